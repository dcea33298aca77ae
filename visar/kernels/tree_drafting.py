"""Drafting of trees: siblings drawn without replacement (static), or the likeliest candidates (dynamic).

Static trees draw as arXiv 2402.14160, one launch per level; dynamic ones grow as EAGLE-2, arXiv 2406.16858, two
launches per level and one in the end. The plain counterparts are `draft_static` and `draft_dynamic` of
visar/samplers/trees.py.

B images, M nodes, L = M + 1 slots, D depth, W nodes of a level, C candidates, V codes.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.kernels.distributions import codes_of, inverted, likeliest, tile


@triton.jit
def _siblings(
    probs_ptr, children_ptr, uniform_ptr, q_ptr, tokens_ptr, codes, nodes, probs_image, probs_row, uniform_image,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One node of the level: its children, each from the distribution without its elder siblings."""
    image = tl.program_id(0).to(tl.int64)
    parent = tl.program_id(1)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    probs = tl.load(probs_ptr + image * probs_image + parent * probs_row + code, mask=inside, other=0.0)
    first = tl.load(children_ptr + 2 * parent)
    count = tl.load(children_ptr + 2 * parent + 1)
    for node in range(first, first + count):
        tl.store(q_ptr + (image * nodes + node) * codes + code, probs, mask=inside)
        token = inverted(probs, tl.load(uniform_ptr + image * uniform_image + node), ROWS, COLUMNS)
        tl.store(tokens_ptr + image * nodes + node, token)
        mass = tl.where(code == token, 0.0, probs)
        mass = tl.where(tl.sum(mass) > 0, mass, probs)
        probs = mass / tl.sum(mass)


def draw_siblings(
    probs_BWV: Tensor, children_W2: Tensor, uniform_BM: Tensor, q_BMV: Tensor, tokens_BM: Tensor
) -> None:
    """Draws the children of a level's nodes without replacement, and notes the distribution of each.

    Args:
        probs_BWV: the level's distributions; may be expanded over the nodes.
        children_W2: int64, the first child of every node and the number of its children.
        uniform_BM: one uniform number per node of the tree.
        q_BMV, tokens_BM: written at the children's places.
    """
    batch, width, codes = probs_BWV.shape
    if probs_BWV.stride(2) != 1:
        probs_BWV = probs_BWV.contiguous()
    _siblings[(batch, width)](
        probs_BWV,
        children_W2,
        uniform_BM,
        q_BMV,
        tokens_BM,
        codes,
        tokens_BM.shape[1],
        probs_BWV.stride(0),
        probs_BWV.stride(1),
        uniform_BM.stride(0),
        **tile(codes),
    )


@triton.jit
def _candidates(
    probs_ptr, score_ptr, of_slot_ptr, token_ptr, parent_ptr, scores_ptr,
    codes, probs_image, probs_row, children, begin, offset, candidates, grown,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """One node: its likeliest children, whose scores are log probabilities of the paths down to them."""
    image = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    code = codes_of(ROWS, COLUMNS)
    probs = tl.load(probs_ptr + image * probs_image + node * probs_row + code, mask=code < codes, other=-1.0)
    if ROOT:
        score = 0.0
        parent = -1
    else:
        score = tl.load(score_ptr + image * children + node)
        parent = tl.load(of_slot_ptr + image * (grown + 1) + begin + node)
    for child in range(children):
        best = tl.max(probs)
        token = likeliest(probs, code)
        place = image * candidates + offset + node * children + child
        tl.store(token_ptr + place, token)
        tl.store(parent_ptr + place, parent)
        # The small fine for depth lets a parent win the tie with a child that the drafter is sure of.
        tl.store(scores_ptr + place, score + tl.log(tl.maximum(best, 1e-30)) - 1e-3)
        probs = tl.where(code == token, -1.0, probs)


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
    """One image: the best of the last level's candidates become nodes, in the candidates' order."""
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
    """One image: the best of all candidates as a tree; kept_ptr holds the slots of those that stay."""
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
    # All slots climb to the root at once, marking whom they pass.
    current = slot.to(tl.int64)
    depth = tl.zeros([SLOTS], tl.int64)
    for _ in range(deepest + 1):
        tl.store(seen + slot * slots + current, tl.full([SLOTS], 1, tl.uint8), mask=slot < slots)
        up = (slot < slots) & (current > 0)
        depth += up.to(tl.int64)
        current = tl.load(parents_ptr + image * nodes + current - 1, mask=up, other=0)
    tl.store(depth_ptr + image * slots + slot, depth, mask=slot < slots)


class Growth:
    """A tree that grows as `visar.samplers.trees.draft_dynamic` says: its buffers for one pass, and what grows them.

    A candidate is a token behind an expanded node; the best of a level become nodes and are expanded next.

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
        self.scores_BC, self.score_BW = (
            torch.empty(batch, n, dtype=torch.float32, device=device) for n in (self.candidates, children)
        )
        self.of_slot_BL, self.depth_BL = self._new(self.grown + 1), self._new(self.grown + 1)
        self.tokens_BM, self.parents_BM = self._new(self.grown), self._new(self.grown)
        self.seen_BLL = torch.empty(batch, self.grown + 1, self.grown + 1, dtype=torch.bool, device=device)

    def _new(self, length: int) -> Tensor:
        return torch.empty(self.batch, length, dtype=torch.int64, device=self.device)

    def add(self, probs_BWV: Tensor) -> None:
        """Adds the likeliest children of the nodes expanded last (at first: of the root) to the candidates."""
        probs_BWV = probs_BWV if probs_BWV.stride(2) == 1 else probs_BWV.contiguous()
        codes = probs_BWV.shape[-1]
        _candidates[(self.batch, self.width)](
            probs_BWV,
            self.score_BW,
            self.of_slot_BL,
            self.token_BC,
            self.parent_BC,
            self.scores_BC,
            codes,
            probs_BWV.stride(0),
            probs_BWV.stride(1),
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

        Returns: tokens_BM, seen_BLL, place_BL and parents_BM of a draft tree, and the slot of the first new node.
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
            self.seen_BLL[:, : nodes + 1, : nodes + 1],
            self.depth_BL[:, : nodes + 1],
            self.parents_BM[:, :nodes],
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
        return tokens_BM, seen_BLL, depth_BL, parents_BM
