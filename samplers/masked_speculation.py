"""Continuous speculative decoding (CSpD) of masked models: a small one drafts, the large one checks windows. Lossy.

Sources: arXiv 2411.11925 (the paper's formulas); MarkXCloud/CSpD@d91f721 (what its code does). Draft and target run
their chains from the same first point with the same noises; where they end is compared by the last transition's
Gaussian of each and a factor V for the widths of all others:

    r = V p(x | x_1 of the target) / q(x | x_1 of the draft), accepted if u < r; else x ~ p with chance [1 - 1 / r]+.

The paper has V = prod s_q / prod s_p ("paper"). The code has it upside down and makes both Gaussians 42 times as wide
in the first test, not in the second ("reference"): a draft is in effect accepted where it is near the target's token.
Both change the distribution. A window is verified in one pass that sees the tokens before it only, so the target is
that of as many steps as windows: the honest rival is `masked` with so many. Where no proposal is taken the code puts
zeros; here the target's own token stays.

B images, L tokens, C numbers of a token, M rounds.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from visar.core.checks import Range, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Masked, TokenHead
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime, Session
from visar.samplers.continuous import check_same_tokens, token_noise
from visar.samplers.masked import DEFAULT_STEPS, check_steps, masked_after, strengths

Rule = Literal["paper", "reference"]

INNER_TEMPERATURE = 42.0
ROUNDS = 100
_DRAFTS = Range(1, 4096)
_SHARE = Range(0, 1)


# --------------------------------------------------------------------------------------------------------- the rules
@dataclass(frozen=True)
class ChainEnd:
    """How a chain ended.

    Attributes:
        mean, std: of the last transition, float32 [..., C].
        log_widths: sum over the other transitions of the logarithms of their standard deviations, [..., C].
    """

    mean: Tensor
    std: Tensor
    log_widths: Tensor


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density [...] of a diagonal Gaussian."""
    return -(((x - mean) / std).square() / 2 + std.log() + math.log(2 * math.pi) / 2).sum(-1)


def paper_log_ratio(x: Tensor, target: ChainEnd, draft: ChainEnd) -> Tensor:
    """log r of the paper, [...]: for accepting a draft x, and at a proposal x after a rejection."""
    log_factor = (draft.log_widths - target.log_widths).sum(-1)
    return log_factor + log_normal(x, target.mean, target.std) - log_normal(x, draft.mean, draft.std)


def reference_log_ratio(
    x: Tensor, target: ChainEnd, draft: ChainEnd, inner_temperature: float = INNER_TEMPERATURE
) -> Tensor:
    """log r of the released code, [...]; it resamples with inner temperature 1."""
    log_factor = (target.log_widths - draft.log_widths).sum(-1)
    wide_p, wide_q = (each.std * inner_temperature for each in (target, draft))
    return log_factor + log_normal(x, target.mean, wide_p) - log_normal(x, draft.mean, wide_q)


def residual_chance(log_ratio: Tensor) -> Tensor:
    """Chance [1 - 1 / r]+ of taking a proposal."""
    return (-torch.expm1(-log_ratio)).clamp(min=0.0)


