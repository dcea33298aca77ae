"""What `visar eval --compare` does; its flags are made from the fields."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from visar.cli.evaluate import Echo
from visar.core.guidance import Guidance
from visar.evaluate.comparison import write_comparison
from visar.evaluate.options import Compare, RunOptions
from visar.evaluate.pipeline import Sampling
from visar.evaluate.report import Report, distinct_names, load_report, table
from visar.evaluate.run import evaluate_pipeline
from visar.evaluate.scoring import Scoring, load_scoring
from visar.evaluate.speed import check_batches
from visar.io.progress import Progress
from visar.io.shards import World, join_world, leave_world
from visar.pipelines.components import placement
from visar.pipelines.loading import load
from visar.samplers.index import GENERAL
from visar.samplers.settings import GUIDANCE, parse_sampler


def compare(options: Compare, echo: Echo, progress: Progress | None = None) -> None:
    """Runs `visar eval --compare`; arguments as of `visar.cli.evaluate.evaluate`."""
    runs = _runs(options)
    reports: list[Report | None]
    if not runs:
        reports = [*distinct_names([load_report(name) for name in options.names])]
    else:
        world = join_world(placement(options.device)[0])
        batch_size = 64 if isinstance(options.batch_size, str) else options.batch_size

        @functools.cache
        def scoring() -> Scoring:
            """Loaded when the first run has been checked."""
            return load_scoring(options, world.device, rank=world.rank, batch_size=batch_size, progress=progress)

        reports = [
            _compared(options, run, _later_runs(runs, number), scoring, world, progress)
            for number, run in enumerate(runs)
        ]
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
        raise ValueError("--reference is needed to make the images' figures")
    if not pairs and options.speed_batches:
        raise ValueError("--speed-batches needs --samplers or --runs; finished folders bring their own speeds")
    check_batches(options.speed_batches)
    several = len({model for model, _ in pairs}) > 1
    runs = []
    for model, sampler in pairs:
        folder = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in f"{model} {sampler}")
        run = replace(options, out=options.out / folder)
        label = f"{model} {sampler}" if several else sampler
        runs.append(_Run(model, _sampling(sampler, options.guidance_scale), run, label))
    return runs


def _sampling(text: str, guidance_scale: float | None) -> Sampling:
    name, settings = parse_sampler(text, general=True)
    general = {key: settings.pop(key) for key in (*GUIDANCE, *GENERAL) if key in settings}
    scale: float | None = general.pop("guidance_scale", guidance_scale)
    schedule = general.pop("guidance_schedule", None)
    if schedule is not None and scale is None:
        raise ValueError(f"sampler {text!r}: guidance_schedule needs guidance_scale")
    guidance = scale if scale is None or schedule is None else Guidance(scale, schedule=schedule)
    return Sampling(name, settings, guidance, **general)


def _later_runs(runs: list[_Run], number: int) -> list[_Run]:
    """Later runs of the same model if this is its first one, so that they are all checked before it; else none."""
    model = runs[number].model
    return [] if model in {run.model for run in runs[:number]} else [r for r in runs[number + 1 :] if r.model == model]


def _compared(
    options: Compare,
    run: _Run,
    later: list[_Run],
    scoring: Callable[[], Scoring],
    world: World,
    progress: Progress | None,
) -> Report | None:
    pipeline = load(run.model, device=world.device, dtype=options.dtype)
    for other in later:
        other.sampling.check(pipeline)
    report = evaluate_pipeline(
        pipeline,
        run.sampling,
        options,
        run.options,
        name=run.model,
        speed_batches=options.speed_batches,
        scoring=scoring,
        world=world,
        progress=progress,
    )
    return None if report is None else replace(report, name=run.label)


def split_run(text: str) -> tuple[str, str]:
    """MODEL/SAMPLER:setting=value to the model and the sampler with its settings.

    The first ":" ends MODEL/SAMPLER, and its last "/" ends the model: both a model's folder and settings may hold
    slashes.

    Raises:
        ValueError: no model.
    """
    pair, colon, settings = text.partition(":")
    model, _, sampler = pair.rpartition("/")
    if not model:
        raise ValueError(f"run {text!r}: write MODEL/SAMPLER or MODEL/SAMPLER:setting=value,setting=value")
    return model, sampler + colon + settings
