"""How many images of a pipeline fit into memory, computed or measured."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visar.guidance import Guidance
from visar.memory import (
    LARGEST_CPU_BATCH,
    OutOfMemory,
    any_condition,
    estimated_batch,
    free_bytes,
    largest_batch,
    memory_need,
)
from visar.noise import image_seeds

if TYPE_CHECKING:
    from visar.pipelines.image import ImageOutput, ImagePipeline

# Part of a GPU's free memory that a measured batch may take.
USABLE = 0.9


def find_batch_size(pipeline: "ImagePipeline", most: int, limit_bytes: int | None, settings: dict[str, Any]) -> int:
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


def out_of_memory(
    pipeline: "ImagePipeline", batch: int, guidance: Guidance, done: "ImageOutput | None"
) -> OutOfMemory:
    """The error that says how many images should fit instead of `batch`; `done` is what was made before."""
    pipeline.runtime.clear()
    device = pipeline._execution_device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    need = _estimate(pipeline, guidance)
    return OutOfMemory(batch, estimated_batch(need, free_bytes(device), batch), done)


def _estimate(pipeline: "ImagePipeline", guidance: Guidance) -> Callable[[int], int]:
    """From a batch to the bytes that it needs beside the weights, by shapes alone."""
    guided = guidance.active(len(pipeline.generator.block_sizes))
    return lambda batch: memory_need(pipeline.generator, pipeline.tokenizer, batch, guided).batch


class _Enough(Exception):
    """Ends a call that is only measured."""


def _measured_bytes(pipeline: "ImagePipeline", batch: int, settings: dict[str, Any], device: torch.device) -> int:
    """Most that torch takes from a GPU for a batch, captured steps and decoder included."""
    pipeline.runtime.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    alike = len(set(pipeline.generator.block_kinds)) == 1

    def callback(done: int, ids: Tensor) -> None:
        if alike and done >= 3:
            raise _Enough

    with contextlib.suppress(_Enough):
        condition = any_condition(pipeline.generator, batch, device)
        pipeline.sample_tokens(condition, image_seeds(0, batch), callback=callback, **settings)
    num_tokens = sum(pipeline.generator.block_sizes)
    ids_BN = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)
    for _ in range(2):  # as it is, then captured
        pipeline.decode(ids_BN)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - before
