"""What `visar eval --compare` does; its flags are made from the fields."""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from visar.evaluate.commands import Echo, Eval, evaluate
from visar.evaluate.report import Report, load_report, table
from visar.evaluate.run import Progress, write_comparison
from visar.evaluate.sharding import World, join_world, leave_world
from visar.pipelines.loading import placement
from visar.sampler_arguments import parse_sampler


@dataclass(frozen=True)
class Compare:
    """The same seeds through several samplers or models: one table, relative to the first, and a picture of the trade.

    Without --samplers, the names are folders that `visar eval` wrote.
    """

    names: tyro.conf.Positional[tuple[str, ...]]
    """Models (each goes through every sampler), or folders written by `visar eval`."""
    out: Path = Path("comparison")
    """Folder for compare.md, compare.json, pareto.png, and a folder a run."""
    samplers: tuple[str, ...] = ()
    """Each as NAME or NAME:setting=value,setting=value, such as static_tree:branches=2,1,drafter=eagle."""
    reference: str = ""
    """As of `visar eval`; its other flags have their defaults but for these:"""
    num_samples: int = 10_000
    """Pictures a run."""
    batch_size: int = 64
    """Pictures at a time."""
    seed: int = 0
    """Image i has seed + i in every run."""
    guidance_scale: float | None = None
    """1.0 = off; each model's own default when not given."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (FD-Lite0) or inception-v3 (FID)."""
    extractor_weights: Path | None = None
    """Weights file of the extractor."""
    train: str | None = None
    """Training pictures, for the copy rate."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32 or bfloat16; float32 on a CPU, bfloat16 on a GPU."""


def compare(options: Compare, echo: Echo, progress: Progress | None = None) -> None:
    """Runs `visar eval --compare`; arguments as of `visar.evaluate.commands.evaluate`."""
    if not options.names:
        raise ValueError("name at least one model or folder to compare")
    if not options.samplers:
        reports: list[Report | None] = [load_report(name) for name in options.names]
    elif not options.reference:
        raise ValueError("--reference is needed to make the pictures' figures")
    else:
        for sampler in options.samplers:
            parse_sampler(sampler)  # a slip shows before the first run
        world = join_world(placement(options.device)[0])
        runs = [(model, sampler) for model in options.names for sampler in options.samplers]
        reports = [_compared(options, model, sampler, world, progress) for model, sampler in runs]
        leave_world(world)
    found = [report for report in reports if report is not None]
    if found:
        write_comparison(found, options.out)
        echo(table(found))


def _compared(options: Compare, model: str, sampler: str, world: World, progress: Progress | None) -> Report | None:
    name, settings = parse_sampler(sampler)
    label = " ".join(part for part in (model if len(options.names) > 1 else "", sampler) if part)
    folder = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in f"{model} {sampler}")
    report = evaluate(
        Eval(
            model=model,
            reference=options.reference,
            out=options.out / folder,
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            seed=options.seed,
            sampler=name,
            guidance_scale=options.guidance_scale,
            extractor=options.extractor,
            extractor_weights=options.extractor_weights,
            train=options.train,
            device=options.device,
            dtype=options.dtype,
        ),
        settings,
        echo=lambda rows: None,
        progress=progress,
        world=world,
    )
    return None if report is None else replace(report, name=label)
