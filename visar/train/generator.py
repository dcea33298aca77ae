"""Training of generators on a tokenizer's ids: cross-entropy of every token given those before it and the condition.

Source: LlamaGen's recipe, arXiv 2406.06525 section 3.2 (AdamW 0.9 / 0.95, weight decay 0.05, clipping at 1, dropout 0.1,
conditions dropped with 0.1). Differs from it: a learning rate that falls, averaged weights, the model of the best
validation is kept, and classes are drawn with weight n^-power.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from visar.condition import Condition
from visar.generators.raster import RasterGPT
from visar.guidance import Guidance
from visar.noise import Noise, image_seeds
from visar.output import to_uint8
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load_tokenizer
from visar.samplers.ancestral import sample_ancestral
from visar.train.conditions import drop_condition
from visar.train.log import Sheet
from visar.train.loop import Run, Task, TrainResult, run_task
from visar.train.options import RunOptions
from visar.train.randomness import Draw, IndexDraws, balanced_weights, step_seed
from visar.train.tokenizer import json_options


@dataclass(frozen=True, kw_only=True)
class TrainGenerator(RunOptions):
    """Trains a generator on a tokenizer's ids, and writes both as a pipeline that `visar.load` reads."""

    data: Path
    """Images: emoji64.zip, a folder with a subfolder a class, or a parquet file."""
    tokenizer: str
    """A folder that `visar train tokenizer` wrote (its model/), or the name of an embedded tokenizer."""
    tokens: Path | None = None
    """File of ids to read, or to write if it does not exist; without it ids are made anew."""
    variants: int = 32
    """Augmented variants of every training image, made once; 1 = the images as they are."""
    width: int = 256
    """Of the transformer."""
    num_layers: int = 9
    """Of the transformer."""
    num_heads: int = 4
    """Of the transformer."""
    hidden_width: int = 704
    """Of its feed-forward parts."""
    model_options: str = "{}"
    """Further constructor arguments as JSON."""
    class_condition: bool = True
    """Condition on the class."""
    attributes: tuple[str, ...] | None = None
    """Label columns to condition on besides; all that the data has when not given."""
    words: Literal["none", "sum", "prefix"] = "none"
    """Condition on words too: by the mean of their vectors, or one by one before the image."""
    dropout: float = 0.1
    """On the input, and after every attention and feed-forward part."""
    label_dropout: float = 0.1
    """Chance that an image loses all its conditions."""
    class_dropout: float = 0.0
    """Chance that it loses the class, besides."""
    attribute_dropout: float = 0.1
    """The same for every attribute."""
    word_dropout: float = 0.1
    """The same for the words."""
    class_balance: float = 0.5
    """Images are drawn with weight n^-power, n the size of their class: 0 = as they are, 1 = all classes alike."""
    weight_decay: float = 0.05
    """Of matrices."""
    sample_images: int = 48
    """Pictures of a sheet."""
    sample_guidance: float = 2.0
    """Guidance of its pictures; 1.0 = off."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights in model/."""


def build_generator(options: TrainGenerator, tokenizer: ModelMixin, pictures: PictureSet) -> nn.Module:
    """A raster generator for the tokenizer's grid and the data's conditions, with fresh weights from the run's seed.

    Raises:
        ValueError: a tokenizer without a grid of ids, words that the data does not have, or arguments that the
            architecture refuses.
    """
    layout = tokenizer.layout
    if layout.kind != "grid":
        raise ValueError(f"tokenizer with tokens of kind {layout.kind!r}; a raster generator needs a grid of ids")
    if options.words != "none" and pictures.words_NT is None:
        raise ValueError(f"words {options.words!r}: the images of {options.data} have no words; choose none")
    arguments: dict[str, Any] = dict(
        vocab_size=layout.vocab_size,
        grid=layout.scales[0],
        codebook_width=layout.channels,
        width=options.width,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        hidden_width=options.hidden_width,
        num_classes=pictures.table_sizes[0] if options.class_condition else 0,
        attributes=tuple(pictures.table_sizes[1:]),
        token_dropout=options.dropout,
        residual_dropout=options.dropout,
        ffn_dropout=options.dropout,
    )
    if options.words != "none":
        arguments |= dict(
            words=options.words, word_vocab_size=pictures.num_words, num_words=pictures.words_NT.shape[1]
        )
    try:
        model = RasterGPT(**{**arguments, **json_options(options.model_options)})
    except TypeError as error:
        raise ValueError(f"the raster generator does not take these model_options: {error}") from error
    model.reset_parameters(torch.Generator().manual_seed(step_seed(options.seed, 0, Draw.INITIAL)))
    if model.config["token_input"] == "codebook":
        model.set_codebook(tokenizer.codebook)
    return model


def token_loss(logits_BNV: Tensor, ids_BN: Tensor) -> Tensor:
    """Mean negative log-likelihood of the ids, nats a token, float32."""
    return functional.cross_entropy(logits_BNV.float().flatten(0, 1), ids_BN.flatten())


class GeneratorTask(Task):
    """Steps and measurements of `train_generator`.

    Args:
        run: this process.
        options: of the run.
        tokenizer: whose ids they are.
        ids_NVL: integers [N, variants, L] of the training images on the device.
        pictures: the training images, for their conditions.
        validation_ids_NL: of the validation images as they are.
        validation: the validation images.
    """

    select, higher_is_better = "nll", False
