"""What saved folders carry beside weights and settings: the number of their format, and what diffusers' loaders need.

A pipeline's folder has pipeline.py and visar_model.py, each part visar_model.py: a few lines that import this package,
for `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` and `AutoModel.from_pretrained`. visar writes
these files and never reads them.

Formats: 1 is the first that folders state; those without a number are read as 1. A folder is read by every version
that knows its format. A format that is given up is announced by a warning for two minor versions before it is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
"""Format that folders are written in; also the newest that is read."""

FORMAT_KEY = "_visar_format"
MODEL_MODULE, MODEL_CLASS = "visar_model", "VisarModel"
PIPELINE_MODULE = "pipeline"
_AUTO_MAP = {"AutoModel": f"{MODEL_MODULE}.{MODEL_CLASS}"}
_MODEL_CODE = f'''"""Lets AutoModel and pipelines of diffusers read this folder, with the installed package visar."""

from visar.pipelines.parts import {MODEL_CLASS}

__all__ = ["{MODEL_CLASS}"]
'''
_PIPELINE_CODE = '''"""Lets DiffusionPipeline of diffusers read this folder, with the installed package visar."""

from visar.pipelines.{module} import {name}

__all__ = ["{name}"]
'''


def check_format(content: Mapping[str, Any], where: str | Path = "this folder") -> None:
    """Checks that a folder's format is one that this version reads.

    Args:
        content: of its model_index.json or config.json.
        where: for the error message.

    Raises:
        ValueError: a later format, or none at all.
    """
    found = content.get(FORMAT_KEY, 1)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{where} is damaged: {FORMAT_KEY} {found!r:.80}; it must be a whole number >= 1")
    if found > FORMAT:
        raise ValueError(
            f"{where} has format {found}; this version of visar reads formats up to {FORMAT}: install a newer one"
        )


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's JSON says without the entry that is for diffusers' loaders alone."""
    check_format(content)
    return {name: value for name, value in content.items() if name != "auto_map"}


def mark_model(folder: Path) -> None:
    """Completes a model's folder, in which diffusers has written config.json."""
    _update(folder / "config.json", {FORMAT_KEY: FORMAT, "auto_map": _AUTO_MAP})
    (folder / f"{MODEL_MODULE}.py").write_text(_MODEL_CODE, encoding="utf-8")


def mark_pipeline(folder: Path, name: str, parts: tuple[str, ...]) -> None:
    """Completes a pipeline's folder, in which diffusers has written model_index.json.

    Args:
        folder: of the pipeline.
        name: of its class.
        parts: names of its models, which are there; their classes are in their config.json.
    """
    changes: dict[str, Any] = {part: [MODEL_MODULE, MODEL_CLASS] for part in parts}
    changes |= {"_class_name": [PIPELINE_MODULE, name], FORMAT_KEY: FORMAT, "auto_map": _AUTO_MAP}
    _update(folder / "model_index.json", changes)
    module = "video" if name == "VideoPipeline" else "image"
    # Older loaders of parts look for their code here.
    (folder / f"{MODEL_MODULE}.py").write_text(_MODEL_CODE, encoding="utf-8")
    (folder / f"{PIPELINE_MODULE}.py").write_text(_PIPELINE_CODE.format(name=name, module=module), encoding="utf-8")


def _update(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
