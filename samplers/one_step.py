"""Images in one or a few passes of a one-step student.

Source: Distilled Decoding, arXiv 2412.17153 section 3 and figure 4; time points as in microsoft/distilled_decoding@
3b95d33f. Soft output is this project's.

B images, N tokens, V codes, C code width.
"""

import dataclasses
import functools
import time
from typing import Literal

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, OneStep
from visar.core.noise import Noise
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime
from visar.kernels import finite
from visar.samplers.flow import initial_noise

Output = Literal["soft", "codes", "vectors"]


def made_of(model: OneStep, logits_BNV: Tensor, vectors_BNC: Tensor, output: Output, late: int) -> Tensor:
    """What an image is made of, float32 [B, N, C] in the scale of the noise; see `sample_one_step`.

    Args:
        model: the student.
        logits_BNV, vectors_BNC: its predictions.
        output: kind.
        late: first token whose vector is used, for "vectors".
    """
    if output == "soft":
        return torch.softmax(model.config["sharpness"] * logits_BNV, dim=-1) @ model.codes
    codes_BNC = model.codes[logits_BNV.argmax(-1)]
    if output == "vectors":
        codes_BNC[:, late:] = vectors_BNC[:, late:]
    return codes_BNC


def check_one_step(model: OneStep, guidance: Guidance, steps: int, output: Output | None) -> None:
    """Checks the arguments of `sample_one_step`; errors as there."""
    starts = model.config["starts"]
    if guidance.active(1):
        raise ValueError(f"guidance_scale {guidance.scale}; a one-step model has learned its teacher's, leave it at 1")
    if not 1 <= steps <= len(starts):
        raise ValueError(f"steps {steps}; this model takes 1 ... {len(starts)}")
    if output not in (None, "soft", "codes", "vectors"):
        raise ValueError(f"output {output!r}; choose one of soft, codes, vectors")


@torch.no_grad()
def sample_one_step(
    model: OneStep,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    steps: int = 1,
    output: Output | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws all tokens of an image from its noise in one pass, or in a few. Lossy.

    Distilled Decoding, arXiv 2412.17153 section 3. A further step keeps the tokens before its starting point, puts the
    same noise behind them and predicts the rest anew.

    Args:
        model: a one-step student.
        condition: of the B images.
        noise: one seed an image; a standard normal vector a token.
        guidance: must be off: the teacher's is part of what the student learned.
        steps: 1 ... number of the model's `starts`.
        output: what the image is made of: mean codes ("soft"), the likeliest codes ("codes"), or the vectors of the
            second head from the model's block `late` on ("vectors", the paper); None is the model's own choice. The
            tokens returned are the likeliest codes in any case.
        callback: called after every step, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: a step is one graph.

    Returns: tokens int64 [B, N], what the tokenizer makes the image of, and statistics.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.
    """
    check_one_step(model, guidance, steps, output)
    model.check_condition(condition)
    config, device = model.config, noise.device
    output = output or config["output"]
    begun = time.perf_counter()
    session = runtime.session(model, device, ("one_step", condition.batch, output))
    given = {name: value for name, value in vars(condition).items() if value is not None}
    held = dataclasses.replace(condition, **{name: session.static(name, value) for name, value in given.items()})
    position_N = torch.arange(model.num_tokens, device=device)
    channels = model.codes.shape[1]
    noise_BNC = session.static("noise", initial_noise(noise, position_N[None], channels))
    ids_BN = session.static("ids", torch.zeros(noise.batch, model.num_tokens, dtype=torch.int64, device=device))
    source_BNC = session.static("source", torch.zeros_like(noise_BNC))
    late = model.first_token(config["late"])

    def step(first: int) -> None:
        known_N = position_N < first
        inputs_BNC = torch.where(known_N[:, None], model.codes[ids_BN], noise_BNC)
        logits_BNV, vectors_BNC = model(inputs_BNC, known_N, held)
        finite.note(logits_BNV)
        made_BNC = made_of(model, logits_BNV, vectors_BNC, output, late)
        source_BNC.copy_(torch.where(known_N[:, None], source_BNC, made_BNC))
        ids_BN.copy_(torch.where(known_N, ids_BN, logits_BNV.argmax(-1)))

    passes = 0
    for block in config["starts"][:steps]:
        first, passes = model.first_token(block), passes + 1
        session.run(functools.partial(step, first), ("from", first))
        if callback is not None and callback(model.num_tokens, ids_BN):
            break
    latent_BChw = model.latents(source_BNC)
    session.check_finite()  # waits for the device
    statistics = SampleStatistics(
        forward_passes={"generator": passes},
        tokens_per_pass={model.num_tokens: noise.batch},
        seconds=time.perf_counter() - begun,
    )
    return SampleOutput(ids_BN.clone(), statistics, latent_BChw)
