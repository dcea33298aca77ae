"""Making and copying models from a recipe's options."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visar.checkpoints import hub
from visar.data.vocabulary import Vocabulary
from visar.generators.training import GeneratorFamily
from visar.io.files import json_object, load_weights, tensors_only
from visar.tokenizers.decoding import image_sides
from visar.train.options import TrainGenerator
from visar.train.randomness import Draw, step_seed


def json_options(text: str) -> dict[str, Any]:
    """Constructor arguments given as JSON.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        return json_object(text)
    except ValueError as error:
        needed = "a JSON object such as '{\"base_channels\": 48}'"
        raise ValueError(f"model_options {text!r:.200} is {error}; needed: {needed}") from error


def image_side(tokenizer: Any) -> int:
    """Side in pixels of the images that a tokenizer's layout is for.

    Raises:
        ValueError: they are not square.
    """
    height, width = image_sides(tokenizer)
    if height != width:
        of_tokens = ""
        if tokenizer.layout.arrangement != "sequence":
            rows, columns = tokenizer.layout.shapes[-1][-2:]
            of_tokens = f" of {rows} x {columns} tokens"
        raise ValueError(
            f"a tokenizer{of_tokens}; training needs square images, and it is for {height} x {width} pixels"
        )
    return height


def build_generator(
    family: GeneratorFamily, tokenizer: Any, vocabulary: Vocabulary, options: TrainGenerator, caption_width: int = 0
) -> nn.Module:
    """A generator for a tokenizer's tokens, with fresh weights from the run's seed.

    Args:
        family: that fits the tokenizer's layout.
        tokenizer: whose tokens they are.
        vocabulary: vocabulary of the conditions: label columns and words.
        options: options of the run; its sizes and conditions are read.
        caption_width: hidden size of the text encoder whose features are read instead of labels and words; 0 = none.

    Raises:
        ValueError: conditions that the family cannot read, or arguments that the architecture refuses.
    """
    arguments = family.arguments(tokenizer, vocabulary, options, caption_width)
    try:
        model: Any = family.model(**{**arguments, **json_options(options.model_options)})
    except (TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{family.model.__name__} does not take these model_options: {error}") from error
    model.reset_parameters(torch.Generator().manual_seed(step_seed(options.seed, 0, Draw.INITIAL)))
    family.connect(model, tokenizer)
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


def initial_folder(folder: Path) -> Path:
    """Where the model lies that training starts from: itself, an embedded model of that name, or a pipeline's
    generator."""
    if str(folder) in hub.embedded_names():
        folder = hub.EMBEDDED_FOLDER / folder
    return folder / "generator" if (folder / "generator").is_dir() else folder


def load_initial(model: nn.Module, folder: Path, layers: tuple[int, ...] = ()) -> None:
    """Fills a model with the weights of a saved one.

    Args:
        model: a model of the same architecture.
        folder: as save_pretrained writes it, or a pipeline's, whose generator is taken; or an embedded model's name.
        layers: those of the saved model's layers that the model has, see `select_layers`; empty = all.

    Raises:
        ValueError: no weights there, or of another architecture (keys and shapes are named), or layers that it does
            not have.
    """
    inner = initial_folder(folder)
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
