"""Collaborative decoding: models that share a tokenizer take turns over the scales.

A large one draws the few coarse tokens, a small one the many fine ones.
"""

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Scales
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime, check_finite
from visar.generators.scales import ScaleState
from visar.samplers.next_scale import ScaleSettings, check_next_scale, draw_scale, finish, open_session


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model and the scales that it predicts, first ... last - 1."""

    model: Scales
    first: int
    last: int


def plan_stages(model: Scales, followers: Sequence[Scales], takes_over: Sequence[int], last: int) -> list[Stage]:
    """Which model predicts which scales; a model that follows itself continues in its own state.

    Args:
        model: predicts from the first scale.
        followers: the models after it.
        takes_over: scale at which each of them begins.
        last: number of scales to make.

    Raises:
        ValueError: another number of scales than of followers, scales not rising inside the pyramid, or models that
            do not share a tokenizer.
    """
    if len(followers) != len(takes_over):
        raise ValueError(f"{len(followers)} followers, but {len(takes_over)} scales at which they take over")
    starts = [0, *takes_over, last]
    if any(later <= earlier for earlier, later in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"takes_over {list(takes_over)}; the scales must rise, inside 1 ... {last - 1}")
    stages: list[Stage] = []
    for index, generator in enumerate([model, *followers]):
        first, end = starts[index], starts[index + 1]
        if stages and stages[-1].model is generator:
            stages[-1] = Stage(generator, stages[-1].first, end)
            continue
        ours, theirs = model.pyramid, generator.pyramid
        if ours.scales != theirs.scales or not torch.equal(ours.codebook, theirs.codebook):
            raise ValueError(f"follower {index} was made for another tokenizer: other scales or another codebook")
        stages.append(Stage(generator, first, end))
    return stages


def _run_stage(
    stage: Stage,
    condition: Condition,
    guidance: Guidance,
    settings: tuple[ScaleSettings, ...],
    noise: Noise,
    history: ScaleState | None,
    callback: Callback | None,
    runtime: Runtime,
) -> tuple[ScaleState, int, Tensor | None]:
    """Predicts a stage's scales.

    Returns: its state without the cache, which is what the next model needs of it; at which scale the callback ended
        the sampling, -1 if it did not; and the flag that logits were not finite, to be checked at the end, as that
        waits for the device.
    """
    model = stage.model
    options = ("collaborative", settings, stage.first, stage.last)
    session = open_session(runtime, model, condition, guidance, noise, *options)
    state = session.state = model.start(
        condition,
        guidance,
        state=session.state,
        first_scale=stage.first,
        last_scale=stage.last - 1,
        history=history,
    )
    every_position = torch.arange(model.num_tokens, device=noise.device).expand(condition.batch, -1)
    uniform_BN = session.static("uniform", noise.uniform(Use.TOKEN, every_position))

    def step() -> None:
        model.append(state, *draw_scale(model, state, settings[state.block], uniform_BN, noise))

    stopped = -1
    for scale in range(stage.first, stage.last):
        state.block = scale
        session.run(step, model.block_kinds[scale])
        if callback is not None and callback(model.ends[scale], model.result(state)):
            stopped = scale
            break
    return dataclasses.replace(state, cache=None, modulations={}), stopped, session.invalid_1


def check_collaborative(
    model: Scales,
    guidance: Guidance,
    followers: Sequence[Scales],
    takes_over: Sequence[int],
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
    temperature_after_filter: bool,
    num_scales: int | None,
) -> tuple[tuple[ScaleSettings, ...], list[Stage]]:
    """Checks the arguments of `sample_collaborative`, errors as there; returns settings of scales and stages."""
    extras = (temperature_after_filter, False, num_scales, None)
    settings, _, last = check_next_scale(model, guidance, temperature, top_k, top_p, *extras)
    return settings, plan_stages(model, followers, takes_over, last)


@torch.no_grad()
def sample_collaborative(
    model: Scales,
    condition: Condition,
    *,
    followers: Sequence[Scales],
    takes_over: Sequence[int],
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    temperature_after_filter: bool = True,
    num_scales: int | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws the first scales from one model and later ones from others. Lossy: no single model's distribution.

    CoDe, arXiv 2411.17787 section 3 (there: one drafter, one refiner). What is handed over is the map and the
    resized maps of all scales; a model that takes over reads the coarser scales in the pass of its first own scale.
    Any number of models, at any scale, of any family over scales. When all models are the same the tokens are those
    of plain sampling.

    Memory: a model's cache holds the scales up to its last only, and is freed before the next model's is made, so a
    refiner's phase needs what the refiner alone would. (A runtime that captures keeps all caches for the next call.)

    Args:
        model: predicts from the first scale (the drafter).
        condition: of the B images.
        followers: models after it, in order (the refiner).
        takes_over: scale at which each follower begins. CoDe: [N] with N = 9, 8, 7 or 6 of 10 scales.
        noise: one seed per image; one uniform number per token.
        guidance: blocks are scales. CoDe: Guidance(1.5, "extrapolate", "linear") for FID, 4 for visual quality.
        temperature: > 0, for all scales or one per scale; 1.0 = off. CoDe: 1.1 on the first 7 scales, then 1.0.
        top_k: 0 = off; for all scales or one per scale. CoDe: 600.
        top_p: in (0, 1]; 1.0 = off. CoDe: 0.96 for FID, 0.95 for visual quality.
        temperature_after_filter: divide by the temperature after top-k and top-p (CoDe) or before.
        num_scales: stop after so many scales; None is all.
        callback: called after every scale, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N], the accumulated map and statistics; forward passes are counted as "drafter",
        "refiner", "refiner 2" ...

    Raises:
        ValueError: see `plan_stages`; a setting out of range; a condition that does not fit a model.
    """
    begun = time.perf_counter()
    filters, extras = (temperature, top_k, top_p), (temperature_after_filter, num_scales)
    settings, stages = check_collaborative(model, guidance, followers, takes_over, *filters, *extras)
    names = ["drafter", "refiner", *(f"refiner {index}" for index in range(2, len(stages)))]
    passes, state, last, flags = {}, None, 0, []
    for name, stage in zip(names, stages, strict=False):
        state, stopped, flag = _run_stage(stage, condition, guidance, settings, noise, state, callback, runtime)
        flags.append(flag)
        last = stage.last if stopped < 0 else stopped + 1
        passes[name] = last - stage.first
        if stopped >= 0:
            break
    for flag in flags:
        check_finite(flag)
    assert state is not None
    return finish(model, state, last, passes, model.block_sizes[:last], begun)
