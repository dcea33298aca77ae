"""Speculative Jacobi decoding: the model's own conditionals of the previous pass draft the tokens of the next.

Sources: SJD, Teng et al., arXiv 2410.01699, algorithm 1 (tyshiwo1/Accelerating-T2I-AR-with-SJD@b389cfb); the couplings
are arXiv 2510.24211's (coupled SJD, "MC" and "GS").

Why it is exact. Call a draft y of a position fair if, given all that happened at earlier positions, it follows the
distribution q that is stored with it. A fair draft verified against q yields a token of the target distribution. A
draft stays fair from pass to pass if it is (a) drawn anew from the new conditional p, with q := p; (b) put through the
accept/resample rule with the new p, with q := p in both outcomes; or (c) the arg-max of log p plus Gumbel noise that
is fixed for the position, with q := p. Guesses of slots that were never predicted are fair too: they are chosen
without a look at p.

B batch, K drafts, L = K + 1 slots, V codes, N tokens.
"""

import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Windowed
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.samplers.jacobi_drafts import COUPLINGS, INITIALS, Coupling, Drafts, Initial, carry, verify_drafts
from visar.samplers.stages import in_stages
from visar.samplers.verify import Counts, check_passes, run_passes, static_noise

TableChance = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


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


@in_stages
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
    and window - 1 drafts, accepts the drafts up to the first rejection, draws one more token, and makes the
    conditionals of the other slots the drafts of the next pass.

    Args:
        model: a generator of one token per step with start, verify and commit.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance; SJD: scale 3 (Lumina-mGPT, Emu3), 7.5 (LlamaGen).
        temperature: > 0; 1.0 = off. SJD: 1.0.
        top_k: 0 = off. SJD: 2000 (Lumina-mGPT), 2048 (Emu3), 1000 (LlamaGen).
        top_p: in (0, 1]; 1.0 = off. SJD: 1.0.
        window: slots L of a pass, 1 = ancestral. SJD: 16; coupled SJD: 32 to 64. Nearly free at batch 1, dear at 8.
        initial: first guess of a slot: "random" code (SJD's default); "left" neighbour's token, "left_mode" the
            likeliest code of its distribution, "left_law" a draw from it; "above", "above_law" the same one row up
            (SJD's fastest). Where there is no neighbour the guess is random.
        coupling: "none" draws drafts anew (SJD); "maximal" keeps them where the distributions agree (MC); "gumbel"
            keeps the noise of a position (GS; V floats per position). Couplings pay with long windows.
        adaptive: each image reads 4 times as many slots as it lately committed per pass, at least 4 and at most
            `window`; worth it where long windows cost time. Not in the papers.
        check_every: passes between two looks of the host; with adaptive, between two changes of the window.
        callback: called at every look, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.

    Differs from the paper: rows of a batch advance each at its own pace (the released code commits the minimum and
    tests accepted tokens again, which changes the distribution); nothing is filtered twice; with "maximal", q := p
    also for drafts that were accepted (the released code leaves the old q, which changes the distribution); the first
    pass already carries guesses.
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
    chance: TableChance | None = None,
    table: Tensor | None = None,
    key: Hashable = None,
) -> SampleOutput:
    """The loop of sample_jacobi, and of lossy samplers that accept by another rule.

    Args:
        chance: (p_BKV, q_BKV, draft_BK, table) -> probabilities [B, K] of accepting the drafts; None is the exact
            rule.
        table: a tensor that the rule reads; the session keeps a copy for captured passes.
        key: what else the rule depends on.
    """
    begun = time.perf_counter()
    num_tokens, batch, device = model.num_tokens, condition.batch, noise.device
    every = check_every if adaptive else 0
    work = ("jacobi", key, batch, guidance.active(num_tokens), *filters, window, initial, coupling, every)
    session = runtime.session(model, device, work)
    drafts = Drafts.start(session, noise, model, window, initial, coupling, adaptive)
    state = session.state = model.start(condition, guidance, ragged=True, window=window - 1, state=session.state)
    source = static_noise(session, noise)
    pass_11 = session.static("pass", torch.zeros(1, 1, dtype=torch.int64, device=device))
    slot_L = session.static("slot", torch.arange(window, device=device))
    counts = Counts.start(session, window, batch, num_tokens, device)
    static_table = None if table is None else session.static("table", table)
    rule = None if chance is None else lambda p_BKV, q_BKV, draft_BK: chance(p_BKV, q_BKV, draft_BK, static_table)

    def turn(slots: int) -> None:
        # Predict all slots in parallel from the last token and the drafts.
        logits_BLV = model.verify(state, drafts.tokens_BK[:, : slots - 1])
        # Accept the drafts up to the first rejection, and draw one token more.
        uniform_BL3 = source.uniform(Use.DRAFT, state.length[:, None] + slot_L[:slots], (3,), pass_11)
        p_BLV, verdict, next_BL = verify_drafts(drafts, logits_BLV, uniform_BL3, state.length, counts, filters, rule)
        model.commit(state, verdict.tokens_BL, verdict.count_B)
        # The conditionals of the slots behind them draft the next pass; what the window lacks is guessed.
        carry(drafts, state, next_BL, p_BLV, verdict.count_B)
        pass_11.add_(1)
        if adaptive:
            drafts.adapt(state.length, pass_11, check_every)

    passes, done = run_passes(
        session,
        state,
        turn,
        num_tokens=num_tokens,
        window=window,
        check_every=check_every,
        callback=callback,
        width=(lambda: int(drafts.size_B.max())) if adaptive else None,
    )
    return counts.output(state.tokens[:, :done].clone(), {"generator": passes}, time.perf_counter() - begun)
