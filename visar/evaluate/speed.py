"""How fast images are made, tokens and decoding together, and the GPU memory it takes: by batch size."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from visar.bench.timing import Timing, seconds_of
from visar.core.noise import image_seeds
from visar.evaluate.generation import ImageGenerator
from visar.evaluate.labels import LabelPlan

WARM_UP = 2  # the first call tunes and runs eagerly, the second captures


@dataclass(frozen=True)
class Speed:
    """Whole calls of one batch size.

    Attributes:
        batch: images of a call.
        images_per_s: images per second of the median call.
        spread: (longest - shortest) / median of the timed calls, which make different images.
        peak_gib: most GPU memory that tensors took, weights included, in GiB; None on a CPU.
    """

    batch: int
    images_per_s: float
    spread: float
    peak_gib: float | None


def check_batches(batches: Sequence[int]) -> None:
    """Checks batch sizes to be timed.

    Raises:
        ValueError: one below 1, or one given twice.
    """
    if min(batches, default=1) < 1 or len(set(batches)) < len(batches):
        raise ValueError(f"speed_batches {tuple(batches)}; they must be >= 1, and each given once")


def measure_speed(
    generate: ImageGenerator, plan: LabelPlan, batch: int, *, seed: int, device: torch.device, calls: int = 5
) -> Speed:
    """Times calls that make images 0, 1, 2, ... of a run, one batch per call, after two untimed calls.

    Args:
        generate: makes a batch.
        plan: label of image i.
        batch: images of a call.
        seed: image i has seed + i.
        device: where it runs; other tensors there count to the peak too.
        calls: timed ones, >= 1.
    """

    def make(call: int) -> None:
        seeds = image_seeds(seed + call * batch, batch)
        generate(seeds, plan.labels(range(call * batch, (call + 1) * batch), seeds))

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for call in range(WARM_UP):
        make(call)
    timing = Timing(tuple(seconds_of(partial(make, call), device) for call in range(calls)))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    return Speed(batch, batch / timing.median, timing.spread, peak)
