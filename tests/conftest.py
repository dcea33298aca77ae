"""What tests share: where parity fixtures are, and which tests need a GPU."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

torch.set_num_threads(2)


@dataclass(frozen=True)
class Parity:
    """One system's parity folder: config.json, checkpoint and expected values."""

    folder: Path

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    def checkpoint(self, name: str = "checkpoint.safetensors") -> dict[str, Tensor]:
        return {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_file(self.folder / name).items()
        }

    def manifests(self) -> list[Path]:
        return sorted(self.folder.glob("manifest-*.json"))


@pytest.fixture
def parity() -> Callable[[str], Parity]:
    """Parity folder of a system: in VISAR_PARITY_DIR, by default tests/fixtures/parity."""
    shipped = Path(__file__).parent / "fixtures" / "parity"
    root = Path(os.environ.get("VISAR_PARITY_DIR", shipped))

    def find(system: str) -> Parity:
        if root != shipped and not (root / system).is_dir():
            pytest.skip(f"{root} has no folder {system}")
        return Parity(root / system)

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; the last GPU result is in docs/results.md")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
