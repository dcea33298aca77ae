"""`visar seeds`: whether a seed gives the same image whatever else differs between two runs; a table of all samplers.

A reference run makes every image in batches of one size, in the order of the seeds. Each other run changes one thing,
and the share of images that come out the same, as uint8 pixels, is a cell of the table.
"""

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from visar.bench.options import Seeds
from visar.bench.timing import machine_facts
from visar.core.noise import image_seeds
from visar.core.runtime import EAGER, Runtime
from visar.io.files import atomic_write
from visar.io.pictures import to_uint8
from visar.pipelines.components import placement
from visar.pipelines.loading import load
from visar.samplers.settings import parse_sampler

Report = Callable[[str], None]
PLAIN = ("ancestral", "next_scale")
SAMPLERS: dict[str, tuple[str, ...]] = {
    "emoji-raster": (
        "ancestral",
        "flow:steps=12",
        "jacobi:window=8",
        "jacobi:window=16,coupling=maximal,adaptive=true",
        "speculative:num_drafts=4,drafter=eagle",
        "static_tree:branches=4,2,1,1,drafter=eagle",
        "dynamic_tree:depth=4,children=4,nodes=24,drafter=heads",
        "k_seq:num_chains=4,num_drafts=3,drafter=ngram",
        "grouped:window=16,group=25",
        "lantern:tree=static,max_ratio=10,num_neighbours=10,branches=4,2,1,1,drafter=eagle",
    ),
    "emoji-raster-4096": ("ancestral",),
    "emoji-raster-text": ("ancestral",),
    "emoji-var": ("next_scale", "next_scale:smooth=true", "collaborative:followers=emoji-var-small,takes_over=6"),
    "emoji-var-small": ("next_scale",),
    "emoji-hmar": ("next_scale", "masked_refinement"),
}
"""Embedded models and samplers of the table."""


@dataclass(frozen=True)
class Made:
    """Images of some seeds: ids [B, N] and uint8 pixels [B, C, H, W]."""

    ids: np.ndarray
    pixels: np.ndarray

    def rows(self, index: Any) -> "Made":
        """The same of some of the images."""
        return Made(self.ids[index], self.pixels[index])


def make(pipeline: Any, sampler: str, seeds: Sequence[int], batch: int) -> Made:
    """Images of these seeds, in this order, so many at a time."""
    name, options = parse_sampler(sampler)
    out = pipeline(
        num_images=len(seeds), seeds=list(seeds), sampler=name, sampler_options=options, batch_size=batch,
        output_type="pt",
    )  # fmt: skip
    return Made(out.tokens.cpu().numpy(), to_uint8(out.images * 2.0 - 1.0).cpu().numpy())


def opened(model: str, device: str | None, dtype: str, deterministic: str) -> Any:
    """The pipeline, without a progress bar."""
    pipeline = load(model, device=device, dtype=dtype, deterministic=deterministic)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_a_process(
    model: str, device: str | None, dtype: str, deterministic: str, samplers: Sequence[str], counts: Sequence[int],
    batch: int, part: int,
) -> list[Made]:  # fmt: skip
    """Images of every sampler by one of two processes: part 0 makes the first half of the seeds, 1 the rest."""
    pipeline, found = opened(model, device, dtype, deterministic), []
    for sampler, count in zip(samplers, counts, strict=True):
        half = math.ceil(count / 2)
        found.append(make(pipeline, sampler, range(count)[part * half : (part + 1) * half], batch))
    return found


def cell(reference: Made, other: Made) -> dict[str, float | int]:
    """Share of the images, and of their ids, that are the same."""
    same = [
        (ours == theirs).reshape(len(ours), -1).all(1)
        for ours, theirs in ((reference.pixels, other.pixels), (reference.ids, other.ids))
    ]
    return {"images": float(same[0].mean()), "ids": float(same[1].mean()), "of": len(same[0])}


