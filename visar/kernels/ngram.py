"""Distributions of the n-gram drafter: every token so far votes for itself, more where its neighbours match.

One program per node of a tree's level, or the end of a chain. The plain counterpart is
`visar.samplers.drafters.ngram.NgramDrafting`; votes are summed in any order.

B images, M nodes, W nodes asked for, T positions with slack, V codes.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.kernels.distributions import codes_of, tile


@triton.jit
def _ngram(
    tokens_ptr, length_ptr, draft_ptr, parents_ptr, probs_ptr,
    token_image, draft_image, parents_image, num_tokens, columns, codes, first, depth, weight,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    probs = probs_ptr + (image * tl.num_programs(1) + node) * codes
    tl.store(probs + code, tl.zeros([ROWS, COLUMNS], tl.float32), mask=inside)

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
    # Drafts from the node up to the root stand where the tree has them, though nothing has committed them.
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
    # The row of the distribution in memory is the counter: it must be zero before the votes, and read behind them.
    tl.debug_barrier()
    tl.atomic_add(probs + token, vote, mask=real & (position < here))
    tl.debug_barrier()
    votes = tl.load(probs + code, mask=inside, other=0.0, cache_modifier=".cg")
    votes = tl.where(inside, votes + 1.0 / codes, 0.0)
    tl.store(probs + code, votes / tl.sum(votes), mask=inside)


def ngram_probs(
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
    """Distributions [B, W, V] of `visar.samplers.drafters.ngram.NgramDrafting` behind W nodes.

    Args:
        draft_BM, parents_BM: the tree's tokens and parents; None: the drafts are one chain, whose end is asked for.
        first: slot of the first of the W nodes; depth: of all of them.
    """
    batch = tokens_BT.shape[0]
    probs_BWV = torch.empty(batch, nodes, vocab_size, dtype=torch.float32, device=tokens_BT.device)
    parents = draft_BM if parents_BM is None else parents_BM
    _ngram[(batch, nodes)](
        tokens_BT,
        length_B,
        draft_BM,
        parents,
        probs_BWV,
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
    return probs_BWV
