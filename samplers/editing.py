"""Editing without training: new tokens where a mask says so, those of a given image elsewhere, at every scale."""

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Refining, Scales
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.generators.scales import ScaleState
from visar.samplers.filtering import categorical
from visar.samplers.next_scale import ScaleSettings, check_next_scale, draw_scale, finish, open_session
from visar.samplers.verify import static_noise

Strategy = Literal["codes", "map", "refine"]


def box_mask(
    grid: tuple[int, int], box: tuple[float, float, float, float], *, keep: Literal["outside", "inside"]
) -> Tensor:
    """Keep-mask bool [1, h, w] of a box: keep its outside to inpaint (or edit) the box, its inside to outpaint.

    Args:
        grid: finest grid (h, w).
        box: top, left, bottom, right as fractions in 0 ... 1; edges are rounded to the grid.
        keep: the part of the given image that stays.

    Raises:
        ValueError: an empty box or one outside the image.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(
            f"box {box}; it is top, left, bottom, right with 0 <= top < bottom <= 1 and so for left, right"
        )
    height, width = grid
    inside = torch.zeros(1, height, width, dtype=torch.bool)
    inside[:, round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    return inside if keep == "inside" else ~inside


def grid_mask(keep_BHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Keep-mask bool [B, h, w] of a mask in pixels, bool [B, H, W]: a position stays if all its pixels do."""
    kept = functional.interpolate(keep_BHW[:, None].float(), size=grid, mode="area")[:, 0]
    return kept > 1 - 1e-4


def scale_keep_mask(keep_Bhw: Tensor, scale: tuple[int, int]) -> Tensor:
    """Keep-mask of a scale, bool [B, L]: the finest one resized bilinearly, where it exceeds one half."""
    resized = functional.interpolate(keep_Bhw[:, None].float(), size=scale, mode="bilinear", align_corners=False)
    return resized.flatten(1) > 0.5


def keep_codes(
    model: Scales,
    state: ScaleState,
    tokens_BL: Tensor,
    codes_BLC: Tensor | None,
    given_BL: Tensor,
    keep_BL: Tensor,
) -> None:
    """Commits a scale whose kept positions have the given tokens."""
    mixed_BL = torch.where(keep_BL, given_BL, tokens_BL)
    if codes_BLC is not None:
        codes_BLC = torch.where(keep_BL[..., None], model.pyramid.embedding(given_BL), codes_BLC)
    model.append(state, mixed_BL, codes_BLC)


def keep_map(
    model: Scales,
    state: ScaleState,
    tokens_BL: Tensor,
    codes_BLC: Tensor | None,
    given_map_BChw: Tensor,
    keep_Bhw: Tensor,
) -> None:
    """Commits a scale after which the accumulated map is the given one at kept positions."""
    codes = model.pyramid.embedding(tokens_BL) if codes_BLC is None else codes_BLC
    accumulated = model.pyramid.accumulate(state.map_BChw, state.block, codes)
    model.commit_map(state, tokens_BL, torch.where(keep_Bhw[:, None], given_map_BChw, accumulated))


def refine_edit(
    model: Scales,
    state: ScaleState,
    settings: ScaleSettings,
    tokens_BL: Tensor,
    given_BL: Tensor,
    keep_BL: Tensor,
    uniform_BL: Tensor,
) -> tuple[Tensor, None]:
    """Tokens of a scale drawn by a masked pass that sees the kept ones."""
    assert isinstance(model, Refining)
    mixed_BL = torch.where(keep_BL, given_BL, tokens_BL)
    return categorical(settings.filter(model.refine(state, mixed_BL, ~keep_BL)), uniform_BL), None


def check_edit(
    model: Scales,
    guidance: Guidance,
    given_tokens: Tensor,
    keep: Tensor,
    strategy: Strategy,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
    temperature_after_filter: bool,
    smooth: bool,
) -> tuple[ScaleSettings, ...]:
    """Checks the arguments of `sample_edit`, errors as there; returns the settings of the scales."""
    if strategy not in ("codes", "map", "refine"):
        raise ValueError(f"editing strategy {strategy!r}; choose codes, map or refine")
    if strategy == "refine" and not isinstance(model, Refining):
        raise ValueError(f"strategy refine needs a model with masked passes; {type(model).__name__} has none")
    batch = len(given_tokens)
    if given_tokens.ndim != 2 or given_tokens.shape[1] != model.num_tokens:
        raise ValueError(f"given_tokens {tuple(given_tokens.shape)}; needed: [one per image, {model.num_tokens}]")
    if keep.shape[0] not in (1, batch) or tuple(keep.shape[1:]) != model.scales[-1]:
        raise ValueError(f"keep {tuple(keep.shape)}; needed: [1 or {batch}, *{model.scales[-1]}]")
    extras = (temperature_after_filter, smooth, None, None)
    return check_next_scale(model, guidance, temperature, top_k, top_p, *extras)[0]


