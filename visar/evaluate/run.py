"""From something that makes pictures to its card: what `visar eval`, its mode --compare and `visar stats` run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visar.evaluate.copies import Copies, copies, neighbour_picture
from visar.evaluate.extractors import Extractor, load_extractor
from visar.evaluate.generation import (
    Generated,
    ImageGenerator,
    KeepImages,
    collect,
    generate_images,
    read_pictures,
    remake_images,
    write_npz,
)
from visar.evaluate.images import ImageSource, ResizeChain, open_images
from visar.evaluate.labels import LABEL_POLICIES, LabelPlan, LabelPolicy, LabelTable
from visar.evaluate.metrics import MetricOptions, compute_metrics
from visar.evaluate.pareto import Point, draw_pareto
from visar.evaluate.references import Reference, measure, save_statistics
from visar.evaluate.report import Report, make_report, markdown_table, save_report, table
from visar.evaluate.sharding import World
from visar.files import atomic_write

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RunOptions:
    """One evaluation run, whatever makes the pictures.

    Attributes:
        out: folder of the run: state, metrics.json, card.md, pictures.
        num_samples: pictures; 50,000 for ImageNet's published figures, 10,000 for the emoji set.
        batch_size: pictures at a time.
        seed: image i has seed + i.
        labels: "auto" (the training histogram where the model or the reference knows it, else balanced classes, else
            none) or a policy of LabelPlan.
        keep_images: "none", "png" or "npz".
        metrics: settings of the scores.

    Raises:
        ValueError: fewer pictures than precision and recall need.
    """

    out: Path
    num_samples: int = 10_000
    batch_size: int = 64
    seed: int = 0
    labels: LabelPolicy | Literal["auto"] = "auto"
    keep_images: KeepImages = "none"
    metrics: MetricOptions = field(default_factory=MetricOptions)

    def __post_init__(self) -> None:
        if self.num_samples <= self.metrics.neighbours:
            raise ValueError(
                f"num_samples {self.num_samples}: precision and recall with {self.metrics.neighbours} neighbours need "
                f"{self.metrics.neighbours + 1} pictures or more"
            )


def label_plan(
    policy: LabelPolicy | Literal["auto"],
    *,
    num_classes: int,
    table: LabelTable | None,
    prompts: tuple[str, ...] = (),
) -> LabelPlan:
    """The plan of a policy; "auto" as RunOptions says.

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
    progress: Progress | None = None,
) -> Report | None:
    """Makes the pictures, scores them, writes metrics.json, card.md and neighbours.png.

    Args:
        generate: makes a batch.
        reference: None in processes other than the first.
        extractor: its layers are computed for every picture.
        plan: labels.
        options: of the run.
        name: row of tables.
        settings: what the pictures depend on besides seeds and labels; the run's folder remembers it.
        world: the processes.
        train_NHWC: uint8 training pictures for the copy rate; None leaves it out. Given in every process or in none.
        held_out_NHWC: real pictures that were not trained on, for the copy rate's null.
        progress: told (what, done, total).

    Returns: the report in the first process, None in the others.
    """
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
        progress=counted(progress, "images", -(-options.num_samples // world.size)),
    )
    if world.rank:
        return None
    assert reference is not None
    generated = collect(options.out, options.num_samples)
    if options.keep_images == "npz":
        write_npz(options.out, options.num_samples, options.out / "samples.npz")
    metrics = compute_metrics(
        generated.features, reference, extractor.kind, layer=extractor.layers[0], options=options.metrics
    )
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
    progress: Progress | None = None,
) -> Report:
    """Scores pictures made elsewhere (a folder, an .npz) and writes metrics.json, card.md; arguments as above."""
    generated = read_pictures(
        source, extractor, batch_size, train_NHWC is not None, counted(progress, "images", len(source))
    )
    found = None
    if train_NHWC is not None and generated.thumbnails_ND is not None:
        found = copies(generated.thumbnails_ND, train_NHWC, held_out_NHWC, device=extractor.device)
    report = make_report(
        source.name,
        generated,
        compute_metrics(generated.features, reference, extractor.kind, layer=extractor.layers[0], options=metrics),
        reference,
        extractor,
        settings={"pictures": source.name, "pictures_sha256": source.digest()},
        processes=1,
        batch_size=batch_size,
        device=extractor.device,
        copies=found,
    )
    save_report(report, out)
    return report


def _copies(
    generated: Generated,
    generate: ImageGenerator,
    plan: LabelPlan,
    options: RunOptions,
    train_NHWC: Tensor,
    held_out_NHWC: Tensor | None,
    world: World,
) -> Copies:
    """Copy rates, and a picture of the eight samples nearest to training pictures."""
    assert generated.thumbnails_ND is not None
    found = copies(generated.thumbnails_ND, train_NHWC, held_out_NHWC, device=world.device)
    closest = found.distance_N.argsort(stable=True)[:8].tolist()
    sample_NHWC = remake_images(closest, generate, plan, options.seed)
    if sample_NHWC.shape[1:] == train_NHWC.shape[1:]:
        neighbour_picture(sample_NHWC, train_NHWC, options.out / "neighbours.png")
    return found


