"""The figure with its whole protocol: metrics.json, a Markdown card, and tables of what compares only."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from visar.evaluate.copies import Copies
from visar.evaluate.generation import Generated
from visar.evaluate.metrics import Metrics, Scorer
from visar.evaluate.scoring import Scoring
from visar.evaluate.speed import Speed
from visar.io.files import atomic_write, json_object

# Figures compare when these agree; what differs between the rows of a table is the model and how it was sampled.
COMPARABLE = (
    "protocol",
    "reference_sha256",
    "extractor",
    "extractor_layer",
    "extractor_weights_sha256",
    "extractor_dtype",
    "num_samples",
    "labels",
    "uint8_rule",
    "second_reference_sha256",
    "second_extractor",
    "second_extractor_layer",
    "second_extractor_weights_sha256",
)


@dataclass(frozen=True)
class Report:
    """Scores of a run and everything needed to make them again.

    Attributes:
        name: row of a table.
        protocol: what was done, in the order in which the card prints it.
        metrics: the scores.
        second: scores by a second extractor; None without one.
        cost: images_per_second, forward_passes_per_image by model, mean_tokens_per_pass, acceptance_rate.
        images_sha256: of all images; equal for equal images.
        duplicates: images with the bytes of an earlier one.
        copies: copy rates; None where no training images were given.
        speed: by batch size, where it was measured.
    """

    name: str
    protocol: dict[str, Any]
    metrics: Metrics
    cost: dict[str, Any]
    images_sha256: str
    duplicates: int
    copies: dict[str, float | None] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    speed: tuple[Speed, ...] = ()
    second: Metrics | None = None

    @property
    def passes(self) -> float:
        """Forward passes for one image (of its batch) of all models that make it, but for one that only drafts."""
        return sum(self.cost["forward_passes_per_image"].values()) - self.drafter_passes

    @property
    def drafter_passes(self) -> float:
        """Forward passes, small ones, of what drafts for the generator."""
        counts = self.cost["forward_passes_per_image"]
        return counts.get("drafter", 0.0) if "generator" in counts else 0.0

    @property
    def images_per_second(self) -> float | None:
        """Images per second of one process while it made the run's images; None for images that were not made here."""
        return self.cost["images_per_second"]


