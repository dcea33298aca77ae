"""Token after token of a causal model over continuous tokens: every one drawn by the model's head. Exact.

Source: MAR's causal ablation, arXiv 2406.11838 section 3.3.

B images, N tokens, C numbers of a token, T transitions of a head's chain.
"""

import time

import torch
from torch import Tensor

from visar.core.checks import Range, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Continuous, Masked, TokenHead
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime

_TEMPERATURE = Range(0, 1000)


def check_head(model: Continuous, guidance: Guidance, temperature: float, head_steps: int | None) -> None:
    """`check_head_settings` of a model with one token a step."""
    check_head_settings(model.token_head, guidance, len(model.block_sizes), temperature, head_steps)


def check_head_settings(
    head: TokenHead, guidance: Guidance, steps: int, temperature: float, head_steps: int | None
) -> None:
    """Checks what samplers ask of a head.

    Args:
        head: of the model.
        guidance: over `steps` steps.
        temperature, head_steps: of the head's chain.

    Raises:
        ValueError: a temperature below 0, transitions that the head does not have, or guidance that it does not take.
    """
    check_range("temperature", temperature, _TEMPERATURE)
    head.check_steps(head_steps)
    if guidance.active(steps) and not head.takes_guidance:
        raise ValueError(
            f"guidance_scale {guidance.scale}; this model's head takes no guidance, leave it at 1 (a mixture of "
            "Gaussians has no guided form)"
        )


def check_continuous(model: Continuous, guidance: Guidance, temperature: float, head_steps: int | None) -> None:
    """Checks the arguments of `sample_continuous`; errors as there."""
    check_head(model, guidance, temperature, head_steps)


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
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws token after token, each by the head's chain given the tokens before it. Exact.

    Source: arXiv 2406.11838 section 3.3.

    Args:
        model: a causal generator of continuous tokens.
        condition: of the B images.
        noise: one seed an image; a chain's noises are functions of the seed and of the token's place.
        guidance: classifier-free guidance over tokens, of what the head predicts (MAR).
        temperature: factor of the noise of the head's transitions, >= 0; 1.0 = off. MAR without guidance: 0.95.
        head_steps: transitions of the head's chain; None = the model's own number.
        callback: called after every token, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: a token with its whole chain is one step.

    Returns: tokens float32 [B, N, C] and statistics; counts has head_passes.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.
    """
    check_head(model, guidance, temperature, head_steps)
    begun, head = time.perf_counter(), model.token_head
    sizes, batch = model.block_sizes, condition.batch
    work = ("continuous", batch, guidance.active(len(sizes)), temperature, head_steps)
    session = runtime.session(model, noise.device, work)
    state = session.state = model.start(condition, guidance, state=session.state)
    own = Noise(session.static("seeds", noise.seeds_B), noise.device)

    def step() -> None:
        features_RLD = model.features(state)
        position_BL = model.positions(state).expand(batch, -1)
        tokens_BLC = head.draw(
            features_RLD,
            lambda number: token_noise(own, position_BL, number, head.channels),
            steps=head_steps,
            temperature=temperature,
            scale_BL=model.scales(state, 1),
        )
        model.append(state, tokens_BLC)

    done = 0
    for block, kind in enumerate(model.block_kinds):
        state.block = block
        session.run(step, kind)
        done = block + 1
        if callback is not None and callback(done, model.result(state)):
            break
    tokens_BNC = model.result(state)[:, :done].clone()
    session.check_finite()  # waits for the device
    statistics = SampleStatistics(
        forward_passes={"generator": done},
        tokens_per_pass={1: batch * done},
        seconds=time.perf_counter() - begun,
        counts={"head_passes": done * head.check_steps(head_steps)},
    )
    return SampleOutput(tokens_BNC, statistics)
