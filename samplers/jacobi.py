"""Speculative Jacobi decoding: the model's own conditionals of the previous pass draft the tokens of the next.

Sources: SJD, Teng et al., arXiv 2410.01699, algorithm 1 (tyshiwo1/Accelerating-T2I-AR-with-SJD@b389cfb); the couplings
are arXiv 2510.24211's (coupled SJD, "MC" and "GS").

Why it is exact. Call a draft y of a position fair if, given all that happened at earlier positions, it follows the law
q that is stored with it. A fair draft judged against q yields a token of the target law. A draft stays fair from pass
to pass if it is (a) drawn anew from the new conditional p, with q := p; (b) put through the accept/resample rule with
the new p, with q := p in both outcomes; or (c) the arg-max of log p plus Gumbel noise that is fixed for the position,
with q := p. Guesses of slots that were never predicted are fair too: they are chosen without a look at p.

B batch, K drafts, L = K + 1 slots, V codes, N tokens, T = N + K + 1 positions with slack, S remembered positions,
M = S + K.
"""

import time
from collections.abc import Callable, Hashable
from typing import Literal

import torch
from torch import Tensor

from visar import kernels
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Windowed
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.samplers.filtering import draw, fits_kernels, token_law
from visar.samplers.verify import (
    Counts,
    Verdict,
    check_passes,
    held_noise,
    judged_in_chain,
    one_hot,
    residual,
    run_passes,
    verify,
)

Coupling = Literal["none", "maximal", "gumbel"]
COUPLINGS = ("none", "maximal", "gumbel")
Initial = Literal["random", "left", "left_mode", "left_law", "above", "above_law"]
Chance = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
INITIALS = ("random", "left", "left_mode", "left_law", "above", "above_law")


def refresh(
    coupling: Coupling,
    p_BLV: Tensor,
    q_BKV: Tensor,
    draft_BK: Tensor,
    verdict: Verdict,
    fresh_uniform_BL: Tensor,
    emit_uniform_BL: Tensor,
    gumbel_BLV: Tensor | None = None,
) -> Tensor:
    """A new fair draft of every row of p, int64 [B, L]: the rules (a) "none", (b) "maximal", (c) "gumbel" above."""
    if coupling == "gumbel":
        assert gumbel_BLV is not None
        return (p_BLV.log() + gumbel_BLV).argmax(-1)
    if coupling == "none":
        return draw(p_BLV, fresh_uniform_BL)
    resampled_BK = draw(residual(p_BLV[:, :-1], q_BKV), emit_uniform_BL[:, :-1])
    coupled_BK = torch.where(verdict.accepted_BK, draft_BK, resampled_BK)
    return torch.cat([coupled_BK, draw(p_BLV[:, -1:], fresh_uniform_BL[:, -1:])], dim=1)


def shift(values: Tensor, by_B: Tensor, length: int) -> Tensor:
    """Entries by_B ... by_B + length - 1 of axis 1 (the last one repeated behind the end)."""
    index = (by_B[:, None] + torch.arange(length, device=by_B.device)).clamp(max=values.shape[1] - 1)
    return values.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:]))


def guess_source(initial: Initial, position_BK: Tensor, known_B: Tensor, columns: int) -> Tensor:
    """Position that the guess of `position_BK` is taken from, int64 [B, K]; -1 where there is none.

    Left: the neighbour, or the last known token if that comes first; none in column 0. Above: the nearest known token
    of the column. known_B: number of positions from 0 on that are committed or drafted.
    """
    if initial.startswith("left"):
        source_BK = torch.minimum(position_BK - 1, known_B[:, None] - 1)
        return torch.where(position_BK % columns == 0, -1, source_BK)
    rows_up_BK = (position_BK - known_B[:, None]).div(columns, rounding_mode="floor") + 1
    return (position_BK - columns * rows_up_BK.clamp(min=1)).clamp(min=-1)


