"""Masked sampling of continuous tokens: a random order an image, several places a step, each drawn by the head.

Source: MAR, arXiv 2406.11838 section 3.4, LTH14/mar@fe470ac (schedule, guidance, order).

B images, N tokens, L places of a step, C numbers of a token.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Masked
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime, Session
from visar.samplers.continuous import HeadSchedule, HeadSolver, chain_of, check_head, token_noise

DEFAULT_STEPS = 64


def masked_after(num_tokens: int, steps: int) -> list[int]:
    """Tokens that are still masked after every step: a cosine, at least one fewer than before, 0 at the end."""
    left, counts = num_tokens, []
    for step in range(steps - 1):
        wanted = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        left = max(1, min(left - 1, wanted))
        counts.append(left)
    return [*counts, 0]


def strengths(guidance: Guidance, num_tokens: int, steps: int, drawn: int | None = None) -> list[float]:
    """Guidance of every step. A linear schedule rises with the share of tokens that are known after the step, which
    for the last one are all but one (as released).

    Args:
        guidance: over the steps.
        num_tokens: of the image.
        steps: of the call.
        drawn: how many of them are drawn; the others are known from the start. None = all.
    """
    values = []
    for step, left in enumerate(masked_after(num_tokens if drawn is None else drawn, steps)):
        value = guidance.at(step, steps)
        if guidance.schedule == "linear" and guidance.interval is None:
            first, last = guidance.at(0, 2), guidance.at(1, 2)
            value = first + (last - first) * (num_tokens - max(left, 1)) / num_tokens
        values.append(value)
    return values


def check_masked(
    model: Masked,
    guidance: Guidance,
    steps: int | None,
    temperature: float,
    head_steps: int | None,
    last_head_steps: int | None,
    head_schedule: HeadSchedule,
    head_solver: HeadSolver | None,
) -> list[int]:
    """Checks the arguments of `sample_masked`, errors as there; returns the head's transitions in every step."""
    return check_steps(
        model, model.num_tokens, guidance, steps, temperature, head_steps, last_head_steps, head_schedule, head_solver
    )


def check_steps(
    model: Masked,
    drawn: int,
    guidance: Guidance,
    steps: int | None,
    temperature: float,
    head_steps: int | None,
    last_head_steps: int | None = None,
    head_schedule: HeadSchedule = "linear",
    head_solver: HeadSolver | None = None,
) -> list[int]:
    """`check_masked` where `drawn` of the tokens are drawn."""
    count = min(DEFAULT_STEPS, drawn) if steps is None else steps
    if not 1 <= count <= drawn:
        raise ValueError(f"steps {count}; needed: 1 ... {drawn}, the number of tokens")
    guidance.scales(count)
    check_head(model.token_head, temperature, head_steps, head_solver)
    return chain_of(model.token_head, count, head_steps, last_head_steps, head_schedule, head_solver)


