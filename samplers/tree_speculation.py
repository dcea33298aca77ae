"""Speculation with several drafts per position: trees of drafts, and K-SEQ.

Sources: EAGLE, arXiv 2401.15077; EAGLE-2, 2406.16858; LANTERN++'s static trees, 2502.06352; SpecTr, 2310.15141. The
pure parts are in visar/samplers/trees.py.

B batch, M nodes, L = M + 1 slots, D depth of a tree, k chains, V codes, N tokens, R rows (2B when guided).
"""

from collections.abc import Callable, Hashable
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from visar.core.checks import Range, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, repeat
from visar.core.interface import Callback, Features, Trees
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.core.window import DraftTree
from visar.samplers.drafters.interface import Drafter, Drafting
from visar.samplers.filtering import filtered_probs
from visar.samplers.speculative import begin_speculation
from visar.samplers.stages import in_stages
from visar.samplers.trees import (
    Walk,
    check_paths,
    draft_chains,
    draft_dynamic,
    draft_static,
    full_paths,
    walk_chains,
    walk_chosen,
    walk_drawn,
)
from visar.samplers.verify import DRAFTS, check_passes

# Of a tree; candidates are those of a dynamic one before the best are chosen.
NODES, DEPTH, CANDIDATES = Range(1, 1024), Range(1, 128), Range(1, 2**17)

Read = Callable[[DraftTree], Tensor]
Speculate = Callable[[Drafting, Read, Tensor, Tensor, Tensor, Tensor | None], Walk]


def run_trees(
    model: Trees,
    condition: Condition,
    speculate: Speculate,
    key: Hashable,
    *,
    depth: int,
    nodes: int,
    noise: Noise,
    guidance: Guidance,
    filters: tuple[float, int, float],
    drafter: Drafter | None,
    check_every: int,
    callback: Callback | None,
    runtime: Runtime,
    table: Tensor | None = None,
    grown: int = 0,
) -> SampleOutput:
    """The loop of all samplers that draft trees.

    Args:
        speculate: (drafting, read, draft uniforms [B, M], accept uniforms [B, M], emit uniform [B], table) -> the
            accepted path through a tree that it drafts, where read(tree) are the target's distributions [B, L, V].
        key: what a captured pass depends on besides model, batch, filters and drafter.
        depth, nodes: D and M of its trees.
        table: a tensor that it reads; the session keeps a copy for captured passes.
        grown: nodes that a drafter reads while it grows a tree, of which `nodes` stay; 0 = trees are not grown.
    """
    work = begin_speculation(
        model,
        condition,
        (key, depth, nodes, grown),
        noise=noise,
        guidance=guidance,
        filters=filters,
        drafter=drafter,
        runtime=runtime,
        depth=depth,
        room=max(nodes, depth, grown),
        chain=nodes == depth and not grown,
    )
    state, drafting, num_tokens = work.state, work.drafting, model.num_tokens
    static_table = None if table is None else work.session.static("table", table)

    def turn(slots: int) -> None:
        start_B = state.length.clone()
        shown: list[Tensor] = []

        def read(tree: DraftTree) -> Tensor:
            if not drafting.reads_features:
                return filtered_probs(model.verify_tree(state, tree), *filters)
            assert isinstance(model, Features)
            shown.append(model.features(state, tree))
            return filtered_probs(model.guided_logits(state, shown[0], tree.place_BL), *filters)

        uniform = work.source.uniform(Use.DRAFT, start_B[:, None], (2 * nodes + 1,), work.passes_11)[:, 0]
        path = speculate(drafting, read, uniform[:, :nodes], uniform[:, nodes:-1], uniform[:, -1], static_table)
        count_B = path.accepted_B + 1
        model.commit_path(state, path.slots_BD, path.tokens_BL, count_B)
        left_B = num_tokens - start_B
        within_BD = torch.arange(depth, device=noise.device) < left_B[:, None]
        verified_B = torch.where(within_BD, path.verified_BD, 0).sum(1)
        work.counts.add(count_B, path.accepted_B, verified_B, left_B, path.refused_B)
        drafting.observe(start_B, features_on_path(shown[0], path, state.parts) if shown else None, count_B)

    return work.run(turn, check_every, callback)


def features_on_path(features_RLD: Tensor, path: Walk, parts: int) -> Tensor:
    """Hidden vectors of the root and of the accepted nodes after it, of all slots' [R, L, D]."""
    slots_BL = torch.cat([torch.zeros_like(path.slots_BD[:, :1]), path.slots_BD], dim=1)
    slots_RL = repeat(slots_BL, parts)
    return features_RLD.gather(1, slots_RL[..., None].expand(-1, -1, features_RLD.shape[-1]))