def environment(device: torch.device) -> dict[str, str]:
    """Versions and device, for the card."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "device": name,
        "torch": torch.__version__,
        "torch-fidelity": version("torch-fidelity"),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def make_report(
    name: str,
    generated: Generated,
    metrics: Metrics,
    scoring: Scoring,
    *,
    settings: dict[str, Any],
    processes: int,
    batch_size: int,
    device: torch.device,
    copies: Copies | None = None,
    second: Metrics | None = None,
) -> Report:
    """Puts a run's figures and protocol together.

    Args:
        scoring: what the figures were measured with.
        settings: what only the caller knows: model, sampler and its options, guidance, temperature, top_k, top_p,
            labels, seeds, uint8_rule, dtype, image_size.
        second: scores by the second extractor.
    """
    extractor, reference = scoring.first.extractor, scoring.first.reference
    assert reference is not None
    layer = extractor.layers[0]
    statistics = reference.statistics[layer]
    protocol = {
        "protocol": reference.protocol,
        "reference": reference.name,
        "reference_kind": reference.kind,
        "reference_sha256": reference.sha256,
        "reference_count": statistics.count,
        "reference_resize": reference.resize,
        "extractor": extractor.name,
        "extractor_layer": layer,
        "extractor_weights_sha256": extractor.weights,
        "extractor_resize": extractor.kind.resize,
        "extractor_dtype": extractor.dtype,
        **({} if scoring.second is None else _second_protocol(scoring.second)),
        "num_samples": generated.num_samples,
        **settings,
        "processes": processes,
        "batch_size": batch_size,
        **environment(device),
    }
    counts = generated.statistics
    notes = [*metrics.notes, *reference.notes]
    if second is not None:
        notes += [f"{second.distance_name}: {note}" for note in second.notes]
    if generated.duplicates:
        notes.append(f"{generated.duplicates} of {generated.num_samples} images have the bytes of an earlier one")
    rates = None
    if copies is not None:
        rates = {key: value for key, value in vars(copies).items() if isinstance(value, float | None)}
        if copies.copy_rate > 0.1:
            notes.append(
                f"{copies.copy_rate:.1%} of the samples are copies of training images: the distance says little"
            )
    return Report(
        name=name,
        protocol=protocol,
        metrics=metrics,
        cost={
            "images_per_second": generated.images_per_second,
            "forward_passes_per_image": generated.forward_passes_per_image,
            "mean_tokens_per_pass": counts.mean_tokens_per_pass,
            "acceptance_rate": counts.acceptance_rate,
        },
        images_sha256=generated.images_sha256,
        duplicates=generated.duplicates,
        copies=rates,
        notes=tuple(notes),
        second=second,
    )


def _second_protocol(scorer: Scorer) -> dict[str, Any]:
    assert scorer.reference is not None
    return {
        "second_reference": scorer.reference.name,
        "second_reference_sha256": scorer.reference.sha256,
        "second_extractor": scorer.extractor.name,
        "second_extractor_layer": scorer.extractor.layers[0],
        "second_extractor_weights_sha256": scorer.extractor.weights,
        "second_extractor_resize": scorer.extractor.kind.resize,
    }


def save_report(report: Report, folder: str | Path) -> None:
    """Writes metrics.json and card.md."""
    folder = Path(folder)
    with atomic_write(folder / "metrics.json") as path:
        path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    with atomic_write(folder / "card.md") as path:
        path.write_text(card(report), encoding="utf-8")


def load_report(folder: str | Path) -> Report:
    """Reads metrics.json of a folder.

    Raises:
        ValueError: there is none, or it is not one of ours.
    """
    path = Path(folder) / "metrics.json"
    try:
        report = report_of(json_object(path.read_bytes()))
        card(report)  # which reads all of it
        return report
    except FileNotFoundError as error:
        raise ValueError(f"no metrics.json in {folder}: run visar eval with --out {folder} first") from error
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a report of visar eval ({error})") from error


def report_of(content: dict[str, Any]) -> Report:
    """A report from what metrics.json, or a row of compare.json, says."""
    speed = tuple(Speed(**row) for row in content.get("speed", ()))  # older reports have none, nor a second score
    read = {"metrics": _metrics(content["metrics"]), "notes": tuple(content["notes"]), "speed": speed}
    second = content.get("second")
    return Report(**{**content, **read, "second": None if second is None else _metrics(second)})


def _metrics(content: dict[str, Any]) -> Metrics:
    return Metrics(**{**content, "notes": tuple(content["notes"])})


def _sampling(report: Report, varying: Sequence[str]) -> str:
    protocol = report.protocol
    settings = dict(protocol.get("sampler_options", {}))
    settings.update({name: protocol.get(name) for name in varying})
    guidance = settings.pop("guidance", None)
    if guidance is not None:
        settings["guidance_scale"] = guidance["scale"]
    texts = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    listed = ",".join(f"{name}={value}" for name, value in texts.items())
    return f"{protocol.get('sampler', '')}{':' * bool(listed)}{listed}"


def distinct_names(reports: Sequence[Report]) -> list[Report]:
    """The reports, named by their samplers and settings besides where several have the same name."""
    if len({report.name for report in reports}) == len(reports):
        return list(reports)
    filters = ("guidance", "temperature", "top_k", "top_p")
    varying = [name for name in filters if len({str(report.protocol.get(name)) for report in reports}) > 1]
    return [replace(report, name=f"{report.name} {_sampling(report, varying)}".rstrip()) for report in reports]


def check_comparable(reports: Sequence[Report]) -> None:
    """Refuses a table of figures that do not compare.

    Raises:
        ValueError: rows differ in the protocol; the message names in what.
    """
    first = reports[0]
    for report in reports[1:]:
        differing = [
            f"{key} ({first.protocol.get(key)!r} and {report.protocol.get(key)!r})"
            for key in COMPARABLE
            if first.protocol.get(key) != report.protocol.get(key)
        ]
        if differing:
            raise ValueError(f"{first.name} and {report.name} do not compare: they differ in {'; '.join(differing)}")


def table(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """Header and rows of a table of comparable reports; speed and passes are also given relative to the first row.

    Measured speeds and peaks of memory share a cell: "images/s at 1 / 8 / 64".

    Raises:
        ValueError: the reports do not compare.
    """
    check_comparable(reports)
    metrics = [report.metrics for report in reports]
    first = reports[0]
    second = [report.second for report in reports if report.second is not None]
    others = second if len(second) == len(reports) else []
    columns: list[tuple[str, list[str]]] = [
        ("run", [report.name for report in reports]),
        *_image_column(reports),
        *_distance_columns(metrics, "real null"),
        *_second_distance(metrics, others),
        ("s" + metrics[0].distance_name, [_number(row.spatial_distance, ".2f") for row in metrics]),
        ("KID", [_pair(row.kid, row.kid_std) for row in metrics]),
        ("IS", [_pair(row.inception_score, row.inception_score_std, 2) for row in metrics]),
        ("precision", [_number(row.precision, ".3f") for row in metrics]),
        ("recall", [_number(row.recall, ".3f") for row in metrics]),
        *_second_scores(others, str(first.protocol.get("second_extractor"))),
        ("copies", [_share(report, "copy_rate") for report in reports]),
        ("copies moved", [_share(report, "copy_rate_moved") for report in reports]),
        ("passes/image", [_number(report.passes or None, ".1f") for report in reports]),
        ("passes ratio", [_ratio(report.passes, first.passes) for report in reports]),
        ("drafter passes", [_number(report.drafter_passes or None, ".1f") for report in reports]),
        ("tokens/pass", [_number(report.cost["mean_tokens_per_pass"] or None, ".2f") for report in reports]),
        ("accepted", [_number(report.cost["acceptance_rate"], ".1%") for report in reports]),
        ("images/s", [_rate(report.images_per_second) for report in reports]),
        ("speed ratio", [_ratio(report.images_per_second, first.images_per_second) for report in reports]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cell != "-" for cell in cells)]
    shown += _speed_columns(reports)
    if len(reports) == 1:
        shown = [(name, cells) for name, cells in shown if " ratio" not in name]
    return [tuple(name for name, _ in shown), *zip(*(cells for _, cells in shown), strict=True)]


def _image_column(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    """What images are made of, where one is of something else than codes."""
    made_of = [report.protocol.get("image_of", "codes") for report in reports]
    return [("image of", made_of)] if set(made_of) != {"codes"} else []


def _distance_columns(metrics: Sequence[Metrics], null_name: str) -> list[tuple[str, list[str]]]:
    name, first = metrics[0].distance_name, metrics[0].distance
    return [
        (name, [f"{row.distance:.2f}" for row in metrics]),
        (f"{name} ratio", [_ratio(row.distance, first) for row in metrics]),
        (null_name, [_number(row.null_distance, ".2f") for row in metrics]),
    ]


def _second_distance(metrics: Sequence[Metrics], others: Sequence[Metrics]) -> list[tuple[str, list[str]]]:
    """The distance by a second extractor, and the runs' ranks by both; nothing without scores by it."""
    if not others:
        return []
    columns = _distance_columns(others, f"real null of {others[0].distance_name}")
    if len(others) > 1:
        sides = [[row.distance for row in side] for side in (metrics, others)]
        ranks = [[1 + sum(other < value for other in side) for value in side] for side in sides]
        columns.append(("ranks", [f"{one} / {other}" for one, other in zip(*ranks, strict=True)]))
    return columns