@torch.no_grad()
def sample_masked(
    model: Masked,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    steps: int | None = None,
    temperature: float = 1.0,
    head_steps: int | None = None,
    last_head_steps: int | None = None,
    head_schedule: HeadSchedule = "linear",
    head_solver: HeadSolver | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens in a random order, a growing number at a time, each given all that are known. Lossy below N steps.

    Source: arXiv 2406.11838 section 3.4. Tokens of one step do not see each other; with as many steps as tokens there
    is one a step.

    Args:
        model: a masked generator of continuous tokens.
        condition: of the B images.
        noise: one seed an image: its order and the noises of its tokens are functions of it.
        guidance: classifier-free guidance over steps, of what the head predicts; a linear schedule rises with the
            share of known tokens (MAR).
        steps: passes of the model, 1 ... N; None = 64, or N where that is less. MAR: 256 of 256 for its figures.
        temperature: factor of the noise of the head's transitions, >= 0. MAR without guidance: 0.95.
        head_steps: transitions of the head's chain; None = the model's own number.
        last_head_steps, head_schedule: transitions in the last step, which those of the steps before fall to, and how;
            lossy, see `sample_continuous`; None = head_steps throughout.
        head_solver: see `sample_continuous`; None = the head's own.
        callback: called after every step, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: one for every step's pass, and one for the chains of every number of tokens.

    Returns: tokens float32 [B, N, C] in raster order, 0 where a callback ended before they were drawn; statistics,
        whose counts have head_passes.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.
    """
    head = (head_steps, last_head_steps, head_schedule, head_solver)
    chain = check_masked(model, guidance, steps, temperature, *head)
    work = ("masked", condition.batch, guidance.active(len(chain)), temperature, tuple(chain), head_solver)
    session = runtime.session(model, noise.device, work)
    settings = (guidance, chain, temperature, head_solver)
    return draw_masked(model, session, condition, noise, *settings, None, callback)


def draw_masked(
    model: Masked,
    session: Session,
    condition: Condition,
    noise: Noise,
    guidance: Guidance,
    chain: list[int],
    temperature: float,
    head_solver: HeadSolver | None,
    known: tuple[Tensor, Tensor, int] | None,
    callback: Callback | None,
) -> SampleOutput:
    """Draws an image's tokens, or those that are not known.

    Args:
        model, condition, noise, guidance, temperature, head_solver, callback: see `sample_masked`.
        session: of the call.
        chain: the head's transitions in every step.
        known: tokens [B, N, C], bool [B, N] of those that stay, and how many of a row are drawn; None = all are.
    """
    batch, total, count = condition.batch, model.num_tokens, len(chain)
    own = Noise(session.static("seeds", noise.seeds_B), noise.device)
    keys_BN = own.uniform(Use.ORDER, torch.arange(total, device=noise.device).expand(batch, -1))
    if known is not None:
        keys_BN = keys_BN + known[1]  # places at the end of an order are visible first
    order_BN = session.static("order", keys_BN.argsort(dim=1, stable=True))
    drawn = total if known is None else known[2]

    def noise_of(step: int, places_BL: Tensor, number: int) -> Tensor:
        return token_noise(own, places_BL, number, model.token_head.channels)

    begun = time.perf_counter()
    doubled = Guidance(2.0) if guidance.active(count) else OFF
    session.state = model.start(condition, doubled, state=session.state)
    if known is not None:
        session.state.tokens.copy_(known[0] * known[1][..., None])
    scales = strengths(guidance, total, count, drawn)
    done = run_steps(
        model, session, order_BN, noise_of, scales, chain, temperature, callback, drawn=drawn, head_solver=head_solver
    )
    tokens_BNC = session.state.tokens.clone()
    session.check_finite()  # waits for the device
    left = masked_after(drawn, count)[:done]
    sizes = [before - after for before, after in zip([drawn, *left], left, strict=False)]
    statistics = SampleStatistics(
        forward_passes={"generator": done},
        tokens_per_pass={size: batch * sizes.count(size) for size in sorted(set(sizes))},
        seconds=time.perf_counter() - begun,
        counts={"head_passes": sum(chain[:done])},
    )
    return SampleOutput(tokens_BNC, statistics)


def run_steps(
    model: Masked,
    session: Session,
    order_BN: Tensor,
    noise_of: Callable[[int, Tensor, int], Tensor],
    scales: list[float],
    chain: list[int],
    temperature: float,
    callback: Callback | None,
    *,
    drawn: int | None = None,
    head_solver: HeadSolver | None = None,
) -> int:
    """Runs the steps and returns how many there were.

    Args:
        model: with its state in the session.
        session: of the call.
        order_BN: int64; the first places of it stay masked for longest (as released).
        noise_of: (step, places [B, L], number) -> standard normal [B, L, C].
        scales: guidance of every step.
        chain: transitions of the head in every step.
        temperature, callback, head_solver: see `sample_masked`.
        drawn: how many tokens are drawn, the first places of the order; None = all.
    """
    state, total, steps = session.state, model.num_tokens, len(scales)
    drawn = total if drawn is None else drawn
    scales_T = session.static("scales", torch.tensor(scales, device=order_BN.device))
    before = drawn
    for step, after in enumerate(masked_after(drawn, steps)):
        size = before - after

        def read(step: int = step, before: int = before, after: int = after, size: int = size) -> None:
            places_BL, visible_BK = order_BN[:, after:before].sort(dim=1).values, order_BN[:, before:]
            session.static(f"places of {size}", places_BL)
            session.static(f"features of {size}", model.features_at(state, visible_BK, places_BL))
            session.static(f"scale of {size}", scales_T[step].expand(places_BL.shape))

        def draw(step: int = step, size: int = size) -> None:
            places_BL = session.buffer(f"places of {size}")
            tokens_BLC = model.token_head.draw(
                session.buffer(f"features of {size}"),
                lambda number: noise_of(step, places_BL, number),
                steps=chain[step],
                temperature=temperature,
                scale_BL=session.buffer(f"scale of {size}") if state.parts == 2 else None,
                solver=head_solver,
            )
            model.commit_at(state, places_BL, tokens_BLC)

        # A pass reads other numbers of tokens in every step; chains of as many tokens are one kind.
        session.run(read, ("read", step))
        session.run(draw, ("draw", size, chain[step]))
        before = after
        if callback is not None and callback(total - after, state.tokens):
            return step + 1
    return steps
