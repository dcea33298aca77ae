"""Kernels between the matrix products: residual + RMS norm, SwiGLU, guidance. M rows, D hidden size, F hidden."""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from visar.kernels.overlap import launch


@triton.jit
def _add_rms_norm(
    residual_ptr, delta_ptr, weight_ptr, normed_ptr, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(residual_ptr + row * width + column, mask=inside, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row * width + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + row * width + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + row * width + column, normed.to(x.dtype), mask=inside)


def add_rms_norm_(
    residual_MD: Tensor, delta_MD: Tensor | None, weight_D: Tensor, eps: float, overlap: bool = False
) -> Tensor:
    """Adds `delta_MD` (None = nothing) to the residual in place and returns its RMS norm times the weight.

    Statistics in float32, cast, then the weight, as RMSNorm. All tensors contiguous and of one dtype.
    `overlap`: see visar/kernels/overlap.py.
    """
    rows, width = residual_MD.shape
    normed_MD = torch.empty_like(residual_MD)
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        residual_MD,
        residual_MD if delta_MD is None else delta_MD,
        weight_D,
        normed_MD,
        width,
        eps,
        ADD=delta_MD is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
        **launch(overlap),
    )
    return normed_MD


@triton.jit
def _first_inputs(
    tokens_ptr, draft_ptr, length_ptr, table_ptr, prefix_ptr, out_ptr,
    batch, positions, token_stride, draft_stride, width,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    line = tl.program_id(0).to(tl.int64)
    row = line // positions
    slot = line % positions
    image = row % batch
    column = tl.arange(0, BLOCK)
    inside = column < width
    length = tl.load(length_ptr + (image if RAGGED else 0))
    previous = tl.load(tokens_ptr + image * token_stride + tl.maximum(length - 1, 0))
    drafted = tl.load(draft_ptr + image * draft_stride + slot - 1, mask=slot > 0, other=0)
    token = tl.where(slot > 0, drafted, previous)
    begins = (slot == 0) & (length == 0)
    known = tl.load(table_ptr + token * width + column, mask=inside & (begins == 0), other=0.0)
    prefix = tl.load(prefix_ptr + row * width + column, mask=inside & begins, other=0.0)
    tl.store(out_ptr + line * width + column, tl.where(begins, prefix, known), mask=inside)


def first_inputs(
    tokens_BT: Tensor,
    draft_BK: Tensor | None,
    length: Tensor,
    table_VD: Tensor,
    prefix_last_RD: Tensor,
    overlap: bool = False,
) -> Tensor:
    """Input embeddings [R, K + 1, D]: the last committed token (at length 0 the prefix's last vector), and the drafts.

    Args:
        tokens_BT: int64 committed ids, contiguous.
        draft_BK: int64 drafted ids, or None.
        length: int64 [1] or [B] of committed tokens.
        table_VD: embedding of every id.
        prefix_last_RD: of every row; row r belongs to image r mod B.
        overlap: the next kernel may start early. This one never does: it begins a step, see `cached_attention`.
    """
    (batch, slots), (rows, width) = tokens_BT.shape, prefix_last_RD.shape
    drafts = 0 if draft_BK is None else draft_BK.shape[1]
    draft = tokens_BT if draft_BK is None or not drafts else draft_BK.contiguous()
    out_RLD = prefix_last_RD.new_empty(rows, drafts + 1, width)
    block = triton.next_power_of_2(width)
    _first_inputs[(rows * (drafts + 1),)](
        tokens_BT,
        draft,
        length,
        table_VD,
        prefix_last_RD,
        out_RLD,
        batch,
        drafts + 1,
        slots,
        draft.shape[1],
        width,
        RAGGED=length.shape[0] > 1,
        BLOCK=block,
        PDL=overlap,
        num_warps=4,
    )
    return out_RLD


@triton.jit
def _silu_multiply(both_ptr, out_ptr, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    gate = tl.load(both_ptr + row * 2 * hidden + column, mask=inside, other=0.0)
    up = tl.load(both_ptr + row * 2 * hidden + hidden + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide * tl.sigmoid(wide)).to(gate.dtype)
    tl.store(out_ptr + row * hidden + column, (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), inside)


def silu_multiply(both_M2F: Tensor) -> Tensor:
    """silu(first half) * second half, [M, 2F] -> [M, F]; contiguous."""
    rows, hidden = both_M2F.shape[0], both_M2F.shape[1] // 2
    out_MF = both_M2F.new_empty(rows, hidden)
    block = min(triton.next_power_of_2(hidden), 1024)
    _silu_multiply[(rows, triton.cdiv(hidden, block))](both_M2F, out_MF, hidden, BLOCK=block, num_warps=4)
    return out_MF


@triton.jit
def _guide(
    logits_ptr, scale_ptr, length_ptr, depth_ptr, out_ptr, batch, positions, codes, depth_image,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr, TREE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    code = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = code < codes
    image = row // positions
    length = tl.load(length_ptr + (image if RAGGED else 0))
    ahead = row % positions
    if TREE:
        ahead = tl.load(depth_ptr + image * depth_image + ahead)
    scale = tl.load(scale_ptr + length + ahead)
    conditional = tl.load(logits_ptr + row * codes + code, mask=inside, other=0.0).to(tl.float32)
    null_row = row + batch * positions
    null = tl.load(logits_ptr + null_row * codes + code, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * codes + code, null + (conditional - null) * scale, mask=inside)


def guide(
    logits_RLV: Tensor, scale_N: Tensor, length: Tensor, overlap: bool = False, depth_BL: Tensor | None = None
) -> Tensor:
    """Guided float32 logits [B, L, V] of a doubled batch [2B, L, V]; `visar.core.guidance.combine` with positions.

    Args:
        logits_RLV: contiguous.
        scale_N: float32 strength of every position.
        length: int64 [1] or [B]: position of slot 0.
        overlap: see visar/kernels/overlap.py.
        depth_BL: position of each slot, counted from slot 0; None for 0, 1, ... May be expanded.
    """
    rows, positions, codes = logits_RLV.shape
    out_BLV = logits_RLV.new_empty(rows // 2, positions, codes, dtype=torch.float32)
    block = min(triton.next_power_of_2(codes), 2048)
    depth = length if depth_BL is None else depth_BL  # not followed without depths
    _guide[(rows // 2 * positions, triton.cdiv(codes, block))](
        logits_RLV,
        scale_N,
        length,
        depth,
        out_BLV,
        rows // 2,
        positions,
        codes,
        depth.stride(0) if depth_BL is not None and depth.shape[0] > 1 else 0,
        RAGGED=length.shape[0] > 1,
        BLOCK=block,
        TREE=depth_BL is not None,
        num_warps=4,
        **launch(overlap),
    )
    return out_BLV
