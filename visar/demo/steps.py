"""Images while they form: a call of a pipeline in a thread of its own, as a sequence of what is there so far."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from visar.io.pictures import to_pictures
from visar.pipelines.image import ImageOutput, ImagePipeline
from visar.samplers.index import SAMPLERS

_GREY = 0.8
"""Of pixels whose tokens are not there yet, in [-1, 1]."""
_HELPED = ("collaborative", "edit")
"""Samplers that take more than a model and numbers."""


@dataclass
class Progress:
    """What there is of a call.

    Attributes:
        images: of the tokens so far; none before the first ones.
        done, total: tokens of an image.
        seconds: since the call began, decoding of previews among them.
        result: of the finished call.
    """

    images: list[PIL.Image.Image] = field(default_factory=list)
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    result: ImageOutput[list[PIL.Image.Image]] | None = None


class _Stopped(Exception):
    """Ends a call whose images nobody waits for."""


def fitting_samplers(pipeline: ImagePipeline) -> list[str]:
    """Names of the samplers that make a pipeline's images with their own default settings."""
    names = []
    for name, entry in SAMPLERS.items():
        if name in _HELPED or not entry.fits(pipeline.generator):
            continue
        try:
            pipeline.check_settings(sampler=name)
        except ValueError:
            continue
        names.append(name)
    return names


@torch.no_grad()
def partial_images(pipeline: ImagePipeline, tokens: Tensor, done: int) -> list[PIL.Image.Image]:
    """Images of the first tokens: over scales those of the last whole scale, else with grey where none are yet.

    Args:
        tokens: ids [B, n] or vectors [B, n, C], n >= done; vectors that are 0 are not there either.
        done: number of tokens that all images have.

    Returns: one image a row; none where the tokens so far make no image.
    """
    layout, tokenizer = pipeline.tokenizer.layout, pipeline.tokenizer
    if layout.previews:
        ends = [end for end in layout.previews if end <= min(done, tokens.shape[1])]
        return to_pictures(pipeline.decode(tokens[:, : ends[-1]])) if ends else []
    if layout.arrangement != "grid" or not done:
        return []
    batch, total = tokens.shape[0], layout.num_tokens
    known_BN = torch.arange(total, device=tokens.device).expand(batch, -1) < done
    whole = tokens.new_zeros(batch, total, *tokens.shape[2:])
    count = min(total, tokens.shape[1])
    whole[:, :count] = tokens[:, :count]
    if tokens.is_floating_point():
        known_BN = (whole != 0).any(-1)
    else:
        whole = torch.where(known_BN, whole, tokens[:, done - 1, None])  # something that the decoder knows
    height, width = layout.shapes[0]
    side = tokenizer.downsampling
    known_BHW = known_BN.unflatten(1, (height, width)).repeat_interleave(side, 1).repeat_interleave(side, 2)
    image_BCHW = pipeline.decode(whole)
    return to_pictures(torch.where(known_BHW[:, None], image_BCHW, torch.full_like(image_BCHW, _GREY)))


def watch(
    pipeline: ImagePipeline, call: Callable[..., Any], *, every: float = 0.5, **arguments: Any
) -> Iterator[Progress]:
    """Runs a call and yields what is there of it; closing the iterator ends the call.

    Args:
        pipeline: makes the images.
        call: makes an `ImageOutput` of the arguments; takes callback_on_step_end where it tells of its steps.
        every: seconds between two looks at least.
        arguments: of the call.

    Yields: progress of the same call; the last one has its result.

    Raises:
        Exception: whatever the call raises.
    """
    news: queue.Queue[Progress | BaseException] = queue.Queue()
    stop, begun = threading.Event(), time.perf_counter()
    total, shown = pipeline.generator.num_tokens, begun

    def look(_: ImagePipeline, step: int, __: int, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal shown
        if stop.is_set():
            raise _Stopped
        if time.perf_counter() - shown > every:
            made = partial_images(pipeline, values["tokens"], step + 1)
            shown = time.perf_counter()
            if made:
                news.put(Progress(made, step + 1, total, shown - begun))
        return {}

    def run() -> None:
        try:
            result = call(**arguments, callback_on_step_end=look)
            news.put(Progress(list(result.images), total, total, time.perf_counter() - begun, result))
        except BaseException as error:  # for the thread that waits
            news.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            value = news.get()
            if isinstance(value, BaseException):
                raise value
            yield value
            if value.result is not None:
                return
    finally:
        stop.set()
        thread.join()
