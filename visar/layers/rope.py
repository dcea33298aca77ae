"""Rotary position embedding as a table per sequence position: 1D, and 2D over (row, column) of a grid.

Source: Su et al., arXiv 2104.09864. The 2D form and the treatment of the prefix are LlamaGen's (arXiv 2406.06525,
FoundationVision/LlamaGen@ce98ec4): pairs (2i, 2i+1) are rotated, the first half of the pairs by the row, the second
by the column. E is the head width.
"""

from typing import Literal

import torch
from torch import Tensor

RopeKind = Literal["1d", "2d"]
PrefixRotation = Literal["zero", "identity"]


def rope_table(
    kind: RopeKind,
    *,
    prefix_length: int,
    grid: tuple[int, int],
    head_width: int,
    prefix_rotation: PrefixRotation = "zero",
    base: float = 10000.0,
) -> Tensor:
    """Cosines and sines of every position of [prefix, image tokens in raster order].

    Args:
        kind: "2d" rotates image tokens by their grid row and column; "1d" by their place in the sequence, prefix
            included.
        prefix_length: number of positions before the first image token.
        grid: (rows, columns) of image tokens.
        head_width: E; a multiple of 4 for "2d", even for "1d".
        prefix_rotation: for "2d": "zero" makes queries and keys of the prefix vanish (cos = sin = 0, as LlamaGen was
            trained: the prefix is read through its values alone); "identity" leaves them as they are.
        base: 10000.

    Returns: float32 [prefix_length + rows * columns, E / 2, 2] on the CPU, last axis (cos, sin).
    """
    with torch.device("cpu"):
        return _table(kind, prefix_length, grid, head_width, prefix_rotation, base)


def _table(
    kind: str, prefix_length: int, grid: tuple[int, int], head_width: int, prefix_rotation: str, base: float
) -> Tensor:
    rows, columns = grid
    if kind == "1d":
        frequency = base ** (-torch.arange(0, head_width, 2).float() / head_width)
        angle = torch.arange(prefix_length + rows * columns).float()[:, None] * frequency
        return torch.stack([angle.cos(), angle.sin()], dim=-1)
    if kind != "2d":
        raise ValueError(f"rope {kind!r}; choose 1d or 2d")
    if prefix_rotation not in ("zero", "identity"):
        raise ValueError(f"prefix_rotation {prefix_rotation!r}; choose zero or identity")
    half = head_width // 2
    frequency = base ** (-torch.arange(0, half, 2).float() / half)
    by_row = (torch.arange(rows).float()[:, None] * frequency)[:, None].expand(rows, columns, -1)
    by_column = (torch.arange(columns).float()[:, None] * frequency)[None].expand(rows, columns, -1)
    angle = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    image = torch.stack([angle.cos(), angle.sin()], dim=-1)
    prefix = torch.zeros(prefix_length, head_width // 2, 2)
    if prefix_rotation == "identity":
        prefix[..., 0] = 1.0
    return torch.cat([prefix, image])


def rotate(x_BLNE: Tensor, table_BLE2: Tensor) -> Tensor:
    """Rotates pairs (2i, 2i+1) of every head in float32; the result has x's dtype.

    table_BLE2: [1 or B, L, E / 2, 2] rows of `rope_table` for the tokens' positions.
    """
    pair = x_BLNE.float().unflatten(-1, (-1, 2))
    cos, sin = table_BLE2[:, :, None].unbind(-1)
    first, second = pair.unbind(-1)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.flatten(-2).to(x_BLNE.dtype)
