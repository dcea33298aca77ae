"""The accepted path through a tree of drafts that the target has read, and the token after it.

One program per image. `walk` verifies siblings one after another (arXiv 2402.14160), for LANTERN (2410.03355) against
the distribution in which a draft has its neighbours' probability; `walk_chains` verifies k chains a depth at a time by
K-SEQ (SpecTr, 2310.15141, algorithm 3). The plain counterparts are in visar/samplers/trees.py and
visar/samplers/relaxed.py.

B images, M nodes, L = M + 1 slots, D depth, k chains or neighbours of a code, V codes.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.kernels.distributions import at, chance_of, codes_of, inverted, residual_of, tile


@triton.jit
def _ended(
    probs, slots_D, tokens_D, num_accepted, verified_D, refused, emit_ptr, slots_ptr, tokens_ptr,
    num_accepted_ptr, verified_ptr, refused_ptr, probs_ptr, image, depth, codes, step, code, inside,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Draws the token after the accepted nodes and writes the path, as `visar.samplers.trees.finish`."""
    tl.store(probs_ptr + image * codes + code, probs, mask=inside)
    emitted = inverted(probs, tl.load(emit_ptr + image), ROWS, COLUMNS)
    tl.store(slots_ptr + image * depth + step, slots_D, mask=step < depth)
    tokens = tl.where(step == num_accepted, emitted, tokens_D)
    tl.store(tokens_ptr + image * (depth + 1) + step, tokens, mask=step < depth + 1)
    tl.store(num_accepted_ptr + image, num_accepted)
    tl.store(verified_ptr + image * depth + step, verified_D, mask=step < depth)
    tl.store(refused_ptr + image, refused.to(tl.uint8))


