"""The class that diffusers' loaders find in a part's folder; it gives the model that the folder is of."""

import os
from typing import Any

import torch
from diffusers import ModelMixin

from visar.pipelines.components import (
    DRAFTERS,
    GENERATORS,
    TOKENIZERS,
    _place,
    find_folder,
    load_component,
    placement,
    read_json,
)

# Arguments with which the loaders call, and the values of them that change nothing here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, False, True),
    "disable_mmap": (None, False, True),
    "device_map": (None, "cpu"),
    "force_download": (None, False),
}


class VisarModel(ModelMixin):
    """Reads a tokenizer, generator or drafter of visar as `visar.load` does: classes come from its tables, and weights
    that are missing or too many are errors."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **settings: Any) -> Any:
        """The model of a folder, on the CPU and in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, a pipeline's with `subfolder`, or owner/model on the hub.
            settings: of diffusers' loaders: subfolder, torch_dtype or dtype (None is float32), variant, revision,
                cache_dir, token, local_files_only. Others are taken where their value asks for nothing.

        Raises:
            ValueError: no such folder, one that is damaged or of another class, or a setting that is not taken.
        """
        subfolder, variant = settings.pop("subfolder", None), settings.pop("variant", None)
        kind = settings.pop("torch_dtype", None)
        kind = settings.pop("dtype", None) or kind
        options = {name: settings.pop(name, None) for name in ("revision", "cache_dir", "token", "local_files_only")}
        for name, value in settings.items():
            taken = _NEUTRAL.get(name, (None, False))
            if not any(value is each or (isinstance(value, str) and value == each) for each in taken):
                raise ValueError(f"models of visar do not take {name}={value!r:.80}; allowed: {taken}")
        options["local_files_only"] = bool(options["local_files_only"])
        device, dtype = placement("cpu", torch.float32 if kind is None else kind)
        folder = find_folder(os.fspath(pretrained_model_name_or_path), variant, **options) / (subfolder or "")
        found = read_json(folder / "config.json").get("_class_name")
        tables = TOKENIZERS | GENERATORS | DRAFTERS
        return _place(load_component(tables, found, folder, variant=variant), device, dtype)
