"""Rotary positions, cache write and attention of one decode step in one kernel per layer.

The cache is read once, up to the current length, which is a tensor on the device: one captured launch serves every
step. B images, R rows (2B when guided), L new positions or nodes of a drafted tree, N heads, E head width, S slots.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from visar.kernels.mode import active
from visar.kernels.overlap import launch

# Lowest running maximum: finite, so that rows that have seen nothing yet stay free of NaN.
NOTHING = tl.constexpr(-1.0e30)
_SOME = 8 * 132  # programs: neither so few that one should be wide, nor so many that it should be narrow


@triton.jit
def rotated(base_ptr, offset, partner, inside, cos, sin, sign):
    """Elements of a vector rotated in pairs (2i, 2i + 1), rounded to their own dtype, as float32."""
    x = tl.load(base_ptr + offset, mask=inside, other=0.0)
    other = tl.load(base_ptr + partner, mask=inside, other=0.0)
    turned = x.to(tl.float32) * cos + sign * other.to(tl.float32) * sin
    return turned.to(x.dtype)


@triton.jit
def _add_tile(query, key, value, slot, root, mask_ptr, top, total, out, MASKED: tl.constexpr):
    """Running softmax of one query over one more tile of keys: its maximum, sum and weighted values."""
    seen = slot < root
    if MASKED:
        seen = seen & (tl.load(mask_ptr + slot, mask=seen, other=0) != 0)
    score = tl.where(seen, tl.sum(key.to(tl.float32) * query[None, :], axis=1), float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=0))
    weight = tl.exp(score - new_top)
    shrink = tl.exp(top - new_top)
    total = total * shrink + tl.sum(weight, axis=0)
    out = out * shrink + tl.sum(value.to(tl.float32) * weight[:, None], axis=0)
    return new_top, total, out


@triton.jit
def _one_token(
    qkv_ptr, keys_ptr, values_ptr, rope_ptr, length_ptr, valid_ptr, out_ptr,
    ahead, batch, slots, places, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    head = tl.program_id(1)
    if RAGGED:
        root = tl.load(length_ptr + row % batch).to(tl.int32) + ahead
    else:
        root = tl.load(length_ptr).to(tl.int32) + ahead
    e = tl.arange(0, WIDTH_POW2)
    real = e < WIDTH
    turn = rope_ptr + tl.minimum(root, places - 1) * WIDTH + (e // 2) * 2
    cos = tl.load(turn, mask=real, other=0.0)
    sin = tl.load(turn + 1, mask=real, other=0.0)
    sign = tl.where(e % 2 == 0, -1.0, 1.0)
    line = (row.to(tl.int64) * HEADS + head) * slots * WIDTH

    # The length, and slots before it, are as earlier steps left them: a step begins with a kernel that starts after
    # all before it have ended, so these reads need not wait for this step's kernels.
    slot = tl.arange(0, BLOCK)
    tile = line + slot[:, None] * WIDTH + e[None, :]
    inside = (slot < root)[:, None] & real[None, :]
    key = tl.load(keys_ptr + tile, mask=inside, other=0.0)
    value = tl.load(values_ptr + tile, mask=inside, other=0.0)
    if PDL:
        gdc_wait()

    new = qkv_ptr + row * (3 * HEADS * WIDTH) + head * WIDTH
    query = rotated(new, e, e ^ 1, real, cos, sin, sign).to(tl.float32) * scale
    new_key = rotated(new + HEADS * WIDTH, e, e ^ 1, real, cos, sin, sign)
    new_value = tl.load(new + 2 * HEADS * WIDTH + e, mask=real, other=0.0)
    tl.store(keys_ptr + line + root * WIDTH + e, new_key, mask=real)
    tl.store(values_ptr + line + root * WIDTH + e, new_value, mask=real)

    # The new position comes from registers, the others from the cache.
    top = tl.sum(query * new_key.to(tl.float32), axis=0)
    total = tl.full([], 1.0, tl.float32)
    out = new_value.to(tl.float32)
    if MASKED:
        seen_itself = tl.load(valid_ptr + row * slots + root) != 0
        top = tl.where(seen_itself, top, NOTHING)
        total = tl.where(seen_itself, 1.0, 0.0)
        out = tl.where(seen_itself, out, 0.0)
    mask = valid_ptr + row * slots
    top, total, out = _add_tile(query, key, value, slot, root, mask, top, total, out, MASKED)
    for start in tl.range(BLOCK, root, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tile = line + slot[:, None] * WIDTH + e[None, :]
        inside = (slot < root)[:, None] & real[None, :]
        key = tl.load(keys_ptr + tile, mask=inside, other=0.0)
        value = tl.load(values_ptr + tile, mask=inside, other=0.0)
        top, total, out = _add_tile(query, key, value, slot, root, mask, top, total, out, MASKED)
    out = out / tl.maximum(total, 1.0e-30)
    tl.store(out_ptr + row * (HEADS * WIDTH) + head * WIDTH + e, out.to(new_value.dtype), mask=real)


@triton.jit
def turns(rope_ptr, place, e, inside, places, WIDTH: tl.constexpr):
    """Cosines and sines of places, [places, E]."""
    turn = rope_ptr + tl.minimum(place, places - 1)[:, None] * WIDTH + ((e // 2) * 2)[None, :]
    return tl.load(turn, mask=inside, other=0.0), tl.load(turn + 1, mask=inside, other=0.0)


@triton.jit
def absorb(query, key, value, seen, scale, top, total, out):
    """Running softmax over one more tile of keys: its maximum, sum and weighted values."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1))
    weight = tl.exp(score - new_top[:, None])
    shrink = tl.exp(top - new_top)
    total = total * shrink + tl.sum(weight, axis=1)
    out = out * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return new_top, total, out


