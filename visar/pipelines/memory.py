"""Memory of sampling: what a batch needs, the largest batch that fits, and parts that wait on the CPU.

B images, R rows (2B when guided), N tokens of an image, L positions of a block, V codes, D width, H W image pixels.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visar.core.guidance import Guidance
from visar.core.noise import image_seeds

LARGEST_CPU_BATCH = 64
"""More images at a time gain nothing on a CPU."""
# Maps of the widest and finest level that a convolutional decoder holds at once, and copies of a block's logits that a
# sampler holds in float32: from peaks measured on a GPU (docs/benchmarks.md).
_LIVE_MAPS, _LIVE_LOGITS = 5, 6


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that sampling a batch takes.

    Attributes:
        weights: weights of generator and tokenizer; the same for every batch size.
        cache: keys and values of all rows.
        step: tensors of the largest block: logits and the feed-forward part's hidden vectors.
        decoding: maps of the tokenizer's decoder.
    """

    weights: int
    cache: int
    step: int
    decoding: int

    @property
    def batch(self) -> int:
        """What comes on top of the weights; a step's and the decoder's memory are not needed at the same time."""
        return self.cache + max(self.step, self.decoding)

    @property
    def total(self) -> int:
        """All."""
        return self.weights + self.batch


def weight_bytes(*models: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def largest_weight(model: nn.Module) -> Tensor:
    """The parameter with the most entries: its dtype is what the model computes in."""
    return max(model.parameters(), key=lambda parameter: parameter.numel())


def element_bytes(model: nn.Module) -> int:
    """Bytes of an entry of the model's largest weight: what it computes in."""
    return largest_weight(model).itemsize


def memory_need(generator: Any, tokenizer: Any, batch: int, guided: bool) -> MemoryNeed:
    """An estimate from shapes alone; models on the meta device do.

    Args:
        generator, tokenizer: a pipeline's.
        batch: images at a time, B.
        guided: whether the batch is doubled.
    """
    config, rows = generator.config, batch * (2 if guided else 1)
    entry = element_bytes(generator)
    hidden = config.get("hidden_width") or round(config.get("width", 0) * config.get("mlp_ratio", 4.0))
    logits = (rows * entry + batch * _LIVE_LOGITS * 4) * config.get("vocab_size", 0)
    step = max(generator.block_sizes) * (logits + rows * entry * (2 * hidden + 8 * config.get("width", 0)))
    number = element_bytes(tokenizer)
    if hasattr(tokenizer, "decoding_values"):  # the tokenizer's own count
        decoding = tokenizer.decoding_values(batch) * number
    else:
        own = tokenizer.config
        levels = own["channel_multipliers"]
        pixels = tokenizer.layout.sizes[-1] * own.get("frame_group", 1) * 4 ** (len(levels) - 1)
        maps = batch * pixels * own["base_channels"] * levels[0] * number
        decoding = _LIVE_MAPS * maps
    return MemoryNeed(
        weights=weight_bytes(generator, tokenizer),
        cache=generator.cache_bytes(rows),
        step=step,
        decoding=decoding,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors may take: on a GPU with what torch keeps for reuse, on a CPU half of what is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - kept
        return min(free, max(allowed, 0)) + kept - torch.cuda.memory_allocated(device)
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    pages = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") // 2


def largest_batch(measure: Callable[[int], int], limit_bytes: int, most: int) -> int:
    """The largest power of two <= most whose measured need is within the limit.

    Batches 1 and 2 are measured, a straight line through them says which batch should fit, and that one is measured
    too; where it does not fit, half of it.

    Args:
        measure: bytes that a batch takes; may raise torch.OutOfMemoryError.
        limit_bytes: allowed.
        most: bound.

    Raises:
        ValueError: most < 1, or not even one image fits.
    """
    if most < 1:
        raise ValueError(f"at most {most} images at a time; it must be >= 1")

    def need(batch: int) -> int:
        try:
            return measure(batch)
        except torch.OutOfMemoryError:
            return limit_bytes + 1

    one = need(1)
    if one > limit_bytes:
        raise ValueError(
            f"one image needs {one / 2**30:.2f} GiB besides the weights and {limit_bytes / 2**30:.2f} GiB are free: "
            "free memory, load the model with dtype bfloat16, or with offload=True"
        )
    if most == 1:
        return 1
    two = need(2)
    if two > limit_bytes:
        return 1
    each = max(two - one, 1)
    batch = 2
    while 2 * batch <= most and one + (2 * batch - 1) * each <= limit_bytes:
        batch *= 2
    while batch > 2 and need(batch) > limit_bytes:
        batch //= 2
    return batch


class OutOfMemory(ValueError):
    """A batch that does not fit.

    Attributes:
        batch: images at a time that were tried.
        fits: the largest power of two below it that should fit; 0 if not even one image does.
        done: an `ImageOutput` of the images made before, or None.
    """

    def __init__(self, batch: int, fits: int, done: Any) -> None:
        self.batch, self.fits, self.done = batch, fits, done
        advice = f"about {fits} fit: set batch_size to {fits}" if fits else "not even one image fits: use offload=True"
        made = f"; the {len(done.images)} images made before are not lost" if done is not None else ""
        super().__init__(f"out of memory with {batch} images at a time; {advice}{made}")


def estimated_batch(need: Callable[[int], int], limit_bytes: int, below: int) -> int:
    """The largest power of two < below whose estimated need is within the limit; 0 if none is."""
    fitting = [2**i for i in range(below.bit_length()) if 2**i < below and need(2**i) <= limit_bytes]
    return max(fitting, default=0)


@contextlib.contextmanager
def borrowed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Has a module on a device for a while; afterwards it is where it was."""
    home = next(module.parameters()).device
    nn.Module.to(module, device)
    try:
        yield
    finally:
        nn.Module.to(module, home)


# Part of a GPU's free memory that a measured batch may take.
USABLE = 0.9


def find_batch_size(pipeline: Any, most: int, limit_bytes: int | None, settings: dict[str, Any]) -> int:
    """See `ImagePipeline.find_batch_size`; settings are arguments of `sample_tokens`."""
    device = pipeline._execution_device
    if device.type != "cuda":
        limit = free_bytes(device) if limit_bytes is None else limit_bytes
        return largest_batch(_estimate(pipeline, settings["guidance"]), limit, min(most, LARGEST_CPU_BATCH))
    pipeline.runtime.clear()
    torch.cuda.empty_cache()
    limit = int(USABLE * free_bytes(device)) if limit_bytes is None else limit_bytes
    try:
        return largest_batch(lambda batch: _measured_bytes(pipeline, batch, settings, device), limit, most)
    finally:
        pipeline.runtime.clear()
        torch.cuda.empty_cache()


def out_of_memory(pipeline: Any, batch: int, guidance: Guidance, done: Any) -> OutOfMemory:
    """The error that says how many images should fit instead of `batch`; `done` is what was made before."""
    pipeline.runtime.clear()
    device = pipeline._execution_device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    need = _estimate(pipeline, guidance)
    return OutOfMemory(batch, estimated_batch(need, free_bytes(device), batch), done)


def _estimate(pipeline: Any, guidance: Guidance) -> Callable[[int], int]:
    """From a batch to the bytes that it needs beside the weights, by shapes alone."""
    guided = guidance.active(len(pipeline.generator.block_sizes))
    return lambda batch: memory_need(pipeline.generator, pipeline.tokenizer, batch, guided).batch


def _measured_bytes(pipeline: Any, batch: int, settings: dict[str, Any], device: torch.device) -> int:
    """Most that torch takes from a GPU for a batch, captured steps and decoder included."""
    pipeline.runtime.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    alike = len(set(pipeline.generator.block_kinds)) == 1

    def enough(done: int, _: Tensor) -> bool:
        return alike and done >= 3

    condition = pipeline.generator.example_condition(batch)
    pipeline.sample_tokens(condition, image_seeds(0, batch), callback=enough, **settings)
    ids_BN = torch.zeros(batch, pipeline.generator.num_tokens, dtype=torch.int64, device=device)
    for _ in range(2):  # as it is, then captured
        pipeline.decode(ids_BN, image_seeds(0, batch))
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - before
