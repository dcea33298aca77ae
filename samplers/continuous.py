"""Token after token of a causal model over continuous tokens: every one drawn by the model's head. Exact.

Source: MAR's causal ablation, arXiv 2406.11838 section 3.3.

B images, N tokens, C numbers of a token, T transitions of a head's chain.
"""

import math
import time
from typing import Literal, get_args

import torch
from torch import Tensor

from visar.core.checks import Range, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Continuous, Masked, TokenHead
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime

HeadSolver = Literal["ancestral", "ddim", "dpm", "euler", "heun", "sde"]
"""Solvers of all heads; which of them a head has, it says."""
HeadSchedule = Literal["linear", "cosine", "two_stage", "constant"]
"""How a head's transitions fall as more tokens are known; see `head_steps_of`."""

_TEMPERATURE = Range(0, 1000)
_SCHEDULES: tuple[HeadSchedule, ...] = get_args(HeadSchedule)


def check_head(
    head: TokenHead, temperature: float, head_steps: int | None, head_solver: HeadSolver | None = None
) -> None:
    """Checks what samplers ask of a head.

    Args:
        head: of the model.
        temperature, head_steps, head_solver: of the head's chain.

    Raises:
        ValueError: a temperature below 0, transitions or a solver that the head does not have, or a temperature for a
            solver without noise.
    """
    check_range("temperature", temperature, _TEMPERATURE)
    head.check_steps(head_steps, head_solver)
    if head_solver in head.silent_solvers and temperature != 1.0:
        raise ValueError(f"temperature {temperature}; head_solver {head_solver} adds no noise: leave it at 1")


def head_steps_of(step: int, steps: int, first: int, last: int, schedule: HeadSchedule = "linear") -> int:
    """Transitions of the head in a step, which fall from `first` to `last`. DiSA, arXiv 2505.20297.

    "linear" falls evenly; "cosine" like half a cosine, late at first; "two_stage" has `first` in the first half of the
    steps and `last` after it; "constant" does not fall. The linear one is exactly the released one.
    """
    if steps == 1 or schedule == "constant":
        return first
    left = (steps - 1 - step) / (steps - 1)
    if schedule == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2.0
    elif schedule == "two_stage":
        left = 1.0 if 2 * step < steps else 0.0
    return int(left * (first - last)) + last


def chain_of(
    head: TokenHead,
    steps: int,
    head_steps: int | None,
    last_head_steps: int | None = None,
    head_schedule: HeadSchedule = "linear",
    head_solver: HeadSolver | None = None,
) -> list[int]:
    """Transitions of the head in every step.

    Raises:
        ValueError: a schedule that there is not, a number that the head does not have, or more transitions in the last
            step than in the first.
    """
    if head_schedule not in _SCHEDULES:
        raise ValueError(f"head_schedule {head_schedule!r}; choose {', '.join(_SCHEDULES)}")
    first = head.check_steps(head_steps, head_solver)
    last = first if last_head_steps is None else head.check_steps(last_head_steps, head_solver)
    if last > first:
        raise ValueError(f"last_head_steps {last}; needed: at most head_steps, {first}")
    if last < first and head_schedule == "constant":
        raise ValueError(f"last_head_steps {last}; head_schedule constant has head_steps alone, {first} here")
    counts = [head_steps_of(step, steps, first, last, head_schedule) for step in range(steps)]
    for count in counts:
        head.check_steps(count, head_solver)
    return counts


def check_continuous(
    model: Continuous,
    guidance: Guidance,
    temperature: float,
    head_steps: int | None,
    last_head_steps: int | None,
    head_schedule: HeadSchedule,
    head_solver: HeadSolver | None,
) -> None:
    """Checks the arguments of `sample_continuous`; errors as there."""
    guidance.scales(model.num_tokens)
    check_head(model.token_head, temperature, head_steps, head_solver)
    chain_of(model.token_head, model.num_tokens, head_steps, last_head_steps, head_schedule, head_solver)


