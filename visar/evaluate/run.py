"""From something that makes images to its card: what `visar eval`, its mode --compare and `visar stats` run."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from visar.evaluate.copies import Copies, neighbour_picture
from visar.evaluate.generation import (
    ImageGenerator,
    collect,
    generate_images,
    read_pictures,
    remake_images,
    write_npz,
)
from visar.evaluate.images import ImageSource
from visar.evaluate.labels import LABEL_POLICIES, LabelPlan, LabelPolicy, LabelTable
from visar.evaluate.options import MetricOptions, RunOptions, ScoreOptions
from visar.evaluate.pipeline import PipelineGenerator, Sampling
from visar.evaluate.report import Report, environment, load_report, make_report, save_report
from visar.evaluate.scoring import Scoring, load_scoring
from visar.evaluate.speed import Speed, check_batches, measure_speed
from visar.io.progress import Progress, counted
from visar.io.shards import World, join_world, leave_world
from visar.pipelines.image import ImagePipeline


def label_plan(
    policy: LabelPolicy | Literal["auto"],
    *,
    num_classes: int,
    table: LabelTable | None,
    prompts: tuple[str, ...] = (),
    pictures: str = "training images",
) -> LabelPlan:
    """The plan of a policy; "auto" as RunOptions says. `pictures` says in words whose labels the table holds.

    Raises:
        ValueError: an unknown policy, or what it needs is missing.
    """
    if policy not in ("auto", *LABEL_POLICIES):
        raise ValueError(f"labels {policy!r}; choose auto, {', '.join(LABEL_POLICIES)}")
    if policy == "auto":
        policy = "prompts" if prompts else "histogram" if table else "balanced" if num_classes else "none"
    return LabelPlan(
        policy,
        num_classes=num_classes or None,
        table=table if policy == "histogram" else None,
        prompts=prompts if policy == "prompts" else (),
        pictures=pictures,
    )


def evaluate_generator(
    generate: ImageGenerator,
    scoring: Scoring,
    plan: LabelPlan,
    options: RunOptions,
    *,
    name: str,
    settings: dict[str, Any],
    world: World,
    progress: Progress | None = None,
) -> Report | None:
    """Makes the images, scores them, writes metrics.json, card.md and neighbours.png.

    Args:
        generate: makes a batch.
        scoring: layers of its networks are computed for every image; the first process needs its references.
        plan: labels.
        options: options of the run.
        name: row of tables.
        settings: what the images depend on besides seeds and labels; the run's folder remembers it.
        world: the processes.
        progress: told (what, done, total).

    Returns: the report in the first process, None in the others.
    """
    if isinstance(options.batch_size, str):
        raise ValueError(f"batch_size {options.batch_size!r}; a number is needed here, only a pipeline can find one")
    generate_images(
        generate,
        scoring.first.extractor,
        plan,
        options.out,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        seed=options.seed,
        world=world,
        identity={"model": name, **settings},
        keep_images=options.keep_images,
        keep_thumbnails=scoring.train_NHWC is not None,
        second=scoring.second_extractor,
        progress=counted(progress, "images", -(-options.num_samples // world.size)),
    )
    if world.rank:
        return None
    generated = collect(options.out, options.num_samples)
    if options.keep_images == "npz":
        write_npz(options.out, options.num_samples, options.out / "samples.npz")
    first, second = scoring.metrics(generated, options.metrics)
    found = scoring.copies(generated, world.device)
    if found is not None:
        _draw_neighbours(found, generate, plan, options, scoring)
    report = make_report(
        name,
        generated,
        first,
        scoring,
        settings={
            "model": name,
            **settings,
            "labels": plan.describe(options.num_samples),
            "seeds": f"image i: {options.seed} + i",
        },
        processes=world.size,
        batch_size=options.batch_size,
        device=world.device,
        copies=found,
        second=second,
    )
    save_report(report, options.out)
    return report


def evaluate_images(
    source: ImageSource,
    scoring: Scoring,
    out: Path,
    *,
    batch_size: int = 64,
    metrics: MetricOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Scores images made elsewhere (a folder, an .npz) and writes metrics.json, card.md; arguments as above."""
    extractor = scoring.first.extractor
    generated = read_pictures(
        source,
        extractor,
        batch_size,
        scoring.train_NHWC is not None,
        scoring.second_extractor,
        counted(progress, "images", len(source)),
    )
    first, second = scoring.metrics(generated, metrics or MetricOptions())
    report = make_report(
        source.name,
        generated,
        first,
        scoring,
        settings={"pictures": source.name, "pictures_sha256": source.digest()},
        processes=1,
        batch_size=batch_size,
        device=extractor.device,
        copies=scoring.copies(generated, extractor.device),
        second=second,
    )
    save_report(report, out)
    return report


