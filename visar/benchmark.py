"""`visar bench`: how fast a generator decodes, how near to the memory floor, and whether both paths agree.

Presets run on random weights of the released shapes, so anybody can repeat a figure; no claim on quality is made here.
"""

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from visar.condition import Condition
from visar.files import atomic_write
from visar.generators.raster import RASTER_PRESETS, RasterGPT
from visar.guidance import Guidance
from visar.noise import Noise, image_seeds
from visar.pipelines.loading import load, placement
from visar.runtime import EAGER, Runtime
from visar.samplers.ancestral import sample_ancestral


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times decoding on this machine: eager and captured, tokens only, and prints time over the bandwidth floor."""

    model: str | None = None
    """An embedded name or a folder; instead of --preset."""
    preset: str | None = None
    """A released shape with random weights: llamagen-b, -l, -xl, -xxl, -3b."""
    batch: tuple[int, ...] = (1, 8)
    """Images at a time."""
    grid: int = 16
    """Tokens a side, for presets."""
    guidance_scale: float = 2.0
    """1.0 = off; otherwise the batch is doubled."""
    top_k: int = 0
    """0 = off."""
    top_p: float = 1.0
    """1.0 = off."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights and the cache."""
    paths: tuple[Literal["eager", "captured"], ...] = ("eager", "captured")
    """Ways to run a step; captured needs a GPU."""
    runs: int = 3
    """Timed calls, after one that warms up (and captures)."""
    eager_steps: int = 64
    """Steps of a timed eager call (captured ones are timed whole): eager steps of one model take the same time
    each."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda or cpu."""
    out: Path | None = None
    """Write the rows as JSON as well."""


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def ceilings(device: torch.device) -> dict[str, float]:
    """What the machine can do: copy GB/s, bf16 matmul TFLOP/s, us of a tiny kernel, eager and captured."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    tiny = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    tiny.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(1000):
            tiny.add_(1)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(seconds_of(call, device) for _ in range(5))

    def many() -> None:
        for _ in range(1000):
            tiny.add_(1)

    return {
        "copy_gb_s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
        "matmul_tflop_s": 2 * 8192**3 / best(lambda: matrix @ matrix) / 1e12,
        "eager_kernel_us": best(many) * 1e3,
        "captured_kernel_us": best(graph.replay) * 1e3,
    }


def floor_seconds(model: RasterGPT, rows: int, bandwidth_gb_s: float) -> float:
    """Least time of a decode step: the layers' and the head's weights read once, and half the full cache of every
    row."""
    weights = sum(p.nbytes for module in (model.layers, model.output) for p in module.parameters())
    tokens = model.prefix_length + model.num_tokens
    cache = 2 * len(model.layers) * model.config["width"] * model.output.weight.element_size() * tokens / 2
    return (weights + rows * cache) / (bandwidth_gb_s * 1e9)


def _model(options: Bench, device: torch.device) -> tuple[str, RasterGPT]:
    if (options.model is None) == (options.preset is None):
        raise ValueError("give a model or --preset, one of them")
    dtype = getattr(torch, options.dtype)
    if options.model is not None:
        return options.model, load(options.model, device=device, dtype=dtype).generator
    if options.preset not in RASTER_PRESETS:
        raise ValueError(f"unknown preset {options.preset!r}; choose one of {', '.join(RASTER_PRESETS)}")
    torch.manual_seed(0)
    with device:
        model = RasterGPT(grid=(options.grid, options.grid), **RASTER_PRESETS[options.preset]).eval()
    nn.Module.to(model, dtype)  # diffusers' own `to` warns about float32 modules that do not exist
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return options.preset, model


def _condition(model: RasterGPT, batch: int, device: torch.device) -> Condition:
    config = model.config
    sizes = ([config["num_classes"]] if config["num_classes"] else []) + list(config["attributes"])
    labels = torch.zeros(batch, len(sizes), dtype=torch.int64, device=device) if sizes else None
    words = torch.ones(batch, 1, dtype=torch.int64, device=device) if config["word_vocab_size"] else None
    return Condition(labels_BA=labels, words_BT=words)


class _Stop(Exception):
    """Ends an eager call after the steps that are timed."""


def _time_path(options: Bench, model: RasterGPT, batch: int, path: str, device: torch.device) -> dict[str, float]:
    runtime = Runtime() if path == "captured" else EAGER
    steps = model.num_tokens if path == "captured" else min(options.eager_steps, model.num_tokens)

    def stop(done: int, tokens: torch.Tensor) -> None:
        if done == steps:
            raise _Stop

    def call() -> None:
        try:
            sample_ancestral(
                model,
                _condition(model, batch, device),
                noise=Noise(image_seeds(0, batch), device),
                guidance=Guidance(options.guidance_scale),
                top_k=options.top_k,
                top_p=options.top_p,
                runtime=runtime,
                callback=None if steps == model.num_tokens else stop,
            )
        except _Stop:
            pass

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = seconds_of(call, device)
    times = [seconds_of(call, device) / steps for _ in range(options.runs)]
    step = statistics.median(times)
    return {
        "first_call_s": first,
        "ms_per_step": step * 1e3,
        "spread": (max(times) - min(times)) / step,
        "ms_per_image": step * model.num_tokens / batch * 1e3,
        "images_per_s": batch / (step * model.num_tokens),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
    }


def paths_agree(model: RasterGPT, batch: int, device: torch.device, guidance_scale: float) -> bool:
    """Whether captured and eager decoding give the same ids for the same seeds, at float32.

    In bfloat16 they need not: the library behind a matrix product may choose another algorithm under capture.
    """
    model = copy.deepcopy(model)
    nn.Module.float(model)
    settings: dict[str, Any] = dict(noise=Noise(image_seeds(7, batch), device), guidance=Guidance(guidance_scale))
    condition = _condition(model, batch, device)
    runtime = Runtime()
    captured = sample_ancestral(model, condition, runtime=runtime, **settings).tokens
    again = sample_ancestral(model, condition, runtime=runtime, **settings).tokens
    eager = sample_ancestral(model, condition, runtime=EAGER, **settings).tokens
    return bool(torch.equal(captured, eager) and torch.equal(again, eager))


def bench(options: Bench, report: Callable[[str], None]) -> list[dict]:
    """Runs the benchmark; `report` receives the lines of the table as they come.

    Returns: one dict a row: model, batch, path, times, and on a GPU the floor and the machine's ceilings.

    Raises:
        ValueError: no such model, preset or device, counts below 1, or a captured path without a GPU.
    """
    device, _ = placement(options.device)
    if options.runs < 1 or options.eager_steps < 1 or min(options.batch, default=0) < 1:
        raise ValueError(
            f"batch {options.batch}, runs {options.runs}, eager_steps {options.eager_steps}; they must be >= 1"
        )
    if device.type != "cuda" and "captured" in options.paths:
        options = dataclasses.replace(options, paths=tuple(path for path in options.paths if path != "captured"))
        report("no GPU: eager path only")
        if not options.paths:
            raise ValueError("the captured path needs a GPU")
    machine = ceilings(device) if device.type == "cuda" else {}
    name, model = _model(options, device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report(f"{name} on {card}, torch {torch.__version__}, {options.dtype}, guidance {options.guidance_scale}")
    if machine:
        report(", ".join(f"{key} {value:.4g}" for key, value in machine.items()))
        agree = paths_agree(model, 2, device, options.guidance_scale)
        report(f"captured ids equal eager ids (float32): {agree}")
    rows = []
    for batch in options.batch:
        for path in options.paths:
            row: dict = {
                "model": name,
                "batch": batch,
                "path": path,
                "device": card,
                "dtype": options.dtype,
                **machine,
            }
            row |= _time_path(options, model, batch, path, device)
            line = (
                f"batch {batch:4d}  {path:8s} {row['ms_per_step']:8.3f} ms/step  {row['images_per_s']:8.3f} images/s"
            )
            if machine:
                rows_per_step = batch * (2 if options.guidance_scale != 1.0 else 1)
                row["floor_ms"] = floor_seconds(model, rows_per_step, machine["copy_gb_s"]) * 1e3
                row["of_floor"] = row["floor_ms"] / row["ms_per_step"]
                line += f"  {row['of_floor']:6.1%} of floor  {row['peak_gib']:.2f} GiB"
            report(f"{line}  first call {row['first_call_s']:.2f} s  spread {row['spread']:.0%}")
            rows.append(row)
    if options.out is not None:
        with atomic_write(options.out) as file:
            file.write_text(json.dumps(rows, indent=1))
    return rows
