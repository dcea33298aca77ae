"""Trees of drafts: how they are drafted, and how a tree that the target has read is verified.

Sources: static trees, Medusa, arXiv 2401.10774, and EAGLE, 2401.15077; dynamic trees, EAGLE-2, 2406.16858; siblings
without replacement, Jeon et al., 2402.14160, and LANTERN++, 2502.06352; K-SEQ, SpecTr, 2310.15141, algorithm 3.

A node's siblings are verified one after another. A rejected sibling leaves the residual as the distribution that the
next one is verified against, so the token that is committed at last follows the target's distribution, whether the
siblings were drawn without replacement (each against the drafter's distribution without its elder siblings) or chosen
without a draw (a one-hot distribution).

B batch, M nodes, L = M + 1 slots (0 is the root), D largest depth, W nodes of a level, V codes, k chains, K = D.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from visar import kernels
from visar.core.window import DraftTree
from visar.samplers.drafters.interface import Drafting
from visar.samplers.filtering import draw, fits_kernels
from visar.samplers.verify import acceptance, residual, row_at

NodeRule = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def normalised(mass: Tensor) -> Tensor:
    """Mass [..., V] as a distribution."""
    return mass / mass.sum(-1, keepdim=True)


def without(probs: Tensor, token: Tensor) -> Tensor:
    """The distribution [..., V] without one token [...], normalised; unchanged where nothing else is left."""
    mass = probs.scatter(-1, token[..., None], 0.0)
    return normalised(torch.where(mass.sum(-1, keepdim=True) > 0, mass, probs))


# ------------------------------------------------------------------------------------------------------------ shapes
def full_paths(branches: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Rank paths of the tree whose nodes at depth d all have branches[d] children."""
    return [path for depth in range(len(branches)) for path in product(*map(range, branches[: depth + 1]))]