def first_taken(chance_M: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """The first of M rounds, along axis 0, whose proposal is taken: index int64 [...], and whether there is one."""
    taken_M = uniform_M < chance_M
    return taken_M.long().argmax(0), taken_M.any(0)


def last_taken(chance_M: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """As `first_taken`, but as the released code does it: rounds go on for all tokens until each has taken once, and
    later proposals overwrite earlier ones. A token's draw depends on its batch."""
    taken_M = uniform_M < chance_M
    seen_M = taken_M.long().cumsum(0) > 0
    unfinished_M = ~seen_M.flatten(1).all(1)
    # A round is run if some token had taken nothing in the rounds before it.
    run_M = torch.cat([torch.ones_like(unfinished_M[:1]), unfinished_M[:-1]])
    shape = (-1, *[1] * (taken_M.ndim - 1))
    number_M = torch.arange(len(taken_M), device=taken_M.device).view(shape)
    last = torch.where(taken_M & run_M.view(shape), number_M, -1).amax(0)
    return last.clamp(min=0), last >= 0


_ENDS = tuple(field.name for field in fields(ChainEnd))
# Of every rule: log r of drafts and of proposals, and which round's proposal is taken.
_RULES: dict[Rule, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
    "paper": (paper_log_ratio, paper_log_ratio, first_taken),
    "reference": (reference_log_ratio, partial(reference_log_ratio, inner_temperature=1.0), last_taken),
}


# ------------------------------------------------------------------------------------------------------- the sampler
def check_masked_speculation(
    model: Masked,
    guidance: Guidance,
    drafter: Masked | None,
    num_drafts: int,
    target_share: float,
    rule: Rule,
    steps: int | None,
    temperature: float,
    head_steps: int | None,
) -> None:
    """Checks the arguments of `sample_masked_speculation`; errors as there."""
    check_steps(model, model.num_tokens, guidance, steps, temperature, head_steps)
    check_range("num_drafts", num_drafts, _DRAFTS)
    check_range("target_share", target_share, _SHARE)
    if rule not in _RULES:
        raise ValueError(f"rule {rule!r}; choose paper or reference, both lossy")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}; the rules compare densities: above 0")
    if drafter is None:
        raise ValueError("masked_speculation needs drafter: a smaller masked model over the same tokens")
    check_steps(drafter, drafter.num_tokens, guidance, steps, temperature, head_steps)
    check_same_tokens(model, drafter)
    ours, theirs = model.token_head, drafter.token_head
    for head in (ours, theirs):
        known = head.deviations(head.check_steps(head_steps))
        if head.check_steps(head_steps) < 2 or (known is not None and min(known) <= 0):
            raise ValueError(
                f"a {type(head).__name__} with these settings has transitions without noise: no densities"
            )
    if ours.check_steps(head_steps) != theirs.check_steps(head_steps):
        raise ValueError("the drafter's head has other transitions than the model's: give head_steps")


def chain_end(
    head: TokenHead,
    features_RLD: Tensor,
    noise: Callable[[int], Tensor],
    *,
    steps: int | None,
    temperature: float,
    scale_BL: Tensor | None,
) -> tuple[Tensor, ChainEnd]:
    """Tokens [B, L, C] as `Head.draw` makes them, and how their chains ended; arguments as of it."""
    count = head.check_steps(steps)
    x_BLC = head.start(noise(0))
    widths, mean_BLC, std = torch.zeros_like(x_BLC), x_BLC, torch.ones_like(x_BLC)
    for index in range(count):
        mean_BLC, deviation = head.transition(x_BLC, index, features_RLD, steps=steps, scale_BL=scale_BL)
        std = torch.as_tensor(deviation, device=x_BLC.device, dtype=x_BLC.dtype).expand_as(x_BLC)
        last = index == count - 1
        widths = widths if last else widths + std.log()
        x_BLC = mean_BLC if last and not head.noisy_end else mean_BLC + temperature * std * noise(index + 1)
    return x_BLC, ChainEnd(mean_BLC, temperature * std, widths)


@dataclass(frozen=True)
class Draws:
    """Random numbers of a call, each a function of places int64 [B, L].

    Attributes:
        chain: (places, number) -> standard normal [B, L, C], the noises of chains, common to both models.
        uniform: (step, places) -> [B, L], that decides about drafts.
        proposals: (step, places) -> standard normal [M, B, L, C] and uniform [M, B, L], of the rounds after it.
    """

    chain: Callable[[Tensor, int], Tensor]
    uniform: Callable[[int, Tensor], Tensor]
    proposals: Callable[[int, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def sample_masked_speculation(
    model: Masked,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    drafter: Masked | None = None,
    num_drafts: int = 8,
    target_share: float = 0.05,
    rule: Rule = "paper",
    steps: int | None = None,
    temperature: float = 1.0,
    head_steps: int | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Drafts steps by a small masked model, and verifies every few of them by one pass of the large one. Lossy.

    Continuous speculative decoding, arXiv 2411.11925; see the module's text for what its rules do.

    Args:
        model: a masked generator of continuous tokens.
        condition: of the B images.
        noise: one seed an image.
        guidance: over steps, of both models; that of a window's last step verifies it.
        drafter: a smaller one over the same tokens, with as many transitions.
        num_drafts: steps of a window; the model verifies in steps whose number it divides, and in the last.
        target_share: share of the steps, the first ones, that the model makes itself. The paper: 0.05.
        rule: "paper" or "reference", see the module's text; the images of "reference" depend on their batch where
            drafts are rejected.
        steps, temperature, head_steps: see `sample_masked`; the temperature is above 0.
        callback: called after every verified window, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: one for every step.

    Returns: tokens float32 [B, N, C] in raster order, and statistics, whose counts have head_passes,
        drafter_head_passes, and fallbacks: rejected tokens for which no proposal was taken.

    Raises:
        ValueError: a setting out of range, a head without densities, or a drafter that does not fit.
    """
    check_masked_speculation(model, guidance, drafter, num_drafts, target_share, rule, steps, temperature, head_steps)
    assert drafter is not None
    count = min(DEFAULT_STEPS, model.num_tokens) if steps is None else steps
    settings = (num_drafts, target_share, rule, count, temperature, head_steps)
    work = ("masked_speculation", condition.batch, guidance.active(count), settings, id(drafter))
    session = runtime.session(model, noise.device, work)
    own = Noise(session.static("seeds", noise.seeds_B), noise.device)
    position_BN = torch.arange(model.num_tokens, device=noise.device).expand(condition.batch, -1)
    order_BN = session.static("order", own.uniform(Use.ORDER, position_BN).argsort(dim=1, stable=True))
    channels = model.token_head.channels

    def proposals(step: int, places_BL: Tensor) -> tuple[Tensor, Tensor]:
        normal = [own.normal(Use.RESIDUAL, places_BL, (channels,), counter=2 * m) for m in range(ROUNDS)]
        uniform = [own.uniform(Use.RESIDUAL, places_BL, counter=2 * m + 1) for m in range(ROUNDS)]
        return torch.stack(normal), torch.stack(uniform)

    draws = Draws(
        lambda places_BL, number: token_noise(own, places_BL, number, channels),
        lambda step, places_BL: own.uniform(Use.ACCEPT, places_BL),
        proposals,
    )
    begun = time.perf_counter()
    run = _Run(model, drafter, session, order_BN, draws, strengths(guidance, model.num_tokens, count))
    run.start(condition, guidance.active(count))
    passes = run.windows(num_drafts, target_share, rule, temperature, head_steps, callback)
    tokens_BNC = run.states[0].tokens.clone()
    session.check_finite()  # waits for the device
    proposed, accepted, fallbacks = run.totals.tolist()
    transitions = model.token_head.check_steps(head_steps)
    statistics = SampleStatistics(
        forward_passes={"generator": passes[0], "drafter": passes[1]},
        proposed=proposed,
        accepted=accepted,
        seconds=time.perf_counter() - begun,
        counts={
            "head_passes": transitions * passes[0],
            "drafter_head_passes": transitions * passes[1],
            "fallbacks": fallbacks,
        },
    )
    return SampleOutput(tokens_BNC, statistics)


class _Run:
    """One call: its models, states and random numbers; `strength` is the guidance of every step."""

    def __init__(
        self,
        model: Masked,
        drafter: Masked,
        session: Session,
        order_BN: Tensor,
        draws: Draws,
        strength: list[float],
    ) -> None:
        self.models, self.session, self.order_BN, self.draws = (model, drafter), session, order_BN, draws
        self.strengths_T = session.static("strengths", torch.tensor(strength, device=order_BN.device))
        self.totals = session.static("totals", torch.zeros(3, dtype=torch.int64, device=order_BN.device))

    def start(self, condition: Condition, guided: bool) -> None:
        """States of both models over one buffer of tokens."""
        before = self.session.state or (None, None)
        doubled = Guidance(2.0) if guided else OFF
        self.states = self.session.state = [
            each.start(condition, doubled, state=state) for each, state in zip(self.models, before, strict=True)
        ]
        self.states[1].tokens = self.states[0].tokens
        nothing = torch.zeros_like(self.states[0].tokens)
        self.ends = ChainEnd(*(self.session.static(f"draft {name}", nothing) for name in _ENDS))

    def windows(
        self,
        num_drafts: int,
        target_share: float,
        rule: Rule,
        temperature: float,
        head_steps: int | None,
        callback: Callback | None,
    ) -> tuple[int, int]:
        """Runs all steps; returns the passes of the model and of the drafter."""
        total = self.models[0].num_tokens
        counts, passes = masked_after(total, len(self.strengths_T)), [0, 0]
        before = window = total
        chain: dict[str, Any] = dict(steps=head_steps, temperature=temperature)
        for step, after in enumerate(counts):
            own = step <= target_share * len(counts)

            def draw(step: int = step, before: int = before, after: int = after, which: int = 0 if own else 1) -> None:
                places_BL, tokens_BLC, end = self._draw(which, step, before, before, after, **chain)
                self.models[which].commit_at(self.states[which], places_BL, tokens_BLC)
                if which:
                    self._keep(places_BL, end)

            self.session.run(draw, ("step", step))
            passes[0 if own else 1] += 1
            if own:
                window = after
            elif step % num_drafts == 0 or step == len(counts) - 1:

                def verify(step: int = step, window: int = window, after: int = after) -> None:
                    self._verify(step, window, after, rule, **chain)

                self.session.run(verify, ("verify", step))
                passes[0] += 1
                window = after
            if window == after and callback is not None and callback(total - after, self.states[0].tokens):
                break
            before = after
        return passes[0], passes[1]

    def _draw(
        self, which: int, step: int, known: int, before: int, after: int, *, steps: int | None, temperature: float
    ) -> tuple[Tensor, Tensor, ChainEnd]:
        """Places of the order's `after` ... `before`, sorted, and their tokens given those behind `known`."""
        places_BL = self.order_BN[:, after:before].sort(dim=1).values
        model, state = self.models[which], self.states[which]
        features_RLD = model.features_at(state, self.order_BN[:, known:], places_BL)
        scale_BL = self.strengths_T[step].expand(places_BL.shape) if state.parts == 2 else None
        tokens_BLC, end = chain_end(
            model.token_head,
            features_RLD,
            lambda number: self.draws.chain(places_BL, number),
            steps=steps,
            temperature=temperature,
            scale_BL=scale_BL,
        )
        return places_BL, tokens_BLC, end

    def _keep(self, places_BL: Tensor, end: ChainEnd) -> None:
        """Keeps how drafted chains ended, by place."""
        for name in _ENDS:
            value = getattr(end, name)
            getattr(self.ends, name).scatter_(1, places_BL[..., None].expand_as(value), value)

    def _verify(
        self,
        step: int,
        window: int,
        after: int,
        rule: Rule,
        *,
        steps: int | None,
        temperature: float,
    ) -> None:
        places_BL, tokens_BLC, target = self._draw(
            0, step, window, window, after, steps=steps, temperature=temperature
        )
        index_BLC = places_BL[..., None].expand_as(tokens_BLC)
        draft = ChainEnd(*(getattr(self.ends, name).gather(1, index_BLC) for name in _ENDS))
        drafted_BLC = self.states[0].tokens.gather(1, index_BLC)
        of_drafts, of_proposals, taken = _RULES[rule]
        accepted_BL = self.draws.uniform(step, places_BL) < of_drafts(drafted_BLC, target, draft).exp()
        normal, uniform = self.draws.proposals(step, places_BL)
        proposed = target.mean + target.std * normal
        number_BL, found_BL = taken(residual_chance(of_proposals(proposed, target, draft)), uniform)
        again_BLC = proposed.gather(0, number_BL[None, ..., None].expand(1, *tokens_BLC.shape))[0]
        resampled_BLC = torch.where(found_BL[..., None], again_BLC, tokens_BLC)
        result_BLC = torch.where(accepted_BL[..., None], drafted_BLC, resampled_BLC)
        self.models[0].commit_at(self.states[0], places_BL, result_BLC)
        rejected_BL = ~accepted_BL
        everything_BL = torch.ones_like(accepted_BL)
        values = [each.sum() for each in (everything_BL, accepted_BL, rejected_BL & ~found_BL)]
        self.totals.add_(torch.stack(values))
