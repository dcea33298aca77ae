"""Temperature, top-k and top-p, alone, as a distribution or with the draw of a code; one program per row of V codes.

The plain counterparts are in visar/samplers/filtering.py; `probs_of` is `visar.samplers.filtering.filtered_probs`.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from visar.kernels import finite
from visar.kernels.distributions import codes_of, filtered, filters_of, inverted, note, tile
from visar.kernels.overlap import launch, overlaps


@triton.jit
def _filter(
    logits_ptr, out_ptr, codes, temperature, top_k, top_p,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, BLOCK)
    inside = code < codes
    x = tl.load(logits_ptr + line * codes + code, mask=inside, other=float("-inf")) / temperature
    kept, _ = filtered(x, inside, top_k, top_p, TOP_K, TOP_P)
    tl.store(out_ptr + line * codes + code, tl.where(kept, x, float("-inf")), mask=inside)


def filter_codes(logits_MV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """`visar.samplers.filtering.filter_logits` of float32 [M, V], contiguous, V <= visar.kernels.MAX_CODES."""
    lines, codes = logits_MV.shape
    out_MV = torch.empty_like(logits_MV)
    block = triton.next_power_of_2(codes)
    settings, switches = filters_of(codes, temperature, top_k, top_p)
    warps = min(max(block // 512, 4), 32)
    _filter[(lines,)](logits_MV, out_MV, codes, *settings, **switches, BLOCK=block, num_warps=warps)
    return out_MV


@triton.jit
def _probs(
    logits_ptr, out_ptr, flag_ptr, codes, temperature, top_k, top_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, WATCHED: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * codes
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    x = tl.load(logits_ptr + line + code, mask=inside, other=float("-inf")).to(tl.float32) / temperature
    if WATCHED:
        note(x, flag_ptr)
    _, mass = filtered(x, inside, top_k, top_p, TOP_K, TOP_P)
    tl.store(out_ptr + line + code, mass / tl.sum(mass), mask=inside)


def probs_of(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """`visar.samplers.filtering.filtered_probs` of [..., V], V <= visar.kernels.MAX_CODES."""
    logits = logits.contiguous()
    codes = logits.shape[-1]
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    settings, switches = filters_of(codes, temperature, top_k, top_p)
    flag_1 = finite.flag()
    if out.numel():
        pointers = (logits, out, out if flag_1 is None else flag_1)
        watched = dict(WATCHED=flag_1 is not None)
        _probs[(logits.numel() // codes,)](*pointers, codes, *settings, **switches, **watched, **tile(codes))
    return out


@triton.jit
def _draw(
    logits_ptr, uniform_ptr, out_ptr, flag_ptr, codes, temperature, top_k, top_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, WATCHED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    x = tl.load(logits_ptr + line * codes + code, mask=inside, other=float("-inf")) / temperature
    if WATCHED:
        note(x, flag_ptr)
    _, mass = filtered(x, inside, top_k, top_p, TOP_K, TOP_P)
    tl.store(out_ptr + line, inverted(mass, tl.load(uniform_ptr + line), ROWS, COLUMNS))


def draw_codes(logits_MV: Tensor, uniform_M: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Codes int64 [M] of `visar.samplers.filtering.filter_logits` and `categorical`, up to rounding of the sums.

    Args:
        logits_MV: float32, contiguous, V <= visar.kernels.MAX_CODES.
        uniform_M: float32 in (0, 1), contiguous.
        temperature, top_k, top_p: see `filter_logits`.
    """
    lines, codes = logits_MV.shape
    out_M = torch.empty(lines, dtype=torch.int64, device=logits_MV.device)
    settings, switches = filters_of(codes, temperature, top_k, top_p)
    flag_1 = finite.flag()
    pointers = (logits_MV, uniform_M, out_M, out_M if flag_1 is None else flag_1)
    switches |= dict(WATCHED=flag_1 is not None) | launch(overlaps(logits_MV.device))
    _draw[(lines,)](*pointers, codes, *settings, **switches, **tile(codes))
    return out_M


@triton.jit
def _draw_mass(mass_ptr, uniform_ptr, out_ptr, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    code = codes_of(ROWS, COLUMNS)
    mass = tl.load(mass_ptr + line * codes + code, mask=code < codes, other=0.0)
    tl.store(out_ptr + line, inverted(mass, tl.load(uniform_ptr + line), ROWS, COLUMNS))


def draw_mass(mass: Tensor, uniform: Tensor) -> Tensor:
    """`visar.samplers.filtering.draw` of float32 [..., V], V <= visar.kernels.MAX_CODES."""
    mass, uniform = mass.contiguous(), uniform.contiguous()
    out = torch.empty(uniform.shape, dtype=torch.int64, device=mass.device)
    if out.numel():
        _draw_mass[(out.numel(),)](mass, uniform, out, mass.shape[-1], **tile(mass.shape[-1]))
    return out
