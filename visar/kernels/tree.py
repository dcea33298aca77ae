"""Trees of drafts: attention among their nodes, how they are drafted, and the way through them.

The plain counterparts are in visar/cache.py, visar/samplers/trees.py, visar/samplers/relaxed.py and
visar/samplers/drafters.py. The same uniform numbers are used in the same way; sums are rounded in another order.

B images, R rows (2B when guided), M nodes, L = M + 1 slots, D depth, W nodes of a level, k chains, N heads, E head
width, V codes, C candidates.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.cache import KVCache
from visar.kernels.attention import _NOTHING, _absorb, _rotated, _turns
from visar.kernels.elementwise import add_rms_norm_, silu_multiply
from visar.kernels.verify import at, chance_of, codes_of, inverted, likeliest, residual_of, tile
from visar.layers import RMSNorm

if TYPE_CHECKING:
    from visar.generators.raster import Block


# ---------------------------------------------------------------------------------------------------------- attention
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
    cos_QE, sin_QE = _turns(rope_ptr, place_Q, e, inside_QE, places, WIDTH)
    offset_QE = node_Q[:, None] * stride + e[None, :]
    partner_QE = node_Q[:, None] * stride + (e ^ 1)[None, :]
    query_QE = _rotated(new_query, offset_QE, partner_QE, inside_QE, cos_QE, sin_QE, sign)
    key_QE = _rotated(new_key, offset_QE, partner_QE, inside_QE, cos_QE, sin_QE, sign)
    value_QE = tl.load(new_value + offset_QE, mask=inside_QE, other=0.0)
    target_QE = line + (root + first + node_Q)[:, None] * WIDTH + e[None, :]
    tl.store(keys_ptr + target_QE, key_QE, mask=inside_QE)
    tl.store(values_ptr + target_QE, value_QE, mask=inside_QE)

    top_Q = tl.full([QUERIES], _NOTHING, tl.float32)
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
        top_Q, total_Q, out_QE = _absorb(query_QE, key, value, seen, scale, top_Q, total_Q, out_QE)

    # Nodes of earlier programs are rotated anew rather than read from what those write.
    for before in tl.range(0, begin, QUERIES):
        node_W = before + tl.arange(0, QUERIES)
        seen_W = node_W < positions
        inside_WE = seen_W[:, None] & real[None, :]
        place_W = tl.maximum(root + tl.load(depths + node_W, mask=seen_W, other=0).to(tl.int32), 0)
        cos_WE, sin_WE = _turns(rope_ptr, place_W, e, inside_WE, places, WIDTH)
        offset_WE = node_W[:, None] * stride + e[None, :]
        partner_WE = node_W[:, None] * stride + (e ^ 1)[None, :]
        key_WE = _rotated(new_key, offset_WE, partner_WE, inside_WE, cos_WE, sin_WE, sign)
        value_WE = tl.load(new_value + offset_WE, mask=inside_WE, other=0.0)
        if MASKED:
            seen_W = seen_W & (tl.load(valid + root + first + node_W, mask=seen_W, other=0) != 0)
        ancestor = tl.load(
            seen_rows_Q[:, None] + (first + node_W)[None, :], mask=own_Q[:, None] & seen_W[None, :], other=0
        )
        top_Q, total_Q, out_QE = _absorb(query_QE, key_WE, value_WE, ancestor != 0, scale, top_Q, total_Q, out_QE)

    seen_Q = own_Q
    if MASKED:
        seen_Q = seen_Q & (tl.load(valid + root + first + node_Q, mask=own_Q, other=0) != 0)
    ancestor = tl.load(
        seen_rows_Q[:, None] + (first + node_Q)[None, :], mask=own_Q[:, None] & seen_Q[None, :], other=0
    )
    top_Q, total_Q, out_QE = _absorb(query_QE, key_QE, value_QE, ancestor != 0, scale, top_Q, total_Q, out_QE)
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
    float32 = qkv_RLX.dtype == torch.float32
    width_pow2 = max(triton.next_power_of_2(width), 16)
    queries = 32 if positions > 16 and width_pow2 <= 64 and not float32 else 16
    _tree[(rows, heads, triton.cdiv(positions, queries))](
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
        QUERIES=queries,
        BLOCK=32 if float32 else 64,
        num_warps=8 if float32 else 4,
        num_stages=1 if float32 else 2,
    )
    return out_RLX


def decode_tree(
    layers: Sequence["Block"],
    last_norm: RMSNorm,
    x_RLD: Tensor,
    cache: KVCache,
    rope_PE2: Tensor,
    length: Tensor,
    key_valid_RS: Tensor | None,
    depth_BL: Tensor,
    seen_BLL: Tensor,
    *,
    ahead: int,
    batch: int,
) -> Tensor:
    """Normed last hidden vectors [R, L, D] of a tree's slots; see `visar.kernels.decoder.decode_layers`."""
    shape, residual_MD = x_RLD.shape[:2], x_RLD.flatten(0, 1)
    place: dict = dict(ahead=ahead, batch=batch, key_valid_RS=key_valid_RS, depth_BL=depth_BL, seen_BLL=seen_BLL)
    norms = [norm for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)] + [last_norm]
    normed_MD = add_rms_norm_(residual_MD, None, norms[0].weight, norms[0].eps)
    for i, layer in enumerate(layers):
        after_attention, after_feed_forward = norms[2 * i + 1 : 2 * i + 3]
        qkv_RLX = layer.attention.wqkv(normed_MD).unflatten(0, shape)
        mixed_RLD = tree_attention(qkv_RLX, cache.keys[i], cache.values[i], rope_PE2, length, **place)
        delta_MD = layer.attention.wo(mixed_RLD.flatten(0, 1))
        normed_MD = add_rms_norm_(residual_MD, delta_MD, after_attention.weight, after_attention.eps)
        delta_MD = layer.feed_forward.w2(silu_multiply(layer.feed_forward.gate_and_up(normed_MD)))
        normed_MD = add_rms_norm_(residual_MD, delta_MD, after_feed_forward.weight, after_feed_forward.eps)
    return normed_MD.unflatten(0, shape)


