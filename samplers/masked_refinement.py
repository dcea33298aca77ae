"""Next-scale sampling in which a scale's least certain tokens are masked and drawn again, a few times."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Refining
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.generators.scales import ScaleState
from visar.samplers.filtering import categorical
from visar.samplers.next_scale import ScaleSettings, check_next_scale, finish, open_session

Schedule = str | Sequence[int | Sequence[int]]

# HMAR's default at 256 px: tokens kept by every pass of the scales of 4 and of 9 tokens; other scales take one pass.
DEFAULT_PASSES: dict[int, tuple[int, ...]] = {4: (1, 3), 9: (1, 1, 2, 5)}


def _parse_schedule(text: str) -> list[int | list[int]]:
    try:
        scales = [[int(count) for count in part.split(",")] for part in text.split("/")]
    except ValueError as error:
        raise ValueError(f"refinement schedule {text!r}; write it as 1/1,3/1,1,2,5") from error
    return [counts[0] if len(counts) == 1 else counts for counts in scales]


def refinement_schedule(sizes: Sequence[int], schedule: Schedule | None) -> tuple[tuple[int, ...], ...]:
    """Tokens that every pass of every scale keeps.

    Args:
        sizes: tokens of every scale.
        schedule: of the first scales (later ones take one pass): the counts (n0, n1, ...) of a scale's passes, which
            add up to its tokens; a list of one count, whatever it is, means no refinement; a number m means m passes
            that keep about the same number each, the first ones less. As text: "/" between scales, "," between
            counts, such as 1/1,3/1,1,2,5; a scale without commas is a number of passes. None is HMAR's default.

    Raises:
        ValueError: counts that do not add up, more passes than tokens, or more entries than scales.
    """
    if schedule is None:
        return tuple(DEFAULT_PASSES.get(size, (size,)) for size in sizes)
    if isinstance(schedule, str):
        schedule = _parse_schedule(schedule)
    if len(schedule) > len(sizes):
        raise ValueError(f"a refinement schedule of {len(schedule)} scales; the model has {len(sizes)}")
    passes = []
    for scale, size in enumerate(sizes):
        entry = schedule[scale] if scale < len(schedule) else 1
        if isinstance(entry, int):
            if not 1 <= entry <= size:
                raise ValueError(f"{entry} passes at scale {scale}; it has {size} tokens")
            counts = tuple(size * (i + 1) // entry - size * i // entry for i in range(entry))
        else:
            counts = tuple(entry) if len(entry) > 1 else (size,)
        if sum(counts) != size or min(counts) < 1:
            raise ValueError(f"passes {list(counts)} at scale {scale}; they must be >= 1 and add up to {size}")
        if scale == 0 and len(counts) > 1:
            raise ValueError("the first scale is not refined; give it one pass")
        passes.append(counts)
    return tuple(passes)


def least_certain(confidence_BL: Tensor, candidate_BL: Tensor, count: int) -> Tensor:
    """bool [B, L]: the `count` candidates of every image with the lowest confidence (the first ones on ties)."""
    ranked = confidence_BL.masked_fill(~candidate_BL, float("inf"))
    rank_BL = ranked.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return rank_BL < count


def draw_with_confidence(
    logits_BLV: Tensor, settings: ScaleSettings, uniform_BL: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, L] and their probabilities under the filtered distribution, float32 [B, L]."""
    filtered = settings.filter(logits_BLV)
    tokens_BL = filtered.argmax(-1) if greedy else categorical(filtered, uniform_BL)
    confidence = torch.softmax(filtered, dim=-1).gather(-1, tokens_BL[..., None])
    return tokens_BL, confidence.squeeze(-1)


def refine_scale(
    model: Refining,
    state: ScaleState,
    settings: ScaleSettings,
    counts: tuple[int, ...],
    uniforms_PBL: Sequence[Tensor],
    guidance_scale: float,
    greedy: bool,
) -> Tensor:
    """Ids of scale `state.block`: a next-scale draw, then passes that draw what is masked anew; kept ones stay."""
    tokens_BL, confidence_BL = draw_with_confidence(model.predict(state), settings, uniforms_PBL[0], greedy)
    masked_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    for index in range(1, len(counts)):
        masked_BL = least_certain(confidence_BL, masked_BL, sum(counts[index:]))
        logits_BLV = model.refine(state, tokens_BL, masked_BL, guidance_scale)
        drawn_BL, confidence_BL = draw_with_confidence(logits_BLV, settings, uniforms_PBL[index], greedy)
        tokens_BL = torch.where(masked_BL, drawn_BL, tokens_BL)
    return tokens_BL


