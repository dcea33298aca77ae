"""Making and copying models from a recipe's options."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visar.checkpoints import hub
from visar.data.vocabulary import Vocabulary
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.io.files import load_weights, tensors_only

# Vectors of a caption: the longest of emoji64 has 19 for minilm.
CAPTION_LENGTH = 20


def json_options(text: str) -> dict[str, Any]:
    """Constructor arguments given as JSON.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"model_options {text!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model_options {text!r}; needed: a JSON object such as '{{\"base_channels\": 48}}'")
    return values


def image_side(tokenizer: Any) -> int:
    """Side in pixels of the images that a tokenizer's grid of ids is for."""
    if tokenizer.layout.kind == "scales":
        return tokenizer.layout.scales[-1][0] * tokenizer.downsampling
    return tokenizer.config["image_size"]


def build_generator(
    tokenizer: Any,
    vocabulary: Vocabulary,
    *,
    width: int,
    num_layers: int,
    num_heads: int,
    hidden_width: int,
    dropout: float,
    class_condition: bool,
    words: str,
    caption_width: int = 0,
    family: str = "auto",
    model_options: dict[str, Any],
    seed: int,
) -> nn.Module:
    """A generator for a tokenizer's ids with fresh weights: raster for one grid, next-scale for several.

    Args:
        tokenizer: whose ids they are.
        vocabulary: of the conditions: label columns and words.
        width, num_layers, num_heads, hidden_width, dropout: of the transformer.
        class_condition: whether the first label column is read.
        words: "none", "sum" or "prefix".
        caption_width: of the text encoder whose features are read instead of all that; 0 = none.
        family: "auto", or "hmar" for a hierarchical masked generator over scales.
        model_options: further constructor arguments.
        seed: of the weights.

    Raises:
        ValueError: tokens that are no ids, words one by one or captions before scales, or arguments that the
            architecture refuses.
    """
    layout, generator = tokenizer.layout, torch.Generator().manual_seed(seed)
    if layout.kind == "continuous":
        raise ValueError(f"tokens of kind {layout.kind!r}; ids are needed (kinds grid and scales)")
    num_classes, *attributes = vocabulary.null_labels
    arguments: dict[str, Any] = dict(
        vocab_size=layout.vocab_size,
        codebook_width=layout.channels,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_classes=num_classes if class_condition else 0,
        attributes=tuple(attributes),
        word_vocab_size=0 if words == "none" else len(vocabulary.words),
    )
    if family not in ("auto", "hmar"):
        raise ValueError(f"family {family!r}; choose auto or hmar")
    if family == "hmar" and layout.kind != "scales":
        raise ValueError(f"family hmar needs a tokenizer over scales; the ids of this one are a {layout.kind}")
    build: type[RasterGPT] | type[NextScaleTransformer] | type[HierarchicalMaskedTransformer]
    if layout.kind == "scales":
        if words == "prefix":
            raise ValueError("words prefix is for raster generators; a next-scale generator takes sum or none")
        if caption_width:
            raise ValueError("text encoders are for raster generators; a next-scale generator takes words sum or none")
        build = HierarchicalMaskedTransformer if family == "hmar" else NextScaleTransformer
        arguments |= dict(scales=layout.scales, mlp_ratio=hidden_width / width, dropout=dropout)
        arguments |= {name: tokenizer.config[name] for name in ("num_phi", "phi_ratio")}
        if family == "hmar":
            arguments["hide_masked"] = True  # released models are not trained so; see docs/results.md
    else:
        build = RasterGPT
        arguments |= dict(grid=layout.scales[0], hidden_width=hidden_width)
        arguments |= dict(token_dropout=dropout, residual_dropout=dropout, ffn_dropout=dropout)
        if words != "none":
            arguments |= dict(words=words, num_words=vocabulary.num_words)
        if caption_width:
            arguments |= dict(caption_width=caption_width, caption_length=CAPTION_LENGTH)
    try:
        model: Any = build(**{**arguments, **model_options})
    except TypeError as error:
        raise ValueError(f"{build.__name__} does not take these model_options: {error}") from error
    model.reset_parameters(generator)
    if layout.kind == "scales":
        model.set_tokenizer(tokenizer.quantizer)
    elif model.config["token_input"] == "codebook":
        model.set_codebook(tokenizer.codebook.detach().cpu())
    return model


def select_layers(content: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """Weights of some of a transformer's layers, renumbered from 0, and all others as they are.

    Source: DistilBERT, arXiv 1910.01108 section 3, starts its student so.

    Args:
        content: weights of a raster or next-scale generator.
        layers: numbers of the layers to keep, rising.

    Raises:
        ValueError: no layers in content, or numbers that are not theirs or do not rise.
    """
    pattern = re.compile(r"(blocks|layers)\.(\d+)\.(.+)")
    found = {key: match for key in content if (match := pattern.fullmatch(key))}
    count = 1 + max((int(match[2]) for match in found.values()), default=-1)
    if not count:
        raise ValueError("initial_layers is for raster and next-scale generators; initial holds neither")
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
        raise ValueError(f"initial_layers {layers}; needed: rising numbers of 0 ... {count - 1}")
    place = {layer: index for index, layer in enumerate(layers)}
    selected = {key: value for key, value in content.items() if key not in found}
    for key, match in found.items():
        if int(match[2]) in place:
            selected[f"{match[1]}.{place[int(match[2])]}.{match[3]}"] = content[key]
    return selected


def load_initial(model: nn.Module, folder: Path, layers: tuple[int, ...] = ()) -> None:
    """Fills a model with the weights of a saved one.

    Args:
        model: of the same architecture.
        folder: as save_pretrained writes it, or a pipeline's, whose generator is taken; or an embedded model's name.
        layers: those of the saved model's layers that the model has, see `select_layers`; empty = all.

    Raises:
        ValueError: no weights there, or of another architecture (keys and shapes are named), or layers that it does
            not have.
    """
    if str(folder) in hub.embedded_names():
        folder = hub.EMBEDDED_FOLDER / folder
    inner = folder / "generator" if (folder / "generator").is_dir() else folder
    content = tensors_only(load_weights(inner / "diffusion_pytorch_model.safetensors"), inner)
    try:
        model.load_state_dict(select_layers(content, layers) if layers else content)
    except RuntimeError as error:
        raise ValueError(f"initial {folder} holds another architecture: {error}") from error


def in_dtype(model: Any, dtype: str) -> Any:
    """A copy with contiguous weights in a dtype; modules that must stay float32 see to that themselves."""
    copy = deepcopy(model)
    nn.Module.to(copy, dtype=getattr(torch, dtype))
    nn.Module.to(copy, memory_format=torch.contiguous_format)
    return copy
