"""Visar convert: what was read, written as a folder."""

import dataclasses
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import nn

from visar.checkpoints import hub
from visar.checkpoints.code import takes_over_of
from visar.checkpoints.convert import Models, read_models
from visar.checkpoints.options import Convert
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.io.files import _new_folder
from visar.pipelines.components import DTYPES
from visar.pipelines.image import ImagePipeline


def _defaults(models: Models) -> dict[str, Any]:
    """Sampling settings for models of a source, where no official name says more."""
    if models.source == "llamagen":
        return {}
    if isinstance(models.generator, HierarchicalMaskedTransformer):
        depth = models.generator.config["num_layers"]
        return hub.HMAR_DEFAULTS.get(depth, hub.HMAR_DEFAULTS[16])
    return hub.CODE_DEFAULTS if models.source == "code" else hub.VAR_DEFAULTS


def _official(options: Convert) -> hub.Official | None:
    """The row that `like` names.

    Raises:
        ValueError: no such row, or one of another source.
    """
    if options.like is None:
        return None
    if options.like not in hub.OFFICIAL:
        raise ValueError(f"like {options.like!r}; the official names are {', '.join(hub.OFFICIAL)}")
    entry = hub.OFFICIAL[options.like]
    if options.source not in (None, entry.source):
        raise ValueError(f"like {options.like!r} is of {entry.source}, not of source {options.source!r}")
    return entry


def save(models: Models, folder: Path, defaults: dict[str, Any]) -> str:
    """Writes models and says what is where: a pipeline's folder, that of one model, or drafter/ and refiner/ (CoDe).

    Args:
        models: from `read_models`.
        folder: empty.
        defaults: sampling settings of the pipeline.
    """
    tokenizer, generator, refiner = models.tokenizer, models.generator, models.refiner
    if refiner is not None and tokenizer is not None and generator is not None:
        ImagePipeline(tokenizer, generator, defaults=defaults).save_pretrained(folder / "drafter")
        refiner.save_pretrained(folder / "refiner")
        return f"drafter/ (pipeline: {_named(tokenizer)}, {_named(generator)}) and refiner/ ({_named(refiner)})"
    if tokenizer is not None and generator is not None:
        ImagePipeline(tokenizer, generator, defaults=defaults).save_pretrained(folder)
        return f"{_named(tokenizer)}, {_named(generator)}"
    alone = generator if tokenizer is None else tokenizer
    assert alone is not None
    alone.save_pretrained(folder)
    return f"{_named(alone)} alone"


def _named(model: ModelMixin) -> str:
    return f"{type(model).__name__} of {sum(value.numel() for value in model.parameters()) / 1e6:.1f} M parameters"


def convert(options: Convert) -> str:
    """Runs `visar convert`: reads another project's files, writes a folder, and returns one line about it.

    Raises:
        ValueError: see `read_models`; also an `out` that holds something, an unknown dtype or official name.
    """
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype {options.dtype!r}; choose one of {', '.join(DTYPES)}")
    entry = _official(options)
    if entry is not None:
        options = dataclasses.replace(options, source=entry.source, grid=options.grid or entry.grid)
    with _new_folder(options.out) as folder:
        models = read_models(options)
        for model in (models.tokenizer, models.generator, models.refiner):
            if model is not None:
                # ModelMixin.to logs a warning about modules kept in float32, which keep themselves there.
                nn.Module.to(model, DTYPES[options.dtype])
        written = save(models, folder, _defaults(models) if entry is None else entry.defaults)
    return f"{options.out}: {written}, {options.dtype}, from {models.source}'s {options.file.name}{_hint(options)}"


def _hint(options: Convert) -> str:
    named = {takes_over_of(path) for path in (options.file, options.second) if path is not None} - {None}
    return f"; by their names the refiner takes over at scale {named.pop()}" if len(named) == 1 else ""
