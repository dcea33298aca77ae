"""Editing by masked models of continuous tokens: those of a given image stay, the others are drawn given them.

Source: MAR, arXiv 2406.11838 section 4 (editing of images); known tokens are visible from the first step on.

B images, N tokens, C numbers of a token.
"""

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Masked
from visar.core.noise import Noise
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.samplers.continuous import HeadSchedule, HeadSolver
from visar.samplers.masked import check_steps, draw_masked


def check_masked_edit(
    model: Masked,
    guidance: Guidance,
    given_tokens: Tensor,
    keep: Tensor,
    steps: int | None,
    temperature: float,
    head_steps: int | None,
    last_head_steps: int | None,
    head_schedule: HeadSchedule,
    head_solver: HeadSolver | None,
) -> list[int]:
    """Checks the arguments of `sample_masked_edit`, errors as there; returns the head's transitions in every step."""
    needed = (model.num_tokens, model.token_head.channels)
    if given_tokens.ndim != 3 or tuple(given_tokens.shape[1:]) != needed:
        raise ValueError(
            f"given_tokens {tuple(given_tokens.shape)}; needed: [one per image, {needed[0]}, {needed[1]}]"
        )
    batch = len(given_tokens)
    if len(keep) not in (1, batch) or keep[0].numel() != model.num_tokens:
        raise ValueError(
            f"keep {tuple(keep.shape)}; needed: [1 or {batch}, height, width] of {model.num_tokens} tokens"
        )
    drawn = sorted(set((~keep.bool()).flatten(1).sum(1).tolist()))
    if len(drawn) > 1:
        raise ValueError(f"masks of one call draw as many tokens each; these draw {drawn}: edit them one by one")
    if not drawn[0]:
        raise ValueError("keep leaves no token to draw: the part to draw anew must cover one whole token")
    head = (head_steps, last_head_steps, head_schedule, head_solver)
    return check_steps(model, drawn[0], guidance, steps, temperature, *head)


@torch.no_grad()
def sample_masked_edit(
    model: Masked,
    condition: Condition,
    *,
    given_tokens: Tensor,
    keep: Tensor,
    noise: Noise,
    guidance: Guidance = OFF,
    steps: int | None = None,
    temperature: float = 1.0,
    head_steps: int | None = None,
    last_head_steps: int | None = None,
    head_schedule: HeadSchedule = "linear",
    head_solver: HeadSolver | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Inpaints, outpaints or edits a given image by a masked model. Lossy, as `sample_masked` is.

    Source: arXiv 2406.11838 section 4. The places that are drawn come in the order that the image's seed gives them,
    by the cosine schedule over as many; with one a step this is the model's own distribution given what stays.

    Args:
        model: a masked generator of continuous tokens.
        condition: of the B images; the model's null condition for none.
        given_tokens: float [B, N, C], the tokenizer's tokens of the given images.
        keep: bool [B, h, w] or [1, h, w], True where the given image stays; all rows draw as many.
        noise: one seed an image.
        guidance: over steps; a linear schedule rises with the share of known tokens, those given among them.
        steps: passes, 1 ... the number of tokens that are drawn; None = 64, or that number where it is less.
        temperature, head_steps, last_head_steps, head_schedule, head_solver: see `sample_masked`.
        callback: called after every step, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs, see `sample_masked`.

    Returns: tokens float32 [B, N, C], the given ones where they stay, and statistics.

    Raises:
        ValueError: tokens or a mask that do not fit, a setting out of range, or a condition that does not fit.
    """
    head = (head_steps, last_head_steps, head_schedule, head_solver)
    chain = check_masked_edit(model, guidance, given_tokens, keep, steps, temperature, *head)
    batch = condition.batch
    if len(given_tokens) != batch:
        raise ValueError(f"given_tokens of {len(given_tokens)} images; the condition is of {batch}")
    keep_BN = keep.bool().flatten(1).expand(batch, -1).to(noise.device)
    drawn = int((~keep[:1].bool()).sum())
    work = ("masked_edit", batch, guidance.active(len(chain)), temperature, tuple(chain), head_solver, drawn)
    session = runtime.session(model, noise.device, work)
    known = (given_tokens.to(noise.device, torch.float32), keep_BN, drawn)
    return draw_masked(model, session, condition, noise, guidance, chain, temperature, head_solver, known, callback)