def check_static_tree(
    model: Trees,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    branches: tuple[int, ...],
    paths: tuple[tuple[int, ...], ...] | None,
    check_every: int,
) -> list[tuple[int, ...]]:
    """Checks the arguments of `sample_static_tree`, errors as there; returns the tree's rank paths."""
    shape = static_shape(model, branches, paths)
    check_passes(model, guidance, (temperature, top_k, top_p), len(shape[-1]) + 1, check_every)
    return shape


@in_stages
@torch.no_grad()
def sample_static_tree(
    model: Trees,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    drafter: Drafter | None = None,
    branches: tuple[int, ...] = (4, 2, 1, 1),
    paths: tuple[tuple[int, ...], ...] | None = None,
    check_every: int = 8,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens by speculation with trees of a fixed shape, siblings drawn without replacement. Exact.

    EAGLE's tree, arXiv 2401.15077, with the acceptance of arXiv 2402.14160, as LANTERN++ (2502.06352) uses it before
    its relaxation. A tree's depth does not depend on the drafter's confidence, which is low on images.

    Args:
        model: a generator of one token per step with start, verify_tree and commit_path.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance, for the drafter too.
        temperature: > 0; 1.0 = off.
        top_k: 0 = off.
        top_p: in (0, 1]; 1.0 = off.
        drafter: see sample_speculative.
        branches: children of a node at each depth; (1, 1, 1, 1) is a chain.
        paths: another shape instead: rank paths of all nodes, such as ((0,), (1,), (0, 0)). LANTERN++: 57 nodes, up to
            10 children per node.
        check_every, callback, runtime: see sample_speculative.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: a setting out of range, a path without its parent, or a condition or drafter that does not fit.
    """
    shape = check_static_tree(model, guidance, temperature, top_k, top_p, branches, paths, check_every)
    depth = len(shape[-1])

    def speculate(
        drafting: Drafting, read: Read, draft_BM: Tensor, accept_BM: Tensor, emit_B: Tensor, table: Tensor | None
    ) -> Walk:
        tree, q_BMV = draft_static(drafting, shape, draft_BM)
        return walk_drawn(read(tree), tree, q_BMV, accept_BM, emit_B, depth)

    return run_trees(
        model,
        condition,
        speculate,
        ("static tree", tuple(shape)),
        depth=depth,
        nodes=len(shape),
        noise=noise,
        guidance=guidance,
        filters=(temperature, top_k, top_p),
        drafter=drafter,
        check_every=check_every,
        callback=callback,
        runtime=runtime,
    )


def check_dynamic_tree(
    model: Trees,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    depth: int,
    children: int,
    nodes: int,
    check_every: int,
) -> int:
    """Checks the arguments of `sample_dynamic_tree`, errors as there; returns the number of nodes."""
    size = dynamic_size(model, depth, children, nodes)
    check_passes(model, guidance, (temperature, top_k, top_p), depth + 1, check_every)
    return size


@in_stages
@torch.no_grad()
def sample_dynamic_tree(
    model: Trees,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    drafter: Drafter | None = None,
    depth: int = 5,
    children: int = 10,
    nodes: int = 58,
    check_every: int = 8,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens by speculation with trees that grow where the drafter is confident. Exact.

    EAGLE-2, arXiv 2406.16858, section 4. The nodes are chosen without a draw, so each is accepted with the target's
    probability, and its elder siblings are taken out of the distribution first.

    Args:
        model: a generator of one token per step with start, verify_tree and commit_path.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance, for the drafter too.
        temperature: > 0; 1.0 = off.
        top_k: 0 = off.
        top_p: in (0, 1]; 1.0 = off.
        drafter: see sample_speculative.
        depth: D. EAGLE-2, LANTERN: 5 (4 expansions).
        children: children of an expanded node, and nodes expanded per level. EAGLE-2: 10.
        nodes: M, nodes that the target reads. EAGLE-2, LANTERN: 58.
        check_every, callback, runtime: see sample_speculative.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: a setting out of range, or a condition or drafter that does not fit.
    """
    nodes = check_dynamic_tree(model, guidance, temperature, top_k, top_p, depth, children, nodes, check_every)

    def speculate(
        drafting: Drafting, read: Read, draft_BM: Tensor, accept_BM: Tensor, emit_B: Tensor, table: Tensor | None
    ) -> Walk:
        tree = draft_dynamic(drafting, depth, children, nodes)
        return walk_chosen(read(tree), tree, accept_BM, emit_B, depth)

    return run_trees(
        model,
        condition,
        speculate,
        ("dynamic tree", children),
        depth=depth,
        nodes=nodes,
        grown=grown_size(model, depth, children),
        noise=noise,
        guidance=guidance,
        filters=(temperature, top_k, top_p),
        drafter=drafter,
        check_every=check_every,
        callback=callback,
        runtime=runtime,
    )


def static_shape(
    model: Trees, branches: tuple[int, ...], paths: tuple[tuple[int, ...], ...] | None
) -> list[tuple[int, ...]]:
    """Rank paths of a static tree in order of depth.

    Raises:
        ValueError: see sample_static_tree.
    """
    if paths is not None:
        check_range("paths: nodes", len(paths), NODES)
        shape = check_paths([tuple(path) for path in paths])
    elif not branches:
        raise ValueError("branches (); one number per depth is needed")
    else:
        check_range("branches", branches, NODES)
        check_range("depth", len(branches), DEPTH)
        check_range(f"branches {branches}: nodes", sum(accumulate(branches, mul)), NODES)
        shape = full_paths(tuple(branches))
    most = max(path[-1] for path in shape) + 1
    if most > model.config["vocab_size"]:
        raise ValueError(f"{most} children per node of a vocabulary of {model.config['vocab_size']}")
    return shape


def dynamic_size(model: Trees, depth: int, children: int, nodes: int) -> int:
    """Number of nodes of a dynamic tree: `nodes`, or all candidates if they are fewer.

    Raises:
        ValueError: a setting outside of NODES, or candidates outside of CANDIDATES.
    """
    for name, value, allowed in (("depth", depth, DEPTH), ("children", children, NODES), ("nodes", nodes, NODES)):
        check_range(name, value, allowed)
    children = min(children, int(model.config["vocab_size"]))
    candidates = children + (depth - 1) * children * children
    check_range(f"depth {depth}, children {children}: candidates", candidates, CANDIDATES)
    return min(nodes, candidates)


def grown_size(model: Trees, depth: int, children: int) -> int:
    """Nodes of a dynamic tree that the drafter reads: the best `children` of every level but the last."""
    return (depth - 1) * min(children, int(model.config["vocab_size"]))


def check_k_seq(
    model: Trees,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    num_chains: int,
    num_drafts: int,
    check_every: int,
) -> None:
    """Checks the arguments of `sample_k_seq`; errors as there."""
    drafts = num_chains * num_drafts
    check_range("num_drafts", num_drafts, DRAFTS)
    for name, value in (("num_chains", num_chains), ("num_chains * num_drafts", drafts)):
        check_range(name, value, NODES)
    check_passes(model, guidance, (temperature, top_k, top_p), num_drafts + 1, check_every)


@in_stages
@torch.no_grad()
def sample_k_seq(
    model: Trees,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    drafter: Drafter | None = None,
    num_chains: int = 4,
    num_drafts: int = 4,
    check_every: int = 8,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens by speculation with several independent chains of drafts. Exact.

    SpecTr, arXiv 2310.15141, algorithm 3 (K-SEQ), which is within 1 - 1/e of the best acceptance of k independent
    drafts. Independent drafts often repeat each other where the distribution is narrow: there a static tree wastes
    fewer slots.

    Args:
        model: a generator of one token per step with start, verify_tree and commit_path.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance, for the drafter too.
        temperature: > 0; 1.0 = off.
        top_k: 0 = off.
        top_p: in (0, 1]; 1.0 = off.
        drafter: see sample_speculative.
        num_chains: k. SpecTr: 8.
        num_drafts: length of a chain. SpecTr: 8.
        check_every, callback, runtime: see sample_speculative.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: a setting out of range, or a condition or drafter that does not fit.
    """
    check_k_seq(model, guidance, temperature, top_k, top_p, num_chains, num_drafts, check_every)

    def speculate(
        drafting: Drafting, read: Read, draft_BM: Tensor, accept_BM: Tensor, emit_B: Tensor, table: Tensor | None
    ) -> Walk:
        tree, probs = draft_chains(drafting, num_drafts, draft_BM.unflatten(1, (num_drafts, num_chains)))
        accept_BDk = accept_BM.unflatten(1, (num_drafts, num_chains))
        return walk_chains(read(tree), tree, probs, accept_BDk, emit_B)

    return run_trees(
        model,
        condition,
        speculate,
        ("k-seq", num_chains),
        depth=num_drafts,
        nodes=num_chains * num_drafts,
        noise=noise,
        guidance=guidance,
        filters=(temperature, top_k, top_p),
        drafter=drafter,
        check_every=check_every,
        callback=callback,
        runtime=runtime,
    )