def counted(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    """The progress of one stage, told the number done only."""
    return None if progress is None else lambda done: progress(what, done, total)


def stacked(source: ImageSource) -> Tensor:
    """All pictures of a set in memory, uint8 [N, H, W, 3]."""
    return torch.cat(list(source.batches(1024))).movedim(-3, -1).contiguous()


@dataclass(frozen=True)
class ScoreOptions:
    """What pictures are scored with and against; shared by the commands.

    Attributes:
        reference: name of a shipped file, statistics file, ADM batch, .npz of images, or folder.
        extractor, extractor_weights, layer, spatial, extractor_dtype: see load_extractor.
        protocol: "generation" or "reconstruction".
        resize, image_size: how a folder's pictures get their size.
        train, held_out: folder or .npz of pictures for the copy rate and its null.
    """

    reference: str
    extractor: str = "efficientnet-lite0"
    extractor_weights: Path | None = None
    extractor_dtype: Literal["float32", "float64"] = "float32"
    layer: str | None = None
    spatial: bool = False
    protocol: Literal["generation", "reconstruction"] = "generation"
    resize: ResizeChain = "none"
    image_size: int | None = None
    train: str | None = None
    held_out: str | None = None

    def load_extractor(self, device: torch.device) -> Extractor:
        """The extractor on a device."""
        return load_extractor(
            self.extractor,
            device=device,
            dtype=self.extractor_dtype,
            weights=self.extractor_weights,
            layer=self.layer,
            spatial=self.spatial,
        )


def make_statistics(
    source: str | Path | ImageSource,
    extractor: Extractor,
    out: str | Path,
    *,
    protocol: Literal["generation", "reconstruction"] = "generation",
    batch_size: int = 64,
    resize: ResizeChain = "none",
    image_size: int | None = None,
    labels: LabelTable | None = None,
    keep_features: bool = False,
    progress: Progress | None = None,
) -> Reference:
    """Writes a statistics file of real pictures; the whole of `visar stats`.

    Args:
        source: folder, .npz of images, or an open set.
        extractor: whose features; the file can be used with this extractor and these weights only.
        out: file to write, .npz.
        protocol: what the file is a reference for.
        batch_size: pictures at a time.
        resize, image_size: how a folder's pictures get their size.
        labels: the pictures' labels, for samples that follow their histogram; None takes those that the set brings.
        keep_features: also store the features, which KID, precision and recall need; 4 bytes a picture and feature.
        progress: told (what, done, total).

    Raises:
        ValueError: no pictures, unreadable ones, or a path that cannot be written.
    """
    images = open_images(source, resize, image_size)
    with atomic_write(out) as path:
        path.touch()  # an output that cannot be written is found now, not after the work
    reference = measure(
        images,
        extractor,
        protocol=protocol,
        batch_size=batch_size,
        labels=labels,
        resize="none" if image_size is None else f"{resize} to {image_size}",
        keep_features=keep_features,
        progress=counted(progress, "pictures", len(images)),
    )
    save_statistics(reference, out)
    return reference


def write_comparison(reports: list[Report], out: str | Path) -> None:
    """Writes compare.json, compare.md and pareto.png of comparable reports; the first row is what ratios refer to.

    In pareto.png the cost is the time of an image at the largest batch size that was timed (`--speed-batches`) in all
    runs, else the number of forward passes; without either there is no picture.

    Raises:
        ValueError: the reports do not compare, or there is none.
    """
    if not reports:
        raise ValueError("no run to compare")
    out = Path(out)
    rows = table(reports)
    protocol = reports[0].protocol
    shared = {key: value for key, value in protocol.items() if all(r.protocol.get(key) == value for r in reports)}
    lines = [markdown_table(rows), "Common protocol:", "", *(f"- {key}: {value}" for key, value in shared.items())]
    with atomic_write(out / "compare.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with atomic_write(out / "compare.json") as path:
        path.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n", encoding="utf-8")
    costs = _costs(reports)
    if costs is not None:
        cost_name, values = costs
        draw_pareto(
            [Point(r.name, cost, r.metrics.distance) for r, cost in zip(reports, values, strict=True)],
            out / "pareto.png",
            cost_name=cost_name,
            distance_name=reports[0].metrics.distance_name,
        )


def _costs(reports: list[Report]) -> tuple[str, list[float]] | None:
    """What a run costs, by name and for every report; None where it is not known of all."""
    timed = [{row.batch: row.images_per_s for row in report.speed} for report in reports]
    common = set(timed[0]).intersection(*timed[1:])
    if common:
        batch = max(common)
        return f"ms an image at batch {batch}", [1000 / rates[batch] for rates in timed]
    if all(report.passes for report in reports):
        return "forward passes per image", [report.passes or 0.0 for report in reports]
    return None
