"""Checkpoints of a training run: a folder each, whole or absent; and how options given and saved are compared."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from visar.io.files import replaced_folder, restore_folder

_PREFIX = "step-"
_REMOVE = "remove its folder to resume from an older checkpoint, or start anew with resume=restart"


def options_to_json(options: Any) -> dict[str, Any]:
    """The fields of a dataclass of options as plain JSON values (paths as text, tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def check_same_options(saved: dict[str, Any], options: Any, free: Collection[str], folder: Path) -> None:
    """Checks that a run resumes with the options it was started with.

    Args:
        saved: `options_to_json` of the begun run.
        options: those given now.
        free: names that may differ, as they do not change what is computed.
        folder: folder of the run, for the message.

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
            + "\ngive the saved ones to resume, another folder for another run, or resume=restart to start anew here"
        )


class CheckpointStore:
    """The newest checkpoints of a run, in one folder.

    Args:
        folder: where they are.
        keep: how many stay, >= 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        numbers = {path: path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir()}
        return sorted(int(number) for number in numbers.values() if number.isdecimal())

    def save(self, step: int, state: dict[str, Any], config: dict[str, Any]) -> Path:
        """Writes a checkpoint beside the others, then removes those that are too old.

        Args:
            step: finished steps.
            state: nested dicts of tensors and plain data.
            config: options of the run.

        Raises:
            ValueError: no space; the checkpoints that are there stay.
        """
        final = self.folder / f"{_PREFIX}{step:08d}"
        with replaced_folder(final) as temporary:
            torch.save(state, temporary / "state.pt")
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"{_PREFIX}{old:08d}")
        return final

    def config(self, step: int) -> dict[str, Any]:
        """Options saved with a checkpoint.

        Raises:
            ValueError: the file is missing or damaged.
        """
        path = self.folder / f"{_PREFIX}{step:08d}" / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}); {_REMOVE}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds a {type(config).__name__}, not the options of a run; {_REMOVE}")
        return config

    def load(self, step: int) -> dict[str, Any]:
        """State of a checkpoint, on the CPU.

        Raises:
            ValueError: the file is missing, damaged, or not a checkpoint.
        """
        path = self.folder / f"{_PREFIX}{step:08d}" / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path} is damaged ({reason}); {_REMOVE}") from error
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError(f"{path} is not a checkpoint of this program; {_REMOVE}")
        return state

    def misfit(self, step: int, error: Exception) -> ValueError:
        """What to raise where the state of a checkpoint does not fit the run."""
        path = self.folder / f"{_PREFIX}{step:08d}" / "state.pt"
        return ValueError(f"{path} does not fit this run ({type(error).__name__}: {error}); {_REMOVE}")

    def remove_parts(self) -> None:
        """Removes what a killed run left half written."""
        for path in self.folder.glob(f".{_PREFIX}*.old"):
            restore_folder(path.with_name(path.stem.removeprefix(".")))
        for path in self.folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)