@triton.jit
def _places(depths_ptr, root, node, own, TREE: tl.constexpr):
    """Where new positions stand: a window's one behind another, a tree's nodes at their depth below the root."""
    if TREE:
        return tl.maximum(root + tl.load(depths_ptr + node, mask=own, other=0).to(tl.int32), 0)
    return root + node


@triton.jit
def _ancestors(lines_Q, slot, own_Q, seen):
    """Which slots of the tree its nodes see, [nodes, slots]."""
    return tl.load(lines_Q[:, None] + slot[None, :], mask=own_Q[:, None] & seen[None, :], other=0) != 0


@triton.jit
def _window(
    qkv_ptr, keys_ptr, values_ptr, rope_ptr, length_ptr, valid_ptr, depth_ptr, seen_ptr, out_ptr,
    ahead, batch, slots, places, positions, first, depth_image, seen_image, seen_node, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    begin = tl.program_id(2) * QUERIES
    image = row % batch
    if RAGGED:
        root = tl.load(length_ptr + image).to(tl.int32) + ahead
    else:
        root = tl.load(length_ptr).to(tl.int32) + ahead
    e = tl.arange(0, WIDTH_POW2)
    real = e < WIDTH
    sign = tl.where(e % 2 == 0, -1.0, 1.0)[None, :]
    stride = 3 * HEADS * WIDTH
    new_query = qkv_ptr + row * positions * stride + head * WIDTH
    new_key = new_query + HEADS * WIDTH
    new_value = new_key + HEADS * WIDTH
    line = (row * HEADS + head) * slots * WIDTH
    valid = valid_ptr + row * slots

    # New position i is slot first + i of the window or the tree, and slot base + i of the cache.
    new_Q = begin + tl.arange(0, QUERIES)
    own_Q = new_Q < positions
    if TREE:
        base = root + first
        new_valid = valid + root + first  # `valid + base` costs a tree 34 registers more
        depths = depth_ptr + image * depth_image + first
        lines_Q = seen_ptr + image * seen_image + (first + new_Q).to(tl.int64) * seen_node
    else:
        base, new_valid, depths, lines_Q = root, valid + root, depth_ptr, new_Q

    # This program's queries, and the keys and values of the same positions, which it writes to the cache.
    inside_QE = own_Q[:, None] & real[None, :]
    place_Q = _places(depths, root, new_Q, own_Q, TREE)
    cos_QE, sin_QE = turns(rope_ptr, place_Q, e, inside_QE, places, WIDTH)
    offset_QE = new_Q[:, None] * stride + e[None, :]
    partner_QE = new_Q[:, None] * stride + (e ^ 1)[None, :]
    query_QE = rotated(new_query, offset_QE, partner_QE, inside_QE, cos_QE, sin_QE, sign)
    key_QE = rotated(new_key, offset_QE, partner_QE, inside_QE, cos_QE, sin_QE, sign)
    value_QE = tl.load(new_value + offset_QE, mask=inside_QE, other=0.0)
    target_QE = line + (base + new_Q)[:, None] * WIDTH + e[None, :]
    tl.store(keys_ptr + target_QE, key_QE, mask=inside_QE)
    tl.store(values_ptr + target_QE, value_QE, mask=inside_QE)

    top_Q = tl.full([QUERIES], NOTHING, tl.float32)
    total_Q = tl.zeros([QUERIES], tl.float32)
    out_QE = tl.zeros([QUERIES, WIDTH_POW2], tl.float32)
    for start in tl.range(0, base, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        known = slot < base
        tile = line + slot[:, None] * WIDTH + e[None, :]
        inside = known[:, None] & real[None, :]
        key = tl.load(keys_ptr + tile, mask=inside, other=0.0)
        value = tl.load(values_ptr + tile, mask=inside, other=0.0)
        if MASKED:
            known = known & (tl.load(valid + slot, mask=known, other=0) != 0)
        seen = known[None, :]
        if TREE:
            ancestors = _ancestors(lines_Q, slot - root, own_Q, known & (slot > root))
            seen = (known & (slot <= root))[None, :] | ancestors
        top_Q, total_Q, out_QE = absorb(query_QE, key, value, seen, scale, top_Q, total_Q, out_QE)

    # Positions of earlier programs are rotated anew rather than read from what those write.
    for before in tl.range(0, begin, QUERIES):
        new_W = before + tl.arange(0, QUERIES)
        seen_W = new_W < positions
        inside_WE = seen_W[:, None] & real[None, :]
        place_W = _places(depths, root, new_W, seen_W, TREE)
        cos_WE, sin_WE = turns(rope_ptr, place_W, e, inside_WE, places, WIDTH)
        offset_WE = new_W[:, None] * stride + e[None, :]
        partner_WE = new_W[:, None] * stride + (e ^ 1)[None, :]
        key_WE = rotated(new_key, offset_WE, partner_WE, inside_WE, cos_WE, sin_WE, sign)
        value_WE = tl.load(new_value + offset_WE, mask=inside_WE, other=0.0)
        if MASKED:
            seen_W = seen_W & (tl.load(new_valid + new_W, mask=seen_W, other=0) != 0)
        seen = seen_W[None, :]
        if TREE:
            seen = _ancestors(lines_Q, first + new_W, own_Q, seen_W)
        top_Q, total_Q, out_QE = absorb(query_QE, key_WE, value_WE, seen, scale, top_Q, total_Q, out_QE)

    seen_Q = own_Q
    if MASKED:
        seen_Q = seen_Q & (tl.load(new_valid + new_Q, mask=own_Q, other=0) != 0)
    if TREE:
        seen_QQ = _ancestors(lines_Q, first + new_Q, own_Q, seen_Q)
    else:
        seen_QQ = seen_Q[None, :] & (new_Q[None, :] <= new_Q[:, None])
    top_Q, total_Q, out_QE = absorb(query_QE, key_QE, value_QE, seen_QQ, scale, top_Q, total_Q, out_QE)
    out_QE = out_QE / tl.maximum(total_Q, 1.0e-30)[:, None]
    result = out_ptr + (row * positions + new_Q)[:, None] * (HEADS * WIDTH) + head * WIDTH + e[None, :]
    tl.store(result, out_QE.to(value_QE.dtype), mask=inside_QE)


def cached_attention(
    qkv_RLX: Tensor,
    keys_RNSE: Tensor,
    values_RNSE: Tensor,
    rope_PE2: Tensor,
    length: Tensor,
    *,
    ahead: int,
    batch: int,
    key_valid_RS: Tensor | None,
    overlap: bool = False,
    tree: Any = None,
    first: int = 0,
) -> Tensor:
    """Attention of L new positions of every row over the cache and over themselves; they enter the cache.

    Positions of a window see those before them; nodes of a tree see their ancestors. The plain counterpart is
    `visar.layers.llama.Attention` between its two matrix products, for a tree with `visar.layers.cache.visible_tree`.

    Args:
        qkv_RLX: [R, L, 3 N E], queries, keys and values side by side, heads inside; contiguous.
        keys_RNSE, values_RNSE: one layer of the cache, contiguous; written from slot root + first on.
        rope_PE2: float32 [P, E / 2, 2], see visar/layers/rope.py; places beyond the table take its last row.
        length: int64 [1] or [B]; root = length + ahead is the slot and the place of the first new position.
        ahead: prefix positions before the one that predicts token 0.
        batch: B; row r belongs to image r mod B.
        key_valid_RS: bool, False for slots that nobody sees; None if all are seen. A query that sees nothing gets 0.
        overlap: see visar/kernels/overlap.py; one position only. What wrote the cache before must have ended when
            the step began.
        tree: whose slots `first` ... the new positions are; None for a window.
        first: slots of the tree before it are in the cache already, slot i at root + i.

    Returns: [R, L, N E], before the output matrix.
    """
    rows, positions, _ = qkv_RLX.shape
    heads, slots, width = keys_RNSE.shape[1:]
    out_RLX = qkv_RLX.new_empty(rows, positions, heads * width)
    masked = key_valid_RS is not None
    # A mask is read as bytes; without one the pointer is never followed.
    valid = key_valid_RS.view(torch.uint8) if key_valid_RS is not None else qkv_RLX
    cached = (qkv_RLX, keys_RNSE, values_RNSE, rope_PE2, length, valid)
    width_pow2 = max(triton.next_power_of_2(width), 16)
    shape = dict(HEADS=heads, WIDTH=width, WIDTH_POW2=width_pow2, RAGGED=length.shape[0] > 1, MASKED=masked)
    sizes, scale = (ahead, batch, slots, rope_PE2.shape[0]), width**-0.5
    if positions == 1 and tree is None:
        # In the invariant mode the number of rows must not choose: a tile for tens of rows.
        tile = _token_tile(_SOME if active() else rows * heads, slots, width_pow2)
        _one_token[(rows, heads)](*cached, out_RLX, *sizes, scale, **shape, **tile, **launch(overlap))
        return out_RLX
    tile = _window_tile(positions, width_pow2, qkv_RLX.dtype)
    # A window has no table of ancestors: its pointers are never followed.
    table, strides = (qkv_RLX, qkv_RLX), (0, 0, 0)
    if tree is not None:
        table = (tree.place_BL, tree.seen_BLL.view(torch.uint8))
        assert table[0].stride(1) == table[1].stride(2) == 1
        depth_image, seen_image = (each.stride(0) if each.shape[0] > 1 else 0 for each in table)
        strides = (depth_image, seen_image, table[1].stride(1))
    _window[(rows, heads, triton.cdiv(positions, tile["QUERIES"]))](
        *cached, *table, out_RLX, *sizes, positions, first, *strides, scale, **shape, TREE=tree is not None, **tile
    )
    return out_RLX


def _token_tile(programs: int, slots: int, width_pow2: int) -> dict[str, int]:
    """Cache slots that a program of one position takes at once, and its launch options."""
    # Few programs: wide tiles, so that a long cache takes few turns. Many: small ones, so that many fit into a
    # multiprocessor (an H100 has 132); one warp is the fastest there, but not over wide heads. In between the length
    # of the cache decides.
    if programs <= 132:
        warps = 16 if slots > 320 else 8
    elif width_pow2 > 64:
        warps = 4
    elif programs <= _SOME:
        warps = 8 if slots > 320 else 4
    else:
        warps = 1
    block = min(2**11 * warps // width_pow2, 32 * warps, max(triton.next_power_of_2(slots), 16))
    return dict(BLOCK=block, num_warps=warps, num_stages=1)


def _window_tile(positions: int, width_pow2: int, dtype: torch.dtype) -> dict[str, int]:
    """Queries and cache slots that a program of a window or a tree takes at once, and its launch options."""
    if dtype == torch.float32:
        return dict(QUERIES=16, BLOCK=32, num_warps=8, num_stages=1)
    queries = 32 if positions > 16 and width_pow2 <= 64 else 16
    return dict(QUERIES=queries, BLOCK=64, num_warps=4, num_stages=2)