def _draw_neighbours(
    found: Copies, generate: ImageGenerator, plan: LabelPlan, options: RunOptions, scoring: Scoring
) -> None:
    """A sheet of the eight samples nearest to training images."""
    assert scoring.train_NHWC is not None
    closest = found.distance_N.argsort(stable=True)[:8].tolist()
    sample_NHWC = remake_images(closest, generate, plan, options.seed)
    if sample_NHWC.shape[1:] == scoring.train_NHWC.shape[1:]:
        neighbour_picture(sample_NHWC, scoring.train_NHWC, options.out / "neighbours.png")


def evaluate_pipeline(
    pipeline: ImagePipeline,
    sampling: Sampling,
    score: ScoreOptions,
    options: RunOptions,
    *,
    name: str,
    uint8_rule: str = "round",
    scored_size: int | None = None,
    prompts: tuple[str, ...] = (),
    speed_batches: tuple[int, ...] = (),
    scoring: Callable[[], Scoring] | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Scores a pipeline; the whole of `visar eval`. Run by every process of a torchrun or accelerate launch.

    Args:
        pipeline: on the device it shall run on.
        sampling: how it samples.
        score: reference and extractor.
        options: options of the run.
        name: the model's name in tables and cards.
        uint8_rule: key of UINT8_RULES.
        scored_size: side in pixels that images are resized to before they are scored; None leaves them.
        prompts: for models conditioned on words; image i has prompt i mod their number.
        speed_batches: batch sizes at which the first process times whole calls, see `measure_speed`; what the folder's
            report of the same device says already stays.
        scoring: gives what `score` asks for, loaded before; None loads it.
        world: the processes; None joins those of the launcher.
        progress: told (what, done, total).

    Returns: the report in the first process, None in the others.

    Raises:
        ValueError: settings, references or folders that do not fit.
    """
    check_batches(speed_batches)
    if prompts and options.captions is not None:
        raise ValueError(f"give prompts or captions {options.captions!r}, not both")
    sampling.check(pipeline)
    joined = world or join_world(pipeline.device.type)
    generate = PipelineGenerator(pipeline, sampling, uint8_rule, scored_size)
    if joined.device != pipeline.device:
        pipeline.to(joined.device)
    pipeline.set_progress_bar_config(disable=True)
    batch_size = options.batch_size
    if isinstance(batch_size, str):
        batch_size = pipeline.find_batch_size(
            options.num_samples, sampler_options=sampling.sampler_options, **sampling.call_settings()
        )
        options = replace(options, batch_size=batch_size)
    if scoring is None:
        scored = load_scoring(score, joined.device, rank=joined.rank, batch_size=batch_size, progress=progress)
    else:
        scored = scoring()
    known = _known_speed(options, joined) if joined.rank == 0 else {}
    reference = scored.first.reference
    table = joined.from_first(None if reference is None else reference.labels)
    if options.captions is None:
        asked = generate.training_table(table if isinstance(table, LabelTable) else None)
    else:
        asked = generate.ask_for(options.captions, score.image_size)
    plan = label_plan(
        options.labels,
        num_classes=generate.num_classes,
        table=asked,
        prompts=prompts,
        pictures="training images" if options.captions is None else f"images of {options.captions}",
    )
    report = evaluate_generator(
        generate, scored, plan, options, name=name, settings=generate.settings(), world=joined, progress=progress
    )
    if report is not None:
        batches = speed_batches or tuple(known)
        for number, batch in enumerate(batches, 1):
            if batch not in known:
                pipeline.runtime.clear()
                gc.collect()
                with scored.away():
                    known[batch] = measure_speed(generate, plan, batch, seed=options.seed, device=joined.device)
            report = replace(report, speed=(*report.speed, known[batch]))
            save_report(report, options.out)
            if progress is not None:
                progress("timing", sum(batches[:number]), sum(batches))
    joined.barrier()  # the others leave the machine to the timing
    if world is None:
        leave_world(joined)
    return report


def _known_speed(options: RunOptions, world: World) -> dict[int, Speed]:
    """Speeds by batch size that the folder's report holds, if they were measured on such a device."""
    if not (options.out / "metrics.json").is_file():
        return {}
    report = load_report(options.out)
    same = report.protocol["device"] == environment(world.device)["device"]
    return {row.batch: row for row in report.speed} if same else {}