def check_paths(paths: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Rank paths in order of depth; (0, 2) is the third child of the first child.

    Raises:
        ValueError: no path, or a path whose parent or elder sibling is missing.
    """
    known = set(paths)
    for path in paths:
        elder = path[:-1] + (path[-1] - 1,) if path and path[-1] > 0 else path[:-1]
        if not path or min(path) < 0 or (elder and elder not in known):
            raise ValueError(f"tree path {path}: its parent and its elder siblings must be in the tree")
    if not paths:
        raise ValueError("a tree needs at least one path")
    return sorted(known, key=lambda path: (len(path), path))


def path_parents(paths: list[tuple[int, ...]]) -> list[int]:
    """Slot of every node's parent, for paths in order of depth."""
    slot = {path: i + 1 for i, path in enumerate(paths)} | {(): 0}
    return [slot[path[:-1]] for path in paths]


# ---------------------------------------------------------------------------------------------------------- drafting
@functools.cache
def fixed_tree(parents: tuple[int, ...], device: torch.device) -> DraftTree:
    """A tree of one row with these parents and no tokens yet; made once per device."""
    parents_1M = torch.tensor([parents], dtype=torch.int64, device=device)
    return DraftTree.from_parents(torch.zeros_like(parents_1M), parents_1M)


@functools.cache
def level_children(paths: tuple[tuple[int, ...], ...]) -> list[tuple[tuple[int, int], ...]]:
    """Per level, the first child and the number of children of each node of the level above."""
    levels: list[tuple[tuple[int, int], ...]] = []
    for depth in range(len(paths[-1])):
        above = [path for path in paths if len(path) == depth] if depth else [()]
        counts = [sum(path[:-1] == parent and len(path) == depth + 1 for path in paths) for parent in above]
        first = sum(len(path) <= depth for path in paths)
        levels.append(tuple((first + sum(counts[:i]), count) for i, count in enumerate(counts)))
    return levels


@functools.cache
def children_table(children: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """A level of `level_children`, int64 [W, 2]; made once per device."""
    return torch.tensor(children, dtype=torch.int64, device=device)


def draw_siblings(
    probs_BWV: Tensor, children: tuple[tuple[int, int], ...], uniform_BM: Tensor, q_BMV: Tensor, tokens_BM: Tensor
) -> None:
    """Draws the children of a level's nodes without replacement, and notes the distribution of each.

    Args:
        probs_BWV: the distributions behind the level's nodes.
        children: of each node, see level_children.
        uniform_BM: one uniform number per node of the tree.
        q_BMV, tokens_BM: written at the children's places.
    """
    if fits_kernels(probs_BWV):
        from visar.kernels.tree_drafting import draw_siblings as draw_all

        with kernels.on(probs_BWV.device):
            return draw_all(probs_BWV, children_table(children, probs_BWV.device), uniform_BM, q_BMV, tokens_BM)
    level_W = list(probs_BWV.unbind(1))
    # First the eldest children of all nodes at once, then the second ones, ...
    for rank in range(max(count for _, count in children)):
        parents = [w for w, (_, count) in enumerate(children) if count > rank]
        nodes = [children[w][0] + rank for w in parents]
        probs_BXV = torch.stack([level_W[w] for w in parents], dim=1)
        tokens_BX = draw(probs_BXV, torch.stack([uniform_BM[:, node] for node in nodes], dim=1))
        rest_BXV = without(probs_BXV, tokens_BX)
        for i, (w, node) in enumerate(zip(parents, nodes, strict=True)):
            tokens_BM[:, node], q_BMV[:, node], level_W[w] = tokens_BX[:, i], probs_BXV[:, i], rest_BXV[:, i]


def draft_static(drafting: Drafting, paths: list[tuple[int, ...]], uniform_BM: Tensor) -> tuple[DraftTree, Tensor]:
    """Draws a tree of fixed shape, siblings without replacement.

    Returns: the tree, and the distribution [B, M, V] that each node was drawn from: the drafter's without its elder
        siblings.
    """
    shape = fixed_tree(tuple(path_parents(paths)), uniform_BM.device)
    probs_BWV = drafting.begin()[:, None]
    tokens_BM = torch.empty(uniform_BM.shape, dtype=torch.int64, device=uniform_BM.device)
    q_BMV = probs_BWV.new_empty(*uniform_BM.shape, probs_BWV.shape[-1])
    for depth, children in enumerate(level_children(tuple(paths)), 1):
        draw_siblings(probs_BWV, children, uniform_BM, q_BMV, tokens_BM)
        if depth < len(paths[-1]):
            shorter, nodes = children[0][0], sum(children[-1])
            probs_BWV = drafting.extend_tree(shape.begun(tokens_BM, nodes), shorter + 1, depth)
    return shape.begun(tokens_BM, len(paths)), q_BMV


def draft_dynamic(drafting: Drafting, depth: int, children: int, nodes: int) -> DraftTree:
    """Grows a tree where the drafter is confident, without a draw: EAGLE-2, arXiv 2406.16858, section 4.

    At each level the `children` likeliest paths are expanded by their `children` likeliest tokens; of all candidates
    the `nodes` with the largest products of the drafter's probabilities stay (with them all their ancestors).
    """
    probs_BWV = drafting.begin()[:, None]
    growth = begin_growth(probs_BWV, depth, children)
    for level in range(1, depth):
        growth.add(probs_BWV)
        tree, first = growth.expand()
        probs_BWV = drafting.extend_tree(tree, first, level)
    growth.add(probs_BWV)
    return growth.pruned(nodes)


def ordered(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values [..., count] and their indices, the first of equal ones first."""
    values, index = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], index[..., :count]


class Growth:
    """Candidates of a dynamic tree, and the part of it that the drafter has read.

    Args:
        batch, device: of the distributions.
        children: likeliest tokens of a node, and likeliest nodes of a level that are expanded.
    """

    def __init__(self, batch: int, children: int, device: torch.device) -> None:
        self.children = children
        self.tree = DraftTree.root(batch, device)
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.scores: list[Tensor] = []
        # Of the nodes expanded last: slots in the tree, scores; of every slot: its candidate, -1 for the root.
        self.slots_BW = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.score_BW = torch.zeros(batch, 1, dtype=torch.float32, device=device)
        self.candidate_BS = torch.full((batch, 1), -1, dtype=torch.int64, device=device)

    def add(self, probs_BWV: Tensor) -> None:
        """Adds the likeliest children of the nodes expanded last (at first: of the root) to the candidates."""
        probability_BWc, token_BWc = ordered(probs_BWV, self.children)
        # The small fine for depth lets a parent win the tie with a child that the drafter is sure of.
        score_BWc = self.score_BW[..., None] + probability_BWc.clamp(min=1e-30).log() - 1e-3
        parent_BW = self.candidate_BS.gather(1, self.slots_BW)
        self.tokens.append(token_BWc.flatten(1))
        self.parents.append(parent_BW.repeat_interleave(self.children, dim=1))
        self.scores.append(score_BWc.flatten(1))

    def expand(self) -> tuple[DraftTree, int]:
        """Takes the likeliest of the candidates added last into the tree; it, and the slot of its first new node."""
        score_BC, before = self.scores[-1], sum(part.shape[1] for part in self.tokens[:-1])
        chosen_BW = ordered(score_BC, min(self.children, score_BC.shape[1]))[1].sort(dim=1).values
        parents_BW = self.slots_BW.repeat_interleave(self.children, dim=1).gather(1, chosen_BW)
        first = self.tree.num_nodes + 1
        self.tree = self.tree.grown(self.tokens[-1].gather(1, chosen_BW), parents_BW)
        self.score_BW = score_BC.gather(1, chosen_BW)
        slots = torch.arange(first, self.tree.num_nodes + 1, device=chosen_BW.device)
        self.slots_BW = slots.expand(len(chosen_BW), -1)
        self.candidate_BS = torch.cat([self.candidate_BS, before + chosen_BW], dim=1)
        return self.tree, first

    def pruned(self, nodes: int) -> DraftTree:
        """The tree of the likeliest candidates of all levels."""
        token_BC, parent_BC, score_BC = (torch.cat(parts, 1) for parts in (self.tokens, self.parents, self.scores))
        kept_BM = ordered(score_BC, min(nodes, score_BC.shape[1]))[1].sort(dim=1).values
        order = torch.arange(1, kept_BM.shape[1] + 1, device=kept_BM.device).expand_as(kept_BM)
        slot_BC = torch.zeros_like(token_BC).scatter(1, kept_BM, order)
        parent_BM = parent_BC.gather(1, kept_BM)
        parent_slot_BM = torch.where(parent_BM < 0, 0, slot_BC.gather(1, parent_BM.clamp(min=0)))
        return DraftTree.from_parents(token_BC.gather(1, kept_BM), parent_slot_BM)


class KernelGrowth:
    """What Growth does, in two launches per level and one in the end."""

    def __init__(self, batch: int, depth: int, children: int, device: torch.device) -> None:
        from visar.kernels.tree_drafting import Growth as Launches

        self.device, self.launches = device, Launches(batch, depth, children, device)

    def add(self, probs_BWV: Tensor) -> None:
        with kernels.on(self.device):
            self.launches.add(probs_BWV)

    def expand(self) -> tuple[DraftTree, int]:
        with kernels.on(self.device):
            parts, first = self.launches.expand()
        return DraftTree(*parts), first

    def pruned(self, nodes: int) -> DraftTree:
        with kernels.on(self.device):
            return DraftTree(*self.launches.pruned(nodes))


def begin_growth(probs_BWV: Tensor, depth: int, children: int) -> Growth | KernelGrowth:
    """A dynamic tree of its root alone; probs_BWV: what follows the root."""
    batch, _, vocab_size = probs_BWV.shape
    children, device = min(children, vocab_size), probs_BWV.device
    return KernelGrowth(batch, depth, children, device) if fits_kernels(probs_BWV) else Growth(batch, children, device)


def draft_chains(drafting: Drafting, depth: int, uniform_BDk: Tensor) -> tuple[DraftTree, list[Tensor]]:
    """Draws k independent chains; slot 1 + d k + j is the draft at depth d + 1 of chain j.

    Returns: the tree, and per depth the distributions [B, k, V] that the drafts were drawn from.
    """
    chains, probs = uniform_BDk.shape[2], []
    parents = [max(0, node + 1 - chains) for node in range(depth * chains)]
    shape = fixed_tree(tuple(parents), uniform_BDk.device)
    probs_BkV = drafting.begin()[:, None].expand(-1, chains, -1)
    tokens_BM = uniform_BDk[:, 0, :0].long()
    for level in range(depth):
        if level:
            probs_BkV = drafting.extend_tree(shape.begun(tokens_BM, level * chains), 1 + (level - 1) * chains, level)
        probs.append(probs_BkV)
        tokens_BM = torch.cat([tokens_BM, draw(probs_BkV, uniform_BDk[:, level])], dim=1)
    return shape.begun(tokens_BM, depth * chains), probs


# --------------------------------------------------------------------------------------------------------- verifying
@dataclass(frozen=True)
class Walk:
    """The accepted path through a tree, and the token after it.

    Attributes:
        slots_BD: int64 slots of the accepted nodes, from the root down; 0 behind the last.
        tokens_BL: int64 [B, D + 1] accepted tokens and the one drawn after them; 0 behind it.
        accepted_B: number of accepted nodes.
        verified_BD: int64, number of nodes verified at every depth.
        refused_B: bool, whether nodes were rejected where the token after the accepted ones is.
        probs_BV: distribution of the token that comes after the accepted ones.
    """

    slots_BD: Tensor
    tokens_BL: Tensor
    accepted_B: Tensor
    verified_BD: Tensor
    refused_B: Tensor
    probs_BV: Tensor


def finish(
    tree: DraftTree,
    slots_BD: Tensor,
    accepted_B: Tensor,
    verified_BD: Tensor,
    refused_B: Tensor,
    probs_BV: Tensor,
    uniform_B: Tensor,
) -> Walk:
    """Draws the token after the accepted nodes."""
    padded_BL = torch.cat([torch.zeros_like(accepted_B)[:, None], tree.tokens_BM], dim=1)
    tokens_BD = padded_BL.gather(1, slots_BD)
    tokens_BL = torch.cat([tokens_BD, torch.zeros_like(tokens_BD[:, :1])], dim=1)
    tokens_BL = tokens_BL.scatter(1, accepted_B[:, None], draw(probs_BV, uniform_B)[:, None])
    return Walk(slots_BD, tokens_BL, accepted_B, verified_BD, refused_B, probs_BV)


def walk(
    p_BLV: Tensor, tree: DraftTree, rule: NodeRule, accept_uniform_BM: Tensor, emit_uniform_B: Tensor, depth: int
) -> Walk:
    """Goes down the tree, verifying the children of each accepted node in the order of their slots.

    Args:
        p_BLV: float32 target distributions of what follows the root and every node.
        rule: (probs_BV, node) -> the chance [B] of accepting that node against the distribution, and the mass [B, V]
            of the distribution that is left if it is rejected.
        accept_uniform_BM, emit_uniform_B: float32 in (0, 1).
        depth: D.
    """
    batch, device = p_BLV.shape[0], p_BLV.device
    current_B, accepted_B = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    refused_B = torch.zeros(batch, dtype=torch.bool, device=device)
    slots_BD, verified_BD = (torch.zeros(batch, depth + 1, dtype=torch.int64, device=device) for _ in range(2))
    probs_BV = p_BLV[:, 0]
    for node in range(tree.num_nodes):
        here_B = tree.parents_BM[:, node] == current_B
        chance_B, rest_BV = rule(probs_BV, node)
        taken_B = here_B & (accept_uniform_BM[:, node] < chance_B)
        left_BV = torch.where(here_B[:, None], normalised(rest_BV), probs_BV)
        probs_BV = torch.where(taken_B[:, None], p_BLV[:, node + 1], left_BV)
        current_B = torch.where(taken_B, node + 1, current_B)
        # Not accepted: the write goes to the spare column.
        slots_BD = slots_BD.scatter(1, torch.where(taken_B, accepted_B, depth)[:, None], node + 1)
        verified_BD = verified_BD.scatter_add(1, accepted_B[:, None], here_B[:, None].long())
        accepted_B, refused_B = accepted_B + taken_B, (refused_B | here_B) & ~taken_B
    return finish(tree, slots_BD[:, :depth], accepted_B, verified_BD[:, :depth], refused_B, probs_BV, emit_uniform_B)


def drawn_rule(tree: DraftTree, q_BMV: Tensor) -> NodeRule:
    """The rule for nodes drawn from q (arXiv 2402.14160): min(1, p / q), and [p - q]+ after a rejection. Exact."""

    def rule(probs_BV: Tensor, node: int) -> tuple[Tensor, Tensor]:
        chance_B = acceptance(probs_BV, q_BMV[:, node], tree.tokens_BM[:, node])
        return chance_B, residual(probs_BV, q_BMV[:, node])

    return rule


def walk_drawn(
    p_BLV: Tensor, tree: DraftTree, q_BMV: Tensor, accept_uniform_BM: Tensor, emit_uniform_B: Tensor, depth: int
) -> Walk:
    """`walk` with `drawn_rule`."""
    if fits_kernels(p_BLV):
        return walk_by_kernel(p_BLV, tree, q_BMV, accept_uniform_BM, emit_uniform_B, depth)
    return walk(p_BLV, tree, drawn_rule(tree, q_BMV), accept_uniform_BM, emit_uniform_B, depth)


def walk_by_kernel(
    p_BLV: Tensor,
    tree: DraftTree,
    q_BMV: Tensor | None,
    accept_uniform_BM: Tensor,
    emit_uniform_B: Tensor,
    depth: int,
    **relaxed: Any,
) -> Walk:
    """`visar.kernels.tree_paths.walk` of a tree; `relaxed`: its settings of LANTERN."""
    from visar.kernels.tree_paths import walk as walk_tree

    with kernels.on(p_BLV.device):
        nodes = (tree.tokens_BM, tree.parents_BM)
        return Walk(*walk_tree(p_BLV, q_BMV, *nodes, accept_uniform_BM, emit_uniform_B, depth, **relaxed))


def walk_chosen(p_BLV: Tensor, tree: DraftTree, accept_uniform_BM: Tensor, emit_uniform_B: Tensor, depth: int) -> Walk:
    """Goes down a tree whose nodes were chosen without a draw, verifying all children of a node at once. Exact.

    A child x is accepted with p(x) / (1 - p(elder siblings)), which is its probability in the distribution without
    them; if all are rejected, the token comes from the distribution without all. Arguments as in `walk`; siblings
    must differ.
    """
    if fits_kernels(p_BLV):
        return walk_by_kernel(p_BLV, tree, None, accept_uniform_BM, emit_uniform_B, depth)
    batch, device = p_BLV.shape[0], p_BLV.device
    current_B, accepted_B = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    going_B = torch.ones(batch, dtype=torch.bool, device=device)
    refused_B = ~going_B
    slots_BD, verified_BD = (torch.zeros(batch, depth, dtype=torch.int64, device=device) for _ in range(2))
    probs_BV = p_BLV[:, 0]
    for level in range(depth):
        child_BM = (tree.parents_BM == current_B[:, None]) & going_B[:, None]
        children_B = child_BM.sum(1)
        chance_BM = probs_BV.gather(1, tree.tokens_BM) * child_BM
        taken_BV = torch.zeros_like(probs_BV).scatter_add(1, tree.tokens_BM, child_BM.float())
        rest_BV = probs_BV.masked_fill(taken_BV > 0, 0.0)
        # What a child and its younger siblings have, and the rest: summed from the end, so that small rests survive.
        left_BM = chance_BM.flip(1).cumsum(1).flip(1) + rest_BV.sum(1, keepdim=True)
        accepted_BM = accept_uniform_BM * left_BM < chance_BM
        found_B, winner_B = accepted_BM.any(1), accepted_BM.int().argmax(1)
        elder_B = (child_BM.cumsum(1) - 1).gather(1, winner_B[:, None]).squeeze(1)
        verified_BD[:, level] = torch.where(found_B, elder_B + 1, children_B)
        current_B = torch.where(found_B, winner_B + 1, current_B)
        slots_BD[:, level] = current_B * found_B
        refusing_B = ~found_B & (children_B > 0)
        left_BV = torch.where(refusing_B[:, None], normalised(rest_BV), probs_BV)
        probs_BV = torch.where(found_B[:, None], row_at(p_BLV, current_B), left_BV)
        accepted_B, going_B, refused_B = accepted_B + found_B, found_B, refused_B | refusing_B
    return finish(tree, slots_BD, accepted_B, verified_BD, refused_B, probs_BV, emit_uniform_B)


def k_seq_ratio(p_BV: Tensor, q_BV: Tensor, drafts_B: Tensor, iterations: int = 24) -> Tensor:
    """Smallest r in [1, k] with 1 - (1 - beta)^k <= r beta, beta(r) = sum min(q, p / r), by bisection; float32 [B].

    SpecTr, arXiv 2310.15141, section 5: the best r of K-SEQ for k drafts.
    """
    low_B, high_B = torch.ones(len(p_BV), dtype=torch.float32, device=p_BV.device), drafts_B.float()
    for _ in range(iterations):
        middle_B = (low_B + high_B) / 2
        beta_B = torch.minimum(q_BV, p_BV / middle_B[:, None]).sum(-1)
        valid_B = 1 - (1 - beta_B).clamp(min=0.0) ** drafts_B <= middle_B * beta_B
        low_B, high_B = torch.where(valid_B, low_B, middle_B), torch.where(valid_B, middle_B, high_B)
    return high_B


def walk_chains(
    p_BLV: Tensor, tree: DraftTree, probs: list[Tensor], accept_uniform_BDk: Tensor, emit_uniform_B: Tensor
) -> Walk:
    """K-SEQ, SpecTr, arXiv 2310.15141, algorithm 3, at each depth on the chains that share the accepted tokens. Exact.

    A draft is accepted with min(1, p(x) / (r q(x))); if none is, the token comes from what the accepted part leaves:
    [p - min(q, p / r) a / beta]+ with a = 1 - (1 - beta)^k.
    """
    if fits_kernels(p_BLV):
        from visar.kernels.tree_paths import walk_chains as walk_all

        with kernels.on(p_BLV.device):
            accept_BM = accept_uniform_BDk.flatten(1)
            return Walk(*walk_all(p_BLV, torch.stack(probs, dim=1), tree.tokens_BM, accept_BM, emit_uniform_B))
    batch, depth, chains = accept_uniform_BDk.shape
    alive_Bk = torch.ones(batch, chains, dtype=torch.bool, device=p_BLV.device)
    going_B = alive_Bk[:, 0]
    accepted_B = torch.zeros(batch, dtype=torch.int64, device=p_BLV.device)
    slots_BD, verified_BD = (torch.zeros(batch, depth, dtype=torch.int64, device=p_BLV.device) for _ in range(2))
    probs_BV = p_BLV[:, 0]
    for level in range(depth):
        tokens_Bk = tree.tokens_BM[:, level * chains : (level + 1) * chains]
        q_BV = row_at(probs[level], alive_Bk.int().argmax(1))
        drafts_B = alive_Bk.sum(1).clamp(min=1)
        ratio_B = k_seq_ratio(probs_BV, q_BV, drafts_B)
        shared_BV = torch.minimum(q_BV, probs_BV / ratio_B[:, None])
        scaled_BkV = (probs_BV / ratio_B[:, None])[:, None].expand(-1, chains, -1)
        chance_Bk = acceptance(scaled_BkV, q_BV[:, None].expand_as(scaled_BkV), tokens_Bk)
        accepted_Bk = alive_Bk & (accept_uniform_BDk[:, level] < chance_Bk) & going_B[:, None]
        found_B, winner_B = accepted_Bk.any(1), accepted_Bk.int().argmax(1)
        tried_Bk = alive_Bk & (torch.arange(chains, device=probs_BV.device) <= winner_B[:, None])
        verified_BD[:, level] = torch.where(found_B, tried_Bk.sum(1), drafts_B) * going_B
        beta_B = shared_BV.sum(-1)
        weight_B = (1 - (1 - beta_B).clamp(min=0.0) ** drafts_B) / beta_B.clamp(min=1e-30)
        left_BV = normalised(residual(probs_BV, shared_BV * weight_B[:, None]))
        slot_B = 1 + level * chains + winner_B
        probs_BV = torch.where(
            going_B[:, None], torch.where(found_B[:, None], row_at(p_BLV, slot_B), left_BV), probs_BV
        )
        slots_BD[:, level] = torch.where(found_B, slot_B, 0)
        alive_Bk = alive_Bk & (tokens_Bk == tokens_Bk.gather(1, winner_B[:, None])) & found_B[:, None]
        going_B, accepted_B = going_B & found_B, accepted_B + found_B
    return finish(tree, slots_BD, accepted_B, verified_BD, ~going_B, probs_BV, emit_uniform_B)
