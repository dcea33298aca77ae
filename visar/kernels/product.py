"""Matrix products of a decode step where a library has none that is as fast: few rows, and 8-bit weights.

For a few rows time is the reading of the weights, which starts before the input is there. One program makes a few
outputs of all rows: it reads their weights once, in tiles along the inputs, and keeps sums in registers. The norm
before a product, SwiGLU and the residual behind it are parts of the same launch. From about 8 rows on tensor cores
are faster: a library's product, or for 8-bit weights `scaled_product`. M rows, K inputs, N outputs.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
# mypy: disable-error-code="assignment, var-annotated"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from visar.kernels.overlap import launch

MAX_ROWS = 8
"""Most rows that `product` takes."""
MAX_SCALED_ROWS = 128
"""Most rows that `scaled_product` takes."""


@dataclass(frozen=True)
class Tile:
    """Shape of a program.

    Attributes:
        outputs: outputs of a program, a power of two; hidden units (two weight rows each) when gated. So many at 2
            rows, fewer for more rows, so that the sums keep their room.
        inputs: inputs of a tile, a power of two. Where a tile's row is one 16-byte load of every thread (256 inputs
            of 16 bits a warp) nothing of it passes through shared memory.
        warps: of a program.
        early: tiles that are read before the predecessor has ended; they live in registers.
    """

    outputs: int
    inputs: int
    warps: int
    early: int


# By the matrix's place in a block; found by timing whole captured steps of LlamaGen-XL at 2 rows.
TILES: dict[str, Tile] = {
    "qkv": Tile(8, 1024, 4, 2),
    "wo": Tile(4, 1024, 4, 2),
    "gated": Tile(4, 1024, 4, 2),
    "down": Tile(4, 1024, 4, 4),
    "head": Tile(8, 1024, 4, 2),
}
TILES_8BIT: dict[str, Tile] = {
    "qkv": Tile(8, 1024, 4, 2),
    "wo": Tile(4, 1024, 4, 2),
    "gated": Tile(4, 1024, 4, 2),
    "down": Tile(4, 1024, 4, 4),
    "head": Tile(8, 1024, 4, 2),
}


@triton.jit
def _tile(weight_ptr, n, inside, start, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    return tl.load(
        weight_ptr + n[:, None] * WIDTH + k[None, :], mask=inside[:, None] & (k < WIDTH)[None, :], other=0.0
    )


@triton.jit
def _part(vector_ptr, start, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    return tl.load(vector_ptr + k, mask=k < WIDTH, other=0.0)


@triton.jit
def _product(
    x_ptr, norm_ptr, weight_ptr, up_ptr, scale_ptr, up_scale_ptr, out_ptr, outputs, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs

    # Nothing writes weights while a model decodes: these reads need not wait.
    tiles = ()
    up_tiles = ()
    gains = ()
    for t in tl.static_range(EARLY):
        tiles = tiles + (_tile(weight_ptr, n, inside, t * BLOCK_K, WIDTH, BLOCK_K),)
        if GATED:
            up_tiles = up_tiles + (_tile(up_ptr, n, inside, t * BLOCK_K, WIDTH, BLOCK_K),)
    if NORM:
        for t in tl.static_range(TILES):
            gains = gains + (_part(norm_ptr, t * BLOCK_K, WIDTH, BLOCK_K),)
    if PDL:
        gdc_wait()

    scales = ()
    sums = ()
    up_sums = ()
    for m in tl.static_range(ROWS):
        if NORM:
            squares = tl.zeros([BLOCK_K], tl.float32)
            for t in tl.static_range(TILES):
                x = _part(x_ptr + m * WIDTH, t * BLOCK_K, WIDTH, BLOCK_K).to(tl.float32)
                squares += x * x
            scales = scales + (tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps),)
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        up_sums = up_sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
    for t in tl.static_range(TILES):
        if t < EARLY:
            weight = tiles[t].to(tl.float32)
        else:
            weight = _tile(weight_ptr, n, inside, t * BLOCK_K, WIDTH, BLOCK_K).to(tl.float32)
        if GATED:
            if t < EARLY:
                up_weight = up_tiles[t].to(tl.float32)
            else:
                up_weight = _tile(up_ptr, n, inside, t * BLOCK_K, WIDTH, BLOCK_K).to(tl.float32)
        new_sums = ()
        new_up_sums = ()
        for m in tl.static_range(ROWS):
            x = _part(x_ptr + m * WIDTH, t * BLOCK_K, WIDTH, BLOCK_K)
            wide = x.to(tl.float32)
            if NORM:
                # Rounded where visar.layers.llama.RMSNorm rounds.
                normed = (wide * scales[m]).to(x.dtype).to(tl.float32) * gains[t].to(tl.float32)
                wide = normed.to(x.dtype).to(tl.float32)
            new_sums = new_sums + (sums[m] + weight * wide[None, :],)
            if GATED:
                new_up_sums = new_up_sums + (up_sums[m] + up_weight * wide[None, :],)
        sums = new_sums
        if GATED:
            up_sums = new_up_sums

    for m in tl.static_range(ROWS):
        y = tl.sum(sums[m], axis=1)
        if SCALED:
            y = y * tl.load(scale_ptr + n, mask=inside, other=0.0)
        place = out_ptr + m * outputs + n
        kind = out_ptr.dtype.element_ty
        if GATED:
            up = tl.sum(up_sums[m], axis=1)
            if SCALED:
                up = up * tl.load(up_scale_ptr + n, mask=inside, other=0.0)
            gate = y.to(kind).to(tl.float32)
            y = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
        if ADD:
            y = tl.load(place, mask=inside, other=0.0).to(tl.float32) + y.to(kind).to(tl.float32)
        tl.store(place, y.to(kind), mask=inside)


@dataclass(frozen=True)
class Weight:
    """A matrix [N, K] whose rows are outputs.

    Attributes:
        values: float32, bfloat16 or float16; int8 or float8_e4m3fn with a scale. Contiguous.
        scale_N: float32, multiplies every row; None = 1.
    """

    values: Tensor
    scale_N: Tensor | None = None


def product(
    x_MK: Tensor,
    weight: Weight,
    *,
    norm: Any = None,
    up: Weight | None = None,
    residual_MN: Tensor | None = None,
    overlap: bool = False,
    tile: str | Tile,
) -> Tensor:
    """x W^T with float32 sums, rounded to x's dtype; at most MAX_ROWS rows.

    Args:
        x_MK: float32, bfloat16 or float16, contiguous.
        weight: of N outputs.
        norm: applied to x first.
        up: a second matrix of the same shape and kind: the result is silu(x W^T) * (x up^T).
        residual_MN: the result is added to it in place; contiguous, not x.
        overlap: see visar/kernels/overlap.py.
        tile: shape of a program, or its name in the tables.

    Returns: [M, N] (the residual, if there is one).

    Raises:
        ValueError: more rows than MAX_ROWS, or shapes that do not fit.
    """
    (rows, width), outputs = x_MK.shape, weight.values.shape[0]
    if rows > MAX_ROWS or weight.values.shape[1] != width or (up and up.values.shape != weight.values.shape):
        raise ValueError(
            f"x {tuple(x_MK.shape)}, weight {tuple(weight.values.shape)}; at most {MAX_ROWS} rows, as many inputs"
        )
    if isinstance(tile, str):
        tile = (TILES_8BIT if weight.values.itemsize == 1 else TILES)[tile]
    out_MN = x_MK.new_empty(rows, outputs) if residual_MN is None else residual_MN
    second = up or weight
    block_n = max(2 * tile.outputs // max(triton.next_power_of_2(rows), 2), 1)
    block_k = min(tile.inputs, triton.next_power_of_2(width))
    tiles = triton.cdiv(width, block_k)
    # Pointers of parts that are left out are never followed.
    _product[(triton.cdiv(outputs, block_n),)](
        x_MK,
        x_MK if norm is None else norm.weight,
        weight.values,
        second.values,
        x_MK if weight.scale_N is None else weight.scale_N,
        x_MK if second.scale_N is None else second.scale_N,
        out_MN,
        outputs,
        0.0 if norm is None else norm.eps,
        ROWS=rows,
        WIDTH=width,
        NORM=norm is not None,
        GATED=up is not None,
        ADD=residual_MN is not None,
        SCALED=weight.scale_N is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        TILES=tiles,
        EARLY=min(tile.early, tiles),
        num_warps=tile.warps,
        **launch(overlap),
    )
    return out_MN


@triton.jit
def _scaled_product(
    x_ptr, weight_ptr, scale_ptr, out_ptr, rows, outputs, width, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m[:, None] * width + k[None, :], mask=(m < rows)[:, None] & (k < width)[None, :], other=0.0
        )
        inside = (n < outputs)[:, None] & (k < width)[None, :]
        weight = tl.load(weight_ptr + n[:, None] * width + k[None, :], mask=inside, other=0.0)
        total += tl.dot(x, tl.trans(weight.to(x.dtype)), input_precision="ieee")
    total = total * tl.load(scale_ptr + n, mask=n < outputs, other=0.0)[None, :]
    place = out_ptr + m[:, None] * out_stride + n[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


def scaled_product(x_MK: Tensor, weight: Weight, out_MN: Tensor | None = None) -> Tensor:
    """x W^T of 8-bit weights by tensor cores, rounded to x's dtype; at most MAX_SCALED_ROWS rows.

    Weights become x's dtype on the way, which all 8-bit values fit into.

    Args:
        x_MK: float32, bfloat16 or float16, contiguous.
        weight: with a scale.
        out_MN: where the result goes, if it is there already; outputs contiguous.

    Raises:
        ValueError: more rows than MAX_SCALED_ROWS, shapes that do not fit, or a weight without a scale.
    """
    (rows, width), outputs = x_MK.shape, weight.values.shape[0]
    if rows > MAX_SCALED_ROWS or weight.values.shape[1] != width or weight.scale_N is None:
        raise ValueError(
            f"x {tuple(x_MK.shape)}, weight {tuple(weight.values.shape)}, scale {weight.scale_N is not None}; at most "
            f"{MAX_SCALED_ROWS} rows, as many inputs, and a scale"
        )
    if out_MN is None:
        out_MN = x_MK.new_empty(rows, outputs)
    # Small matrices: more programs, each with fewer outputs.
    block_n = 16 if outputs <= 2048 else 32
    _scaled_product[(triton.cdiv(outputs, block_n),)](
        x_MK,
        weight.values,
        weight.scale_N,
        out_MN,
        rows,
        outputs,
        width,
        out_MN.stride(0),
        BLOCK_M=max(triton.next_power_of_2(rows), 16),
        BLOCK_N=block_n,
        BLOCK_K=128 if x_MK.dtype != torch.float32 else 32,
        num_warps=4,
        num_stages=4 if x_MK.dtype != torch.float32 else 1,
    )
    return out_MN
