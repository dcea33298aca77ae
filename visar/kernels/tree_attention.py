"""Attention of a drafted tree's nodes over the cache and their ancestors, one kernel a layer.

The window's kernel of visar/kernels/attention.py with two differences: a table says which slots of the tree a node
sees, and a node's place is its depth below the root, not its slot.

B images, R rows (2B when guided), M nodes, L = M + 1 slots, N heads, E head width, S slots of the cache.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.kernels.attention import NOTHING, absorb, rotated, turns, window_tile


@triton.jit
def _tree(
    qkv_ptr, keys_ptr, values_ptr, rope_ptr, length_ptr, valid_ptr, depth_ptr, seen_ptr, out_ptr,
    ahead, batch, slots, places, positions, first, depth_image, seen_image, seen_node, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr, MASKED: tl.constexpr,
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
    depths = depth_ptr + image * depth_image + first

    # This program's nodes: node `first + i` is at cache slot root + first + i and stands at its depth below the root.
    node_Q = begin + tl.arange(0, QUERIES)
    own_Q = node_Q < positions
    seen_rows_Q = seen_ptr + image * seen_image + (first + node_Q).to(tl.int64) * seen_node
    inside_QE = own_Q[:, None] & real[None, :]
    place_Q = tl.maximum(root + tl.load(depths + node_Q, mask=own_Q, other=0).to(tl.int32), 0)
    cos_QE, sin_QE = turns(rope_ptr, place_Q, e, inside_QE, places, WIDTH)
    offset_QE = node_Q[:, None] * stride + e[None, :]
    partner_QE = node_Q[:, None] * stride + (e ^ 1)[None, :]
    query_QE = rotated(new_query, offset_QE, partner_QE, inside_QE, cos_QE, sin_QE, sign)
    key_QE = rotated(new_key, offset_QE, partner_QE, inside_QE, cos_QE, sin_QE, sign)
    value_QE = tl.load(new_value + offset_QE, mask=inside_QE, other=0.0)
    target_QE = line + (root + first + node_Q)[:, None] * WIDTH + e[None, :]
    tl.store(keys_ptr + target_QE, key_QE, mask=inside_QE)
    tl.store(values_ptr + target_QE, value_QE, mask=inside_QE)

    top_Q = tl.full([QUERIES], NOTHING, tl.float32)
    total_Q = tl.zeros([QUERIES], tl.float32)
    out_QE = tl.zeros([QUERIES, WIDTH_POW2], tl.float32)
    for start in tl.range(0, root + first, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        known = slot < root + first
        cell = line + slot[:, None] * WIDTH + e[None, :]
        inside = known[:, None] & real[None, :]
        key = tl.load(keys_ptr + cell, mask=inside, other=0.0)
        value = tl.load(values_ptr + cell, mask=inside, other=0.0)
        if MASKED:
            known = known & (tl.load(valid + slot, mask=known, other=0) != 0)
        in_tree = known & (slot > root)
        ancestor = tl.load(
            seen_rows_Q[:, None] + (slot - root)[None, :], mask=own_Q[:, None] & in_tree[None, :], other=0
        )
        seen = (known & (slot <= root))[None, :] | (ancestor != 0)
        top_Q, total_Q, out_QE = absorb(query_QE, key, value, seen, scale, top_Q, total_Q, out_QE)

    # Nodes of earlier programs are rotated anew rather than read from what those write.
    for before in tl.range(0, begin, QUERIES):
        node_W = before + tl.arange(0, QUERIES)
        seen_W = node_W < positions
        inside_WE = seen_W[:, None] & real[None, :]
        place_W = tl.maximum(root + tl.load(depths + node_W, mask=seen_W, other=0).to(tl.int32), 0)
        cos_WE, sin_WE = turns(rope_ptr, place_W, e, inside_WE, places, WIDTH)
        offset_WE = node_W[:, None] * stride + e[None, :]
        partner_WE = node_W[:, None] * stride + (e ^ 1)[None, :]
        key_WE = rotated(new_key, offset_WE, partner_WE, inside_WE, cos_WE, sin_WE, sign)
        value_WE = tl.load(new_value + offset_WE, mask=inside_WE, other=0.0)
        if MASKED:
            seen_W = seen_W & (tl.load(valid + root + first + node_W, mask=seen_W, other=0) != 0)
        ancestor = tl.load(
            seen_rows_Q[:, None] + (first + node_W)[None, :], mask=own_Q[:, None] & seen_W[None, :], other=0
        )
        top_Q, total_Q, out_QE = absorb(query_QE, key_WE, value_WE, ancestor != 0, scale, top_Q, total_Q, out_QE)

    seen_Q = own_Q
    if MASKED:
        seen_Q = seen_Q & (tl.load(valid + root + first + node_Q, mask=own_Q, other=0) != 0)
    ancestor = tl.load(
        seen_rows_Q[:, None] + (first + node_Q)[None, :], mask=own_Q[:, None] & seen_Q[None, :], other=0
    )
    top_Q, total_Q, out_QE = absorb(query_QE, key_QE, value_QE, ancestor != 0, scale, top_Q, total_Q, out_QE)
    out_QE = out_QE / tl.maximum(total_Q, 1.0e-30)[:, None]
    result = out_ptr + (row * positions + node_Q)[:, None] * (HEADS * WIDTH) + head * WIDTH + e[None, :]
    tl.store(result, out_QE.to(value_QE.dtype), mask=inside_QE)


def tree_attention(
    qkv_RLX: Tensor,
    keys_RNSE: Tensor,
    values_RNSE: Tensor,
    rope_PE2: Tensor,
    length: Tensor,
    *,
    ahead: int,
    batch: int,
    key_valid_RS: Tensor | None,
    depth_BL: Tensor,
    seen_BLL: Tensor,
    first: int = 0,
) -> Tensor:
    """Attention of the slots `first` ... of a drafted tree over the cache and their ancestors; they enter the cache.

    The plain counterpart is `visar.generators.raster.Attention` with the mask of `visar.cache.visible_tree`.

    Args:
        depth_BL, seen_BLL: of all slots up to the last one here, see visar/tree.py; may be expanded.
        first: slots before it are in the cache already, slot i at root + i.
        The others: see `visar.kernels.attention.cached_attention`.

    Returns: [R, L - first, N E], before the output matrix.
    """
    rows, positions, _ = qkv_RLX.shape
    heads, slots, width = keys_RNSE.shape[1:]
    out_RLX = qkv_RLX.new_empty(rows, positions, heads * width)
    valid = key_valid_RS.view(torch.uint8) if key_valid_RS is not None else qkv_RLX
    seen = seen_BLL.view(torch.uint8)
    assert seen.stride(2) == 1 and depth_BL.stride(1) == 1
    width_pow2 = max(triton.next_power_of_2(width), 16)
    tile = window_tile(positions, width_pow2, qkv_RLX.dtype)
    _tree[(rows, heads, triton.cdiv(positions, tile["QUERIES"]))](
        qkv_RLX,
        keys_RNSE,
        values_RNSE,
        rope_PE2,
        length,
        valid,
        depth_BL,
        seen,
        out_RLX,
        ahead,
        batch,
        slots,
        rope_PE2.shape[0],
        positions,
        first,
        depth_BL.stride(0) if depth_BL.shape[0] > 1 else 0,
        seen.stride(0) if seen.shape[0] > 1 else 0,
        seen.stride(1),
        width**-0.5,
        HEADS=heads,
        WIDTH=width,
        WIDTH_POW2=width_pow2,
        RAGGED=length.shape[0] > 1,
        MASKED=key_valid_RS is not None,
        **tile,
    )
    return out_RLX
