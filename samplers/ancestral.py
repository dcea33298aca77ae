"""Ancestral sampling: each block from its conditional. Exact by definition; exact samplers have its distribution."""

import time
from collections.abc import Callable
from typing import Any

import torch

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Categorical
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime, Session
from visar.samplers.filtering import check_filters, sample_logits
from visar.samplers.stages import in_stages


def check_ancestral(model: Categorical, guidance: Guidance, temperature: float, top_k: int, top_p: float) -> None:
    """Checks the arguments of `sample_ancestral`; errors as there."""
    check_filters(temperature, top_k, top_p)
    guidance.scales(len(model.block_sizes))


@in_stages
@torch.no_grad()
def sample_ancestral(
    model: Categorical,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws every block of tokens from the model's conditional given the blocks before it. Exact.

    The plain algorithm of every autoregressive paper (for images: arXiv 2406.06525 section 3.2; block-wise:
    2404.02905).

    Args:
        model: a generator with start, predict, append, positions, result, block_sizes and block_kinds.
        condition: of the B images.
        noise: one seed per image; one uniform number per token.
        guidance: classifier-free guidance over blocks.
        temperature: > 0; 1.0 = off. LlamaGen, VAR: 1.0.
        top_k: 0 = off. LlamaGen: 0 for FID, 2000 for demos; VAR: 900.
        top_p: in (0, 1]; 1.0 = off. LlamaGen: 1.0; VAR: 0.96.
        callback: called after every block, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N] and statistics. Where a callback ends the sampling they are the leading tokens; if the
        model draws them in another order than the tokenizer's, all, with 0 where none is drawn.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.
    """
    check_ancestral(model, guidance, temperature, top_k, top_p)
    begun = time.perf_counter()
    sizes, batch = model.block_sizes, condition.batch
    work = ("ancestral", batch, guidance.active(len(sizes)), temperature, top_k, top_p)
    session = runtime.session(model, noise.device, work)
    state = session.state = model.start(condition, guidance, state=session.state)
    every_position = torch.arange(model.num_tokens, device=noise.device).expand(batch, -1)
    uniform_BN = session.static("uniform", noise.uniform(Use.TOKEN, every_position))

    def step() -> None:
        logits_BLV = model.predict(state)
        uniform_BL = uniform_BN.gather(1, model.positions(state).expand(batch, -1))
        tokens_BL = sample_logits(logits_BLV, uniform_BL, temperature=temperature, top_k=top_k, top_p=top_p)
        model.append(state, tokens_BL)

    return run_blocks(model, session, step, batch, callback, begun)


def run_blocks(
    model: Categorical,
    session: Session,
    step: Callable[[], None],
    batch: int,
    callback: Callback | None,
    begun: float,
) -> SampleOutput:
    """Runs a step for every block, until all are done or the callback ends the sampling.

    Args:
        model: whose blocks they are.
        session: with the model's state.
        step: predicts, draws and appends the block that the state is at.
        batch: B.
        callback: see `Callback`.
        begun: time.perf_counter() at the start.
    """
    state, sizes, done = session.state, model.block_sizes, 0
    for block, (size, kind) in enumerate(zip(sizes, model.block_kinds, strict=True)):
        state.block = block
        session.run(step, kind)
        done += size
        if callback is not None and callback(done, model.result(state)):
            break
    made = sizes[: block + 1]
    session.check_finite()  # waits for the device
    tokens = model.result(state)[:, : _shown(model, state, done)].clone()
    statistics = SampleStatistics(
        forward_passes={"generator": len(made)},
        tokens_per_pass={size: batch * made.count(size) for size in sorted(set(made))},
        seconds=time.perf_counter() - begun,
    )
    return SampleOutput(tokens, statistics)


def _shown(model: Categorical, state: Any, done: int) -> int:
    """How many of the image's tokens to return when `done` are drawn: those, or all if they are not the leading ones.

    They are the leading ones where the next block begins right behind them.
    """
    if done == model.num_tokens:
        return done
    state.block += 1
    return done if int(model.positions(state).min()) == done else model.num_tokens
