"""Ancestral sampling scale by scale, with settings per scale: all that VAR's released sampler offers."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Scales
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime, Session
from visar.generators.scales import ScaleState
from visar.kernels import finite
from visar.samplers.filtering import categorical, check_filters, filter_logits
from visar.samplers.verify import static_noise


@dataclass(frozen=True)
class ScaleSettings:
    """How the tokens of one scale are drawn; see `sample_next_scale`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    temperature_after_filter: bool = False
    smooth: bool = False

    def filter(self, logits_BLV: Tensor) -> Tensor:
        """Logits with the excluded codes at -inf and the temperature applied before or after the filters."""
        if not self.temperature_after_filter:
            filtered_BLV = filter_logits(logits_BLV, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        else:
            filtered_BLV = filter_logits(logits_BLV, top_k=self.top_k, top_p=self.top_p) / self.temperature
        finite.note(filtered_BLV)
        return filtered_BLV


def scale_settings(
    num_scales: int,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
    temperature_after_filter: bool = False,
    smooth: bool = False,
) -> tuple[ScaleSettings, ...]:
    """Settings of every scale from values for all scales, or lists with one per scale.

    Raises:
        ValueError: a list of another length, or a value out of range.
    """
    columns: list[list[Any]] = []
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        column = list(value) if isinstance(value, Sequence) else [value] * num_scales
        if len(column) != num_scales:
            raise ValueError(f"{name} has {len(column)} values; the model has {num_scales} scales")
        columns.append(column)
    settings = []
    for temperature_, top_k_, top_p_ in zip(*columns, strict=True):
        check_filters(temperature_, top_k_, top_p_)
        settings.append(ScaleSettings(temperature_, top_k_, top_p_, temperature_after_filter, smooth))
    return tuple(settings)


def smooth_codes(logits_BLV: Tensor, gumbel_BLV: Tensor, ratio: float, codebook_VC: Tensor) -> Tensor:
    """Means of code vectors [B, L, C] under a Gumbel-softmax that sharpens from the first scale to the last.

    Args:
        logits_BLV: filtered logits.
        gumbel_BLV: standard Gumbel draws.
        ratio: r = scale / (S - 1); logits are multiplied by 1 + r, the softmax temperature is max(0.27 (1 - 0.95 r),
            0.005).
        codebook_VC: code vectors.
    """
    sharpness = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weights = torch.softmax((logits_BLV * (1 + ratio) + gumbel_BLV) / sharpness, dim=-1)
    return weights @ codebook_VC


def draw_scale(
    model: Scales, state: ScaleState, settings: ScaleSettings, uniform_BN: Tensor, noise: Noise
) -> tuple[Tensor, Tensor | None]:
    """Predicts scale `state.block` and draws it.

    Args:
        model, state: the generator and its decoding state.
        settings: of this scale.
        uniform_BN: float32 in (0, 1), one per token.
        noise: further draws (smoothing).

    Returns: ids int64 [B, L], and smoothed codes [B, L, C] or None for the ids' own.
    """
    logits_BLV = settings.filter(model.predict(state))
    position_BL = model.positions(state).expand(state.batch, -1)
    tokens_BL = categorical(logits_BLV, uniform_BN.gather(1, position_BL))
    if not settings.smooth:
        return tokens_BL, None
    gumbel_BLV = noise.gumbel(Use.LATENT, position_BL, (logits_BLV.shape[-1],))
    ratio = state.block / max(len(model.scales) - 1, 1)
    return tokens_BL, smooth_codes(logits_BLV, gumbel_BLV, ratio, model.pyramid.codebook)


def check_scales(model: Scales, num_scales: int | None, prefix_tokens: Tensor | None) -> tuple[int, int]:
    """First scale to predict and the number of scales to stop at.

    Raises:
        ValueError: out of range, or a prefix that is no whole number of scales.
    """
    last = len(model.scales) if num_scales is None else num_scales
    first = 0 if prefix_tokens is None else model.pyramid.num_scales_of(prefix_tokens.shape[1])
    if not first < last <= len(model.scales):
        raise ValueError(
            f"num_scales {last} with a prefix of {first} scales; it must be in {first + 1} ... {len(model.scales)}"
        )
    return first, last


def append_prefix(model: Scales, state: ScaleState, prefix_tokens: Tensor) -> None:
    """Commits given ids int64 [B, whole number of scales]."""
    num_scales = model.pyramid.num_scales_of(prefix_tokens.shape[1])
    for scale, tokens_BL in enumerate(prefix_tokens.split(model.block_sizes[:num_scales], dim=1)):
        state.block = scale
        model.append(state, tokens_BL)


def open_session(
    runtime: Runtime,
    model: Scales,
    condition: Condition,
    guidance: Guidance,
    noise: Noise,
    *settings: Hashable,
) -> Session:
    """The session of a batch; settings: all that changes a step's work, beginning with the sampler's name."""
    key = (*settings, condition.batch, guidance.active(len(model.scales)))
    # mypy takes the class of diffusers for its stand-in without torch.
    return runtime.session(model, noise.device, key)  # type: ignore[arg-type]


def check_next_scale(
    model: Scales,
    guidance: Guidance,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
    temperature_after_filter: bool,
    smooth: bool,
    num_scales: int | None,
    prefix_tokens: Tensor | None,
) -> tuple[tuple[ScaleSettings, ...], int, int]:
    """Checks the arguments of `sample_next_scale`, errors as there; returns settings, first scale and end."""
    settings = scale_settings(len(model.scales), temperature, top_k, top_p, temperature_after_filter, smooth)
    guidance.scales(len(model.scales))
    return settings, *check_scales(model, num_scales, prefix_tokens)


@torch.no_grad()
def sample_next_scale(
    model: Scales,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    temperature_after_filter: bool = False,
    smooth: bool = False,
    num_scales: int | None = None,
    prefix_tokens: Tensor | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws scale after scale from the model's conditionals. Exact, unless smoothing is on.

    VAR, arXiv 2404.02905 section 3.2; smoothing: FoundationVision/VAR@78b9539 (`more_smooth`), for visual
    quality only. With values for all scales and no extras it gives the tokens of `sample_ancestral`.

    Args:
        model: a generator over scales.
        condition: of the B images.
        noise: one seed per image; one uniform number per token.
        guidance: blocks are scales. VAR: Guidance(1.5, "extrapolate", "linear") for FID, 4 for visual quality.
        temperature: > 0, for all scales or one per scale; 1.0 = off (VAR).
        top_k: 0 = off; for all scales or one per scale. VAR: 900.
        top_p: in (0, 1]; 1.0 = off; for all scales or one per scale. VAR: 0.96 for FID, 0.95 for visual
            quality.
        temperature_after_filter: divide by the temperature after top-k and top-p (CoDe) instead of before (Infinity).
        smooth: add Gumbel-weighted means of codes to the map instead of the drawn tokens' codes. The tokens are
            returned, but only the map is the image.
        num_scales: stop after so many scales; None is all.
        prefix_tokens: int64 ids of the first scales, taken as they are; None is none.
        callback: called after every scale, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, tokens of the scales made], the accumulated map and statistics.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.
    """
    begun = time.perf_counter()
    extras = (temperature_after_filter, smooth, num_scales, prefix_tokens)
    settings, first, last = check_next_scale(model, guidance, temperature, top_k, top_p, *extras)
    session = open_session(runtime, model, condition, guidance, noise, "next_scale", settings, first, last)
    state = model.start(condition, guidance, state=session.state, first_scale=first, last_scale=last - 1)
    session.state = state
    if prefix_tokens is not None:
        append_prefix(model, state, prefix_tokens)
    source = static_noise(session, noise)
    every_position = torch.arange(model.num_tokens, device=noise.device).expand(condition.batch, -1)
    uniform_BN = session.static("uniform", noise.uniform(Use.TOKEN, every_position))

    def step() -> None:
        model.append(state, *draw_scale(model, state, settings[state.block], uniform_BN, source))

    for scale in range(first, last):
        state.block = scale
        session.run(step, model.block_kinds[scale])
        if callback is not None and callback(model.ends[scale], model.result(state)):
            last = scale + 1
            break
    session.check_finite()
    return finish(model, state, last, {"generator": last - first}, model.block_sizes[first:last], begun)


def finish(
    model: Scales,
    state: ScaleState,
    num_scales: int,
    forward_passes: dict[str, int],
    pass_sizes: Sequence[int],
    begun: float,
) -> SampleOutput:
    """Copies the result out of the state, waits for the device and fills in the statistics.

    Args:
        model, state: the last generator and its state.
        num_scales: scales made.
        forward_passes: by model name.
        pass_sizes: tokens committed by every pass.
        begun: time.perf_counter() at the start.
    """
    tokens, map_BChw = model.result(state)[:, : model.ends[num_scales - 1]].clone(), state.map_BChw.clone()
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    histogram = {size: state.batch * list(pass_sizes).count(size) for size in sorted(set(pass_sizes))}
    statistics = SampleStatistics(
        forward_passes=forward_passes, tokens_per_pass=histogram, seconds=time.perf_counter() - begun
    )
    return SampleOutput(tokens, statistics, map_BChw)
