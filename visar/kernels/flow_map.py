"""The flow map in one launch: every program carries a few points from noise to their codes, all steps inside.

The plain counterpart is `flow_map` of visar/samplers/flow.py. A thread holds all channels of its points and goes over
every 128th code with its own running softmax, so that a code is read once an evaluation, products need no exchange
between threads, and the threads meet once, at the end of an evaluation. Float32 throughout, without tensor cores. What
a row gives does not depend on the other rows: their number in a program is a function of the code width alone.

M rows, V codes, C code width.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128
"""Codes that a program reads at a time, one a thread."""

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _tile_of(
    first, logits_ptr, codes_ptr, half_ptr, line, codes, channels, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some codes: their numbers, logits [rows, TILE] (-inf beyond the last), vectors [CHANNELS, TILE], |c|^2 / 2."""
    code = first + tl.arange(0, TILE)
    channel = tl.arange(0, CHANNELS)
    inside = code < codes
    place = line[:, None] * codes + code[None, :]
    logits = tl.load(logits_ptr + place, mask=inside[None, :], other=float("-inf")).to(tl.float32)
    held = (channel < channels)[:, None] & inside[None, :]
    vectors = tl.load(codes_ptr + channel[:, None] * codes + code[None, :], mask=held, other=0.0)
    return code, logits, vectors, tl.load(half_ptr + code, mask=inside, other=0.0)


@triton.jit
def _denoised(
    x, near, logits_ptr, codes_ptr, half_ptr, line, codes, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`denoise` of visar/samplers/flow.py at t = 1 - near, for points [ROWS, CHANNELS]."""
    linear = near / ((1.0 - near) * (1.0 - near))
    square = near * linear
    largest = tl.full([ROWS, TILE], _LOWEST, tl.float32)
    mass = tl.zeros([ROWS, TILE], tl.float32)
    total = tl.zeros([ROWS, CHANNELS, TILE], tl.float32)
    for first in range(0, codes, TILE):
        _, logits, vectors, half = _tile_of(
            first, logits_ptr, codes_ptr, half_ptr, line, codes, channels, CHANNELS, TILE
        )  # fmt: skip
        product = tl.sum(x[:, :, None] * vectors[None, :, :], axis=1)
        score = (logits - square * half[None, :]) + linear * product
        above = tl.maximum(largest, score)
        shrink = tl.exp(largest - above)
        weight = tl.exp(score - above)
        mass = mass * shrink + weight
        total = total * shrink[:, None, :] + weight[:, None, :] * vectors[None, :, :]
        largest = above
    share = tl.exp(largest - tl.max(largest, axis=1)[:, None])
    return tl.sum(total * share[:, None, :], axis=2) / tl.sum(mass * share, axis=1)[:, None]


@triton.jit(do_not_specialize=["codes"])
def _flow_map(
    noise_ptr, logits_ptr, codes_ptr, half_ptr, out_ptr, lines, codes, channels, steps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Beyond the last row the last one is done again.
    line = tl.minimum(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), lines - 1)
    channel = tl.arange(0, CHANNELS)
    held = (channel < channels)[None, :]
    x = tl.load(noise_ptr + line[:, None] * channels + channel[None, :], mask=held, other=0.0)
    point = x
    slope = tl.zeros_like(x)
    # Of a step's two evaluations the first leads ahead by Euler's method, the second makes it Heun's. The last step
    # has the first alone: its line ends on the denoised point.
    for evaluation in range(0, 2 * steps - 1):
        second = evaluation % 2
        near = (evaluation // 2 + second) / steps
        denoised = _denoised(
            point, near, logits_ptr, codes_ptr, half_ptr, line, codes, channels, ROWS, CHANNELS, TILE
        )  # fmt: skip
        slope_here = (point - denoised) / (1.0 - near)
        x = tl.where(second == 1, x - 0.5 * (slope + slope_here) / steps, x)
        point = tl.where(second == 1, x, x - slope_here / steps)
        slope = slope_here

    best = tl.full([ROWS, TILE], float("-inf"), tl.float32)
    nearest = tl.zeros([ROWS, TILE], tl.int32)
    for first in range(0, codes, TILE):
        code, logits, vectors, half = _tile_of(
            first, logits_ptr, codes_ptr, half_ptr, line, codes, channels, CHANNELS, TILE
        )  # fmt: skip
        closeness = tl.sum(point[:, :, None] * vectors[None, :, :], axis=1) - half[None, :]
        closer = (closeness > best) & (logits > float("-inf"))
        best = tl.where(closer, closeness, best)
        nearest = tl.where(closer, code[None, :], nearest)
    chosen = tl.min(tl.where(best == tl.max(best, axis=1)[:, None], nearest, codes - 1), axis=1)
    tl.store(out_ptr + line, chosen.to(tl.int64))


def map_codes(noise_MC: Tensor, logits_MV: Tensor, codes_VC: Tensor, steps: int) -> Tensor:
    """`visar.samplers.flow.flow_map`, int64 [M], up to points within rounding of the border between two codes.

    Args:
        noise_MC: float32, contiguous, C <= visar.kernels.MAX_CHANNELS.
        logits_MV: of a dtype that kernels take, contiguous; nothing of their size is made.
        codes_VC: float32.
        steps: >= 1.
    """
    lines, channels = noise_MC.shape
    out_M = torch.empty(lines, dtype=torch.int64, device=noise_MC.device)
    width = triton.next_power_of_2(channels)
    rows = 4 if width <= 8 else 2 if width <= 32 else 1
    if lines:
        _flow_map[(triton.cdiv(lines, rows),)](
            noise_MC,
            logits_MV,
            codes_VC.t().contiguous(),
            codes_VC.square().sum(-1) / 2,
            out_M,
            lines,
            len(codes_VC),
            channels,
            steps,
            ROWS=rows,
            CHANNELS=width,
            TILE=_TILE,
            num_warps=_TILE // 32,
        )
    return out_M
