"""Triton kernels of a transformer over scales: adaptive norms with the residual before them, queries and keys.

R rows (2B when guided), L positions, D hidden size, N heads, E head width, T cache slots.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG_LARGEST_SCALE = tl.constexpr(4.605170185988092)
_HEAD_TILE = 2048


@triton.jit(do_not_specialize=["positions"])
def _modulated_norm(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, out_ptr, normed_ptr,
    positions, width, gate_stride, stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    row = line // positions
    column = tl.arange(0, BLOCK)
    inside = column < width
    offset = line.to(tl.int64) * width + column
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    if ADD:
        branch = tl.load(branch_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + gate * branch).to(x.dtype)
        tl.store(out_ptr + offset, x, mask=inside)
    wide = x.to(tl.float32)
    centered = tl.where(inside, wide - tl.sum(wide, axis=0) / width, 0.0)
    normed = centered * tl.rsqrt(tl.sum(centered * centered, axis=0) / width + eps)
    scale = tl.load(scale_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + offset, (normed * (1.0 + scale) + shift).to(x.dtype), mask=inside)


def modulated_norm(
    x_RLD: Tensor,
    scale_RD: Tensor,
    shift_RD: Tensor,
    eps: float,
    *,
    branch_RLD: Tensor | None = None,
    gate_RD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + gate * branch (x itself without a branch), and its layer norm times (1 + scale) plus shift.

    Args:
        x_RLD, branch_RLD: contiguous; a residual stream and what is added to it.
        scale_RD, shift_RD, gate_RD: of every row, the same for its positions; scale and shift of one stride.
        eps: of the norm. Statistics and arithmetic are in float32; the sum is rounded to the tensors' dtype first.
    """
    rows, positions, width = x_RLD.shape
    assert scale_RD.stride() == shift_RD.stride() and scale_RD.stride(1) == 1
    assert gate_RD is None or gate_RD.stride(1) == 1
    normed_RLD = torch.empty_like(x_RLD)
    out_RLD = x_RLD if branch_RLD is None else torch.empty_like(x_RLD)
    block = triton.next_power_of_2(width)
    _modulated_norm[(rows * positions,)](
        x_RLD,
        x_RLD if branch_RLD is None else branch_RLD,
        scale_RD if gate_RD is None else gate_RD,
        scale_RD,
        shift_RD,
        out_RLD,
        normed_RLD,
        positions,
        width,
        0 if gate_RD is None else gate_RD.stride(0),
        scale_RD.stride(0),
        eps,
        ADD=branch_RLD is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
    )
    return out_RLD, normed_RLD


@triton.jit
def _unit(x, NORM: tl.constexpr):
    """Every line over its length, in float32."""
    wide = x.to(tl.float32)
    if NORM:
        length = tl.sqrt(tl.sum(wide * wide, axis=1))
        wide = wide / tl.maximum(length, 1.0e-12)[:, None]
    return wide


@triton.jit(do_not_specialize=["positions", "begin"])
def _split_heads(
    qkv_ptr, q_bias_ptr, v_bias_ptr, log_scale_ptr, query_ptr, keys_ptr, values_ptr,
    positions, begin, row_stride, head_stride,
    NORM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    row = (line // positions).to(tl.int64)
    position = line % positions
    head = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    inside = (head < HEADS)[:, None] & (e < WIDTH)[None, :]
    place = head[:, None] * WIDTH + e[None, :]
    source = qkv_ptr + line.to(tl.int64) * (3 * HEADS * WIDTH) + place
    query = tl.load(source, mask=inside, other=0.0)
    key = tl.load(source + HEADS * WIDTH, mask=inside, other=0.0)
    value = tl.load(source + 2 * HEADS * WIDTH, mask=inside, other=0.0)
    q_bias = tl.load(q_bias_ptr + place, mask=inside, other=0.0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + place, mask=inside, other=0.0).to(tl.float32)
    turned = _unit(query.to(tl.float32) + q_bias, NORM)
    if NORM:
        log_scale = tl.load(log_scale_ptr + head, mask=head < HEADS, other=0.0).to(tl.float32)
        turned = turned * tl.exp(tl.minimum(log_scale, _LOG_LARGEST_SCALE))[:, None]
    # Queries are written in the order of positions, which is how attention wants its output back.
    tl.store(query_ptr + line.to(tl.int64) * (HEADS * WIDTH) + place, turned.to(query.dtype), mask=inside)
    target = row * row_stride + head[:, None] * head_stride + (begin + position) * WIDTH + e[None, :]
    tl.store(keys_ptr + target, _unit(key, NORM).to(query.dtype), mask=inside)
    tl.store(values_ptr + target, (value.to(tl.float32) + v_bias).to(query.dtype), mask=inside)


def split_heads(
    qkv_RLF: Tensor,
    q_bias_D: Tensor,
    v_bias_D: Tensor,
    log_scale: Tensor | None,
    keys_RNTE: Tensor,
    values_RNTE: Tensor,
    begin: int,
) -> Tensor:
    """Queries [R, N, L, E] of a fused projection; its keys and values go to slots begin ... begin + L - 1.

    Args:
        qkv_RLF: contiguous [R, L, 3 D], without biases.
        q_bias_D, v_bias_D: added to queries and values.
        log_scale: N values; queries and keys get unit length, queries times exp(min(log_scale, log 100)). None =
            neither.
        keys_RNTE, values_RNTE: buffers of the same strides, a head's slots contiguous; changed in place.
        begin: slot of the first position.
    """
    rows, positions, _ = qkv_RLF.shape
    _, heads, _, width = keys_RNTE.shape
    assert keys_RNTE.stride() == values_RNTE.stride() and keys_RNTE.stride()[2:] == (width, 1)
    query_RLNE = qkv_RLF.new_empty(rows, positions, heads, width)
    block_e = triton.next_power_of_2(width)
    block_n = min(max(_HEAD_TILE // block_e, 1), triton.next_power_of_2(heads))
    _split_heads[(rows * positions, triton.cdiv(heads, block_n))](
        qkv_RLF,
        q_bias_D,
        v_bias_D,
        q_bias_D if log_scale is None else log_scale,
        query_RLNE,
        keys_RNTE,
        values_RNTE,
        positions,
        begin,
        keys_RNTE.stride(0),
        keys_RNTE.stride(1),
        NORM=log_scale is not None,
        HEADS=heads,
        WIDTH=width,
        BLOCK_N=block_n,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return query_RLNE.transpose(1, 2)
