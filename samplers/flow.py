"""The flow map: from Gaussian noise to tokens, given the conditional of every token; and sampling through it.

Source: Distilled Decoding, arXiv 2412.17153 section 3 (the closed form is Eq. 1 of its successor, 2510.21003). A token
is where the probability-flow ODE of rectified flow leads, from noise at t = 1 to the codes at t = 0. With the
distribution p over codes c known, the denoiser is a softmax over the codes, so that nothing has to be learned:

    D(x, t) = sum_v w_v c_v,    w = softmax(log p + ((1 - t) x.c - (1 - t)^2 |c|^2 / 2) / t^2),    dx/dt = (x - D) / t

The tokens of an image are thereby a function of its noise and its condition: what one-step students learn.

B images, N tokens, L tokens of a block, M rows, V codes, C code width.
"""

import functools
import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visar import kernels
from visar.core.checks import Range, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Categorical, Scales
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime, Session
from visar.kernels import finite
from visar.samplers.ancestral import check_ancestral, run_blocks
from visar.samplers.filtering import filter_logits
from visar.samplers.stages import in_stages

STEPS = Range(2, 10_000)
# Numbers float32 of one intermediate [rows, V] at a time: 256 MiB.
_LARGEST = 2**26
# Given tokens that a model of one token per block reads in a pass.
_READ = 32


def code_scale(codebook_VC: Tensor) -> float:
    """What code vectors [V, C] are multiplied by so that their mean variance a dimension is 1, that of the noise.

    The map is not invariant to the scale of the codes: small ones are told apart at the very end of the path only.
    """
    return float(codebook_VC.float().var(dim=0, unbiased=False).mean().rsqrt())


def initial_noise(noise: Noise, positions: Tensor, channels: int) -> Tensor:
    """Standard normal float32 [B, L, C] of tokens at positions int64 [1 or B, L] in the tokenizer's order."""
    return noise.normal(Use.LATENT, positions.expand(noise.batch, -1), (channels,))


def denoise(x_MC: Tensor, time_: Tensor | float, logits_MV: Tensor, codes_VC: Tensor) -> Tensor:
    """D(x, t), float32 [M, C]: the mean code given a point x at time t in (0, 1].

    Args:
        x_MC: float32.
        time_: t of all rows, or float32 [M, 1].
        logits_MV: float32 logits of p; -inf for codes that are excluded.
        codes_VC: scaled code vectors.
    """
    near = 1.0 - time_
    products_MV = near * (x_MC @ codes_VC.t()) - near * near * (codes_VC.square().sum(-1) / 2)
    return torch.softmax(logits_MV + products_MV / (time_ * time_), dim=-1) @ codes_VC


def nearest_allowed(x_MC: Tensor, logits_MV: Tensor, codes_VC: Tensor) -> Tensor:
    """Nearest code to every point that is not excluded, int64 [M]."""
    closeness_MV = x_MC @ codes_VC.t() - codes_VC.square().sum(-1) / 2
    return closeness_MV.masked_fill(logits_MV == float("-inf"), float("-inf")).argmax(-1)


def fits_kernel(noise: Tensor, logits: Tensor, codes_VC: Tensor) -> bool:
    """Whether one kernel takes the whole map."""
    return codes_VC.shape[1] <= kernels.MAX_CHANNELS and all(map(kernels.usable, (noise, logits, codes_VC)))


