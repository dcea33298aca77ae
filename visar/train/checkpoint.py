"""Checkpoints of a training run: a folder each, whole or absent; and how options given and saved are compared."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from visar.io.files import replace_folder

_PREFIX = "step-"


def options_to_json(options: Any) -> dict[str, Any]:
    """The fields of a dataclass of options as plain JSON values (paths as text, tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def check_same_options(saved: dict[str, Any], options: Any, free: Collection[str], folder: Path) -> None:
    """Checks that a run goes on with the options it was begun with.

    Args:
        saved: `options_to_json` of the begun run.
        options: those given now.
        free: names that may differ, as they do not change what is computed.
        folder: of the run, for the message.

    Raises:
        ValueError: options differ; all of them are named with both values.
    """
    given = options_to_json(options)
    names = [name for name in sorted(saved.keys() | given.keys()) if name not in free]
    lines = [
        f"  {name}: saved {saved.get(name)!r}, given {given.get(name)!r}"
        for name in names
        if saved.get(name) != given.get(name)
    ]
    if lines:
        raise ValueError(
            f"{folder} holds a run with other options:\n"
            + "\n".join(lines)
            + "\ngive the saved ones to go on, another folder for another run, or resume=restart to begin anew here"
        )


class CheckpointStore:
    """The newest checkpoints of a run, in one folder.

    Args:
        folder: where they are.
        keep: how many are kept, >= 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        return sorted(
            int(path.name.removeprefix(_PREFIX)) for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir()
        )

    def save(self, step: int, state: dict[str, Any], config: dict[str, Any]) -> Path:
        """Writes a checkpoint beside the others, then removes those that are too old.

        Args:
            step: finished steps.
            state: nested dicts of tensors and plain data.
            config: options of the run.
        """
        final = self.folder / f"{_PREFIX}{step:08d}"
        temporary = self.folder / f".{final.name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save(state, temporary / "state.pt")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        replace_folder(temporary, final)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"{_PREFIX}{old:08d}")
        return final

    def config(self, step: int) -> dict[str, Any]:
        """Options saved with a checkpoint."""
        return json.loads((self.folder / f"{_PREFIX}{step:08d}" / "config.json").read_text(encoding="utf-8"))

    def load(self, step: int) -> dict[str, Any]:
        """State of a checkpoint, on the CPU.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / f"{_PREFIX}{step:08d}" / "state.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove its folder to go on from an older one") from error

    def remove_parts(self) -> None:
        """Removes what a killed run left half written."""
        for path in self.folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)