@torch.no_grad()
def sample_edit(
    model: Scales,
    condition: Condition,
    *,
    given_tokens: Tensor,
    keep: Tensor,
    strategy: Strategy = "codes",
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    temperature_after_filter: bool = False,
    smooth: bool = False,
    always_keep: int = 3,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Inpaints, outpaints or edits a given image. Lossy: not the model's distribution given what is kept.

    VAR, arXiv 2404.02905 section 4.4. The mask and the condition say what is done: a box whose outside is kept is
    inpainted under the null condition and edited under a class, one whose inside is kept is outpainted. VAR's authors
    use the 512 px model.

    Args:
        model: a generator over scales.
        condition: of the B images; the model's null condition for none.
        given_tokens: int64 [B, N], the tokenizer's ids of the given images.
        keep: bool [B, h, w] or [1, h, w] on the finest grid, True where the given image stays (`box_mask`,
            `grid_mask`).
        strategy: "codes" (FoundationVision/VAR@78b9539, editing notebook): at every scale kept positions have the
            given tokens, under the mask resized to the scale, and scales of up to `always_keep` tokens are given
            whole. "map" (czg1225/CoDe@bfb204d): after every scale the accumulated map is the given image's at kept
            positions of the finest grid. "refine" (after HMAR, arXiv 2506.04421; no released code): as "codes", then
            one masked pass draws the other positions anew, given the kept ones; needs a model with masked passes.
            Codes blend at the mask's edge, because phi and the resizing mix neighbours; the map's cut is exact.
        noise: one seed per image; one uniform number per token.
        guidance: blocks are scales. VAR: Guidance(3, "extrapolate", "linear").
        temperature, top_k, top_p, temperature_after_filter, smooth: see `sample_next_scale`. VAR: top_k 900, top_p
            0.95, smooth.
        always_keep: see strategy; VAR: 3.
        callback: called after every scale, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N] (kept positions have the given ones, but with "map" all are drawn ones), the
        accumulated map, which is the image (`tokenizer.decode_latents`), and statistics.

    Raises:
        ValueError: an unknown strategy, tokens or a mask that do not fit, a setting out of range.
    """
    begun = time.perf_counter()
    extras = (temperature_after_filter, smooth)
    settings = check_edit(model, guidance, given_tokens, keep, strategy, temperature, top_k, top_p, *extras)
    if len(given_tokens) != condition.batch:
        raise ValueError(f"given_tokens of {len(given_tokens)} images; the condition is of {condition.batch}")
    last = len(model.scales)
    options = ("edit", settings, strategy, always_keep, keep.shape[0])
    session = open_session(runtime, model, condition, guidance, noise, *options)
    state = session.state = model.start(condition, guidance, state=session.state)
    source = static_noise(session, noise)
    every_position = torch.arange(model.num_tokens, device=noise.device).expand(condition.batch, -1)
    uniform_BN = session.static("uniform", noise.uniform(Use.TOKEN, every_position))
    again_BN = session.static("again", noise.uniform(Use.TOKEN, every_position, counter=1))
    given_BN = session.static("given", given_tokens.to(noise.device))
    keep_Bhw = session.static("keep", keep.to(noise.device))
    given_maps = (
        [session.static(f"map {scale}", each) for scale, each in enumerate(model.pyramid.running_maps(given_BN))]
        if strategy == "map"
        else []
    )

    def step() -> None:
        scale = state.block
        drawn = draw_scale(model, state, settings[scale], uniform_BN, source)
        if strategy == "map":
            keep_map(model, state, *drawn, given_maps[scale], keep_Bhw)
            return
        keep_BL = scale_keep_mask(keep_Bhw, model.scales[scale])
        if model.block_sizes[scale] <= always_keep:
            keep_BL = torch.ones_like(keep_BL)
        here = slice(model.begin_of(scale), model.ends[scale])
        if strategy == "refine" and scale > 0:
            drawn = refine_edit(model, state, settings[scale], drawn[0], given_BN[:, here], keep_BL, again_BN[:, here])
        keep_codes(model, state, *drawn, given_BN[:, here], keep_BL)

    for scale in range(last):
        state.block = scale
        session.run(step, model.block_kinds[scale])
        if callback is not None and callback(model.ends[scale], state.tokens):
            last = scale + 1
            break
    session.check_finite()
    passes = 2 * last - 1 if strategy == "refine" else last
    return finish(model, state, last, {"generator": passes}, model.block_sizes[:last], begun)
