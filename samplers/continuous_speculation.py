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

B images, K drafted tokens, C numbers of a token, T transitions.
"""

import time

import torch
from torch import Tensor

from visar.core.checks import Range, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Continuous, TokenHead
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime
from visar.core.window import Window
from visar.samplers.continuous import check_head, check_same_tokens, token_noise

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
    check_head(model, guidance, temperature, head_steps)
    check_range("num_drafts", num_drafts, _DRAFTS)
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}; speculation needs noise in every transition: above 0")
    if drafter is None:
        raise ValueError("continuous_speculation needs drafter: a smaller model over the same tokens")
    check_head(drafter, guidance, temperature, head_steps)
    check_same_tokens(model, drafter)
    ours, theirs = model.token_head, drafter.token_head
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
            'solver "sde")'
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
        model: a causal generator of continuous tokens whose transitions have fixed deviations, see `coupled`.
        condition: of the B images.
        noise: one seed an image.
        guidance: classifier-free guidance over tokens, of both models.
        drafter: a smaller generator over the same tokens, with the same transitions.
        num_drafts: tokens of a window; each image accepts a number of its own.
        temperature: factor of the noise of the transitions, > 0.
        head_steps: transitions of a chain; None = the models' own number.
        callback: called after every window, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: a window is one step.

    Returns: tokens float32 [B, N, C] and statistics; counts has head_passes, drafter_head_passes, and transitions and
        met: how many transitions of tokens that count there were, and in how many both chains stood at one point.

    Raises:
        ValueError: a setting out of range, a head whose transitions cannot be compared, or a drafter that does not
            fit the model.
    """
    check_continuous_speculation(model, guidance, drafter, num_drafts, temperature, head_steps)
    assert drafter is not None
    begun, batch, device = time.perf_counter(), condition.batch, noise.device
    head, small = model.token_head, drafter.token_head
    deviations = [temperature * value for value in _deviations(head, head_steps)]
    steps, window = len(deviations), min(num_drafts, model.num_tokens)
    work = ("continuous_speculation", batch, guidance.active(model.num_tokens), temperature, head_steps, window)
    session = runtime.session(model, device, (*work, id(drafter)))
    if session.state is None:
        session.state = [None, None]
    states = session.state = [
        each.start(condition, guidance, ragged=True, window=window, state=state)
        for each, state in zip((model, drafter), session.state, strict=True)
    ]
    target_state, draft_state = states
    own = Noise(session.static("seeds", noise.seeds_B), device)
    ahead_K = torch.arange(window, device=device)
    totals = session.static("totals", torch.zeros(5, dtype=torch.int64, device=device))
    lengths_B = session.static("lengths", torch.zeros(batch, dtype=torch.int64, device=device))

    def chain_noise(place_BL: Tensor, number: int) -> Tensor:
        return token_noise(own, place_BL, number, head.channels)

    def draft(place: int) -> tuple[list[Tensor], list[Tensor]]:
        """Points of a token's chain, and their means; commits the token to the drafter's state."""
        features_RLD = drafter.features(draft_state)
        scale_BL, place_BL = drafter.scales(draft_state, 1), (target_state.length + place)[:, None]
        x_BLC = small.start(chain_noise(place_BL, 0))
        points, means = [x_BLC], []
        for index, deviation in enumerate(deviations):
            mean_BLC, _ = small.transition(x_BLC, index, features_RLD, steps=head_steps, scale_BL=scale_BL)
            x_BLC = mean_BLC + deviation * chain_noise(place_BL, index + 1)
            points.append(x_BLC)
            means.append(mean_BLC)
        drafter.commit(draft_state, x_BLC, torch.ones_like(draft_state.length))
        return points, means

    def turn() -> None:
        chains = [draft(place) for place in range(window)]
        points = [torch.cat(each, dim=1) for each in zip(*(chain[0] for chain in chains), strict=True)]
        means = [torch.cat(each, dim=1) for each in zip(*(chain[1] for chain in chains), strict=True)]
        read = None if window == 1 else Window.chain(points[-1][:, :-1])
        features_RLD = model.features(target_state, read)
        scale_BL, place_BK = model.scales(target_state, window), target_state.length[:, None] + ahead_K
        y_BKC, met = points[0], torch.zeros((), dtype=torch.int64, device=device)
        valid_BK = place_BK < model.num_tokens
        for index, deviation in enumerate(deviations):
            mean_BKC, _ = head.transition(y_BKC, index, features_RLD, steps=head_steps, scale_BL=scale_BL)
            uniform_BK = own.uniform(Use.ACCEPT, place_BK, counter=index)
            y_BKC, meets_BK = coupled(
                means[index], mean_BKC, deviation, chain_noise(place_BK, index + 1), uniform_BK, points[index + 1]
            )
            met = met + (meets_BK & valid_BK).sum()
        equal_BK = (y_BKC == points[-1]).all(-1)
        accepted_B = equal_BK.long().cumprod(1).sum(1)
        left_B = model.num_tokens - target_state.length
        count_B = torch.minimum((accepted_B + 1).clamp(max=window), left_B)
        # Its own points where both chains end there, the target's from the first that differs on.
        model.commit(target_state, y_BKC, count_B)
        draft_state.length.copy_(target_state.length)
        draft_state.tokens.copy_(target_state.tokens)
        active_B = left_B > 0
        proposed = torch.minimum(left_B, torch.full_like(left_B, window))
        values = [proposed.sum(), torch.minimum(accepted_B, proposed)[active_B].sum(), met]
        values += [steps * proposed.sum(), count_B.sum()]
        totals.add_(torch.stack(values))
        lengths_B.copy_(target_state.length)

    turns = 0
    while True:
        session.run(turn, "window")
        turns += 1
        done = int(lengths_B.min())
        if done == model.num_tokens or (callback is not None and callback(done, model.result(target_state))):
            break
    tokens_BNC = model.result(target_state)[:, :done].clone()
    session.check_finite()
    proposed, accepted, met, transitions, _ = totals.tolist()
    statistics = SampleStatistics(
        forward_passes={"generator": turns, "drafter": turns * window},
        tokens_per_pass={},
        proposed=proposed,
        accepted=accepted,
        seconds=time.perf_counter() - begun,
        counts={
            "head_passes": turns * steps,
            "drafter_head_passes": turns * window * steps,
            "transitions": transitions,
            "met": met,
        },
    )
    return SampleOutput(tokens_BNC, statistics)