def flow_map(noise: Tensor, logits: Tensor, codes_VC: Tensor, steps: int = 24) -> Tensor:
    """Tokens int64 [...] that noise float32 [..., C] leads to, by Heun's method with uniform steps.

    Frequencies over standard normal noise are softmax(logits) but for the solver's error: 24 steps move about one
    token in 200 (512 codes, width 8); more steps, fewer. Codes at -inf are never reached.

    Args:
        noise: standard normal.
        logits: float [..., V], guided and filtered.
        codes_VC: scaled code vectors, see `code_scale`.
        steps: of the solver, two evaluations each but for the last.
    """
    if fits_kernel(noise, logits, codes_VC):
        from visar.kernels.flow_map import map_codes

        with kernels.on(noise.device):
            noise_MC, logits_MV = noise.flatten(0, -2).float().contiguous(), logits.flatten(0, -2).contiguous()
            return map_codes(noise_MC, logits_MV, codes_VC.detach().float(), steps).view(noise.shape[:-1])
    x_MC, logits_MV = noise.flatten(0, -2).float(), logits.flatten(0, -2).float()
    rows = max(1, _LARGEST // logits.shape[-1])
    if len(x_MC) > rows:
        pairs = zip(x_MC.split(rows), logits_MV.split(rows), strict=True)
        return torch.cat([flow_map(*pair, codes_VC, steps) for pair in pairs]).view(noise.shape[:-1])
    with torch.autocast(noise.device.type, enabled=False):
        codes_VC = codes_VC.float()
        times = [1.0 - step / steps for step in range(steps)] + [0.0]
        for now, then in itertools.pairwise(times):
            denoised_MC = denoise(x_MC, now, logits_MV, codes_VC)
            if then == 0.0:  # the straight line to t = 0 ends on D
                x_MC = denoised_MC
                continue
            slope_MC = (x_MC - denoised_MC) / now
            ahead_MC = x_MC + (then - now) * slope_MC
            slope_ahead_MC = (ahead_MC - denoise(ahead_MC, then, logits_MV, codes_VC)) / then
            x_MC = x_MC + (then - now) * (slope_MC + slope_ahead_MC) / 2
        return nearest_allowed(x_MC, logits_MV, codes_VC).view(noise.shape[:-1])


def check_flow(
    model: Categorical,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    codebook: Tensor | None,
    steps: int,
) -> None:
    """Checks the arguments of `sample_flow`; errors as there."""
    check_ancestral(model, guidance, temperature, top_k, top_p)
    check_range("steps", steps, STEPS)
    if codebook is None:
        raise ValueError("the flow map needs codebook, the tokenizer's code vectors (pipelines give it)")
    if codebook.shape[0] != model.config["vocab_size"]:
        raise ValueError(f"codebook of {codebook.shape[0]} codes; the model has {model.config['vocab_size']}")


@in_stages
@torch.no_grad()
def sample_flow(
    model: Categorical,
    condition: Condition,
    *,
    noise: Noise,
    codebook: Tensor | None = None,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    steps: int = 24,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws every block of tokens by the flow map of its conditional. Lossy by the solver's error only.

    Distilled Decoding, arXiv 2412.17153 section 3: the teacher's side. A seed's image is a smooth function of its
    noise where ancestral sampling has none, and is what a one-step student of this model makes of the same seed.

    Args:
        model: a generator with start, predict, append, block_sizes and block_kinds.
        condition: of the B images.
        noise: one seed an image; a standard normal vector a token.
        codebook: code vectors [V, C] of the tokenizer, as looked up; pipelines give it.
        guidance, temperature, top_k, top_p: as in `sample_ancestral`; the map is that of the resulting distribution.
        steps: of Heun's method a token, >= 2. The paper does not say; 24 is within half a per cent of the limit.
        callback: called after every block, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: a setting out of range, a codebook of another size, or a condition that does not fit the model.
    """
    check_flow(model, guidance, temperature, top_k, top_p, codebook, steps)
    assert codebook is not None
    begun = time.perf_counter()
    batch, device = condition.batch, noise.device
    work = ("flow", batch, guidance.active(len(model.block_sizes)), temperature, top_k, top_p, steps)
    session = runtime.session(model, device, work)
    state = session.state = model.start(condition, guidance, state=session.state)
    codes_VC = session.static("codes", codebook.to(device).float() * code_scale(codebook))
    every_position = torch.arange(model.num_tokens, device=device)[None]
    noise_BNC = session.static("noise", initial_noise(noise, every_position, codes_VC.shape[1]))
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    step = functools.partial(draw_block, model, state, noise_BNC, codes_VC, filters, steps)
    return run_blocks(model, session, step, batch, callback, begun)


def draw_block(
    model: Categorical, state: Any, noise_BNC: Tensor, codes_VC: Tensor, filters: Mapping[str, Any], steps: int
) -> None:
    """Predicts the next block, draws it by the flow map and appends it."""
    logits_BLV = filter_logits(model.predict(state), **filters)
    finite.note(logits_BLV)
    place_BLC = model.positions(state)[..., None].expand(len(noise_BNC), -1, codes_VC.shape[1])
    model.append(state, flow_map(noise_BNC.gather(1, place_BLC), logits_BLV, codes_VC, steps))


def read_given(model: Any, session: Session, given_BN: Tensor, first: int) -> int:
    """Commits given tokens of the blocks before `first`, and returns the forward passes that this took.

    A model over scales reads them in its first prediction, one of a token per block many in a pass.
    """
    state, ends = session.state, tuple(itertools.accumulate(model.block_sizes[:first], initial=0))
    scales = isinstance(model, Scales)
    ends = ends if scales else (*ends[:-1:_READ], ends[-1])

    def read(begin: int, end: int) -> None:
        if not scales:
            model.verify(state, given_BN[:, begin:end])
        model.append(state, given_BN[:, begin:end])

    for index, (begin, end) in enumerate(itertools.pairwise(ends)):
        state.block = index if scales else begin
        session.run(functools.partial(read, begin, end), ("read", begin))
    return 0 if scales else len(ends) - 1


@torch.no_grad()
def redraw_blocks(
    model: Any,
    condition: Condition,
    given_BN: Tensor,
    first: int,
    last: int,
    *,
    noise_BNC: Tensor,
    codes_VC: Tensor,
    guidance: Guidance,
    filters: Mapping[str, Any],
    steps: int,
    runtime: Runtime,
) -> tuple[Tensor, int, Session]:
    """Draws the blocks first ... last - 1 by the flow map behind given ones.

    Args:
        model: a generator over scales, or one of a token per block that verifies windows.
        condition: of the B images.
        given_BN: int64 ids; those of the blocks before `first` are read.
        first, last: blocks.
        noise_BNC: of all tokens.
        codes_VC: scaled code vectors.
        guidance, filters, steps, runtime: as of `sample_flow`; filters: temperature, top_k and top_p by name.

    Returns: ids int64 [B, N] up to the last block drawn, the number of forward passes, and the session, whose logits
        are still to be checked to be finite.
    """
    guided = guidance.active(len(model.block_sizes))
    work = ("redraw", condition.batch, guided, *filters.values(), steps, first, last)
    session = runtime.session(model, given_BN.device, work)
    kept = dict(first_scale=first, last_scale=last - 1) if isinstance(model, Scales) else {}
    state = session.state = model.start(condition, guidance, state=session.state, **kept)
    codes_VC, noise_BNC = session.static("codes", codes_VC), session.static("noise", noise_BNC)
    passes = read_given(model, session, session.static("given", given_BN), first)
    step = functools.partial(draw_block, model, state, noise_BNC, codes_VC, filters, steps)
    for block in range(first, last):
        state.block = block
        session.run(step, model.block_kinds[block])
    return model.result(state), passes + last - first, session
