"""From something that makes images to its card: what `visar eval`, its mode --compare and `visar stats` run."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visar.evaluate.copies import Copies, copies, neighbour_picture
from visar.evaluate.extractors import Extractor
from visar.evaluate.generation import (
    Generated,
    ImageGenerator,
    collect,
    generate_images,
    read_pictures,
    remake_images,
    write_npz,
)
from visar.evaluate.images import ImageSource, open_images
from visar.evaluate.labels import LABEL_POLICIES, LabelPlan, LabelPolicy, LabelTable
from visar.evaluate.metrics import Metrics, Scorer, compute_metrics
from visar.evaluate.options import MetricOptions, RunOptions, ScoreOptions
from visar.evaluate.pipeline import PipelineGenerator, Sampling, load_extractors, load_references
from visar.evaluate.references import Reference
from visar.evaluate.report import Report, environment, load_report, make_report, save_report
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
    reference: Reference | None,
    extractor: Extractor,
    plan: LabelPlan,
    options: RunOptions,
    *,
    name: str,
    settings: dict[str, Any],
    world: World,
    train_NHWC: Tensor | None = None,
    held_out_NHWC: Tensor | None = None,
    second: Scorer | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Makes the images, scores them, writes metrics.json, card.md and neighbours.png.

    Args:
        generate: makes a batch.
        reference: None in processes other than the first.
        extractor: its layers are computed for every image.
        plan: labels.
        options: options of the run.
        name: row of tables.
        settings: what the images depend on besides seeds and labels; the run's folder remembers it.
        world: the processes.
        train_NHWC: uint8 training images for the copy rate; None leaves it out. Given in every process or in none.
        held_out_NHWC: real images that were not trained on, for the copy rate's null.
        second: scores the same images too.
        progress: told (what, done, total).

    Returns: the report in the first process, None in the others.
    """
    if isinstance(options.batch_size, str):
        raise ValueError(f"batch_size {options.batch_size!r}; a number is needed here, only a pipeline can find one")
    generate_images(
        generate,
        extractor,
        plan,
        options.out,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        seed=options.seed,
        world=world,
        identity={"model": name, **settings},
        keep_images=options.keep_images,
        keep_thumbnails=train_NHWC is not None,
        second=None if second is None else second.extractor,
        progress=counted(progress, "images", -(-options.num_samples // world.size)),
    )
    if world.rank:
        return None
    assert reference is not None
    generated = collect(options.out, options.num_samples)
    if options.keep_images == "npz":
        write_npz(options.out, options.num_samples, options.out / "samples.npz")
    metrics, others = _scores(generated, Scorer(extractor, reference), second, options.metrics)
    found = None
    if train_NHWC is not None:
        found = _copies(generated, generate, plan, options, train_NHWC, held_out_NHWC, world)
    report = make_report(
        name,
        generated,
        metrics,
        reference,
        extractor,
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
        second=others,
    )
    save_report(report, options.out)
    return report


def evaluate_images(
    source: ImageSource,
    reference: Reference,
    extractor: Extractor,
    out: Path,
    *,
    batch_size: int = 64,
    metrics: MetricOptions | None = None,
    train_NHWC: Tensor | None = None,
    held_out_NHWC: Tensor | None = None,
    second: Scorer | None = None,
    progress: Progress | None = None,
) -> Report:
    """Scores images made elsewhere (a folder, an .npz) and writes metrics.json, card.md; arguments as above."""
    generated = read_pictures(
        source,
        extractor,
        batch_size,
        train_NHWC is not None,
        None if second is None else second.extractor,
        counted(progress, "images", len(source)),
    )
    scores, others = _scores(generated, Scorer(extractor, reference), second, metrics or MetricOptions())
    found = None
    if train_NHWC is not None and generated.thumbnails_ND is not None:
        found = copies(generated.thumbnails_ND, train_NHWC, held_out_NHWC, device=extractor.device)
    report = make_report(
        source.name,
        generated,
        scores,
        reference,
        extractor,
        settings={"pictures": source.name, "pictures_sha256": source.digest()},
        processes=1,
        batch_size=batch_size,
        device=extractor.device,
        copies=found,
        second=others,
    )
    save_report(report, out)
    return report


def _scores(
    generated: Generated, first: Scorer, second: Scorer | None, options: MetricOptions
) -> tuple[Metrics, tuple[Scorer, Metrics] | None]:
    """Scores by both extractors, the second's with what they were measured with."""

    def scores(features: dict[str, Tensor], scorer: Scorer) -> Metrics:
        assert scorer.reference is not None
        extractor = scorer.extractor
        return compute_metrics(features, scorer.reference, extractor.kind, layer=extractor.layers[0], options=options)

    others = None if second is None else (second, scores(generated.second_features, second))
    return scores(generated.features, first), others


def _copies(
    generated: Generated,
    generate: ImageGenerator,
    plan: LabelPlan,
    options: RunOptions,
    train_NHWC: Tensor,
    held_out_NHWC: Tensor | None,
    world: World,
) -> Copies:
    """Copy rates, and a sheet of the eight samples nearest to training images."""
    assert generated.thumbnails_ND is not None
    found = copies(generated.thumbnails_ND, train_NHWC, held_out_NHWC, device=world.device)
    closest = found.distance_N.argsort(stable=True)[:8].tolist()
    sample_NHWC = remake_images(closest, generate, plan, options.seed)
    if sample_NHWC.shape[1:] == train_NHWC.shape[1:]:
        neighbour_picture(sample_NHWC, train_NHWC, options.out / "neighbours.png")
    return found


def stacked(source: ImageSource) -> Tensor:
    """All images of a set in memory, uint8 [N, H, W, 3]."""
    return torch.cat(list(source.batches(1024))).movedim(-3, -1).contiguous()


def evaluate_pipeline(
    pipeline: ImagePipeline,
    sampling: Sampling,
    score: ScoreOptions,
    options: RunOptions,
    *,
    name: str,
    uint8_rule: str = "round",
    prompts: tuple[str, ...] = (),
    speed_batches: tuple[int, ...] = (),
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
        prompts: for models conditioned on words; image i has prompt i mod their number.
        speed_batches: batch sizes at which the first process times whole calls, see `measure_speed`; what the folder's
            report of the same device says already stays.
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
    generate = PipelineGenerator(pipeline, sampling, uint8_rule)
    if joined.device != pipeline.device:
        pipeline.to(joined.device)
    pipeline.set_progress_bar_config(disable=True)
    batch_size = options.batch_size
    if isinstance(batch_size, str):
        batch_size = pipeline.find_batch_size(
            options.num_samples, sampler_options=sampling.sampler_options, **sampling.call_settings()
        )
        options = replace(options, batch_size=batch_size)
    extractor, other = load_extractors(score, joined.device)
    reference, second = None, None if other is None else Scorer(other, None)
    if joined.rank == 0:
        reference, second = load_references(score, extractor, other, batch_size=batch_size, progress=progress)
    known = _known_speed(options, joined) if joined.rank == 0 else {}
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
        generate,
        reference,
        extractor,
        plan,
        options,
        name=name,
        settings=generate.settings(),
        world=joined,
        train_NHWC=None if score.train is None else stacked(open_images(score.train)),
        held_out_NHWC=None if score.held_out is None else stacked(open_images(score.held_out)),
        second=second,
        progress=progress,
    )
    del extractor, reference, other, second  # what they hold is no memory of the pipeline
    if report is not None:
        batches = speed_batches or tuple(known)
        for number, batch in enumerate(batches, 1):
            if batch not in known:
                pipeline.runtime.clear()
                gc.collect()
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
