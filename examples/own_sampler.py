"""A sampler of one's own beside those that ship: min-p, which keeps codes that are at least a share of the likeliest.

Source of the rule: arXiv 2407.01082. It needs what every sampler here needs of a model: start, predict, append.
Randomness comes from the noise alone, one uniform number per token, so an image is a function of its seed. Tensors
live in the session, so on a GPU the same step is captured as a CUDA graph.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import visar
from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise, Use, image_seeds
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.io.pictures import to_pictures
from visar.samplers.ancestral import run_blocks
from visar.samplers.filtering import sample_logits


def min_p(logits: Tensor, share: float) -> Tensor:
    """Logits of codes that are less likely than `share` times the likeliest become -inf."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(share), -torch.inf)


@torch.no_grad()
def sample_min_p(
    model,
    condition: visar.Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    share: float = 0.1,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws every block of tokens from its conditional without its unlikely codes. Lossy.

    Args:
        model: a generator with start, predict, append, positions, result, block_sizes and block_kinds.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance; it comes before the filter.
        share: in (0, 1]; 0.1 is the paper's.
        runtime: eager, or CUDA graphs.

    Raises:
        ValueError: share is out of range.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share {share}; it must be in (0, 1]")
    begun, batch = time.perf_counter(), condition.batch
    # All that changes the work of a step is part of the session's name.
    session = runtime.session(model, noise.device, ("min_p", batch, guidance.active(len(model.block_sizes)), share))
    state = session.state = model.start(condition, guidance, state=session.state)
    positions = torch.arange(model.num_tokens, device=noise.device).expand(batch, -1)
    uniform_BN = session.static("uniform", noise.uniform(Use.TOKEN, positions))

    def step() -> None:
        logits_BLV = min_p(model.predict(state), share)
        uniform_BL = uniform_BN.gather(1, model.positions(state).expand(batch, -1))
        model.append(state, sample_logits(logits_BLV, uniform_BL))

    return run_blocks(model, session, step, batch, None, begun)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-raster")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("min_p"))
    options = parser.parse_args(arguments)

    pipe = visar.load(options.model, device=options.device)
    seeds = image_seeds(options.seed, options.num_images)
    condition, descriptions = pipe.prepare_condition(seeds)
    guidance = pipe.sampling_settings()["guidance"]
    out = sample_min_p(
        pipe.generator,
        condition.to(pipe.device),
        noise=Noise(seeds, pipe.device),
        guidance=guidance,
        share=options.share,
        runtime=pipe.runtime,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for seed, image, description in zip(seeds, to_pictures(pipe.decode(out.tokens)), descriptions, strict=True):
        image.save(options.out / f"{seed}.png")
        print(f"seed {seed}: {description}")


if __name__ == "__main__":
    main()
