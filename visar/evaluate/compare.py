"""What `visar eval --compare` does; its flags are made from the fields."""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from visar.evaluate.commands import Echo
from visar.evaluate.pipeline import Sampling, evaluate_pipeline
from visar.evaluate.report import Report, load_report, table
from visar.evaluate.run import Progress, RunOptions, ScoreOptions, write_comparison
from visar.evaluate.sharding import World, join_world, leave_world
from visar.evaluate.speed import check_batches
from visar.guidance import Guidance
from visar.pipelines.loading import load, placement
from visar.sampler_arguments import parse_sampling, split_run


@dataclass(frozen=True)
class Compare:
    """The same seeds through several samplers or models: one table, relative to the first, and a picture of the trade.

    Without --samplers and --runs, the names are folders that `visar eval` wrote.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Models (each goes through every sampler), or folders written by `visar eval`."""
    out: Path = Path("comparison")
    """Folder for compare.md, compare.json, pareto.png, and a folder a run."""
    samplers: tuple[str, ...] = ()
    """Each as NAME or NAME:setting=value,setting=value, such as static_tree:branches=2,1,drafter=eagle. Settings of
    all: guidance_scale, guidance_schedule, temperature, top_k, top_p, as in next_scale:guidance_scale=2,top_p=0.9."""
    runs: tuple[str, ...] = ()
    """Instead of names and --samplers, each as MODEL/SAMPLER, such as emoji-raster/ancestral
    runs/var/model/next_scale:top_k=900: the last slash before the first colon divides model and sampler."""
    reference: str = ""
    """As of `visar eval`; its other flags have their defaults but for these:"""
    num_samples: int = 10_000
    """Pictures a run."""
    batch_size: int = 64
    """Pictures at a time."""
    speed_batches: tuple[int, ...] = ()
    """Also time whole calls of these batch sizes, tokens and decoding, and say the peak of GPU memory."""
    seed: int = 0
    """Image i has seed + i in every run."""
    guidance_scale: float | None = None
    """1.0 = off, of runs that do not say their own; each model's own default when not given. Where that default rises
    from block to block, so does this."""
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
    runs = _runs(options)
    reports: list[Report | None]
    if not runs:
        reports = [load_report(name) for name in options.names]
    else:
        world = join_world(placement(options.device)[0])
        reports = [_compared(options, run, world, progress) for run in runs]
        leave_world(world)
    found = [report for report in reports if report is not None]
    if found:
        write_comparison(found, options.out)
        echo(table(found))


@dataclass(frozen=True)
class _Run:
    model: str
    sampling: Sampling
    options: RunOptions
    label: str


def _runs(options: Compare) -> list[_Run]:
    """What is to be run, read and checked before the first run; none where finished folders are compared."""
    if options.runs and (options.names or options.samplers):
        raise ValueError("give --runs, or models with --samplers, not both")
    if not options.runs and not options.names:
        raise ValueError("name at least one model or folder to compare, or give --runs")
    pairs = [split_run(run) for run in options.runs]
    pairs += [(model, sampler) for model in options.names for sampler in options.samplers]
    if pairs and not options.reference:
        raise ValueError("--reference is needed to make the pictures' figures")
    if not pairs and options.speed_batches:
        raise ValueError("--speed-batches needs --samplers or --runs; finished folders bring their own speeds")
    check_batches(options.speed_batches)
    several = len({model for model, _ in pairs}) > 1
    runs = []
    for model, sampler in pairs:
        folder = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in f"{model} {sampler}")
        run = RunOptions(
            out=options.out / folder,
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        label = f"{model} {sampler}" if several else sampler
        runs.append(_Run(model, _sampling(sampler, options.guidance_scale), run, label))
    return runs


def _sampling(text: str, guidance_scale: float | None) -> Sampling:
    name, settings, general = parse_sampling(text)
    scale: float | None = general.pop("guidance_scale", guidance_scale)
    schedule = general.pop("guidance_schedule", None)
    if schedule is not None and scale is None:
        raise ValueError(f"sampler {text!r}: guidance_schedule needs guidance_scale")
    guidance = scale if scale is None or schedule is None else Guidance(scale, schedule=schedule)
    return Sampling(name, settings, guidance, **general)


def _compared(options: Compare, run: _Run, world: World, progress: Progress | None) -> Report | None:
    score = ScoreOptions(
        reference=options.reference,
        extractor=options.extractor,
        extractor_weights=options.extractor_weights,
        train=options.train,
    )
    report = evaluate_pipeline(
        load(run.model, device=world.device, dtype=options.dtype),
        run.sampling,
        score,
        run.options,
        name=run.model,
        speed_batches=options.speed_batches,
        world=world,
        progress=progress,
    )
    return None if report is None else replace(report, name=run.label)
