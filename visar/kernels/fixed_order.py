"""Matrix products and attention whose results for a row do not depend on how many rows there are.

A library picks another kernel for another number of rows, and with it another order of summation: a row's result then
depends on its batch. Here the order is fixed by the sizes of a weight, or of a row's own sequence, alone.

Products: the inputs K may be cut into parts; every part is summed from its first input to its last, and the sums of
the parts are added in order. Whether one program sums all parts or each its own, and how many rows and outputs a
program has, changes nothing in that order. With 16-bit numbers the tensor cores add 16 inputs at a time: outputs take
the side of an instruction that has 64 lines in every shape, rows the other one, so that one kind of instruction serves
all numbers of rows (tests read it in the compiled code). With float32 a fused multiply-add takes one input after the
other.

M rows, K inputs, N outputs; R rows of a batch, N heads, L queries, T keys, E head width.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.kernels.attention import NOTHING, absorb

_UNIT = 128  # inputs: parts are made of whole tiles of any shape below
_PROGRAMS = 132  # that run at the same time, one a multiprocessor of an H100 or H200


@dataclass(frozen=True)
class Tile:
    """Outputs, rows and inputs that a program of a product takes at once, and its launch options."""

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int


def parts_of(outputs: int, width: int) -> int:
    """Parts of K = `width` inputs for N = `outputs` where rows are few: so many that all multiprocessors have work."""
    programs, parts = triton.cdiv(outputs, 64), 1
    while 2 * parts * programs <= _PROGRAMS and width >= 512 * parts and parts < 8:
        parts *= 2
    return parts


def tile_of(rows: int, outputs: int, dtype: torch.dtype, parts: int) -> Tile:
    """Shape of a program for so many rows; every choice gives the same results."""
    if dtype == torch.float32:
        return Tile(64, 16 if rows <= 16 else 64, 32, 4, 2)
    if rows <= 16:
        return Tile(64, 16, 128, 4, 5)
    if rows <= 32:
        return Tile(64, 32, 128, 4, 5)
    if rows <= 64:
        return Tile(64, 64, 128, 4, 4)
    if parts == 1 and triton.cdiv(rows, 256) * triton.cdiv(outputs, 128) >= _PROGRAMS:
        return Tile(128, 256, 64, 8, 3)
    if triton.cdiv(rows, 128) * triton.cdiv(outputs, 128) >= _PROGRAMS:
        return Tile(128, 128, 64, 8, 4)  # two sets of sums need the registers
    return Tile(64, 128, 64, 4, 5)


@triton.jit
def _finished(total, bias_ptr, n, inside, BIAS: tl.constexpr, GELU: tl.constexpr):
    """Sums [.., N] with the bias and the tanh form of gelu, in float32."""
    if BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        inner = 1.5957691216057308 * (total + 0.044715 * total * total * total)
        total = total * tl.sigmoid(inner)
    return total


@triton.jit(do_not_specialize=["rows"])
def _product(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, outputs, width, span,
    x_batch, x_row, x_input, weight_batch, weight_output, weight_input, out_batch,
    PARTS: tl.constexpr, APART: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows and outputs: groups of GROUP tiles of rows, outputs inside.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inner = program % (GROUP * tiles_n)
    m = (group * GROUP + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inner // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    in_m = m < rows
    in_n = n < outputs
    x_line = x_ptr + batch * x_batch + m.to(tl.int64)[:, None] * x_row
    weight_line = weight_ptr + batch * weight_batch + n.to(tl.int64)[:, None] * weight_output

    first = 0
    last = PARTS
    if APART:
        first = tl.program_id(2)
        last = first + 1
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for part in tl.range(first, last):
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in tl.range(part * span, tl.minimum((part + 1) * span, width), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            if WHOLE:
                x = tl.load(x_line + k[None, :] * x_input, mask=in_m[:, None], other=0.0)
                weight = tl.load(weight_line + k[None, :] * weight_input, mask=in_n[:, None], other=0.0)
            else:
                in_k = (k < width)[None, :]
                x = tl.load(x_line + k[None, :] * x_input, mask=in_m[:, None] & in_k, other=0.0)
                weight = tl.load(weight_line + k[None, :] * weight_input, mask=in_n[:, None] & in_k, other=0.0)
            sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
        total += sums

    result = tl.trans(total)
    inside = in_m[:, None] & in_n[None, :]
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    if APART:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * out_batch + place, result, mask=inside)
    else:
        result = _finished(result, bias_ptr, n[None, :], in_n[None, :], BIAS, GELU)
        tl.store(out_ptr + batch * out_batch + place, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _add_parts(
    part_ptr, bias_ptr, out_ptr, size, outputs,
    PARTS: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptr + part * size.to(tl.int64) + place, mask=inside, other=0.0)
    total = _finished(total, bias_ptr, place % outputs, inside, BIAS, GELU)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


def product(
    x: Tensor,
    weight: Tensor,
    bias_N: Tensor | None = None,
    *,
    gelu: bool = False,
    parts: int = 1,
    tile: Tile | None = None,
    apart: bool | None = None,
) -> Tensor:
    """x W^T (+ bias, then gelu in its tanh form), sums in float32, rounded to x's dtype; float32 stays float32.

    Args:
        x: [M, K], or [Z, M, K]; any strides.
        weight: [N, K], or [Z, N, K]; of x's dtype, any strides.
        bias_N: of x's dtype, contiguous; None = nothing.
        gelu: activate.
        parts: in which the inputs are summed, part of what the result is: not to be chosen by the number of rows.
        tile, apart: shape of a program, and whether parts are summed by programs of their own; None = what should be
            fastest. Neither changes the result.

    Returns: [M, N] or [Z, M, N], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if x.dim() not in (2, 3) or weight.dim() not in (2, 3) or (x.dim() == 2 and weight.dim() == 3):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}; [M, K] and [N, K], or batches of them")
    batches = x.shape[0] if x.dim() == 3 else 1
    (rows, width), outputs = x.shape[-2:], weight.shape[-2]
    if weight.shape[-1] != width or weight.dtype != x.dtype or (weight.dim() == 3 and weight.shape[0] != batches):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}; as many inputs and one dtype"
        )
    out = x.new_empty(*x.shape[:-1], outputs)
    if not out.numel():
        return out
    tile = tile or tile_of(rows, outputs, x.dtype, parts)
    span = triton.cdiv(triton.cdiv(width, parts), _UNIT) * _UNIT
    parts = triton.cdiv(width, span) if width else 1
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    if apart is None:
        # A few programs that would read for long: as many more.
        apart = 2 * programs <= _PROGRAMS and (tile.outputs + tile.rows) * width * x.itemsize > 400_000
    apart = apart and parts > 1 and batches == 1
    target = x.new_empty(parts, rows, outputs, dtype=torch.float32) if apart else out
    bias = x if bias_N is None else bias_N  # not followed without a bias
    # Programs beyond 65,535 do not fit into the grid's second axis.
    for first in range(0, batches, 65_535):
        count = min(batches - first, 65_535)
        _product[(programs, count, parts if apart else 1)](
            x[first:] if x.dim() == 3 else x,
            weight[first:] if weight.dim() == 3 else weight,
            bias,
            target[first:] if batches > 1 else target,
            rows,
            outputs,
            width,
            span,
            x.stride(0) if x.dim() == 3 else 0,
            x.stride(-2),
            x.stride(-1),
            weight.stride(0) if weight.dim() == 3 else 0,
            weight.stride(-2),
            weight.stride(-1),
            rows * outputs,
            PARTS=parts,
            APART=apart,
            BIAS=bias_N is not None,
            GELU=gelu,
            WHOLE=width % tile.inputs == 0,
            BLOCK_N=tile.outputs,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.inputs,
            GROUP=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if apart:
        size = rows * outputs
        _add_parts[(triton.cdiv(size, 1024),)](
            target, bias, out, size, outputs, PARTS=parts, BIAS=bias_N is not None, GELU=gelu, BLOCK=1024, num_warps=4
        )
    return out


@triton.jit(do_not_specialize=["length", "keys"])
def _attention(
    query_ptr, key_ptr, value_ptr, mask_ptr, out_ptr, length, keys, heads, scale,
    query_row, query_head, query_place, key_row, key_head, key_place, value_row, value_head, value_place,
    mask_row, mask_query,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    place_Q = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    e = tl.arange(0, WIDTH_POW2)
    own_Q = place_Q < length
    real = e < WIDTH
    inside_QE = own_Q[:, None] & real[None, :]
    begin = query_ptr + row * query_row + head * query_head
    query_QE = tl.load(begin + place_Q[:, None] * query_place + e[None, :], mask=inside_QE, other=0.0)
    key_begin = key_ptr + row * key_row + head * key_head
    value_begin = value_ptr + row * value_row + head * value_head
    mask_Q = mask_ptr + row * mask_row + place_Q.to(tl.int64) * mask_query

    top_Q = tl.full([QUERIES], NOTHING, tl.float32)
    total_Q = tl.zeros([QUERIES], tl.float32)
    out_QE = tl.zeros([QUERIES, WIDTH_POW2], tl.float32)
    for start in tl.range(0, keys, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        known = slot < keys
        inside = known[:, None] & real[None, :]
        key = tl.load(key_begin + slot[:, None] * key_place + e[None, :], mask=inside, other=0.0)
        value = tl.load(value_begin + slot[:, None] * value_place + e[None, :], mask=inside, other=0.0)
        seen = own_Q[:, None] & known[None, :]
        if MASKED:
            seen = tl.load(mask_Q[:, None] + slot[None, :], mask=seen, other=0) != 0
        if CAUSAL:
            seen = seen & (slot[None, :] <= place_Q[:, None])
        top_Q, total_Q, out_QE = absorb(query_QE, key, value, seen, scale, top_Q, total_Q, out_QE)
    out_QE = out_QE / tl.maximum(total_Q, 1.0e-30)[:, None]
    line = (row * length + place_Q) * heads + head
    tl.store(out_ptr + line[:, None] * WIDTH + e[None, :], out_QE.to(query_QE.dtype), mask=inside_QE)


def attention(
    query_RNLE: Tensor,
    key_RNTE: Tensor,
    value_RNTE: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q k^T) v: what `scaled_dot_product_attention` computes, in tiles that L, T and E alone decide.

    Args:
        query_RNLE, key_RNTE, value_RNTE: of one dtype, head widths contiguous.
        scale: multiplies query-key products.
        mask: bool, broadcastable to [R, 1, L, T], True where a query sees a key; None = everywhere. A query that sees
            nothing gets 0.
        causal: query i sees keys 0 ... i only.

    Returns: [R, N, L, E], in memory [R, L, N, E].
    """
    rows, heads, length, width = query_RNLE.shape
    keys = key_RNTE.shape[2]
    query_RNLE, key_RNTE, value_RNTE = (
        each if each.stride(3) == 1 else each.contiguous() for each in (query_RNLE, key_RNTE, value_RNTE)
    )
    out_RLNE = query_RNLE.new_empty(rows, length, heads, width)
    if not out_RLNE.numel():
        return out_RLNE.transpose(1, 2)
    seen = query_RNLE  # not followed without a mask
    mask_strides = (0, 0)
    if mask is not None:
        seen = mask.expand(rows, 1, length, keys)[:, 0].view(torch.uint8)
        seen = seen if seen.stride(2) == 1 or keys == 1 else seen.contiguous()
        mask_strides = (seen.stride(0), seen.stride(1))
    width_pow2 = max(triton.next_power_of_2(width), 16)
    if query_RNLE.dtype == torch.float32:
        shape = dict(QUERIES=16, BLOCK=32, num_warps=4, num_stages=1)
    elif length <= 16 or width_pow2 > 128:
        shape = dict(QUERIES=16, BLOCK=64, num_warps=4, num_stages=2)
    else:
        shape = dict(QUERIES=64, BLOCK=64, num_warps=4, num_stages=3 if width_pow2 <= 64 else 2)
    _attention[(rows * heads, triton.cdiv(length, shape["QUERIES"]))](
        query_RNLE,
        key_RNTE,
        value_RNTE,
        seen,
        out_RLNE,
        length,
        keys,
        heads,
        scale,
        *query_RNLE.stride()[:3],
        *key_RNTE.stride()[:3],
        *value_RNTE.stride()[:3],
        *mask_strides,
        MASKED=mask is not None,
        CAUSAL=causal,
        WIDTH=width,
        WIDTH_POW2=width_pow2,
        **shape,
    )
    return out_RLNE.transpose(1, 2)