@triton.jit
def _walk(
    p_ptr, q_ptr, draft_ptr, parents_ptr, accept_ptr, emit_ptr, table_ptr,
    slots_ptr, tokens_ptr, num_accepted_ptr, verified_ptr, refused_ptr, probs_ptr,
    codes, nodes, depth, draft_image, parents_image, accept_image, neighbours, max_moved, max_ratio,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, NEAR: tl.constexpr,
    DRAWN: tl.constexpr, MOVED: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Nodes in the order of their slots; `probs` is the current node's distribution, less its rejected children."""
    image = tl.program_id(0).to(tl.int64)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    step = tl.arange(0, STEPS)
    slots_D = tl.zeros([STEPS], tl.int64)
    tokens_D = tl.zeros([STEPS], tl.int64)
    rows = p_ptr + image * (nodes + 1) * codes + code
    probs = tl.load(rows, mask=inside, other=0.0)
    current = tl.full([], 0, tl.int64)
    num_accepted = tl.full([], 0, tl.int64)
    verified_D = tl.zeros([STEPS], tl.int64)
    refused = tl.full([], 0, tl.int32)
    for node in range(nodes):
        parent = tl.load(parents_ptr + image * parents_image + node)
        if parent == current:
            token = tl.load(draft_ptr + image * draft_image + node)
            accept = tl.load(accept_ptr + image * accept_image + node)
            if MOVED or RATIO:
                # The nearest codes' probability goes to the draft; the final distribution's row holds it meanwhile.
                probs_row = probs_ptr + image * codes
                own = at(probs, code, token)
                tl.store(probs_row + code, probs, mask=inside)
                tl.debug_barrier()
                rank = tl.arange(0, NEAR)
                listed = rank < neighbours
                near = tl.load(table_ptr + token * neighbours + rank, mask=listed, other=0)
                moved = tl.cumsum(tl.load(probs_row + near, mask=listed, other=0.0, cache_modifier=".cg"), axis=0)
                allowed = listed
                if MOVED:
                    allowed = allowed & (moved <= max_moved)
                if RATIO:
                    allowed = allowed & (moved <= (max_ratio - 1) * own)
                tl.debug_barrier()
                tl.store(probs_row + near, tl.zeros([NEAR], tl.float32), mask=allowed)
                tl.debug_barrier()
                probs = tl.load(probs_row + code, mask=inside, other=0.0, cache_modifier=".cg")
                probs = tl.where(code == token, own + tl.max(tl.where(allowed, moved, 0.0), axis=0), probs)
                tl.debug_barrier()
            chance = at(probs, code, token)
            if DRAWN:
                q = tl.load(q_ptr + (image * nodes + node) * codes + code, mask=inside, other=0.0)
                chance = chance_of(chance, at(q, code, token))
                rest = residual_of(probs, q)
            else:
                others = tl.where(code == token, 0.0, probs)
                rest = tl.where(tl.sum(others) > 0, others, probs)
            slot = tl.where(accept < chance, node + 1, 0)
            accepted = slot > 0
            behind = tl.load(rows + (node + 1) * codes, mask=inside & accepted, other=0.0)
            probs = tl.where(accepted, behind, rest / tl.sum(rest))
            mark = accepted & (step == num_accepted)
            slots_D = tl.where(mark, slot, slots_D)
            tokens_D = tl.where(mark, token, tokens_D)
            current = tl.where(accepted, slot, current)
            verified_D += (step == num_accepted).to(tl.int64)
            num_accepted += accepted.to(tl.int64)
            refused = tl.where(accepted, 0, 1)
    _ended(
        probs, slots_D, tokens_D, num_accepted, verified_D, refused, emit_ptr, slots_ptr, tokens_ptr,
        num_accepted_ptr, verified_ptr, refused_ptr, probs_ptr, image, depth, codes, step, code, inside, ROWS, COLUMNS,
    )  # fmt: skip


def _path(batch: int, depth: int, codes: int, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Fields of `visar.samplers.trees.Walk`, to be written, and the same as kernels take them: bools as bytes."""
    slots_BD = torch.empty(batch, depth, dtype=torch.int64, device=device)
    tokens_BL = torch.empty(batch, depth + 1, dtype=torch.int64, device=device)
    accepted_B = torch.empty(batch, dtype=torch.int64, device=device)
    verified_BD = torch.empty_like(slots_BD)
    refused_B = torch.empty(batch, dtype=torch.bool, device=device)
    probs_BV = torch.empty(batch, codes, dtype=torch.float32, device=device)
    path = (slots_BD, tokens_BL, accepted_B, verified_BD, refused_B, probs_BV)
    return path, (*path[:4], refused_B.view(torch.uint8), probs_BV)


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
    """The accepted path through a tree, one program per image: fields of `visar.samplers.trees.Walk`.

    Args:
        q_BMV: distributions that the nodes were drawn from; None: they were chosen without a draw.
        neighbours_Vk, max_moved, max_ratio: of `visar.samplers.relaxed.relaxed_probs`; None verifies exactly.
        The others: see `visar.samplers.trees.walk`.
    """
    batch, slots, codes = p_BLV.shape
    path, written = _path(batch, depth, codes, p_BLV.device)
    near = 1 if neighbours_Vk is None else neighbours_Vk.shape[1]
    _walk[(batch,)](
        p_BLV.contiguous(),
        p_BLV if q_BMV is None else q_BMV.contiguous(),
        draft_BM,
        parents_BM,
        accept_uniform_BM,
        emit_uniform_B.contiguous(),
        p_BLV if neighbours_Vk is None else neighbours_Vk,
        *written,
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
    return path


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
    slots_ptr, tokens_ptr, num_accepted_ptr, verified_ptr, refused_ptr, probs_ptr,
    codes, depth, chains, draft_image, accept_image,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Depth by depth: of the chains that share the accepted tokens, the first whose draft is accepted continues."""
    image = tl.program_id(0).to(tl.int64)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    step = tl.arange(0, STEPS)
    chain = tl.arange(0, CHAINS)
    alive = (chain < chains).to(tl.int32)
    slots_D = tl.zeros([STEPS], tl.int64)
    tokens_D = tl.zeros([STEPS], tl.int64)
    rows = p_ptr + image * (depth * chains + 1) * codes
    probs = tl.load(rows + code, mask=inside, other=0.0)
    current = tl.full([], 0, tl.int64)
    num_accepted = tl.full([], 0, tl.int64)
    verified_D = tl.zeros([STEPS], tl.int64)
    refused = tl.full([], 0, tl.int32)
    for level in range(depth):
        if refused == 0:
            eldest = tl.min(tl.where(alive != 0, chain, chains), axis=0)
            q_row = q_ptr + ((image * depth + level) * chains + eldest) * codes
            q = tl.load(q_row + code, mask=inside, other=0.0)
            drafts = tl.sum(alive, axis=0)
            # The smallest r that K-SEQ may divide by, 1 ... k, by bisection: visar.samplers.trees.k_seq_ratio.
            low = tl.full([], 1.0, tl.float32)
            ratio = drafts.to(tl.float32)
            for _ in range(24):
                middle = (low + ratio) / 2
                beta = tl.sum(tl.minimum(q, probs / middle))
                valid = 1 - _power(tl.maximum(1 - beta, 0.0), drafts, chains) <= middle * beta
                low = tl.where(valid, low, middle)
                ratio = tl.where(valid, middle, ratio)
            shared = tl.minimum(q, probs / ratio)
            beta = tl.sum(shared)
            # The distribution is still a row of p: probabilities of the drafts are read from there.
            place = level * chains + chain
            real = chain < chains
            token = tl.load(draft_ptr + image * draft_image + place, mask=real, other=0)
            target = tl.load(rows + current * codes + token, mask=real, other=0.0) / ratio
            chance = chance_of(target, tl.load(q_row + token, mask=real, other=0.0))
            accept = tl.load(accept_ptr + image * accept_image + place, mask=real, other=2.0)
            accepted = (alive != 0) & (accept < chance)
            winner = tl.min(tl.where(accepted, chain, chains), axis=0)
            found = winner < chains
            tried = tl.sum(tl.where(chain <= winner, alive, 0), axis=0)
            verified_D = tl.where(step == level, tried, verified_D)
            weight = (1 - _power(tl.maximum(1 - beta, 0.0), drafts, chains)) / tl.maximum(beta, 1e-30)
            left = residual_of(probs, shared * weight)
            slot = 1 + level * chains + winner
            behind = tl.load(rows + slot * codes + code, mask=inside & found, other=0.0)
            probs = tl.where(found, behind, left / tl.sum(left))
            chosen = tl.sum(tl.where(chain == winner, token, 0), axis=0)
            mark = found & (step == level)
            slots_D = tl.where(mark, slot, slots_D)
            tokens_D = tl.where(mark, chosen, tokens_D)
            alive = tl.where(token == chosen, alive, 0)
            current = tl.where(found, slot, current).to(tl.int64)
            num_accepted += found.to(tl.int64)
            refused = tl.where(found, 0, 1)
    _ended(
        probs, slots_D, tokens_D, num_accepted, verified_D, refused, emit_ptr, slots_ptr, tokens_ptr,
        num_accepted_ptr, verified_ptr, refused_ptr, probs_ptr, image, depth, codes, step, code, inside, ROWS, COLUMNS,
    )  # fmt: skip


def walk_chains(
    p_BLV: Tensor, q_BDkV: Tensor, draft_BM: Tensor, accept_uniform_BM: Tensor, emit_uniform_B: Tensor
) -> tuple[Tensor, ...]:
    """`visar.samplers.trees.walk_chains`, one program per image: fields of its Walk. M = D k nodes, level by level."""
    batch, depth, chains, codes = q_BDkV.shape
    path, written = _path(batch, depth, codes, p_BLV.device)
    _chains[(batch,)](
        p_BLV.contiguous(),
        q_BDkV,
        draft_BM,
        accept_uniform_BM,
        emit_uniform_B.contiguous(),
        *written,
        codes,
        depth,
        chains,
        draft_BM.stride(0),
        accept_uniform_BM.stride(0),
        STEPS=triton.next_power_of_2(depth + 1),
        CHAINS=triton.next_power_of_2(chains),
        **tile(codes),
    )
    return path


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
