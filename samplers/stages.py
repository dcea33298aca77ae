"""Generators of two stages, for all samplers at once: a sampler draws the labels, then one pass draws all codes.

Source: CTF, arXiv 2503.16194. `in_stages` stands before the samplers of one token per step. Given such a generator,
a sampler runs on its first stage as on any other model, and the codes of the labels are drawn behind it. The draw of
the codes is exact given the labels, so an exact sampler stays exact.

B images, N tokens, V codes, M clusters.
"""

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.interface import Callback, FineSampling, Staged
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime
from visar.samplers.filtering import check_filters, sample_logits

Arguments = ParamSpec("Arguments")

LARGEST = 2**26
"""Most logits of one pass of the fine stage; batches that have more are drawn in several passes."""


def in_stages(sample: Callable[Arguments, SampleOutput]) -> Callable[Arguments, SampleOutput]:
    """The sampler, which takes generators of two stages too.

    Its settings, the guidance among them, are those of the first stage; the second has its own
    (`model.fine_sampling`). Callbacks see every label as the code that its cluster is shown as, and after the last one
    the codes. A callback that ends the sampling before leaves these.
    """
    signature = inspect.signature(sample)

    @functools.wraps(sample)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> SampleOutput:
        given = signature.bind(*args, **kwargs).arguments
        model = given.pop("model")
        if not isinstance(model, Staged):
            return sample(*args, **kwargs)
        return _run_stages(sample, model, given)

    return run


def stage_arguments(model: Staged, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler's arguments as they are for the first stage: a codebook is that of the labels.

    Raises:
        ValueError: see `check_fine`; or a codebook of another size.
    """
    check_fine(model.fine_sampling)
    codebook = arguments.get("codebook")
    if codebook is None:
        return dict(arguments)
    if codebook.shape[0] != model.config["vocab_size"]:
        raise ValueError(f"a codebook of {codebook.shape[0]} codes for a model of {model.config['vocab_size']}")
    return {**arguments, "codebook": model.centres(codebook)}


def check_fine(settings: FineSampling) -> None:
    """Checks how a second stage is sampled.

    Raises:
        ValueError: see `check_filters` and `Guidance`.
    """
    check_filters(settings.temperature, settings.top_k, settings.top_p)
    Guidance(settings.guidance_scale)


def _run_stages(sample: Callable[..., SampleOutput], model: Staged, given: Mapping[str, Any]) -> SampleOutput:
    arguments = stage_arguments(model, given)
    callback: Callback | None = arguments.get("callback")
    if callback is not None:
        arguments["callback"] = functools.partial(_shown, model, callback)
    out = sample(model.coarse, **arguments)
    if out.tokens.shape[1] < model.num_tokens:
        return SampleOutput(model.preview(out.tokens), out.statistics, outcome_BN=out.outcome_BN)
    begun = time.perf_counter()
    noise, runtime = arguments["noise"], arguments.get("runtime", EAGER)
    tokens_BN, passes = draw_fine(model, arguments["condition"], out.tokens, noise=noise, runtime=runtime)
    fine = SampleStatistics(forward_passes={"fine": passes}, seconds=time.perf_counter() - begun)
    if callback is not None:
        callback(model.num_tokens, tokens_BN)
    return SampleOutput(tokens_BN, out.statistics + fine, outcome_BN=out.outcome_BN)


def _shown(model: Staged, callback: Callback, done: int, labels_BN: Tensor) -> bool | None:
    """Calls a callback with the codes that labels are shown as, 0 where not all images have one."""
    known_N = torch.arange(labels_BN.shape[1], device=labels_BN.device) < done
    return callback(done, torch.where(known_N, model.preview(labels_BN), 0))


@torch.no_grad()
def draw_fine(
    model: Staged, condition: Condition, labels_BN: Tensor, *, noise: Noise, runtime: Runtime = EAGER
) -> tuple[Tensor, int]:
    """Draws the code of every label, each from its conditional given all labels.

    Args:
        model: a generator of two stages; `fine_sampling` says how its second one is sampled.
        condition: of the B images.
        labels_BN: int64 labels.
        noise: one seed per image; one uniform number per code.
        runtime: eager, or CUDA graphs.

    Returns: ids int64 [B, N], and the number of passes.
    """
    settings, batch = model.fine_sampling, condition.batch
    guidance = Guidance(settings.guidance_scale)
    filters: dict[str, Any] = dict(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    session = runtime.session(model, noise.device, ("fine", batch, guidance.active(1), *filters.values()))
    state = session.state = model.start(condition, guidance, state=session.state)
    position_BN = torch.arange(model.num_tokens, device=noise.device).expand(batch, -1)
    labels_BN = session.static("labels", labels_BN)
    uniform_BN = session.static("uniform", noise.uniform(Use.FINE, position_BN))
    tokens_BN = session.static("tokens", torch.zeros_like(labels_BN))
    images = max(1, LARGEST // (model.num_tokens * model.config["vocab_size"]))

    def step() -> None:
        for first in range(0, batch, images):
            part = slice(first, first + images)
            logits_BNV = model.fine_logits(state, labels_BN[part], first)
            tokens_BN[part] = sample_logits(logits_BNV, uniform_BN[part], **filters)

    session.run(step, "fine")
    session.check_finite()  # waits for the device
    return tokens_BN.clone(), -(-batch // images)