@triton.jit
def _guide(
    logits_ptr, scale_ptr, length_ptr, depth_ptr, out_ptr, batch, positions, codes, depth_image,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    code = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = code < codes
    image = row // positions
    length = tl.load(length_ptr + (image if RAGGED else 0))
    depth = tl.load(depth_ptr + image * depth_image + row % positions)
    scale = tl.load(scale_ptr + length + depth)
    conditional = tl.load(logits_ptr + row * codes + code, mask=inside, other=0.0).to(tl.float32)
    null_row = row + batch * positions
    null = tl.load(logits_ptr + null_row * codes + code, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * codes + code, null + (conditional - null) * scale, mask=inside)


def guide_tree(logits_RLV: Tensor, scale_N: Tensor, length: Tensor, depth_BL: Tensor) -> Tensor:
    """Guided float32 logits [B, L, V] of a doubled batch; slot j is depth_BL[b, j] behind the committed tokens."""
    rows, positions, codes = logits_RLV.shape
    out_BLV = logits_RLV.new_empty(rows // 2, positions, codes, dtype=torch.float32)
    block = min(triton.next_power_of_2(codes), 2048)
    _guide[(rows // 2 * positions, triton.cdiv(codes, block))](
        logits_RLV.contiguous(),
        scale_N,
        length,
        depth_BL,
        out_BLV,
        rows // 2,
        positions,
        codes,
        depth_BL.stride(0) if depth_BL.shape[0] > 1 else 0,
        RAGGED=length.shape[0] > 1,
        BLOCK=block,
        num_warps=4,
    )
    return out_BLV


@triton.jit
def _move(
    keys_ptr, values_ptr, length_ptr, path_ptr, ahead, batch, rows, slots, steps, path_image,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_POW2: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    image = (line // HEADS) % rows % batch
    root = tl.load(length_ptr + image) + ahead
    e = tl.arange(0, WIDTH_POW2)
    real = e < WIDTH
    keys = keys_ptr + line * slots * WIDTH + e
    values = values_ptr + line * slots * WIDTH + e
    # A node's slot is never below its depth, and slots rise along the path: no entry is overwritten before it is read.
    for step in range(steps):
        source = (root + tl.load(path_ptr + image * path_image + step)) * WIDTH
        target = (root + 1 + step) * WIDTH
        key = tl.load(keys + source, mask=real)
        value = tl.load(values + source, mask=real)
        tl.store(keys + target, key, mask=real)
        tl.store(values + target, value, mask=real)


def move_path(keys: Tensor, values: Tensor, length_B: Tensor, path_BD: Tensor, *, ahead: int) -> None:
    """Moves the cache entries of a path's nodes behind the root's: node path_BD[b, d] goes to slot root + 1 + d.

    Args:
        keys, values: [layers, R, N, S, E], contiguous.
        length_B: int64 committed tokens; root = length + ahead.
        path_BD: int64 slots of the tree, rising from d + 1 or more on; any slot behind the last node.
    """
    layers, rows, heads, slots, width = keys.shape
    _move[(layers * rows * heads,)](
        keys,
        values,
        length_B,
        path_BD,
        ahead,
        length_B.shape[0],
        rows,
        slots,
        path_BD.shape[1],
        path_BD.stride(0),
        HEADS=heads,
        WIDTH=width,
        WIDTH_POW2=triton.next_power_of_2(width),
        num_warps=1,
    )


# ----------------------------------------------------------------------------------------------------------- drafting
@triton.jit
def _siblings(
    law_ptr, children_ptr, uniform_ptr, q_ptr, tokens_ptr, codes, nodes, law_image, law_row, uniform_image,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    parent = tl.program_id(1)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    law = tl.load(law_ptr + image * law_image + parent * law_row + code, mask=inside, other=0.0)
    first = tl.load(children_ptr + 2 * parent)
    count = tl.load(children_ptr + 2 * parent + 1)
    for node in range(first, first + count):
        tl.store(q_ptr + (image * nodes + node) * codes + code, law, mask=inside)
        token = inverted(law, tl.load(uniform_ptr + image * uniform_image + node), ROWS, COLUMNS)
        tl.store(tokens_ptr + image * nodes + node, token)
        mass = tl.where(code == token, 0.0, law)
        mass = tl.where(tl.sum(mass) > 0, mass, law)
        law = mass / tl.sum(mass)


def draw_siblings(law_BWV: Tensor, children_W2: Tensor, uniform_BM: Tensor, q_BMV: Tensor, tokens_BM: Tensor) -> None:
    """Draws the children of a level's nodes without replacement, and notes the law of each.

    Args:
        law_BWV: the level's laws; may be expanded over the nodes.
        children_W2: int64, the first child of every node and the number of its children.
        uniform_BM: one uniform number a node of the tree.
        q_BMV, tokens_BM: written at the children's places.
    """
    batch, width, codes = law_BWV.shape
    if law_BWV.stride(2) != 1:
        law_BWV = law_BWV.contiguous()
    _siblings[(batch, width)](
        law_BWV,
        children_W2,
        uniform_BM,
        q_BMV,
        tokens_BM,
        codes,
        tokens_BM.shape[1],
        law_BWV.stride(0),
        law_BWV.stride(1),
        uniform_BM.stride(0),
        **tile(codes),
    )


@triton.jit
def _ngram(
    tokens_ptr, length_ptr, draft_ptr, parents_ptr, law_ptr,
    token_image, draft_image, parents_image, num_tokens, columns, codes, first, depth, weight,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    law = law_ptr + (image * tl.num_programs(1) + node) * codes
    tl.store(law + code, tl.zeros([ROWS, COLUMNS], tl.float32), mask=inside)

    # Tokens of every position, of its left and of its upper neighbour, and the neighbours of the position asked for.
    length = tl.load(length_ptr + image)
    here = tl.minimum(length + depth, num_tokens - 1)
    position = tl.arange(0, POSITIONS)
    real = position < num_tokens
    committed = tokens_ptr + image * token_image
    token = tl.load(committed + position, mask=real, other=0)
    left = tl.load(committed + position - 1, mask=real & (position > 0), other=0)
    above = tl.load(committed + position - columns, mask=real & (position >= columns), other=0)
    left_here = tl.load(committed + tl.maximum(here - 1, 0))
    above_here = tl.load(committed + tl.maximum(here - columns, 0))
    slot = (first + node).to(tl.int64)
    for step in range(depth):
        place = length + depth - 1 - step
        if TREE:
            drafted = tl.load(draft_ptr + image * draft_image + slot - 1)
            slot = tl.load(parents_ptr + image * parents_image + slot - 1)
        else:
            drafted = tl.load(draft_ptr + image * draft_image + depth - 1 - step)
        token = tl.where(position == place, drafted, token)
        left = tl.where(position - 1 == place, drafted, left)
        above = tl.where(position - columns == place, drafted, above)
        left_here = tl.where(tl.maximum(here - 1, 0) == place, drafted, left_here)
        above_here = tl.where(tl.maximum(here - columns, 0) == place, drafted, above_here)
    left = tl.where(position % columns == 0, codes, left)
    above = tl.where(position < columns, codes, above)
    left_here = tl.where(here % columns == 0, codes, left_here)
    above_here = tl.where(here < columns, codes, above_here)
    vote = (1.0 + weight * (left == left_here).to(tl.float32)) * (1.0 + weight * (above == above_here).to(tl.float32))
    tl.debug_barrier()
    tl.atomic_add(law + token, vote, mask=real & (position < here))
    tl.debug_barrier()
    votes = tl.load(law + code, mask=inside, other=0.0, cache_modifier=".cg")
    votes = tl.where(inside, votes + 1.0 / codes, 0.0)
    tl.store(law + code, votes / tl.sum(votes), mask=inside)


def ngram_laws(
    tokens_BT: Tensor,
    length_B: Tensor,
    draft_BM: Tensor,
    parents_BM: Tensor | None,
    *,
    first: int,
    nodes: int,
    depth: int,
    num_tokens: int,
    columns: int,
    vocab_size: int,
    weight: float,
) -> Tensor:
    """Laws [B, W, V] of `visar.samplers.drafters.NgramDrafting` behind W nodes.

    Args:
        draft_BM, parents_BM: the tree's tokens and parents; None: the drafts are one chain, whose end is asked for.
        first: slot of the first of the W nodes; depth: of all of them.
    """
    batch = tokens_BT.shape[0]
    law_BWV = torch.empty(batch, nodes, vocab_size, device=tokens_BT.device)
    parents = draft_BM if parents_BM is None else parents_BM
    _ngram[(batch, nodes)](
        tokens_BT,
        length_B,
        draft_BM,
        parents,
        law_BWV,
        tokens_BT.stride(0),
        draft_BM.stride(0),
        parents.stride(0) if parents.shape[0] > 1 else 0,
        num_tokens,
        columns,
        vocab_size,
        first,
        depth,
        weight,
        POSITIONS=triton.next_power_of_2(num_tokens),
        TREE=parents_BM is not None,
        **tile(vocab_size),
    )
    return law_BWV


@triton.jit
def _candidates(
    law_ptr, score_ptr, of_slot_ptr, token_ptr, parent_ptr, scores_ptr,
    codes, law_image, law_row, children, begin, offset, candidates, grown,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    code = codes_of(ROWS, COLUMNS)
    law = tl.load(law_ptr + image * law_image + node * law_row + code, mask=code < codes, other=-1.0)
    if ROOT:
        score = 0.0
        parent = -1
    else:
        score = tl.load(score_ptr + image * children + node)
        parent = tl.load(of_slot_ptr + image * (grown + 1) + begin + node)
    for child in range(children):
        best = tl.max(law)
        token = likeliest(law, code)
        place = image * candidates + offset + node * children + child
        tl.store(token_ptr + place, token)
        tl.store(parent_ptr + place, parent)
        # The small fine for depth lets a parent win the tie with a child that the drafter is sure of.
        tl.store(scores_ptr + place, score + tl.log(tl.maximum(best, 1e-30)) - 1e-3)
        law = tl.where(code == token, -1.0, law)


@triton.jit
def _ranks(scores_ptr, count, index, score, CHUNK: tl.constexpr):
    """How many of the scores come before each one: larger ones, and equal ones with a lower index."""
    rank = tl.zeros_like(index)
    for start in range(0, count, CHUNK):
        other = start + tl.arange(0, CHUNK)
        others = tl.load(scores_ptr + other, mask=other < count, other=float("-inf"))
        first = (others[None, :] > score[:, None]) | (
            (others[None, :] == score[:, None]) & (other[None, :] < index[:, None])
        )
        rank += tl.sum((first & (other < count)[None, :]).to(tl.int32), axis=1)
    return rank


@triton.jit
def _expand(
    scores_ptr, token_ptr, score_ptr, of_slot_ptr, tokens_ptr, parents_ptr, depth_ptr, seen_ptr,
    width, children, chosen, begin, offset, candidates, grown, level,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, COUNT)
    slot = tl.arange(0, SLOTS)
    count = width * children
    real = index < count
    here = image * candidates + offset
    score = tl.load(scores_ptr + here + index, mask=real, other=float("-inf"))
    taken = real & (_ranks(scores_ptr + here, count, index, score, 32) < chosen)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    new = begin + width + place
    slots = grown + 1
    tl.store(score_ptr + image * children + place, score, mask=taken)
    token = tl.load(token_ptr + here + index, mask=taken, other=0)
    tl.store(tokens_ptr + image * grown + new - 1, token, mask=taken)
    tl.store(parents_ptr + image * grown + new - 1, (begin + index // children).to(tl.int64), mask=taken)
    tl.store(of_slot_ptr + image * slots + new, offset + index, mask=taken)
    tl.store(depth_ptr + image * slots + new, tl.zeros([COUNT], tl.int64) + level, mask=taken)
    seen = seen_ptr + image * slots * slots + slot
    if ROOT:
        tl.store(of_slot_ptr + image * slots, -1)
        tl.store(depth_ptr + image * slots, 0)
        tl.store(seen, (slot == 0).to(tl.uint8), mask=slot < slots)
    for child in range(chosen):
        own = begin + width + child
        above = begin + tl.sum(tl.where(taken & (place == child), index, 0), axis=0) // children
        if ROOT:
            line = (slot == 0).to(tl.uint8)
        else:
            line = tl.load(seen + above * slots, mask=slot < slots, other=0)
        tl.store(seen + own * slots, tl.where(slot == own, 1, line).to(tl.uint8), mask=slot < slots)


@triton.jit
def _prune(
    scores_ptr, token_ptr, parent_ptr, kept_ptr, tokens_ptr, parents_ptr, depth_ptr, seen_ptr,
    candidates, nodes, deepest, COUNT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, COUNT)
    real = index < candidates
    here = image * candidates
    score = tl.load(scores_ptr + here + index, mask=real, other=float("-inf"))
    taken = real & (_ranks(scores_ptr + here, candidates, index, score, 32) < nodes)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(kept_ptr + here + index, place + 1, mask=taken)
    slots = nodes + 1
    slot = tl.arange(0, SLOTS)
    seen = seen_ptr + image * slots * slots
    for row in range(slots):
        tl.store(seen + row * slots + slot, tl.zeros([SLOTS], tl.uint8), mask=slot < slots)
    tl.debug_barrier()
    parent = tl.load(parent_ptr + here + index, mask=taken, other=-1)
    below = tl.load(kept_ptr + here + tl.maximum(parent, 0), mask=taken & (parent >= 0), other=0)
    token = tl.load(token_ptr + here + index, mask=taken, other=0)
    tl.store(tokens_ptr + image * nodes + place, token, mask=taken)
    tl.store(parents_ptr + image * nodes + place, below.to(tl.int64), mask=taken)
    tl.debug_barrier()
    current = slot.to(tl.int64)
    depth = tl.zeros([SLOTS], tl.int64)
    for _ in range(deepest + 1):
        tl.store(seen + slot * slots + current, tl.full([SLOTS], 1, tl.uint8), mask=slot < slots)
        up = (slot < slots) & (current > 0)
        depth += up.to(tl.int64)
        current = tl.load(parents_ptr + image * nodes + current - 1, mask=up, other=0)
    tl.store(depth_ptr + image * slots + slot, depth, mask=slot < slots)


class Growth:
    """Buffers of a tree that grows as `visar.samplers.trees.draft_dynamic` says, for one pass.

    Args:
        batch, depth, children: B, D, and children of an expanded node.
        device: of the buffers.
    """

    def __init__(self, batch: int, depth: int, children: int, device: torch.device) -> None:
        self.batch, self.depth, self.children, self.device = batch, depth, children, device
        self.width, self.begin, self.offset, self.level = 1, 0, 0, 0
        self.grown = (depth - 1) * children
        self.candidates = children + self.grown * children
        self.token_BC, self.parent_BC = self._new(self.candidates), self._new(self.candidates)
        self.scores_BC, self.score_BW = (torch.empty(batch, n, device=device) for n in (self.candidates, children))
        self.of_slot_BL, self.depth_BL = self._new(self.grown + 1), self._new(self.grown + 1)
        self.tokens_BM, self.parents_BM = self._new(self.grown), self._new(self.grown)
        self.seen_BLL = torch.empty(batch, self.grown + 1, self.grown + 1, dtype=torch.bool, device=device)

    def _new(self, length: int) -> Tensor:
        return torch.empty(self.batch, length, dtype=torch.int64, device=self.device)

    def add(self, law_BWV: Tensor) -> None:
        """Adds the likeliest children of the nodes expanded last (at first: of the root) to the candidates."""
        law_BWV = law_BWV if law_BWV.stride(2) == 1 else law_BWV.contiguous()
        codes = law_BWV.shape[-1]
        _candidates[(self.batch, self.width)](
            law_BWV,
            self.score_BW,
            self.of_slot_BL,
            self.token_BC,
            self.parent_BC,
            self.scores_BC,
            codes,
            law_BWV.stride(0),
            law_BWV.stride(1),
            self.children,
            self.begin,
            self.offset,
            self.candidates,
            self.grown,
            ROOT=self.level == 0,
            **tile(codes),
        )
        self.level += 1

    def expand(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
        """Takes the likeliest of the candidates added last into the tree.

        Returns: tokens_BM, parents_BM, depth_BL and seen_BLL of visar/tree.py, and the slot of the first new node.
        """
        count = self.width * self.children
        _expand[(self.batch,)](
            self.scores_BC,
            self.token_BC,
            self.score_BW,
            self.of_slot_BL,
            self.tokens_BM,
            self.parents_BM,
            self.depth_BL,
            self.seen_BLL.view(torch.uint8),
            self.width,
            self.children,
            self.children,
            self.begin,
            self.offset,
            self.candidates,
            self.grown,
            self.level,
            COUNT=triton.next_power_of_2(count),
            SLOTS=triton.next_power_of_2(self.grown + 1),
            ROOT=self.level == 1,
            num_warps=4,
        )
        self.begin, self.offset, self.width = self.begin + self.width, self.offset + count, self.children
        nodes = self.begin + self.width - 1
        tree = (
            self.tokens_BM[:, :nodes],
            self.parents_BM[:, :nodes],
            self.depth_BL[:, : nodes + 1],
            self.seen_BLL[:, : nodes + 1, : nodes + 1],
        )
        return tree, self.begin

    def pruned(self, nodes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tree of the likeliest candidates of all levels, as in `expand`."""
        nodes = min(nodes, self.candidates)
        tokens_BM, parents_BM, depth_BL = self._new(nodes), self._new(nodes), self._new(nodes + 1)
        seen_BLL = torch.empty(self.batch, nodes + 1, nodes + 1, dtype=torch.bool, device=self.device)
        _prune[(self.batch,)](
            self.scores_BC,
            self.token_BC,
            self.parent_BC,
            self._new(self.candidates),
            tokens_BM,
            parents_BM,
            depth_BL,
            seen_BLL.view(torch.uint8),
            self.candidates,
            nodes,
            self.depth,
            COUNT=triton.next_power_of_2(self.candidates),
            SLOTS=triton.next_power_of_2(nodes + 1),
            num_warps=8,
        )
        return tokens_BM, parents_BM, depth_BL, seen_BLL


# ------------------------------------------------------------------------------------------------------------ judging
@triton.jit
def _ended(
    law, slots_D, tokens_D, kept, judged, refused, emit_ptr, slots_ptr, tokens_ptr, kept_ptr, judged_ptr, refused_ptr,
    law_ptr, image, depth, codes, step, code, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Draws the token after the accepted nodes and writes the way, as visar.samplers.trees.finish."""
    tl.store(law_ptr + image * codes + code, law, mask=inside)
    emitted = inverted(law, tl.load(emit_ptr + image), ROWS, COLUMNS)
    tl.store(slots_ptr + image * depth + step, slots_D, mask=step < depth)
    tokens = tl.where(step == kept, emitted, tokens_D)
    tl.store(tokens_ptr + image * (depth + 1) + step, tokens, mask=step < depth + 1)
    tl.store(kept_ptr + image, kept)
    tl.store(judged_ptr + image, judged)
    tl.store(refused_ptr + image, refused.to(tl.uint8))


@triton.jit
def _walk(
    p_ptr, q_ptr, draft_ptr, parents_ptr, accept_ptr, emit_ptr, table_ptr,
    slots_ptr, tokens_ptr, kept_ptr, judged_ptr, refused_ptr, law_ptr,
    codes, nodes, depth, draft_image, parents_image, accept_image, neighbours, max_moved, max_ratio,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, NEAR: tl.constexpr,
    DRAWN: tl.constexpr, MOVED: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    step = tl.arange(0, STEPS)
    slots_D = tl.zeros([STEPS], tl.int64)
    tokens_D = tl.zeros([STEPS], tl.int64)
    rows = p_ptr + image * (nodes + 1) * codes + code
    law = tl.load(rows, mask=inside, other=0.0)
    current = tl.full([], 0, tl.int64)
    kept = tl.full([], 0, tl.int64)
    judged = tl.full([], 0, tl.int64)
    refused = tl.full([], 0, tl.int32)
    for node in range(nodes):
        parent = tl.load(parents_ptr + image * parents_image + node)
        if parent == current:
            token = tl.load(draft_ptr + image * draft_image + node)
            accept = tl.load(accept_ptr + image * accept_image + node)
            if MOVED or RATIO:
                # The nearest codes' probability goes to the draft; the row of the final law holds it meanwhile.
                law_row = law_ptr + image * codes
                own = at(law, code, token)
                tl.store(law_row + code, law, mask=inside)
                tl.debug_barrier()
                rank = tl.arange(0, NEAR)
                listed = rank < neighbours
                near = tl.load(table_ptr + token * neighbours + rank, mask=listed, other=0)
                moved = tl.cumsum(tl.load(law_row + near, mask=listed, other=0.0, cache_modifier=".cg"), axis=0)
                allowed = listed
                if MOVED:
                    allowed = allowed & (moved <= max_moved)
                if RATIO:
                    allowed = allowed & (moved <= (max_ratio - 1) * own)
                tl.debug_barrier()
                tl.store(law_row + near, tl.zeros([NEAR], tl.float32), mask=allowed)
                tl.debug_barrier()
                law = tl.load(law_row + code, mask=inside, other=0.0, cache_modifier=".cg")
                law = tl.where(code == token, own + tl.max(tl.where(allowed, moved, 0.0), axis=0), law)
                tl.debug_barrier()
            chance = at(law, code, token)
            if DRAWN:
                q = tl.load(q_ptr + (image * nodes + node) * codes + code, mask=inside, other=0.0)
                chance = chance_of(chance, at(q, code, token))
                rest = residual_of(law, q)
            else:
                others = tl.where(code == token, 0.0, law)
                rest = tl.where(tl.sum(others) > 0, others, law)
            slot = tl.where(accept < chance, node + 1, 0)
            accepted = slot > 0
            behind = tl.load(rows + (node + 1) * codes, mask=inside & accepted, other=0.0)
            law = tl.where(accepted, behind, rest / tl.sum(rest))
            mark = accepted & (step == kept)
            slots_D = tl.where(mark, slot, slots_D)
            tokens_D = tl.where(mark, token, tokens_D)
            current = tl.where(accepted, slot, current)
            kept += accepted.to(tl.int64)
            judged += 1
            refused = tl.where(accepted, 0, 1)
    _ended(
        law, slots_D, tokens_D, kept, judged, refused, emit_ptr, slots_ptr, tokens_ptr, kept_ptr, judged_ptr,
        refused_ptr, law_ptr, image, depth, codes, step, code, inside, ROWS, COLUMNS,
    )  # fmt: skip


def _way(batch: int, depth: int, codes: int, device: torch.device) -> tuple[Tensor, ...]:
    """slots_BD, tokens_BL, kept_B, judged_B, refused_B and law_BV of visar.samplers.trees.Walk, to be written."""
    slots_BD = torch.empty(batch, depth, dtype=torch.int64, device=device)
    tokens_BL = torch.empty(batch, depth + 1, dtype=torch.int64, device=device)
    kept_B, judged_B = (torch.empty(batch, dtype=torch.int64, device=device) for _ in range(2))
    refused_B = torch.empty(batch, dtype=torch.bool, device=device)
    return slots_BD, tokens_BL, kept_B, judged_B, refused_B, torch.empty(batch, codes, device=device)


def walk(
    p_BLV: Tensor,
    q_BMV: Tensor | None,
    draft_BM: Tensor,
    parents_BM: Tensor,
    accept_uniform_BM: Tensor,
    emit_uniform_B: Tensor,
    depth: int,
    *,
    neighbours_Vk: Tensor | None = None,
    max_moved: float | None = None,
    max_ratio: float | None = None,
) -> tuple[Tensor, ...]:
    """The way through a tree, one program an image: fields of `visar.samplers.trees.Walk`.

    Args:
        q_BMV: laws that the nodes were drawn from; None: they were chosen without a draw.
        neighbours_Vk, max_moved, max_ratio: of `visar.samplers.relaxed.relaxed_law`; None judges exactly.
        The others: see `visar.samplers.trees.walk`.
    """
    batch, slots, codes = p_BLV.shape
    way = _way(batch, depth, codes, p_BLV.device)
    slots_BD, tokens_BL, kept_B, judged_B, refused_B, law_BV = way
    near = 1 if neighbours_Vk is None else neighbours_Vk.shape[1]
    _walk[(batch,)](
        p_BLV.contiguous(),
        p_BLV if q_BMV is None else q_BMV.contiguous(),
        draft_BM,
        parents_BM,
        accept_uniform_BM,
        emit_uniform_B.contiguous(),
        p_BLV if neighbours_Vk is None else neighbours_Vk,
        slots_BD,
        tokens_BL,
        kept_B,
        judged_B,
        refused_B.view(torch.uint8),
        law_BV,
        codes,
        slots - 1,
        depth,
        draft_BM.stride(0),
        parents_BM.stride(0),
        accept_uniform_BM.stride(0),
        near,
        0.0 if max_moved is None else float(max_moved),
        0.0 if max_ratio is None else float(max_ratio),
        STEPS=triton.next_power_of_2(depth + 1),
        NEAR=triton.next_power_of_2(near),
        DRAWN=q_BMV is not None,
        MOVED=neighbours_Vk is not None and max_moved is not None,
        RATIO=neighbours_Vk is not None and max_ratio is not None,
        **tile(codes),
    )
    return way


@triton.jit
def _power(base, exponent, most):
    """base to a whole power, `most` at most."""
    out = base * 0.0 + 1.0
    for i in range(most):
        out = tl.where(i < exponent, out * base, out)
    return out


@triton.jit
def _chains(
    p_ptr, q_ptr, draft_ptr, accept_ptr, emit_ptr,
    slots_ptr, tokens_ptr, kept_ptr, judged_ptr, refused_ptr, law_ptr,
    codes, depth, chains, draft_image, accept_image,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    step = tl.arange(0, STEPS)
    chain = tl.arange(0, CHAINS)
    alive = (chain < chains).to(tl.int32)
    slots_D = tl.zeros([STEPS], tl.int64)
    tokens_D = tl.zeros([STEPS], tl.int64)
    rows = p_ptr + image * (depth * chains + 1) * codes
    law = tl.load(rows + code, mask=inside, other=0.0)
    current = tl.full([], 0, tl.int64)
    kept = tl.full([], 0, tl.int64)
    judged = tl.full([], 0, tl.int64)
    refused = tl.full([], 0, tl.int32)
    for level in range(depth):
        if refused == 0:
            eldest = tl.min(tl.where(alive != 0, chain, chains), axis=0)
            q_row = q_ptr + ((image * depth + level) * chains + eldest) * codes
            q = tl.load(q_row + code, mask=inside, other=0.0)
            drafts = tl.sum(alive, axis=0)
            low = tl.full([], 1.0, tl.float32)
            ratio = drafts.to(tl.float32)
            for _ in range(24):
                middle = (low + ratio) / 2
                beta = tl.sum(tl.minimum(q, law / middle))
                valid = 1 - _power(tl.maximum(1 - beta, 0.0), drafts, chains) <= middle * beta
                low = tl.where(valid, low, middle)
                ratio = tl.where(valid, middle, ratio)
            shared = tl.minimum(q, law / ratio)
            beta = tl.sum(shared)
            # The law is still a row of p: probabilities of the drafts are read from there.
            place = level * chains + chain
            real = chain < chains
            token = tl.load(draft_ptr + image * draft_image + place, mask=real, other=0)
            target = tl.load(rows + current * codes + token, mask=real, other=0.0) / ratio
            chance = chance_of(target, tl.load(q_row + token, mask=real, other=0.0))
            accept = tl.load(accept_ptr + image * accept_image + place, mask=real, other=2.0)
            accepted = (alive != 0) & (accept < chance)
            winner = tl.min(tl.where(accepted, chain, chains), axis=0)
            found = winner < chains
            judged += tl.sum(tl.where(chain <= winner, alive, 0), axis=0)
            weight = (1 - _power(tl.maximum(1 - beta, 0.0), drafts, chains)) / tl.maximum(beta, 1e-30)
            left = residual_of(law, shared * weight)
            slot = 1 + level * chains + winner
            behind = tl.load(rows + slot * codes + code, mask=inside & found, other=0.0)
            law = tl.where(found, behind, left / tl.sum(left))
            chosen = tl.sum(tl.where(chain == winner, token, 0), axis=0)
            mark = found & (step == level)
            slots_D = tl.where(mark, slot, slots_D)
            tokens_D = tl.where(mark, chosen, tokens_D)
            alive = tl.where(token == chosen, alive, 0)
            current = tl.where(found, slot, current).to(tl.int64)
            kept += found.to(tl.int64)
            refused = tl.where(found, 0, 1)
    _ended(
        law, slots_D, tokens_D, kept, judged, refused, emit_ptr, slots_ptr, tokens_ptr, kept_ptr, judged_ptr,
        refused_ptr, law_ptr, image, depth, codes, step, code, inside, ROWS, COLUMNS,
    )  # fmt: skip


def walk_chains(
    p_BLV: Tensor, q_BDkV: Tensor, draft_BM: Tensor, accept_uniform_BM: Tensor, emit_uniform_B: Tensor
) -> tuple[Tensor, ...]:
    """`visar.samplers.trees.walk_chains`, one program an image: fields of its Walk. M = D k nodes, level by level."""
    batch, depth, chains, codes = q_BDkV.shape
    way = _way(batch, depth, codes, p_BLV.device)
    slots_BD, tokens_BL, kept_B, judged_B, refused_B, law_BV = way
    _chains[(batch,)](
        p_BLV.contiguous(),
        q_BDkV,
        draft_BM,
        accept_uniform_BM,
        emit_uniform_B.contiguous(),
        slots_BD,
        tokens_BL,
        kept_B,
        judged_B,
        refused_B.view(torch.uint8),
        law_BV,
        codes,
        depth,
        chains,
        draft_BM.stride(0),
        accept_uniform_BM.stride(0),
        STEPS=triton.next_power_of_2(depth + 1),
        CHAINS=triton.next_power_of_2(chains),
        **tile(codes),
    )
    return way