def check_masked_refinement(
    model: Refining,
    guidance: Guidance,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
    temperature_after_filter: bool,
    schedule: Schedule | None,
    refinement_guidance: float,
    num_scales: int | None,
) -> tuple[tuple[ScaleSettings, ...], tuple[tuple[int, ...], ...]]:
    """Checks the arguments of `sample_masked_refinement`, errors as there; returns settings and passes of scales."""
    if not 0.0 <= refinement_guidance < float("inf"):
        raise ValueError(f"refinement_guidance {refinement_guidance}; it must be a finite number >= 0 (1.0 = off)")
    if refinement_guidance != 1.0 and not guidance.active(len(model.scales)):
        raise ValueError(f"refinement_guidance {refinement_guidance} needs guidance, which is off")
    extras = (temperature_after_filter, False, num_scales, None)
    settings, _, last = check_next_scale(model, guidance, temperature, top_k, top_p, *extras)
    return settings, refinement_schedule(model.block_sizes, schedule)[:last]


@torch.no_grad()
def sample_masked_refinement(
    model: Refining,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    temperature_after_filter: bool = False,
    schedule: Schedule | None = None,
    refinement_guidance: float = 1.0,
    greedy: bool = False,
    num_scales: int | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws scale after scale, each with a next-scale pass and masked passes. Lossy: not the next-scale distribution.

    HMAR, arXiv 2506.04421 section 3. With one pass per scale it is plain next-scale sampling, bit for bit.

    Args:
        model: a generator over scales with `refine`.
        condition: of the B images.
        noise: one seed per image; one uniform number per token and pass.
        guidance: of the next-scale passes. HMAR: Guidance(t, "extrapolate", "linear") with t 1.7, 1.9, 2.1 for depth
            16, 20, 24, and 1.6 for 30.
        temperature: > 0, for all scales or one per scale; 1.0 = off (HMAR).
        top_k: 0 = off. HMAR: 1000, 950, 900, 650 for depth 16, 20, 24, 30. With 1 every confidence is 1 and the
            choice of masked tokens means nothing: use `greedy`.
        top_p: in (0, 1]; 1.0 = off. HMAR: 0.99.
        temperature_after_filter: see `sample_next_scale`.
        schedule: see `refinement_schedule`. HMAR: (1, 3) at the scale of 4 tokens, (1, 1, 2, 5) at that of 9.
        refinement_guidance: scale of masked passes, "interpolate" convention; 1.0 = off (HMAR, to 1e-6).
        greedy: take the most likely token instead of drawing.
        num_scales: stop after so many scales; None is all.
        callback: called after every scale, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N], the accumulated map and statistics.

    Raises:
        ValueError: a setting or schedule out of range, or a condition that does not fit the model.
    """
    begun = time.perf_counter()
    extras = (temperature_after_filter, schedule, refinement_guidance, num_scales)
    settings, passes = check_masked_refinement(model, guidance, temperature, top_k, top_p, *extras)
    last = len(passes)
    options = ("masked_refinement", settings, passes, refinement_guidance, greedy)
    session = open_session(runtime, model, condition, guidance, noise, *options)
    state = session.state = model.start(condition, guidance, state=session.state)
    every_position = torch.arange(model.num_tokens, device=noise.device).expand(condition.batch, -1)
    uniforms = [
        session.static(f"uniform {index}", noise.uniform(Use.TOKEN, every_position, counter=index))
        for index in range(max(len(counts) for counts in passes))
    ]

    def step() -> None:
        scale = state.block
        position_BL = model.positions(state).expand(condition.batch, -1)
        here = [uniform_BN.gather(1, position_BL) for uniform_BN in uniforms]
        counts = passes[scale]
        tokens_BL = refine_scale(model, state, settings[scale], counts, here, refinement_guidance, greedy)
        model.append(state, tokens_BL)

    for scale in range(last):
        state.block = scale
        session.run(step, model.block_kinds[scale])
        if callback is not None and callback(model.ends[scale], model.result(state)):
            last = scale + 1
            break
    session.check_finite()
    pass_sizes = [count for counts in passes[:last] for count in counts]
    return finish(model, state, last, {"generator": len(pass_sizes)}, pass_sizes, begun)