def _second_scores(others: Sequence[Metrics], network: str) -> list[tuple[str, list[str]]]:
    return [
        (f"KID by {network}", [_pair(row.kid, row.kid_std) for row in others]),
        (f"precision by {network}", [_number(row.precision, ".3f") for row in others]),
        (f"recall by {network}", [_number(row.recall, ".3f") for row in others]),
    ]


def _speed_columns(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    batches = sorted({row.batch for report in reports for row in report.speed})
    if not batches:
        return []
    measured = [{row.batch: row for row in report.speed} for report in reports]
    rates = [[rows[batch].images_per_s if batch in rows else None for batch in batches] for rows in measured]
    peaks = [[rows[batch].peak_gib if batch in rows else None for batch in batches] for rows in measured]
    at = " / ".join(map(str, batches))
    columns = [
        (f"images/s at {at}", [" / ".join(map(_rate, row)) for row in rates]),
        (f"speed ratio at {at}", [" / ".join(map(_ratio, row, rates[0])) for row in rates]),
        (f"peak GiB at {at}", [" / ".join(_number(peak, ".2f") for peak in row) for row in peaks]),
    ]
    if batches[0] == 1:
        columns.insert(0, ("ms at batch 1", [_number(row[0] and 1000 / row[0], ".2f") for row in rates]))
    return columns


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(value: float | None) -> str:
    return _number(value, ".2f" if value is None or value < 100 else ".0f")


def _pair(value: float | None, deviation: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f} +- {deviation or 0.0:.{digits}f}"


def _share(report: Report, key: str) -> str:
    value = None if report.copies is None else report.copies[key]
    return _number(value, ".1%")


def _ratio(value: float | None, first: float | None) -> str:
    return f"{value / first:.2f}x" if value and first else "-"


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows (the first is the header) as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"


def card(report: Report) -> str:
    """The Markdown card of one run: figures, then the whole protocol."""
    held_out = None if report.copies is None else report.copies["held_out_rate"]
    name = report.metrics.distance_name
    warning = "" if name == "FID" else f" {name} is not FID and must not be set beside published FIDs."
    lines = [
        f"# Evaluation of {report.name}",
        "",
        markdown_table(table([report])),
        f"Figures compare only where the protocol below agrees.{warning}",
        '"real null" is what as many real images, not in the reference, would score, extrapolated from the distance '
        'of two halves of the reference; "-" where there are not more images than features, so that it is not known.',
        "",
    ]
    if held_out is not None:
        lines += [f"Copies among real held-out images: {held_out:.1%}.", ""]
    lines += ["## Protocol", ""]
    lines += [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in report.protocol.items()]
    lines += [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in report.cost.items()]
    lines += [
        f"- speed at batch {row.batch}: {_plain({key: value for key, value in asdict(row).items() if key != 'batch'})}"
        for row in report.speed
    ]
    lines += [f"- images sha256: {report.images_sha256}", f"- duplicate images: {report.duplicates}"]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item is not None}
        return ", ".join(f"{key}={_plain(item)}" for key, item in given.items()) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "not known" if value is None else str(value)
