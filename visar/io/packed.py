"""Weights stored in 8 bits: whole numbers of -127 ... 127 and a float32 scale for every row, in a safetensors file.

A packed matrix KEY is an int8 tensor under its own key and a scale [N] under KEY:scale; a row is what belongs to one
output (one index of the first axis). All other tensors are as they are. The file's metadata says storage = int8.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MARK = {"storage": "int8"}
"""Metadata of a packed file."""
SHORTEST = 32
"""Numbers of a row from which packing pays: the scale takes the room of four."""

_SCALE = ":scale"


def pack(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Packs some matrices of a model; the others, and those of short rows, stay.

    Args:
        state: tensors by key.
        names: keys of the matrices to pack.
    """
    packed = dict(state)
    for name in names:
        rows = state[name].detach().float().flatten(1)
        if rows.shape[1] < SHORTEST:
            continue
        scale_N = rows.abs().amax(1) / 127
        whole = (rows / scale_N.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
        packed[name] = whole.to(torch.int8).view(state[name].shape)
        packed[f"{name}{_SCALE}"] = scale_N
    return packed


def unpack(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """float32 matrices of packed ones; a state without any is returned as it is.

    Raises:
        ValueError: a scale without its int8 matrix, or of another number of rows.
    """
    scales = {name.removesuffix(_SCALE): value for name, value in state.items() if name.endswith(_SCALE)}
    plain = {name: value for name, value in state.items() if not name.endswith(_SCALE)}
    for name, scale_N in scales.items():
        whole = plain.get(name)
        if whole is None or whole.dtype != torch.int8 or whole.ndim < 2 or scale_N.shape != whole.shape[:1]:
            raise ValueError(f"{source} is damaged: the scale of {name} has no int8 matrix of as many rows")
        plain[name] = whole.float() * scale_N.float().view(-1, *[1] * (whole.ndim - 1))
    return plain


def is_packed(path: Path) -> bool:
    """Whether a safetensors file says in its metadata that it is packed."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("storage") == MARK["storage"]
