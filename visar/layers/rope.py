"""Rotary position embedding as a table per sequence position: 1D, 2D over (row, column) of a grid, and 3D of a box.

Source: Su et al., arXiv 2104.09864. The 2D form and the treatment of the prefix are LlamaGen's (arXiv 2406.06525,
FoundationVision/LlamaGen@ce98ec4): pairs (2i, 2i+1) are rotated, the first half of the pairs by the row, the second
by the column. The 3D form is this project's: a third of the pairs, rounded down, by the row and by the column each,
the others by the frame. E is the head width.
"""

import math
from typing import Literal

import torch
from torch import Tensor

RopeKind = Literal["1d", "2d", "3d"]
PrefixRotation = Literal["zero", "identity"]


def rope_table(
    kind: RopeKind,
    *,
    prefix_length: int,
    grid: tuple[int, ...],
    head_width: int,
    prefix_rotation: PrefixRotation = "zero",
    base: float = 10000.0,
) -> Tensor:
    """Cosines and sines of every position of [prefix, image tokens in raster order].

    Args:
        kind: "2d" rotates image tokens by their grid row and column; "3d" those of a clip by their frame too; "1d"
            by their place in the sequence, prefix included.
        prefix_length: number of positions before the first image token.
        grid: (rows, columns) of image tokens, or (frames, rows, columns) for "3d" and "1d".
        head_width: E; a multiple of 4 for "2d", even for the others.
        prefix_rotation: for "2d" and "3d": "zero" makes queries and keys of the prefix vanish (cos = sin = 0, as
            LlamaGen was trained: the prefix is read through its values alone); "identity" leaves them as they are.
        base: 10000.

    Returns: float32 [prefix_length + number of tokens, E / 2, 2] on the CPU, last axis (cos, sin).
    """
    with torch.device("cpu"):
        return _table(kind, prefix_length, grid, head_width, prefix_rotation, base)


def _table(
    kind: str, prefix_length: int, grid: tuple[int, ...], head_width: int, prefix_rotation: str, base: float
) -> Tensor:
    if kind == "1d":
        frequency = base ** (-torch.arange(0, head_width, 2).float() / head_width)
        angle = torch.arange(prefix_length + math.prod(grid)).float()[:, None] * frequency
        return torch.stack([angle.cos(), angle.sin()], dim=-1)
    if kind not in ("2d", "3d"):
        raise ValueError(f"rope {kind!r}; choose 1d, 2d or 3d")
    if len(grid) != int(kind[0]):
        raise ValueError(f"rope {kind!r} on a grid of {len(grid)} axes; choose 2d for two, 3d for three, or 1d")
    if prefix_rotation not in ("zero", "identity"):
        raise ValueError(f"prefix_rotation {prefix_rotation!r}; choose zero or identity")
    pairs = head_width // 2
    counts = [pairs - (len(grid) - 1) * (pairs // len(grid)), *[pairs // len(grid)] * (len(grid) - 1)]
    by_axis = []
    for axis, (length, count) in enumerate(zip(grid, counts, strict=True)):
        frequency = base ** (-torch.arange(0, 2 * count, 2).float() / (2 * count))
        angle = torch.arange(length).float()[:, None] * frequency
        shape = [length if other == axis else 1 for other in range(len(grid))]
        by_axis.append(angle.reshape(*shape, count).expand(*grid, count))
    angle = torch.cat(by_axis, dim=-1).flatten(0, -2)
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