def guess(
    initial: Initial,
    position_BK: Tensor,
    known_B: Tensor,
    columns: int,
    tokens_BT: Tensor,
    laws_BMV: Tensor | None,
    first_B: Tensor | None,
    uniform_BK: Tensor,
    vocab_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Guesses int64 [B, K] of slots that no pass has predicted yet.

    Args:
        initial: see sample_jacobi.
        position_BK: where; known_B, columns: see guess_source.
        tokens_BT: committed and drafted tokens.
        laws_BMV, first_B: laws of the positions first_B ... first_B + M - 1, for the kinds that use laws.
        uniform_BK: one uniform number a position.

    Returns: guesses, and the laws [B, K, V] they were drawn from; None when all are one-hot.
    """
    random_BK = (uniform_BK * vocab_size).long().clamp(max=vocab_size - 1)
    if initial == "random":
        return random_BK, None
    source_BK = guess_source(initial, position_BK, known_B, columns)
    found_BK = source_BK >= 0
    if initial in ("left", "above"):
        return torch.where(found_BK, tokens_BT.gather(1, source_BK.clamp(min=0)), random_BK), None
    assert laws_BMV is not None and first_B is not None
    index_BK = (source_BK - first_B[:, None]).clamp(0, laws_BMV.shape[1] - 1)
    law_BKV = laws_BMV.gather(1, index_BK[..., None].expand(-1, -1, vocab_size))
    if initial == "left_mode":
        return torch.where(found_BK, law_BKV.argmax(-1), random_BK), None
    law_BKV = torch.where(found_BK[..., None], law_BKV, one_hot(random_BK, vocab_size))
    return draw(law_BKV, uniform_BK), law_BKV


def gumbel_table(noise: Noise, length: int, vocab_size: int) -> Tensor:
    """Gumbel noise of every position of every image, float32 [B, length, V]; some images at a time to save memory."""
    position = torch.arange(length, device=noise.device)[None]
    rows = torch.arange(noise.batch, device=noise.device)
    few = max(1, 2**22 // (length * vocab_size))
    return torch.cat([noise.rows(some).gumbel(Use.DRAFT, position, (vocab_size,)) for some in rows.split(few)])


def window_sizes(window: int) -> list[int]:
    """Windows of an adaptive call: powers of two from 4 up, then `window` itself."""
    return [size for size in (4, 8, 16, 32, 64, 128) if size < window] + [window]


def check_jacobi(
    model: Windowed,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    window: int,
    initial: Initial,
    coupling: Coupling,
    check_every: int,
) -> None:
    """Checks the arguments of `sample_jacobi`; errors as there."""
    check_passes(model, guidance, (temperature, top_k, top_p), window, check_every)
    if initial not in INITIALS:
        raise ValueError(f"initial {initial!r}; choose one of {', '.join(INITIALS)}")
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling {coupling!r}; choose one of {', '.join(COUPLINGS)}")


@torch.no_grad()
def sample_jacobi(
    model: Windowed,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    window: int = 16,
    initial: Initial = "random",
    coupling: Coupling = "none",
    adaptive: bool = False,
    check_every: int = 8,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens by speculative Jacobi decoding. Exact.

    SJD, arXiv 2410.01699, algorithm 1; with a coupling, coupled SJD, arXiv 2510.24211. Each pass reads the last token
    and window - 1 drafts, keeps the drafts up to the first rejection, draws one more token, and makes the conditionals
    of the other slots the drafts of the next pass.

    Args:
        model: a generator of one token a step with start, verify and commit.
        condition: of the B images.
        noise: one seed an image.
        guidance: classifier-free guidance; SJD: scale 3 (Lumina-mGPT, Emu3), 7.5 (LlamaGen).
        temperature: > 0; 1.0 = off. SJD: 1.0.
        top_k: 0 = off. SJD: 2000 (Lumina-mGPT), 2048 (Emu3), 1000 (LlamaGen).
        top_p: in (0, 1]; 1.0 = off. SJD: 1.0.
        window: slots L of a pass, 1 = ancestral. SJD: 16; coupled SJD: 32 to 64. Nearly free at batch 1, dear at 8.
        initial: first guess of a slot: "random" code (SJD's default); "left" neighbour's token, "left_mode" the
            likeliest code of its law, "left_law" a draw from it; "above", "above_law" the same one row up (SJD's
            fastest). Where there is no neighbour the guess is random.
        coupling: "none" draws drafts anew (SJD); "maximal" keeps them where the laws agree (MC); "gumbel" keeps the
            noise of a position (GS; V floats a position). Couplings pay with long windows.
        adaptive: each image reads 4 times as many slots as it lately committed a pass, at least 4 and at most
            `window`; worth it where long windows cost time. Not in the papers.
        check_every: passes between two looks of the host; with adaptive, between two changes of the window.
        callback: called at every look, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.

    Differs from the paper: rows of a batch advance each at its own pace (the released code commits the minimum and
    tests accepted tokens again, which changes the law); nothing is filtered twice; with "maximal", q := p also for
    drafts that were kept (the released code leaves the old q, which changes the law); the first pass already carries
    guesses.
    """
    check_jacobi(model, guidance, temperature, top_k, top_p, window, initial, coupling, check_every)
    return run_jacobi(
        model,
        condition,
        noise=noise,
        guidance=guidance,
        filters=(temperature, top_k, top_p),
        window=window,
        initial=initial,
        coupling=coupling,
        adaptive=adaptive,
        check_every=check_every,
        callback=callback,
        runtime=runtime,
    )


def run_jacobi(
    model: Windowed,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance,
    filters: tuple[float, int, float],
    window: int,
    initial: Initial,
    coupling: Coupling,
    adaptive: bool,
    check_every: int,
    callback: Callback | None,
    runtime: Runtime,
    chance: Chance | None = None,
    table: Tensor | None = None,
    key: Hashable = None,
) -> SampleOutput:
    """The loop of sample_jacobi, and of lossy samplers that accept by another rule.

    Args:
        chance: (p_BKV, q_BKV, draft_BK, table) -> probabilities [B, K] of keeping the drafts; None is the exact rule.
        table: a tensor that the rule reads; the session keeps a copy for captured passes.
        key: what else the rule depends on.
    """
    begun = time.perf_counter()
    num_tokens, columns, device = model.num_tokens, model.config["grid"][1], noise.device
    vocab_size, batch, drafts = model.config["vocab_size"], condition.batch, window - 1
    guided = guidance.active(num_tokens)
    every = check_every if adaptive else 0
    work = ("jacobi", key, batch, guided, *filters, window, initial, coupling, every)
    session = runtime.session(model, device, work)
    state = session.state = model.start(condition, guidance, ragged=True, window=drafts, state=session.state)
    source = held_noise(session, noise)
    held_table = None if table is None else session.hold("table", table)
    every_position = torch.arange(num_tokens + window, device=device).expand(batch, -1)
    guess_uniform_BT = session.hold("guess", noise.uniform(Use.INITIAL, every_position))
    gumbel_BTV = None
    if coupling == "gumbel":
        gumbel_BTV = session.hold("gumbel", gumbel_table(noise, num_tokens + window, vocab_size))
    first_BK = (guess_uniform_BT[:, :drafts] * vocab_size).long().clamp(max=vocab_size - 1)
    draft_BK = session.hold("draft", first_BK)
    law_BKV = session.hold("law", one_hot(first_BK, vocab_size))
    remembered = columns if initial.endswith(("law", "mode")) else 0
    recent_BSV = session.hold("recent", torch.zeros(batch, remembered, vocab_size, device=device))
    pass_11 = session.hold("pass", torch.zeros(1, 1, dtype=torch.int64, device=device))
    sizes = session.hold("sizes", torch.tensor(window_sizes(window), device=device))
    size_B = session.hold("size", sizes[:1].expand(batch) if adaptive else sizes[-1:].expand(batch))
    mark_B = session.hold("mark", torch.zeros(batch, dtype=torch.int64, device=device))
    slot_L = session.hold("slot", torch.arange(window, device=device))
    counts = Counts.start(session, window, batch, num_tokens, device)

    def step(slots: int) -> None:
        logits_BLV = model.verify(state, draft_BK[:, : slots - 1])
        uniform_BL3 = source.uniform(Use.DRAFT, state.length[:, None] + slot_L[:slots], (3,), pass_11)
        if fits_kernels(logits_BLV):
            with kernels.on(device):
                turn_by_kernels(logits_BLV, uniform_BL3)
        else:
            turn(logits_BLV, uniform_BL3)
        pass_11.add_(1)
        if adaptive:
            due = (pass_11[0] % check_every) == 0
            wanted_B = 4 * (state.length - mark_B) / check_every
            index_B = (sizes < wanted_B[:, None]).sum(-1).clamp(max=len(sizes) - 1)
            size_B.copy_(torch.where(due, sizes[index_B], size_B))
            mark_B.copy_(torch.where(due, state.length, mark_B))

    def turn_by_kernels(logits_BLV: Tensor, uniform_BL3: Tensor) -> None:
        from visar.kernels.jacobi import carry
        from visar.kernels.verify import judge

        drafts_now = logits_BLV.shape[1] - 1
        fresh_BL, accept_BL, emit_BL = uniform_BL3.unbind(-1)
        now_BK, q_BKV = draft_BK[:, :drafts_now], law_BKV[:, :drafts_now]
        given_BLV, chance_BK = logits_BLV, None
        if chance is not None:
            given_BLV = token_law(logits_BLV, *filters)
            chance_BK = chance(given_BLV[:, :-1], q_BKV, now_BK, held_table)
        p_BLV, (tokens_BL, count_B, *_), next_BL = judge(
            given_BLV,
            q_BKV,
            now_BK,
            accept_BL,
            emit_BL,
            filters=filters if chance is None else None,
            judged_B=size_B - 1 if adaptive else None,
            chance_BK=chance_BK,
            coupling=coupling,
            fresh_BL=fresh_BL,
            gumbel_BTV=gumbel_BTV,
            length_B=state.length,
            counts=counts.held,
        )
        model.commit(state, tokens_BL, count_B)
        places = (state.length, state.tokens, guess_uniform_BT, recent_BSV)
        carry(initial, next_BL, p_BLV, count_B, size_B, *places, draft_BK, law_BKV, columns)

    def turn(logits_BLV: Tensor, uniform_BL3: Tensor) -> None:
        slots = logits_BLV.shape[1]
        position_BL = state.length[:, None] + slot_L[:slots]
        left_B = num_tokens - state.length
        p_BLV = token_law(logits_BLV, *filters)
        fresh_BL, accept_BL, emit_BL = uniform_BL3.unbind(-1)
        now_BK, q_BKV, judged_B = draft_BK[:, : slots - 1], law_BKV[:, : slots - 1], size_B - 1
        chance_BK = None if chance is None else chance(p_BLV[:, :-1], q_BKV, now_BK, held_table)
        verdict = verify(p_BLV, q_BKV, now_BK, accept_BL[:, :-1], emit_BL, judged_B=judged_B, chance_BK=chance_BK)
        gumbel_BLV = None
        if gumbel_BTV is not None:
            gumbel_BLV = gumbel_BTV.gather(1, position_BL[..., None].expand(-1, -1, vocab_size))
        next_BL = refresh(coupling, p_BLV, q_BKV, now_BK, verdict, fresh_BL, emit_BL, gumbel_BLV)
        model.commit(state, verdict.tokens_BL, verdict.count_B)
        judged_in_chain_B = judged_in_chain(verdict.kept_B, judged_B, left_B)
        refused_B = judged_in_chain_B > verdict.kept_B
        counts.add(verdict.count_B, verdict.kept_B, judged_in_chain_B, left_B, refused_B)
        # The rows behind the committed tokens are the next drafts, and their conditionals the drafts' laws.
        carried_B = size_B - verdict.count_B
        carried_BK = slot_L[:drafts] < carried_B[:, None]
        tokens_BK = shift(next_BL, verdict.count_B, drafts)
        laws_BKV = shift(p_BLV, verdict.count_B, drafts)
        position_BK = state.length[:, None] + slot_L[:drafts]
        known_BT = torch.scatter(state.tokens, 1, position_BK, tokens_BK)
        laws_BMV, first_B = None, None
        if remembered:
            recent_BSV.copy_(shift(torch.cat([recent_BSV, p_BLV], dim=1), verdict.count_B, remembered))
            laws_BMV, first_B = torch.cat([recent_BSV, laws_BKV], dim=1), state.length - remembered
        guess_BK, guess_law_BKV = guess(
            initial,
            position_BK,
            state.length + carried_B,
            columns,
            known_BT,
            laws_BMV,
            first_B,
            guess_uniform_BT.gather(1, position_BK),
            vocab_size,
        )
        if guess_law_BKV is None:
            guess_law_BKV = one_hot(guess_BK, vocab_size)
        draft_BK.copy_(torch.where(carried_BK, tokens_BK, guess_BK))
        law_BKV.copy_(torch.where(carried_BK[..., None], laws_BKV, guess_law_BKV))

    passes, done = run_passes(
        session,
        state,
        step,
        num_tokens=num_tokens,
        window=window,
        check_every=check_every,
        callback=callback,
        width=(lambda: int(size_B.max())) if adaptive else None,
    )
    tokens = state.tokens[:, :done].clone()
    return counts.output(tokens, {"generator": passes}, time.perf_counter() - begun)
