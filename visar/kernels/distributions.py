"""Functions of a distribution over the V codes: filter it, draw from it, accept a draft by it, take its residual.

These are called by kernels and are none themselves. A program holds the whole distribution as [ROWS, COLUMNS], a row
per block of the inversion in `visar.samplers.filtering.draw`. Uniform numbers are used as the plain samplers use them,
so the codes are the same; sums are rounded in another order.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from visar.kernels import REACHED

COLUMNS = 128
"""Codes of a block of the inversion, as in visar.samplers.filtering.draw."""

_TINY = tl.constexpr(1.1754943508222875e-38)


def tile(codes: int) -> dict:
    """Shape and warps of a program that holds distributions of so many codes: options of the launch."""
    rows = triton.next_power_of_2(triton.cdiv(codes, COLUMNS))
    return dict(ROWS=rows, COLUMNS=COLUMNS, num_warps=min(max(rows // 4, 4), 32))


def filters_of(codes: int, temperature: float, top_k: int, top_p: float) -> tuple[tuple, dict]:
    """Arguments and options of a kernel that calls `filtered`; 1.0, 0 and 1.0 filter nothing."""
    return (float(temperature), min(top_k, codes), top_p * REACHED), dict(TOP_K=0 < top_k < codes, TOP_P=top_p < 1.0)


@triton.jit
def filtered(x, inside, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """Which codes top-k and then top-p leave, and the mass of those, relative to the likeliest code.

    Thresholds are found by bisection on the value: floats and the integers that share their bits have the same order,
    so 32 halvings end at the exact threshold of a sort, ties included.
    """
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
        # A code stays while the mass strictly above it is below p.
        allowed = top_p * tl.sum(mass)
        limit_p = above
        for _ in range(32):
            middle = (threshold & limit_p) + ((threshold ^ limit_p) >> 1)
            beyond = tl.sum(tl.where(key >= middle, mass, 0.0)) >= allowed
            threshold = tl.where(beyond, middle, threshold)
            limit_p = tl.where(beyond, limit_p, middle)
        mass = tl.where(key >= threshold, mass, 0.0)
    return key >= threshold, mass


@triton.jit
def note(x, flag_ptr):
    """`visar.kernels.finite.note` of one row."""
    largest = tl.max(tl.where(x != x, float("inf"), x))
    tl.store(flag_ptr, 1, mask=tl.abs(largest) == float("inf"))


@triton.jit
def codes_of(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The codes 0, 1, ... in rows of COLUMNS; those from V on are padding."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def inverted(mass, uniform, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A code of positive mass in proportion to it: inversion in blocks and then inside the block."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    block = tl.sum(mass, axis=1)
    running = tl.cumsum(block, axis=0)
    rest = uniform * tl.sum(block, axis=0)
    last = tl.max(tl.where(block > 0, row, 0), axis=0)
    chosen = tl.min(tl.where((running > rest) & (block > 0), row, last), axis=0)
    rest -= tl.sum(tl.where(row == chosen, running - block, 0.0), axis=0)
    cell = tl.sum(tl.where(row[:, None] == chosen, mass, 0.0), axis=0)
    running_cell = tl.cumsum(cell, axis=0)
    last_cell = tl.max(tl.where(cell > 0, column, 0), axis=0)
    picked = tl.min(tl.where((running_cell > rest) & (cell > 0), column, last_cell), axis=0)
    return (chosen * COLUMNS + picked).to(tl.int64)


@triton.jit
def at(probs, code, token):
    """The probability of one code."""
    return tl.sum(tl.where(code == token, probs, 0.0))


@triton.jit
def chance_of(target, drafted):
    """min(1, p(x) / q(x)), as visar.samplers.verify.acceptance."""
    return tl.where(target < drafted, target / tl.maximum(drafted, _TINY), tl.where(target > 0, 1.0, 0.0))


@triton.jit
def residual_of(p, q):
    """[p - q]+ as visar.samplers.verify.residual, not normalised; p where nothing is left."""
    mass = tl.maximum(p - q, 0.0)
    return tl.where(tl.sum(mass) > 0, mass, p)


@triton.jit
def likeliest(score, code):
    """The first code of the largest score."""
    return tl.min(tl.where(score == tl.max(score), code, 2147483647)).to(tl.int64)
