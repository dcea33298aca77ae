"""Visar convert: what was read, written as a folder."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import nn

from visar.checkpoints import hub
from visar.checkpoints.convert import read_models
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Models
from visar.io.files import _new_folder
from visar.layers.packable import Storage, save_model
from visar.pipelines.components import DTYPES
from visar.pipelines.image import ImagePipeline
from visar.pipelines.video import VideoPipeline


def _official(options: Convert) -> hub.Official | None:
    """The row that `like` names.

    Raises:
        ValueError: no such row, or one of another source.
    """
    if options.like is None:
        return None
    official = hub.official()
    if options.like not in official:
        raise ValueError(f"--like {options.like}: no such official name; choose one of {', '.join(official)}")
    entry = official[options.like]
    if options.source not in (None, entry.source):
        raise ValueError(f"--like {options.like} is of {entry.source}, not of --source {options.source}")
    return entry


def save(models: Models, folder: Path, defaults: dict[str, Any], storage: Storage = "plain") -> str:
    """Writes models and says what is where: a pipeline's folder, that of one model, or a folder each of a pair.

    Args:
        models: from `read_models`.
        folder: empty.
        defaults: sampling settings of the pipeline.
        storage: see `visar.layers.packable.save_model`.
    """
    tokenizer, generator, second = models.tokenizer, models.generator, models.second
    if tokenizer is not None and generator is not None:
        first_folder, second_folder = models.folders
        kind = VideoPipeline if tokenizer.layout.arrangement == "box" else ImagePipeline
        kind(tokenizer, generator, defaults=defaults).save_pretrained(folder / first_folder, storage)
        if second is None:
            return f"{_named(tokenizer)}, {_named(generator)}"
        save_model(second, folder / second_folder, storage)
        pipeline = f"{first_folder}/ (pipeline: {_named(tokenizer)}, {_named(generator)})"
        return f"{pipeline} and {second_folder}/ ({_named(second)})"
    alone = generator if tokenizer is None else tokenizer
    assert alone is not None
    save_model(alone, folder, storage)
    return f"{_named(alone)} alone"


def _named(model: ModelMixin) -> str:
    return f"{type(model).__name__} of {sum(value.numel() for value in model.parameters()) / 1e6:.1f} M parameters"


def _next(models: Models, out: Path) -> str:
    """What to do with the folder: a command that can be pasted."""
    if models.generator is None:
        return f"Next: visar.load_tokenizer({str(out)!r}), or give it as --tokenizer to visar train generator."
    if models.tokenizer is None:
        return "Next: convert it again with --tokenizer FILE, for a folder that makes images."
    config = models.generator.config
    condition = '--prompt "..."' if config.get("caption_width") else f"--class {min(3, config['num_classes'] - 1)}"
    words = ["visar sample", shlex.quote(str(out / models.folders[0])), condition]
    if models.second is not None:
        words.append(models.options.format(second=shlex.quote(str(out / models.folders[1]))))
    return f"Next: {' '.join(words)}"


def convert(options: Convert) -> str:
    """Runs `visar convert`: reads another project's files, writes a folder, and returns a line about it and a line
    that says what to do next.

    Raises:
        ValueError: see `read_models`; also an `out` that holds something, an unknown dtype or official name.
    """
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: choose one of {', '.join(DTYPES)}")
    entry = _official(options)
    if entry is not None:
        options = dataclasses.replace(options, source=entry.source, grid=options.grid or entry.grid)
    with _new_folder(options.out) as folder:
        models = read_models(options)
        for model in (models.tokenizer, models.generator, models.second):
            if model is not None:
                # ModelMixin.to logs a warning about modules kept in float32, which keep themselves there.
                nn.Module.to(model, DTYPES[options.dtype])
        written = save(models, folder, models.defaults if entry is None else entry.defaults, options.storage)
    origin = f"from {models.source}'s {options.file.name}"
    line = "; ".join([f"{options.out}: {written}, {options.dtype}, {origin}", *models.notes])
    return f"{line}\n{_next(models, options.out)}"
