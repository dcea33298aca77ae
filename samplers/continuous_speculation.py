"""Exact speculation over continuous tokens: a small model drafts a window, the large one verifies it in one pass.

Source: reflection coupling of Gaussian transitions, De Bortoli et al., arXiv 2501.05370 (speculative sampling for
diffusion models), applied to a head's chain; that the two chains of a token may meet again after they separated is
this project's. Continuous speculative decoding, arXiv 2411.11925, decides by a ratio of densities along two paths
instead, which changes the distribution; this sampler does not.

A token is drafted by the chain of the drafter's head: x_0, and x_k+1 = m_k + s_k z_k. The target walks its own chain
y_k beside it from the same y_0 = x_0. Where both transitions have the deviation s, with d = (m - n) / s the distance
of their means (n the target's), y moves by the same point as x with the largest probability there is, and otherwise by
the reflected noise:

    log u <= (|z|^2 - |z + d|^2) / 2  :  y = x        else        y = n + s (z - 2 e (e . z)),  e = d / |d|

Either way y is distributed as n + s N(0, 1), whatever x is: the target's chain is its own. A token is accepted where
both chains end in the same point, and the window ends at the first that does not, with the target's own token there.

Mixtures have densities, and are compared by them: see samplers/continuous_densities.py.

B images, K drafted tokens, C numbers of a token, T transitions.
"""

import math
import time
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visar.core.checks import Range, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Continuous, DensityHead, TokenHead
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime, Session
from visar.core.window import Window
from visar.layers.heads.mixture import MixtureLaw
from visar.samplers.continuous import check_head, check_same_tokens, token_noise
from visar.samplers.continuous_densities import Residual, accepted

_DRAFTS = Range(1, 4096)


def coupled(
    draft_mean: Tensor, target_mean: Tensor, deviation: float, noise: Tensor, uniform: Tensor, drafted: Tensor
) -> tuple[Tensor, Tensor]:
    """The target's next point beside the drafter's, by reflection coupling.

    Args:
        draft_mean, target_mean: float32 [..., C].
        deviation: of both transitions, > 0.
        noise: the drafter's standard normal z [..., C].
        uniform: in (0, 1), [...], independent of it.
        drafted: the drafter's point, draft_mean + deviation * noise.

    Returns: the point, distributed as target_mean + deviation * N(0, 1), and bool [...] where it is the drafter's.
    """
    apart = (draft_mean - target_mean) / deviation
    ratio = (noise.square() - (noise + apart).square()).sum(-1) / 2.0
    meets = uniform.log() <= ratio
    length = apart.norm(dim=-1, keepdim=True)
    direction = apart / length.clamp(min=1e-30)
    reflected = target_mean + deviation * (noise - 2.0 * direction * (direction * noise).sum(-1, keepdim=True))
    return torch.where(meets[..., None], drafted, reflected), meets


def check_continuous_speculation(
    model: Continuous,
    guidance: Guidance,
    drafter: Continuous | None,
    num_drafts: int,
    temperature: float,
    head_steps: int | None,
) -> None:
    """Checks the arguments of `sample_continuous_speculation`; errors as there."""
    guidance.scales(model.num_tokens)
    check_head(model.token_head, temperature, head_steps)
    check_range("num_drafts", num_drafts, _DRAFTS)
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}; speculation needs noise in every transition: above 0")
    if drafter is None:
        raise ValueError("continuous_speculation needs drafter: a smaller model over the same tokens")
    check_head(drafter.token_head, temperature, head_steps)
    check_same_tokens(model, drafter)
    ours, theirs = model.token_head, drafter.token_head
    if isinstance(ours, DensityHead) and isinstance(theirs, DensityHead):
        return
    chains = [_deviations(head, head_steps) for head in (ours, theirs)]
    if chains[0] != chains[1]:
        raise ValueError("the drafter's head has other transitions than the model's: other steps, schedule or solver")


def _deviations(head: TokenHead, head_steps: int | None) -> list[float]:
    """Standard deviation of every transition.

    Raises:
        ValueError: one depends on the weights or is 0, or the last transition adds no noise.
    """
    found = head.deviations(head.check_steps(head_steps)) if head.noisy_end else None
    if found is None or min(found) <= 0:
        raise ValueError(
            f"a {type(head).__name__} with these settings cannot be verified: the deviation of every transition must "
            'be above 0 and the same in both models (diffusion with variance "large" or "small", or a flow with '
            'solver "sde"), or both heads be mixtures'
        )
    return found


