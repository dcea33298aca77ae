"""A raster transformer's pass over a drafted tree: guidance of its nodes, and the commit in the cache.

The counterparts for a window are in visar/kernels/elementwise.py and visar/kernels/verify.py; the plain ones in
visar/generators/raster.py and visar/cache.py.

B images, R rows (2B when guided), M nodes, L = M + 1 slots, D depth of a path, V codes.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _guide(
    logits_ptr, scale_ptr, length_ptr, depth_ptr, out_ptr, batch, positions, codes, depth_image,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    code = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = code < codes
    image = row // positions
    length = tl.load(length_ptr + (image if RAGGED else 0))
    depth = tl.load(depth_ptr + image * depth_image + row % positions)
    scale = tl.load(scale_ptr + length + depth)
    conditional = tl.load(logits_ptr + row * codes + code, mask=inside, other=0.0).to(tl.float32)
    null_row = row + batch * positions
    null = tl.load(logits_ptr + null_row * codes + code, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * codes + code, null + (conditional - null) * scale, mask=inside)


def guide_tree(logits_RLV: Tensor, scale_N: Tensor, length: Tensor, depth_BL: Tensor) -> Tensor:
    """Guided float32 logits [B, L, V] of a doubled batch; slot j is depth_BL[b, j] behind the committed tokens."""
    rows, positions, codes = logits_RLV.shape
    out_BLV = logits_RLV.new_empty(rows // 2, positions, codes, dtype=torch.float32)
    block = min(triton.next_power_of_2(codes), 2048)
    _guide[(rows // 2 * positions, triton.cdiv(codes, block))](
        logits_RLV.contiguous(),
        scale_N,
        length,
        depth_BL,
        out_BLV,
        rows // 2,
        positions,
        codes,
        depth_BL.stride(0) if depth_BL.shape[0] > 1 else 0,
        RAGGED=length.shape[0] > 1,
        BLOCK=block,
        num_warps=4,
    )
    return out_BLV


@triton.jit
def _move(
    keys_ptr, values_ptr, length_ptr, path_ptr, ahead, batch, rows, slots, steps, path_image,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    image = (line // HEADS) % rows % batch
    root = tl.load(length_ptr + image) + ahead
    e = tl.arange(0, WIDTH_POW2)
    real = e < WIDTH
    keys = keys_ptr + line * slots * WIDTH + e
    values = values_ptr + line * slots * WIDTH + e
    # A node's slot is never below its depth, and slots rise along the path: no entry is overwritten before it is read.
    for step in range(steps):
        source = (root + tl.load(path_ptr + image * path_image + step)) * WIDTH
        target = (root + 1 + step) * WIDTH
        key = tl.load(keys + source, mask=real)
        value = tl.load(values + source, mask=real)
        tl.store(keys + target, key, mask=real)
        tl.store(values + target, value, mask=real)


def move_path(keys: Tensor, values: Tensor, length_B: Tensor, path_BD: Tensor, *, ahead: int) -> None:
    """Moves the cache entries of a path's nodes behind the root's: node path_BD[b, d] goes to slot root + 1 + d.

    Args:
        keys, values: [layers, R, N, S, E], contiguous.
        length_B: int64 committed tokens; root = length + ahead.
        path_BD: int64 slots of the tree, rising from d + 1 or more on; any slot behind the last node.
    """
    layers, rows, heads, slots, width = keys.shape
    _move[(layers * rows * heads,)](
        keys,
        values,
        length_B,
        path_BD,
        ahead,
        length_B.shape[0],
        rows,
        slots,
        path_BD.shape[1],
        path_BD.stride(0),
        HEADS=heads,
        WIDTH=width,
        WIDTH_POW2=triton.next_power_of_2(width),
        num_warps=1,
    )