def check_same_tokens(model: Continuous | Masked, drafter: Continuous | Masked) -> None:
    """Checks that a drafter makes as many tokens of the same size.

    Raises:
        ValueError: it does not.
    """
    ours, theirs = ((each.num_tokens, each.token_head.channels) for each in (model, drafter))
    if ours != theirs:
        raise ValueError(
            f"the drafter makes {theirs[0]} tokens of {theirs[1]} numbers, the model {ours[0]} of {ours[1]}: they "
            "were made for different tokenizers"
        )


def token_noise(noise: Noise, position_BL: Tensor, number: int, channels: int) -> Tensor:
    """Standard normal float32 [B, L, C] number `number` of tokens: a function of an image's seed, of where a token
    stands and of the number alone."""
    return noise.normal(Use.LATENT, position_BL, (channels,), counter=number)


@torch.no_grad()
def sample_continuous(
    model: Continuous,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    head_steps: int | None = None,
    last_head_steps: int | None = None,
    head_schedule: HeadSchedule = "linear",
    head_solver: HeadSolver | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws token after token, each by the head's chain given the tokens before it. Exact.

    That is to say the distribution of the head's own chain; fewer transitions or another solver are others.

    Source: arXiv 2406.11838 section 3.3.

    Args:
        model: a causal generator of continuous tokens.
        condition: of the B images.
        noise: one seed an image; a chain's noises are functions of the seed and of the token's place.
        guidance: classifier-free guidance over tokens, of what the head predicts (MAR).
        temperature: factor of the noise of the head's transitions, >= 0; 1.0 = off. MAR without guidance: 0.95.
        head_steps: transitions of the head's chain; None = the model's own number.
        last_head_steps: transitions of the last token, which those of the tokens before it fall to by head_schedule:
            "linear", "cosine", "two_stage" or "constant" (`head_steps_of`); lossy (DiSA, arXiv 2505.20297: 50 to 5);
            None = head_steps throughout.
        head_solver: "ancestral", "ddim" or "dpm" (DPM-Solver++(2M)) of a diffusion head, "euler", "heun" or "sde"
            of a flow; None = the head's own. Those without noise have no temperature.
        callback: called after every token, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: a token with its whole chain is one step.

    Returns: tokens float32 [B, N, C] and statistics; counts has head_passes.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.
    """
    check_continuous(model, guidance, temperature, head_steps, last_head_steps, head_schedule, head_solver)
    begun, head = time.perf_counter(), model.token_head
    sizes, batch = model.block_sizes, condition.batch
    chain = chain_of(head, len(sizes), head_steps, last_head_steps, head_schedule, head_solver)
    work = ("continuous", batch, guidance.active(len(sizes)), temperature, head_solver)
    session = runtime.session(model, noise.device, work)
    state = session.state = model.start(condition, guidance, state=session.state)
    own = Noise(session.static("seeds", noise.seeds_B), noise.device)

    def step() -> None:
        features_RLD = model.features(state)
        position_BL = model.positions(state).expand(batch, -1)
        tokens_BLC = head.draw(
            features_RLD,
            lambda number: token_noise(own, position_BL, number, head.channels),
            steps=chain[state.block],
            temperature=temperature,
            scale_BL=model.scales(state, 1),
            solver=head_solver,
        )
        model.append(state, tokens_BLC)

    done = 0
    for block, kind in enumerate(model.block_kinds):
        state.block = block
        session.run(step, (kind, chain[block]))
        done = block + 1
        if callback is not None and callback(done, model.result(state)):
            break
    tokens_BNC = model.result(state)[:, :done].clone()
    session.check_finite()  # waits for the device
    statistics = SampleStatistics(
        forward_passes={"generator": done},
        tokens_per_pass={1: batch * done},
        seconds=time.perf_counter() - begun,
        counts={"head_passes": sum(chain[:done])},
    )
    return SampleOutput(tokens_BNC, statistics)