@torch.no_grad()
def sample_continuous_speculation(
    model: Continuous,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    drafter: Continuous | None = None,
    num_drafts: int = 8,
    temperature: float = 1.0,
    head_steps: int | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws windows of tokens by a small model and keeps what the large one draws the same. Exact.

    Source: see the module's text. Images are distributed as those of `sample_continuous`; those of a seed are others.

    Args:
        model: a causal generator of continuous tokens whose transitions have fixed deviations, see `coupled`, or whose
            head is a mixture.
        condition: of the B images.
        noise: one seed an image.
        guidance: classifier-free guidance over tokens, of both models.
        drafter: a smaller generator over the same tokens, with the same transitions, or with a mixture too.
        num_drafts: tokens of a window; each image accepts a number of its own.
        temperature: factor of the noise of the transitions, > 0.
        head_steps: transitions of a chain; None = the models' own number.
        callback: called after every window, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: a window is one step. Without a callback the host waits for the device only
            where the slowest image may be complete.

    Returns: tokens float32 [B, N, C] and statistics; counts has head_passes and drafter_head_passes. Of chains it has
        transitions and met: how many transitions of tokens that count there were, and in how many both chains stood
        at one point. Of mixtures it has proposals, those after rejections, and fallbacks, see `MOST_PROPOSALS`.

    Raises:
        ValueError: a setting out of range, a head whose transitions cannot be compared, or a drafter that does not
            fit the model.
    """
    check_continuous_speculation(model, guidance, drafter, num_drafts, temperature, head_steps)
    assert drafter is not None
    begun, batch, total = time.perf_counter(), condition.batch, model.num_tokens
    window = min(num_drafts, total)
    work = ("continuous_speculation", batch, guidance.active(total), temperature, head_steps, window, id(drafter))
    session = runtime.session(model, noise.device, work)
    before = session.state or [None, None]
    session.state = [
        each.start(condition, guidance, ragged=True, window=window, state=state)
        for each, state in zip((model, drafter), before, strict=True)
    ]
    rule = _Densities if isinstance(model.token_head, DensityHead) else _Chains
    run = rule(model, drafter, session, Noise(session.static("seeds", noise.seeds_B), noise.device), window)
    run.prepare(temperature, head_steps)
    turns, due = 0, math.ceil(total / window)
    while True:
        session.run(run.turn, "window")
        turns += 1
        if callback is None and turns < due:
            continue  # no image can be complete
        done = int(run.states[0].length.min())
        if done == total or (callback is not None and callback(done, model.result(run.states[0]))):
            break
        due = turns + math.ceil((total - done) / window)
    tokens_BNC = model.result(run.states[0])[:, :done].clone()
    session.check_finite()
    proposed, accepted, *counted = run.totals.tolist()
    statistics = SampleStatistics(
        forward_passes={"generator": turns, "drafter": turns * window},
        tokens_per_pass={},
        proposed=proposed,
        accepted=accepted,
        seconds=time.perf_counter() - begun,
        counts={
            "head_passes": turns * run.transitions,
            "drafter_head_passes": turns * window * run.transitions,
            **dict(zip(run.counted, counted, strict=True)),
        },
    )
    return SampleOutput(tokens_BNC, statistics)


class _Windows(ABC):
    """One call: its models, states and random numbers, and what a window does by a rule.

    Attributes:
        counted: what the rule counts besides proposed and accepted drafts.
        transitions: of a chain.
        totals: int64 [4], the counts.
    """

    counted: tuple[str, str]
    transitions: int

    def __init__(self, model: Continuous, drafter: Continuous, session: Session, noise: Noise, window: int) -> None:
        self.model, self.drafter, self.noise, self.window = model, drafter, noise, window
        self.session, self.states = session, session.state
        self.ahead_K = torch.arange(window, device=noise.device)
        self.totals = session.static("totals", torch.zeros(4, dtype=torch.int64, device=noise.device))

    @abstractmethod
    def prepare(self, temperature: float, head_steps: int | None) -> None:
        """Reads the settings of the heads' chains."""

    @abstractmethod
    def turn(self) -> None:
        """Drafts a window and verifies it."""

    def chain_noise(self, place_BL: Tensor, number: int) -> Tensor:
        """Noise `number` of the drafter's chains."""
        return token_noise(self.noise, place_BL, number, self.model.token_head.channels)

    def hidden(self, drafts_BKC: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The model's hidden vectors of a window's places, their guidance, and the places [B, K]."""
        state = self.states[0]
        read = None if self.window == 1 else Window.chain(drafts_BKC[:, :-1])
        features_RLD = self.model.features(state, read)
        return features_RLD, self.model.scales(state, self.window), state.length[:, None] + self.ahead_K

    def commit_draft(self, token_B1C: Tensor) -> None:
        """Commits a drafted token to the drafter's state."""
        self.drafter.commit(self.states[1], token_B1C, torch.ones_like(self.states[1].length))

    def follow(self) -> None:
        """Takes the committed tokens over to the drafter's state."""
        target, draft = self.states
        draft.length.copy_(target.length)
        draft.tokens.copy_(target.tokens)


class _Chains(_Windows):
    """Heads whose transitions have the same deviations: both chains side by side, by reflection coupling."""

    counted = ("met", "transitions")

    def prepare(self, temperature: float, head_steps: int | None) -> None:
        self.deviations = [temperature * value for value in _deviations(self.model.token_head, head_steps)]
        self.transitions, self.head_steps = len(self.deviations), head_steps

    def draft(self, place: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Points of a token's chain, their means and noises; commits the token to the drafter's state."""
        state, head = self.states[1], self.drafter.token_head
        features_RLD, scale_BL = self.drafter.features(state), self.drafter.scales(state, 1)
        place_BL = (self.states[0].length + place)[:, None]
        x_BLC = head.start(self.chain_noise(place_BL, 0))
        points, means, noises = [x_BLC], [], []
        for index, deviation in enumerate(self.deviations):
            mean_BLC, _ = head.transition(x_BLC, index, features_RLD, steps=self.head_steps, scale_BL=scale_BL)
            noises.append(self.chain_noise(place_BL, index + 1))
            x_BLC = mean_BLC + deviation * noises[-1]
            points.append(x_BLC)
            means.append(mean_BLC)
        self.commit_draft(x_BLC)
        return points, means, noises

    def turn(self) -> None:
        chains = [self.draft(place) for place in range(self.window)]
        points, means, noises = (
            [torch.cat(each, dim=1) for each in zip(*parts, strict=True)] for parts in zip(*chains, strict=True)
        )
        features_RLD, scale_BL, place_BK = self.hidden(points[-1])
        head, total = self.model.token_head, self.model.num_tokens
        y_BKC, met = points[0], torch.zeros((), dtype=torch.int64, device=place_BK.device)
        valid_BK = place_BK < total
        for index, deviation in enumerate(self.deviations):
            mean_BKC, _ = head.transition(y_BKC, index, features_RLD, steps=self.head_steps, scale_BL=scale_BL)
            uniform_BK = self.noise.uniform(Use.ACCEPT, place_BK, counter=index)
            y_BKC, meets_BK = coupled(means[index], mean_BKC, deviation, noises[index], uniform_BK, points[index + 1])
            met = met + (meets_BK & valid_BK).sum()
        accepted_B = (y_BKC == points[-1]).all(-1).long().cumprod(1).sum(1)
        left_B = total - self.states[0].length
        # Its own points where both chains end there, the target's from the first that differs on.
        self.model.commit(self.states[0], y_BKC, torch.minimum((accepted_B + 1).clamp(max=self.window), left_B))
        self.follow()
        proposed_B = left_B.clamp(max=self.window)
        values = [proposed_B.sum(), torch.minimum(accepted_B, proposed_B).sum(), met]
        self.totals.add_(torch.stack([*values, self.transitions * proposed_B.sum()]))


class _Densities(_Windows):
    """Heads whose densities are known: see samplers/continuous_densities.py."""

    counted = ("proposals", "fallbacks")
    transitions = 1

    def prepare(self, temperature: float, head_steps: int | None) -> None:
        heads: Any = (self.model.token_head, self.drafter.token_head)
        self.heads, self.temperature = heads, temperature
        self.residual = Residual(self.session, self.noise, heads)

    def draft(self, place: int) -> tuple[Tensor, MixtureLaw]:
        """A token [B, 1, C] and what it was drawn from; commits it to the drafter's state."""
        state = self.states[1]
        scale_BL = self.drafter.scales(state, 1)
        law = self.heads[1].law(self.drafter.features(state), temperature=self.temperature, scale_BL=scale_BL)
        place_BL = (self.states[0].length + place)[:, None]
        token_B1C = law.draw(self.chain_noise(place_BL, 0)[..., 0], self.chain_noise(place_BL, 1))
        self.commit_draft(token_B1C)
        return token_B1C, law

    def turn(self) -> None:
        drawn = [self.draft(place) for place in range(self.window)]
        drafts_BKC = torch.cat([token for token, _ in drawn], dim=1)
        draft = MixtureLaw.concatenate([law for _, law in drawn])
        features_RLD, scale_BL, place_BK = self.hidden(drafts_BKC)
        target = self.heads[0].law(features_RLD, temperature=self.temperature, scale_BL=scale_BL)
        uniform_BK = self.noise.uniform(Use.ACCEPT, place_BK)
        accepted_BK = accepted(target.log_prob(drafts_BKC), draft.log_prob(drafts_BKC), uniform_BK)
        # An image whose last rejection is not over yet waits: nothing of its window counts.
        state, waits_B = self.states[0], self.residual.open_B.clone()
        left_B = (self.model.num_tokens - state.length).masked_fill(waits_B, 0)
        proposed_B = left_B.clamp(max=self.window)
        accepted_B = torch.minimum(accepted_BK.long().cumprod(1).sum(1), proposed_B)
        first_B = accepted_B.clamp(max=self.window - 1)
        laws = [law.map(partial(_at, first_B)) for law in (target, draft)]
        self.residual.open(accepted_B < proposed_B, *laws)
        self.model.commit(state, drafts_BKC, accepted_B)
        token_B1C, got_B, proposals, fallbacks = self.residual.draw(state.length)
        self.model.commit(state, token_B1C, got_B.long())
        self.follow()
        self.totals.add_(torch.stack([proposed_B.sum(), accepted_B.sum(), proposals, fallbacks]))


def _at(place_B: Tensor, value_BL: Tensor) -> Tensor:
    """[B, 1, ...], one place of every row of [B, L, ...]."""
    index = place_B.view(-1, *[1] * (value_BL.ndim - 1))
    return value_BL.gather(1, index.expand(-1, 1, *value_BL.shape[2:]))
