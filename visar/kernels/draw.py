"""Temperature, top-k and top-p, alone or with the draw of a code, in one kernel; one program a row. V codes.

Thresholds are found by bisection on the value: floats and the integers that share their bits have the same order, so
32 halvings end at the exact threshold of a sort, ties included.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from visar.kernels.overlap import launch, overlaps

_COLUMNS = 128


@triton.jit
def _kept(x, inside, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """Which codes top-k and then top-p leave, and the mass of those, relative to the likeliest code."""
    mass = tl.where(inside, tl.exp(x - tl.max(x)), 0.0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    above = tl.max(key) + 1
    threshold = tl.min(key)
    if TOP_K:
        # Invariant: at least k codes at or above `threshold`, fewer at or above `limit`.
        limit = above
        for _ in range(32):
            middle = (threshold & limit) + ((threshold ^ limit) >> 1)
            enough = tl.sum((inside & (key >= middle)).to(tl.int32)) >= top_k
            threshold = tl.where(enough, middle, threshold)
            limit = tl.where(enough, limit, middle)
        mass = tl.where(key >= threshold, mass, 0.0)
    if TOP_P:
        # A code stays while the mass strictly above it is at most p.
        allowed = top_p * tl.sum(mass)
        limit_p = above
        for _ in range(32):
            middle = (threshold & limit_p) + ((threshold ^ limit_p) >> 1)
            beyond = tl.sum(tl.where(key >= middle, mass, 0.0)) > allowed
            threshold = tl.where(beyond, middle, threshold)
            limit_p = tl.where(beyond, limit_p, middle)
        mass = tl.where(key >= threshold, mass, 0.0)
    return key >= threshold, mass


@triton.jit
def _filter(
    logits_ptr, out_ptr, codes, temperature, top_k, top_p,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, BLOCK)
    inside = code < codes
    x = tl.load(logits_ptr + line * codes + code, mask=inside, other=float("-inf")) / temperature
    kept, _ = _kept(x, inside, top_k, top_p, TOP_K, TOP_P)
    tl.store(out_ptr + line * codes + code, tl.where(kept, x, float("-inf")), mask=inside)


@triton.jit
def _draw(
    logits_ptr, uniform_ptr, out_ptr, codes, temperature, top_k, top_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    code = row[:, None] * COLUMNS + column[None, :]
    inside = code < codes
    x = tl.load(logits_ptr + line * codes + code, mask=inside, other=float("-inf")) / temperature
    _, mass = _kept(x, inside, top_k, top_p, TOP_K, TOP_P)

    # Inversion in blocks and then inside the block, as visar.samplers.filtering.draw.
    block = tl.sum(mass, axis=1)
    running = tl.cumsum(block, axis=0)
    rest = tl.load(uniform_ptr + line) * tl.sum(block, axis=0)
    last = tl.max(tl.where(block > 0, row, 0), axis=0)
    chosen = tl.min(tl.where((running > rest) & (block > 0), row, last), axis=0)
    rest -= tl.sum(tl.where(row == chosen, running - block, 0.0), axis=0)
    cell = tl.sum(tl.where(row[:, None] == chosen, mass, 0.0), axis=0)
    running_cell = tl.cumsum(cell, axis=0)
    last_cell = tl.max(tl.where(cell > 0, column, 0), axis=0)
    picked = tl.min(tl.where((running_cell > rest) & (cell > 0), column, last_cell), axis=0)
    tl.store(out_ptr + line, (chosen * COLUMNS + picked).to(tl.int64))


def filter_codes(logits_MV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """`visar.samplers.filtering.filter_logits` of float32 [M, V], contiguous, V <= visar.kernels.MAX_CODES."""
    lines, codes = logits_MV.shape
    out_MV = torch.empty_like(logits_MV)
    block = triton.next_power_of_2(codes)
    _filter[(lines,)](
        logits_MV,
        out_MV,
        codes,
        float(temperature),
        min(top_k, codes),
        float(top_p),
        BLOCK=block,
        TOP_K=0 < top_k < codes,
        TOP_P=top_p < 1.0,
        num_warps=min(max(block // 512, 4), 32),
    )
    return out_MV


def draw_codes(logits_MV: Tensor, uniform_M: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Codes int64 [M] of `visar.samplers.filtering.filter_logits` and `categorical`, up to rounding of the sums.

    Args:
        logits_MV: float32, contiguous, V <= visar.kernels.MAX_CODES.
        uniform_M: float32 in (0, 1), contiguous.
        temperature, top_k, top_p: see `filter_logits`.
    """
    lines, codes = logits_MV.shape
    out_M = torch.empty(lines, dtype=torch.int64, device=logits_MV.device)
    rows = triton.next_power_of_2(triton.cdiv(codes, _COLUMNS))
    _draw[(lines,)](
        logits_MV,
        uniform_M,
        out_M,
        codes,
        float(temperature),
        min(top_k, codes),
        float(top_p),
        ROWS=rows,
        COLUMNS=_COLUMNS,
        TOP_K=0 < top_k < codes,
        TOP_P=top_p < 1.0,
        num_warps=min(max(rows // 4, 4), 32),
        **launch(overlaps(logits_MV.device)),
    )
    return out_M