def cells(pipeline: Any, sampler: str, count: int, options: Seeds) -> tuple[Made, dict[str, dict[str, float | int]]]:
    """The reference images of one sampler, and every comparison that one process can make."""
    seeds, size = image_seeds(0, count), options.batch
    reference = make(pipeline, sampler, seeds, size)
    found = {}
    for other in options.other_batches:
        # A batch larger than all images is no other batch; small ones are compared on fewer images.
        most = min(count, other * options.calls)
        if other <= count:
            found[f"batch {other}"] = cell(reference.rows(slice(most)), make(pipeline, sampler, seeds[:most], other))
    order = np.random.default_rng(0).permutation(count)
    found["order"] = cell(reference.rows(order), make(pipeline, sampler, order.tolist(), size))
    rest = slice(min(count // 3 + 1, count - 1), None)
    found["resume"] = cell(reference.rows(rest), make(pipeline, sampler, seeds[rest], size))
    few = min(count, size)
    if pipeline.device.type == "cuda":
        pipeline.runtime = EAGER
        found["eager"] = cell(reference.rows(slice(few)), make(pipeline, sampler, seeds[:few], size))
        pipeline.runtime = Runtime()
    else:
        before = torch.get_num_threads()
        torch.set_num_threads(1 if before > 1 else 2)
        found["threads"] = cell(reference.rows(slice(few)), make(pipeline, sampler, seeds[:few], size))
        torch.set_num_threads(before)
    return reference, found


def seeds_matrix(options: Seeds, report: Report) -> dict[str, Any]:
    """Makes the table; writes it after every model as JSON and, beside it, as Markdown.

    Args:
        options: models, batches, dtypes.
        report: takes a line of text.

    Returns: what the JSON file holds: facts about the machine and the rows.

    Raises:
        ValueError: settings that do not fit.
    """
    device, _ = placement(options.device)
    unknown = [name for name in options.models if name not in SAMPLERS]
    if unknown:
        raise ValueError(f"model {unknown[0]!r}; choose from {', '.join(SAMPLERS)}")
    numbers = (options.images, options.slow_images, options.batch, options.calls, *options.other_batches)
    if min(numbers) < 1 or options.processes not in (1, 2):
        raise ValueError(f"images, batches and calls {numbers}, processes {options.processes}; >= 1, and 1 or 2")
    settings = [setting.partition(":")[::2] for setting in options.settings]
    result: dict[str, Any] = {
        "facts": machine_facts(device), "reference": f"batch {options.batch}", "rows": [],
    }  # fmt: skip
    context = multiprocessing.get_context("spawn")
    for model in options.models or tuple(SAMPLERS):
        chosen = [each for each in SAMPLERS[model] if not options.samplers or each in options.samplers]
        counts = [options.images if each in PLAIN else min(options.images, options.slow_images) for each in chosen]
        first: list[Made] = []
        for dtype, deterministic in settings:
            arguments = (model, options.device, dtype, deterministic or "auto")
            begun = time.perf_counter()
            pipeline, references = opened(*arguments), []
            rows: list[dict[str, Any]] = []
            for sampler, count in zip(chosen, counts, strict=True):
                reference, found = cells(pipeline, sampler, count, options)
                references.append(reference)
                rows.append(
                    {"model": model, "sampler": sampler, "dtype": dtype, "deterministic": arguments[3], "cells": found}
                )
                report(_line(rows[-1]) + f"  ({time.perf_counter() - begun:.1f} s)")
            if options.processes == 2 and chosen:
                with ProcessPoolExecutor(2, mp_context=context) as pool:
                    halves = list(pool.map(partial(in_a_process, *arguments, chosen, counts, options.batch), (0, 1)))
                for row, reference, *parts in zip(rows, references, *halves, strict=True):
                    both = Made(*(np.concatenate([getattr(part, n) for part in parts]) for n in ("ids", "pixels")))
                    row["cells"]["processes"] = cell(reference, both)
            first = first or references
            for row, reference, before in zip(rows, references, first, strict=True):
                if first is not references:
                    row["cells"]["dtype"] = cell(before, reference)
            result["rows"] += rows
            report(f"{model} {dtype} {arguments[3]}: {time.perf_counter() - begun:.1f} s")
            with atomic_write(options.out) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            with atomic_write(options.out.with_suffix(".md")) as temporary:
                temporary.write_text(markdown(result), encoding="utf-8")
    return result


def _share(value: dict[str, float | int] | None) -> str:
    if value is None:
        return "-"
    # Rounded down: only what is equal throughout says so.
    return "equal" if value["images"] == 1.0 else f"{math.floor(value['images'] * 1000) / 10:.1f} %"


def _line(row: dict[str, Any]) -> str:
    parts = [
        f"{name} {_share(value)} (ids {value['ids']:.4f} of {value['of']})" for name, value in row["cells"].items()
    ]
    return f"{row['model']} {row['sampler']} {row['dtype']} {row['deterministic']}: " + ", ".join(parts)


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table; every cell is "equal" or the share of images that are."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["cells"]))
    head = ["model", "sampler", "dtype", "deterministic", *names]
    lines = [head, ["---"] * len(head)]
    for row in result["rows"]:
        own = [row["model"], f"`{row['sampler']}`", row["dtype"], row["deterministic"]]
        lines.append(own + [_share(row["cells"].get(name)) for name in names])
    facts = ", ".join(f"{key} {value}" for key, value in result["facts"].items())
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{facts}; compared with {result['reference']} in the order of the seeds.\n\n{table}\n"
