"""Triton kernels between the convolutions of a decoder that runs channels-last: group norm, residuals, upsampling.

A group norm takes three launches: moments of every channel over chunks of positions, their reduction to a center and
a scale per channel, and the elementwise pass with its activation. The first also does what comes before a norm (a
convolution's bias, the residual addition), so that no tensor is read twice for it; a bias alone costs nothing, because
it only moves a channel's mean. Chunks depend on the image's size only: an image's result does not depend on its batch.

All tensors [B, C, H, W] here lie in memory as [B, H, W, C] (torch.channels_last); C is a multiple of 32. P = H * W
positions, K chunks, G groups.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_TILE = 4096
_MAX_CHUNKS = 256
_MAX_CHANNELS = 256


@dataclass(frozen=True)
class Moments:
    """Moments of every channel over chunks of positions.

    Attributes:
        partial_BK2C: float32 mean, and sum of squared distances from it.
        rows: positions of a chunk; the last may have fewer.
    """

    partial_BK2C: Tensor
    rows: int


@triton.jit
def _values(x_ptr, add_ptr, bias_C, offset, inside, ADD: tl.constexpr):
    """x (+ add) + bias, rounded to the tensors' dtype."""
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    wide = x.to(tl.float32) + bias_C[None, :]
    if ADD:
        wide += tl.load(add_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return wide.to(x.dtype)


@triton.jit
def _moments(
    x_ptr, add_ptr, bias_ptr, other_bias_ptr, out_ptr, partial_ptr, positions, channels, chunks,
    ADD: tl.constexpr, BIASES: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    first = chunk * ROWS
    base = image * positions * channels
    bias = tl.zeros([BLOCK_C], tl.float32)
    if BIASES > 0:
        bias += tl.load(bias_ptr + channel).to(tl.float32)
    if BIASES > 1:
        bias += tl.load(other_bias_ptr + channel).to(tl.float32)
    # Distances are taken from the chunk's first position: sums of squares then lose no digits to a large mean.
    start = base + first * channels + channel[None, :]
    pivot = _values(x_ptr, add_ptr, bias, start, channel[None, :] < channels, ADD).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for done in range(0, ROWS, BLOCK_P):
        row = first + done + tl.arange(0, BLOCK_P)
        inside = (row < positions)[:, None] & (channel < channels)[None, :]
        offset = base + row[:, None] * channels + channel[None, :]
        value = _values(x_ptr, add_ptr, bias, offset, inside, ADD)
        if ADD or BIASES > 0:
            tl.store(out_ptr + offset, value, mask=inside)
        distance = tl.where(inside, value.to(tl.float32) - pivot, 0.0)
        total += distance
        squares += distance * distance
    count = tl.minimum(ROWS, positions - first).to(tl.float32)
    sum_C = tl.sum(total, axis=0)
    square_C = tl.sum(squares, axis=0)
    partial = partial_ptr + (image * chunks + chunk) * 2 * channels + channel
    tl.store(partial, tl.sum(pivot, axis=0) + sum_C / count)
    tl.store(partial + channels, tl.maximum(square_C - sum_C * sum_C / count, 0.0))


@triton.jit
def _reduce(
    partial_ptr, bias_ptr, weight_ptr, affine_ptr, positions, channels, chunks, eps,
    BIAS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    in_group = tl.arange(0, BLOCK_G)
    channel = tl.program_id(0) * GROUP + in_group
    real = in_group < GROUP
    chunk = tl.arange(0, BLOCK_K)
    inside = (chunk < chunks)[:, None] & real[None, :]
    partial = partial_ptr + ((image * chunks + chunk) * 2 * channels)[:, None] + channel[None, :]
    mean = tl.load(partial, mask=inside, other=0.0)
    squares = tl.load(partial + channels, mask=inside, other=0.0)
    bias = tl.zeros([BLOCK_G], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    mean += bias[None, :]
    count = tl.where(inside, tl.minimum(ROWS, positions - chunk * ROWS).to(tl.float32)[:, None], 0.0)
    size = tl.sum(tl.sum(count, axis=1), axis=0)
    center = tl.sum(tl.sum(mean * count, axis=1), axis=0) / size
    distance = mean - center
    variance = tl.sum(tl.sum(squares + count * distance * distance, axis=1), axis=0) / size
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    affine = affine_ptr + image * 2 * channels + channel
    tl.store(affine, center - bias, mask=real)
    tl.store(affine + channels, weight * tl.rsqrt(variance + eps), mask=real)


@triton.jit
def _normalize(
    x_ptr, affine_ptr, shift_ptr, out_ptr, positions, channels,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    affine = affine_ptr + image * 2 * channels + channel
    center = tl.load(affine)
    scale = tl.load(affine + channels)
    shift = tl.load(shift_ptr + channel).to(tl.float32)
    inside = (row < positions)[:, None] & (channel < channels)[None, :]
    offset = image * positions * channels + row[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    normed = (x.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        normed = normed * tl.sigmoid(normed)
    tl.store(out_ptr + offset, normed.to(x.dtype), mask=inside)


@triton.jit
def _upsample(x_ptr, out_ptr, width, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (column < width)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + line * width * channels + column[:, None] * channels + channel[None, :], mask=inside)
    out = out_ptr + line * 4 * width * channels + 2 * column[:, None] * channels + channel[None, :]
    tl.store(out, x, mask=inside)
    tl.store(out + channels, x, mask=inside)
    tl.store(out + 2 * width * channels, x, mask=inside)
    tl.store(out + 2 * width * channels + channels, x, mask=inside)


def _tile(channels: int) -> tuple[int, int]:
    """Positions and channels of a tile; the channels of a tile divide C."""
    block_c = min(channels & -channels, _MAX_CHANNELS)
    return _TILE // block_c, block_c


def channels_last(x_BCHW: Tensor) -> Tensor:
    """The tensor in the layout of these kernels; itself if it is."""
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def _empty(like_BCHW: Tensor, height: int, width: int) -> Tensor:
    batch, channels = like_BCHW.shape[:2]
    return torch.empty(
        (batch, channels, height, width),
        dtype=like_BCHW.dtype,
        device=like_BCHW.device,
        memory_format=torch.channels_last,
    )


def moments(
    x_BCHW: Tensor, *, add_BCHW: Tensor | None = None, biases: Sequence[Tensor] = ()
) -> tuple[Tensor, Moments]:
    """x + add + biases (x itself if neither is given), and its moments for `group_norm`.

    Args:
        x_BCHW: a convolution's output.
        add_BCHW: residual to add; None = nothing.
        biases: at most two, [C] each.
    """
    x_BCHW = channels_last(x_BCHW)
    batch, channels, height, width = x_BCHW.shape
    positions = height * width
    block_p, block_c = _tile(channels)
    rows = max(block_p, triton.next_power_of_2(triton.cdiv(positions, _MAX_CHUNKS)))
    chunks = triton.cdiv(positions, rows)
    partial_BK2C = torch.empty(batch, chunks, 2, channels, device=x_BCHW.device)
    changed = add_BCHW is not None or len(biases) > 0
    out_BCHW = _empty(x_BCHW, height, width) if changed else x_BCHW
    _moments[(chunks, channels // block_c, batch)](
        x_BCHW,
        x_BCHW if add_BCHW is None else channels_last(add_BCHW),
        biases[0] if biases else x_BCHW,
        biases[-1] if biases else x_BCHW,
        out_BCHW,
        partial_BK2C,
        positions,
        channels,
        chunks,
        ADD=add_BCHW is not None,
        BIASES=len(biases),
        ROWS=rows,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out_BCHW, Moments(partial_BK2C, rows)


def group_norm(
    x_BCHW: Tensor, stats: Moments, norm: nn.GroupNorm, *, silu: bool, bias_C: Tensor | None = None
) -> Tensor:
    """norm(x + bias), then silu if asked for; statistics and arithmetic in float32.

    Args:
        x_BCHW: the tensor that `stats` describes (without the bias).
        stats: the result of `moments` for it.
        norm: groups, weight, bias and eps.
        silu: activate.
        bias_C: bias of the convolution that made x, where it was not added; None = nothing.
    """
    batch, channels, height, width = x_BCHW.shape
    positions, group = height * width, channels // norm.num_groups
    chunks = stats.partial_BK2C.shape[1]
    affine_B2C = torch.empty(batch, 2, channels, device=x_BCHW.device)
    _reduce[(norm.num_groups, batch)](
        stats.partial_BK2C,
        stats.partial_BK2C if bias_C is None else bias_C,
        norm.weight,
        affine_B2C,
        positions,
        channels,
        chunks,
        norm.eps,
        BIAS=bias_C is not None,
        ROWS=stats.rows,
        GROUP=group,
        BLOCK_K=triton.next_power_of_2(chunks),
        BLOCK_G=triton.next_power_of_2(group),
        num_warps=4,
    )
    block_p, block_c = _tile(channels)
    out_BCHW = _empty(x_BCHW, height, width)
    _normalize[(triton.cdiv(positions, block_p), channels // block_c, batch)](
        x_BCHW,
        affine_B2C,
        norm.bias,
        out_BCHW,
        positions,
        channels,
        SILU=silu,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out_BCHW


def upsample(x_BCHW: Tensor) -> Tensor:
    """Twice the height and width, nearest neighbour."""
    x_BCHW = channels_last(x_BCHW)
    batch, channels, height, width = x_BCHW.shape
    block_p, block_c = _tile(channels)
    block_p = min(block_p, triton.next_power_of_2(width))
    out_BCHW = _empty(x_BCHW, 2 * height, 2 * width)
    _upsample[(batch * height, triton.cdiv(width, block_p), channels // block_c)](
        x_BCHW, out_BCHW, width, channels, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4
    )
    return out_BCHW
