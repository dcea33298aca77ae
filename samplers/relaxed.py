"""LANTERN: a draft may take over the probability of codes that look like it. Lossy.

Sources: LANTERN, arXiv 2410.03355; LANTERN++, arXiv 2502.06352 (jadohu/LANTERN@3a56e45). Image codes have many near
twins, so that a drafter's first choice is seldom the target's. When a draft x is verified, the probabilities of its
nearest codes n_1 ... n_m are moved onto x, as many as the bound allows:

    p_hat(x) = p(x) + S_m,    p_hat(n_1) = ... = p_hat(n_m) = 0,    S_m = p(n_1) + ... + p(n_m)

with the largest m <= k for which S_m <= delta (additive, LANTERN: the total variation distance of p_hat from p) or
S_m <= (lambda - 1) p(x) (multiplicative, LANTERN++). Then x is verified against p_hat instead of p, and so is the
residual. The bound is for one decision: a token's distribution may move by delta for every sibling that is verified
before it, and depends on which x was drafted. On a toy of 8 codes with three siblings a position's marginal moved by
0.005, 0.04, 0.30 and 0.48 (total variation) at delta 0.05, 0.1, 0.2 and 0.4 in dynamic trees, by 0.004, 0.007, 0.17
and 0.24 in static ones.

B batch, M nodes, L = M + 1 slots, D depth of a tree, V codes, k neighbours, C code width.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from visar.core.checks import CODES, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Trees
from visar.core.noise import Noise
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.core.window import DraftTree
from visar.samplers.drafters.interface import Drafter, Drafting
from visar.samplers.filtering import fits_kernels
from visar.samplers.stages import in_stages
from visar.samplers.tree_speculation import Read, dynamic_size, grown_size, run_trees, static_shape
from visar.samplers.trees import NodeRule, Walk, draft_dynamic, draft_static, finish, walk, walk_by_kernel, without
from visar.samplers.verify import acceptance, check_passes, one_hot, residual


def neighbour_table(codebook_VC: Tensor, num_neighbours: int, chunk: int = 1024) -> Tensor:
    """The k codes nearest to each code (Euclidean, itself left out), nearest first; int32 [V, k].

    Raises:
        ValueError: k is not in 1 ... V - 1.
    """
    codes_VC = codebook_VC.float()
    if not 1 <= num_neighbours < len(codes_VC):
        raise ValueError(f"num_neighbours {num_neighbours}; allowed: 1 ... {len(codes_VC) - 1}")
    rows = []
    for first in range(0, len(codes_VC), chunk):
        distance = torch.cdist(codes_VC[first : first + chunk], codes_VC, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(first, first + len(distance), device=distance.device)[:, None]
        distance.scatter_(1, own, float("inf"))
        rows.append(distance.topk(num_neighbours, dim=1, largest=False).indices.int())
    return torch.cat(rows)


def chosen_neighbours(
    codebook: Tensor | None, neighbours: Tensor | None, num_neighbours: int, device: torch.device
) -> Tensor:
    """The table that `sample_lantern` relaxes with: the given one, or that of the codebook; int32 [V, k]."""
    if neighbours is not None:
        return neighbours.to(device, torch.int32)
    assert codebook is not None
    return neighbour_table(codebook.to(device), min(num_neighbours, codebook.shape[0] - 1))


def relaxed_probs(
    probs_BV: Tensor,
    token_B: Tensor,
    neighbours_Vk: Tensor,
    max_moved: float | None = None,
    max_ratio: float | None = None,
) -> Tensor:
    """p_hat of each row for its draft, float32 [B, V]; arXiv 2410.03355, section 4, and 2502.06352, section 3.

    Args:
        probs_BV: p; token_B: int64 drafts x.
        neighbours_Vk: see neighbour_table.
        max_moved: delta, most probability that is moved; None = no such bound.
        max_ratio: lambda, p_hat(x) / p(x) at most; None = no such bound.
    """
    near_Bk = neighbours_Vk[token_B].long()
    moved_Bk = probs_BV.gather(1, near_Bk).cumsum(1)
    own_B1 = probs_BV.gather(1, token_B[:, None])
    allowed_Bk = torch.ones_like(moved_Bk, dtype=torch.bool)
    if max_moved is not None:
        allowed_Bk = allowed_Bk & (moved_Bk <= max_moved)
    if max_ratio is not None:
        allowed_Bk = allowed_Bk & (moved_Bk <= (max_ratio - 1) * own_B1)
    sum_B1 = (moved_Bk * allowed_Bk).amax(1, keepdim=True)
    left_Bk = probs_BV.gather(1, near_Bk) * ~allowed_Bk
    return probs_BV.scatter(1, near_Bk, left_Bk).scatter(1, token_B[:, None], own_B1 + sum_B1)


Relax = Callable[[Tensor, Tensor], Tensor]


def relaxed_rule(tree: DraftTree, q_BMV: Tensor | None, relax: Relax) -> NodeRule:
    """The rule of p_hat = relax(p, x) for nodes drawn from q, or chosen without a draw (q None)."""

    def rule(probs_BV: Tensor, node: int) -> tuple[Tensor, Tensor]:
        token_B = tree.tokens_BM[:, node]
        hat_BV = relax(probs_BV, token_B)
        if q_BMV is None:
            return hat_BV.gather(1, token_B[:, None]).squeeze(1), without(hat_BV, token_B)
        return acceptance(hat_BV, q_BMV[:, node], token_B), residual(hat_BV, q_BMV[:, node])

    return rule


def walk_relaxed(
    p_BLV: Tensor,
    tree: DraftTree,
    q_BMV: Tensor | None,
    accept_uniform_BM: Tensor,
    emit_uniform_B: Tensor,
    depth: int,
    **bounds: Any,
) -> Walk:
    """`walk` with `relaxed_rule`; bounds: neighbours_Vk, max_moved and max_ratio of `relaxed_probs`."""
    if fits_kernels(p_BLV):
        return walk_by_kernel(p_BLV, tree, q_BMV, accept_uniform_BM, emit_uniform_B, depth, **bounds)
    rule = relaxed_rule(tree, q_BMV, functools.partial(relaxed_probs, **bounds))
    return walk(p_BLV, tree, rule, accept_uniform_BM, emit_uniform_B, depth)


def walk_greedy(p_BLV: Tensor, tree: DraftTree, relax: Relax, depth: int) -> Walk:
    """The longest path of nodes that are the likeliest code once they have their neighbours' probability.

    A node counts if p_hat(x) exceeds p of every other code (the neighbours keep theirs); the token after the path is
    the likeliest one.
    """
    batch = p_BLV.shape[0]
    reached = [torch.ones(batch, dtype=torch.bool, device=p_BLV.device)]
    verified_BD = torch.zeros(batch, depth, dtype=torch.int64, device=p_BLV.device)
    for node in range(tree.num_nodes):
        parent_B1, token_B = tree.parents_BM[:, node, None], tree.tokens_BM[:, node]
        probs_BV = p_BLV.gather(1, parent_B1[..., None].expand(-1, 1, p_BLV.shape[-1])).squeeze(1)
        mine_B1 = relax(probs_BV, token_B).gather(1, token_B[:, None])
        likeliest_B = probs_BV.scatter(1, token_B[:, None], mine_B1).argmax(1) == token_B
        open_B = torch.stack(reached, dim=1).gather(1, parent_B1).squeeze(1)
        reached.append(open_B & likeliest_B)
        verified_BD = verified_BD.scatter_add(1, tree.place_BL[:, node + 1, None] - 1, open_B[:, None].long())
    reached_BL = torch.stack(reached, dim=1)
    deepest_B = (tree.place_BL * reached_BL).argmax(1)
    line_BL = tree.seen_BLL.gather(1, deepest_B[:, None, None].expand(-1, 1, tree.num_nodes + 1)).squeeze(1)
    accepted_B = line_BL.sum(1) - 1
    slot_BL = torch.arange(tree.num_nodes + 1, device=p_BLV.device).expand_as(line_BL)
    # Column d - 1 for the ancestor at depth d; what is not on the path is written to the spare column.
    column_BL = torch.where(line_BL & (slot_BL > 0), tree.place_BL - 1, depth)
    slots_BD = torch.zeros(batch, depth + 1, dtype=torch.int64, device=p_BLV.device).scatter(1, column_BL, slot_BL)
    last_BV = p_BLV.gather(1, deepest_B[:, None, None].expand(-1, 1, p_BLV.shape[-1])).squeeze(1)
    probs_BV = one_hot(last_BV.argmax(1), p_BLV.shape[-1])
    half_B = torch.full((batch,), 0.5, dtype=torch.float32, device=p_BLV.device)
    refused_B = (tree.parents_BM == deepest_B[:, None]).any(1)
    return finish(tree, slots_BD[:, :depth], accepted_B, verified_BD, refused_B, probs_BV, half_B)


def check_lantern(
    model: Trees,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    codebook: Tensor | None,
    neighbours: Tensor | None,
    num_neighbours: int,
    max_moved: float | None,
    max_ratio: float | None,
    tree: Literal["dynamic", "static"],
    depth: int,
    children: int,
    nodes: int,
    branches: tuple[int, ...],
    paths: tuple[tuple[int, ...], ...] | None,
    check_every: int,
) -> tuple[list[tuple[int, ...]], int, int]:
    """Checks the arguments of `sample_lantern`, errors as there; returns rank paths (static), depth and nodes."""
    if tree not in ("dynamic", "static"):
        raise ValueError(f"tree {tree!r}; choose dynamic or static")
    if max_moved is None and max_ratio is None:
        raise ValueError("give max_moved (LANTERN) or max_ratio (LANTERN++), or both")
    if max_moved is not None and not 0 <= max_moved <= 1:
        raise ValueError(f"max_moved {max_moved}; it must be in [0, 1]")
    if max_ratio is not None and not max_ratio >= 1:
        raise ValueError(f"max_ratio {max_ratio}; it must be >= 1 (1 = off)")
    known = codebook if neighbours is None else neighbours
    if known is None or (codebook is not None and neighbours is not None):
        raise ValueError("give the tokenizer's codebook, or a table of neighbours")
    check_range("num_neighbours", num_neighbours, CODES)
    if known.shape[0] != model.config["vocab_size"]:
        raise ValueError(f"neighbours of {known.shape[0]} codes for a model of {model.config['vocab_size']}")
    shape: list[tuple[int, ...]] = []
    if tree == "static":
        shape = static_shape(model, branches, paths)
        depth, nodes = len(shape[-1]), len(shape)
    else:
        nodes = dynamic_size(model, depth, children, nodes)
    check_passes(model, guidance, (temperature, top_k, top_p), depth + 1, check_every)
    return shape, depth, nodes


@in_stages
@torch.no_grad()
def sample_lantern(
    model: Trees,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    codebook: Tensor | None = None,
    neighbours: Tensor | None = None,
    num_neighbours: int = 1000,
    max_moved: float | None = None,
    max_ratio: float | None = None,
    greedy: bool = False,
    drafter: Drafter | None = None,
    tree: Literal["dynamic", "static"] = "dynamic",
    depth: int = 5,
    children: int = 10,
    nodes: int = 58,
    branches: tuple[int, ...] = (4, 2, 1, 1),
    paths: tuple[tuple[int, ...], ...] | None = None,
    check_every: int = 8,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens by speculation with acceptance relaxed to similar codes. Lossy; exact with max_moved=0.

    LANTERN, arXiv 2410.03355 (dynamic trees, max_moved), and LANTERN++, arXiv 2502.06352 (static trees, max_ratio).

    Args:
        model: a generator of one token per step with start, verify_tree and commit_path.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance, for the drafter too. LANTERN: 7.5 (text to image).
        temperature: > 0; 1.0 = off. LANTERN: 1.0.
        top_k: 0 = off.
        top_p: in (0, 1]; 1.0 = off.
        codebook: the tokenizer's code vectors [V, C] as looked up, or
        neighbours: int32 [V, k] of `neighbour_table`, to compute it once.
        num_neighbours: k, for `codebook` (at most V - 1 are used). LANTERN: 1000; LANTERN++: 5 to 10.
        max_moved: delta, probability that a decision may move. LANTERN: 0.05 to 0.4, 0.2 for its figure 1.
        max_ratio: lambda, most growth of a draft's probability. LANTERN++: 5 to 20.
        greedy: take the likeliest token instead of drawing (temperature 0 of the paper; the filters still apply).
        drafter: see sample_speculative. LANTERN: FeatureDrafter.
        tree: "dynamic" (EAGLE-2; depth, children, nodes) or "static" (branches or paths); see the functions of those
            trees.
        check_every, callback, runtime: see sample_speculative.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: no bound at all, a setting out of range, or a condition, codebook or drafter that does not fit.

    Differs from the released code: it takes all k + 1 listed neighbours out of the distribution after a rejection
    (dynamic), or out of the drafter's (static); here the m that were moved, as the papers define p_hat.
    """
    shape, depth, nodes = check_lantern(
        model,
        guidance,
        temperature,
        top_k,
        top_p,
        codebook,
        neighbours,
        num_neighbours,
        max_moved,
        max_ratio,
        tree,
        depth,
        children,
        nodes,
        branches,
        paths,
        check_every,
    )
    table = chosen_neighbours(codebook, neighbours, num_neighbours, noise.device)

    def speculate(
        drafting: Drafting, read: Read, draft_BM: Tensor, accept_BM: Tensor, emit_B: Tensor, table_Vk: Tensor | None
    ) -> Walk:
        bounds: dict = dict(neighbours_Vk=table_Vk, max_moved=max_moved, max_ratio=max_ratio)
        if tree == "static":
            drafted, q_BMV = draft_static(drafting, shape, draft_BM)
        else:
            drafted, q_BMV = draft_dynamic(drafting, depth, children, nodes), None
        p_BLV = read(drafted)
        if greedy:
            return walk_greedy(p_BLV, drafted, functools.partial(relaxed_probs, **bounds), depth)
        return walk_relaxed(p_BLV, drafted, q_BMV, accept_BM, emit_B, depth, **bounds)

    return run_trees(
        model,
        condition,
        speculate,
        ("lantern", tree, tuple(shape), children, max_moved, max_ratio, greedy, table.shape[1]),
        depth=depth,
        nodes=nodes,
        grown=0 if tree == "static" else grown_size(model, depth, children),
        noise=noise,
        guidance=guidance,
        filters=(temperature, top_k, top_p),
        drafter=drafter,
        check_every=check_every,
        callback=callback,
        runtime=runtime,
        table=table,
    )
