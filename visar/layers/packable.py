"""Models that are saved with 8-bit weights, and read such folders; see visar/io/packed.py for the format.

What is packed are the matrices of linear, embedding and convolution layers. Norms, biases, learned vectors, buffers
and modules that stay float32 (a tokenizer's codes among them) are stored as they are.
"""

import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from diffusers import ConfigMixin, ModelMixin
from safetensors.torch import load_file, save_file
from torch import nn

from visar.io.files import atomic_write
from visar.io.formats import mark_model, settings_of
from visar.io.packed import MARK, is_packed, pack, unpack

Storage = Literal["plain", "int8"]


def packed_names(model: nn.Module) -> list[str]:
    """Keys of the matrices that are packed."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and kept.isdisjoint(name.split("."))
    ]


def pack_folder(model: nn.Module, folder: Path) -> None:
    """Packs the weights that the model's `save_pretrained` wrote into a folder."""
    names = set(packed_names(model))
    for path in sorted(folder.glob("*.safetensors")):
        state = load_file(path)
        with atomic_write(path) as temporary:
            save_file(pack(state, names & state.keys()), temporary, metadata={"format": "pt", **MARK})


def save_model(model: Any, folder: Path, storage: Storage = "plain") -> None:
    """Writes a model as diffusers does, with its weights in 8 bits if asked for.

    Raises:
        ValueError: another storage.
    """
    check_storage(storage)
    model.save_pretrained(folder)
    if storage == "int8":
        pack_folder(model, folder)


class Packable(ModelMixin, ConfigMixin):
    """A model whose folder may hold 8-bit weights, and that other loaders read; see visar/io/formats.py."""

    def save_config(self, save_directory: str | PathLike, push_to_hub: bool = False, **settings: Any) -> None:
        """Writes config.json and what other loaders need, as a part of `save_pretrained`."""
        super().save_config(save_directory, push_to_hub, **settings)
        mark_model(Path(save_directory))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **settings: Any) -> Any:
        """Constructor arguments among what config.json says; see diffusers."""
        return super().extract_init_dict(settings_of(config_dict), **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **settings: Any) -> Self:
        """A model from a folder, as diffusers reads it; 8-bit weights become floats first."""
        folder = Path(pretrained_model_name_or_path) / (settings.get("subfolder") or "")
        weights = sorted(folder.glob("*.safetensors"))
        if not any(map(is_packed, weights)):
            return super().from_pretrained(pretrained_model_name_or_path, **settings)
        with tempfile.TemporaryDirectory() as plain:
            for path in folder.glob("*.json"):
                shutil.copy(path, plain)
            for path in weights:
                save_file(unpack(load_file(path), path), Path(plain) / path.name, metadata={"format": "pt"})
            model = super().from_pretrained(plain, **{**settings, "subfolder": None})
        model.register_to_config(_name_or_path=str(folder))
        return model


def check_storage(storage: str) -> None:
    """Checks the name of a storage.

    Raises:
        ValueError: another one.
    """
    if storage not in ("plain", "int8"):
        raise ValueError(f"storage {storage!r}; choose plain or int8")
