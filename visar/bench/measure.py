"""Times of one model at one batch size: tokens, decoding, and both."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visar.bench.options import Bench
from visar.bench.subjects import Subject, floor_seconds, random_ids
from visar.bench.timing import Timing, seconds_of, timed
from visar.core.interface import Windowed
from visar.core.noise import image_seeds
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime
from visar.pipelines.image import ImagePipeline
from visar.tokenizers.decoding import decode_tokens, decoder_noise

# Samplers whose loop never waits for the device: for them the host's own time can be told.
WITHOUT_LOOK = ("ancestral", "next_scale")


@dataclass
class Caller:
    """Calls a sampler the way a pipeline does.

    Attributes:
        subject, batch, options, sampler_options: what is called.
        capture: whether steps are captured.
        stop_after: tokens after which a call ends; 0 = all.
        host_s: seconds from the beginning of the latest call until its last step was enqueued.
        statistics: statistics of the latest whole call.
    """

    subject: Subject
    batch: int
    options: Bench
    sampler_options: dict[str, Any]
    capture: bool
    stop_after: int = 0
    host_s: float = 0.0
    statistics: SampleStatistics = field(default_factory=SampleStatistics)

    def __post_init__(self) -> None:
        self.pipeline = ImagePipeline(self.subject.tokenizer, self.subject.generator)
        self.pipeline.runtime = Runtime() if self.capture else EAGER
        self.pipeline.deterministic = self.options.deterministic
        self._settings = self.pipeline.sampling_settings(
            sampler=self.options.sampler,
            guidance_scale=self.options.guidance_scale,
            top_k=self.options.top_k or None,
            top_p=None if self.options.top_p == 1.0 else self.options.top_p,
        )
        self._condition = self.subject.generator.example_condition(self.batch)

    @torch.no_grad()
    def tokens(self) -> SampleOutput | None:
        """One batch of tokens; None when it was stopped early."""
        begun = time.perf_counter()

        def callback(done: int, _: Tensor) -> bool:
            self.host_s = time.perf_counter() - begun
            return bool(self.stop_after) and done >= self.stop_after

        out = self.pipeline.sample_tokens(
            self._condition,
            image_seeds(0, self.batch),
            sampler_options=self.sampler_options,
            callback=callback,
            **self._settings,
        )
        if self.stop_after:
            return None
        self.statistics = out.statistics
        return out

    @torch.no_grad()
    def images(self) -> Tensor:
        """One batch of images."""
        out = self.tokens()
        assert out is not None
        tokens = out.tokens if out.latent is None else out.latent
        return self.pipeline.decode(tokens, image_seeds(0, self.batch))


def eager_stop(options: Bench, generator: Any, path: str) -> int:
    """Tokens after which a timed eager call ends; 0 = all. Only steps that all do the same work are left out."""
    same = len(set(generator.block_kinds)) == 1
    short = path == "eager" and options.sampler == "ancestral" and same and options.eager_steps < generator.num_tokens
    return options.eager_steps if short else 0


def decode_call(subject: Subject, batch: int, path: str, device: torch.device) -> Callable[[], Tensor]:
    """Decoding of a batch of ids, eagerly or captured; large batches run eagerly either way, see `decode_tokens`."""
    ids_BN, runtime = random_ids(subject, batch, device), Runtime() if path == "captured" else EAGER
    noise = decoder_noise(subject.tokenizer, image_seeds(0, batch), device)
    return lambda: decode_tokens(subject.tokenizer, ids_BN, noise=noise, runtime=runtime)


def decode_row(subject: Subject, options: Bench, batch: int, path: str, device: torch.device) -> dict[str, Any]:
    """Times of decoding alone."""
    call = decode_call(subject, batch, path, device)
    first_s, second_s = seconds_of(call, device), seconds_of(call, device)
    seconds_of(call, device)
    decoding = timed(call, device, options.runs)
    return {
        "first_call_s": first_s,
        "second_call_s": second_s,
        **decoding.row("decode"),
        "ms_per_image": decoding.median / batch * 1e3,
        "images_per_s": batch / decoding.median,
    }


def sampling_row(
    subject: Subject,
    options: Bench,
    sampler_options: dict[str, Any],
    batch: int,
    path: str,
    device: torch.device,
    machine: dict[str, float],
) -> dict[str, Any]:
    """Times of tokens, of decoding, and of both together; see docs/benchmarks.md for the columns."""
    generator = subject.generator
    stop = eager_stop(options, generator, path)
    caller = Caller(subject, batch, options, sampler_options, capture=path == "captured", stop_after=stop)
    first_s, second_s = seconds_of(caller.tokens, device), seconds_of(caller.tokens, device)
    times, host = [], []
    for _ in range(options.runs):
        times.append(seconds_of(caller.tokens, device))
        host.append(caller.host_s)
    timed_steps = stop or sum(caller.statistics.forward_passes.values())
    steps = generator.num_tokens if stop else timed_steps
    tokens = Timing(tuple(seconds * steps / timed_steps for seconds in times))
    row: dict[str, Any] = {
        "first_call_s": first_s,
        "second_call_s": second_s,
        "steps": steps,
        "tokens_per_step": 1.0 if stop else caller.statistics.mean_tokens_per_pass,
        **tokens.row("tokens"),
        "ms_per_step": tokens.median / steps * 1e3,
        **caller.statistics.counts,  # of continuous tokens: passes of heads
    }
    if options.sampler in WITHOUT_LOOK:
        row["host_us_per_step"] = Timing(tuple(host)).median / timed_steps * 1e6
    ids_BN = random_ids(subject, batch, device)
    decoder = torch.no_grad()(lambda: caller.pipeline.decode(ids_BN, image_seeds(0, batch)))
    for _ in range(3):  # as it is, captured, replayed
        decoder()
    row |= timed(decoder, device, options.runs).row("decode")
    total = tokens
    if not stop:
        seconds_of(caller.images, device)
        total = timed(caller.images, device, options.runs)
        row |= total.row("together")
    row |= {"ms_per_image": total.median / batch * 1e3, "images_per_s": batch / total.median}
    blocks = len(generator.block_sizes)
    if machine and (options.sampler in WITHOUT_LOOK or isinstance(generator, Windowed)):
        rows = batch * (2 if options.guidance_scale != 1.0 else 1)
        row["floor_ms"] = floor_seconds(generator, rows, machine) / blocks * 1e3
        row["of_floor"] = row["floor_ms"] / row["ms_per_step"]
    return row
