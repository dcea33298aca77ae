"""Reports, tables, comparisons and pictures of them."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visar.evaluate.comparison import Point, draw_pareto, frontier, write_comparison
from visar.evaluate.extractors import EXTRACTORS, Extractor, load_extractor
from visar.evaluate.images import ArrayImages
from visar.evaluate.labels import LabelPlan
from visar.evaluate.metrics import Scorer
from visar.evaluate.options import RunOptions
from visar.evaluate.references import Reference, measure
from visar.evaluate.report import Report, card, check_comparable, load_report, table
from visar.evaluate.run import evaluate_generator
from visar.evaluate.scoring import Scoring
from visar.io.plots import plot
from visar.io.shards import World

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "evaluation.py")))
PLAN = LabelPlan("balanced", num_classes=5)


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    monkeypatch.setitem(EXTRACTORS, "tiny", TINY.TINY)
    return load_extractor("tiny")


@pytest.fixture
def real() -> torch.Tensor:
    images, _ = TINY.paint(list(range(900, 960)), [(i % 5,) for i in range(60)])
    return images.movedim(1, -1).contiguous()


@pytest.fixture
def reference(extractor: Extractor, real: torch.Tensor) -> Reference:
    return measure(ArrayImages(real, "real"), extractor, protocol="generation", batch_size=32)


def evaluate(out: Path, extractor: Extractor, reference: Reference, **changes: Any) -> Report:
    arguments: dict[str, Any] = {
        "name": "paint",
        "settings": {"sampler": "ancestral", "uint8_rule": "round", "guidance": {"scale": 1.5, "interval": None}},
        "world": World(0, 1, torch.device("cpu")),
    }
    options = changes.pop("options", RunOptions(out=out, num_samples=30, batch_size=8, seed=1))
    pictures = {name: changes.pop(name) for name in ("train_NHWC", "held_out_NHWC") if name in changes}
    report = evaluate_generator(
        changes.pop("generate", TINY.paint),
        Scoring(Scorer(extractor, reference), **pictures),
        PLAN,
        options,
        **{**arguments, **changes},
    )
    assert report is not None
    return report


def test_the_card_has_the_whole_protocol(
    tmp_path: Path, extractor: Extractor, reference: Reference, real: torch.Tensor
) -> None:
    report = evaluate(tmp_path, extractor, reference, train_NHWC=real[:40], held_out_NHWC=real[40:])
    text = (tmp_path / "card.md").read_text()
    assert text == card(report)
    for needed in (
        "protocol: generation",
        reference.sha256,
        "extractor: tiny",
        "num samples: 30",
        "labels: balanced: image i has class i mod 5 (6 a class)",
        "guidance: scale=1.5\n",
        "sampler: ancestral",
        "seeds: image i: 1 + i",
        "uint8 rule: round",
        "extractor resize: averaged to 4 x 4",
        torch.__version__,
        "device: CPU",
        "images per second",
        "forward passes per image: generator=4",
        "FD-tiny is not FID",
        "real null",
        "copies",
        "held-out",
        report.images_sha256,
    ):
        assert needed in text, needed
    assert load_report(tmp_path) == report
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["distance"] == report.metrics.distance
    assert Image.open(tmp_path / "neighbours.png").size == (2 + 5 * 34, 2 + 8 * 34)
    assert report.copies is not None and report.copies["copy_rate"] == 0.0


def test_a_memorised_model_is_called_that(
    tmp_path: Path, extractor: Extractor, reference: Reference, real: torch.Tensor
) -> None:
    def recite(seeds: list[int], labels: list) -> tuple:
        _, statistics = TINY.paint(seeds, labels)
        return real[[seed % 40 for seed in seeds]].movedim(-1, 1).contiguous(), statistics

    report = evaluate(tmp_path, extractor, reference, generate=recite, train_NHWC=real[:40])
    assert report.copies is not None and report.copies["copy_rate"] == 1.0
    assert any("100.0% of the samples are copies" in note for note in report.notes)
    assert "copies" in table([report])[0]


def test_comparison_of_two_samplers(tmp_path: Path, extractor: Extractor, reference: Reference) -> None:
    def coarse(seeds: list[int], labels: list) -> tuple:
        images, statistics = TINY.paint(seeds, labels)
        faster = dataclasses.replace(statistics, forward_passes={"generator": 1, "drafter": 1})
        return (images // 128 * 128), faster

    reports = [
        evaluate(tmp_path / "a", extractor, reference, name="ancestral"),
        evaluate(tmp_path / "b", extractor, reference, name="fast", generate=coarse),
    ]
    rows = table(reports)
    header = rows[0]
    assert header[:4] == ("run", "FD-tiny", "FD-tiny ratio", "real null") and rows[1][:1] == ("ancestral",)
    assert rows[1][2] == "1.00x" and float(rows[2][2][:-1]) == pytest.approx(
        float(rows[2][1]) / float(rows[1][1]), 0.01
    )
    ratios = [row[header.index("passes ratio")] for row in rows[1:]]
    assert ratios == ["1.00x", "0.25x"]  # 4 passes against 1; the drafter's stand apart
    assert float(rows[2][1]) > float(rows[1][1])
    write_comparison(reports, tmp_path / "compare")
    assert "| fast |" in (tmp_path / "compare" / "compare.md").read_text()
    assert len(json.loads((tmp_path / "compare" / "compare.json").read_text())) == 2
    assert Image.open(tmp_path / "compare" / "pareto.png").size[0] >= 900


def test_what_does_not_compare_is_refused(tmp_path: Path, extractor: Extractor, reference: Reference) -> None:
    first = evaluate(tmp_path / "a", extractor, reference)
    for key, value in (("protocol", "reconstruction"), ("num_samples", 10), ("reference_sha256", "0")):
        other = dataclasses.replace(first, name="other", protocol={**first.protocol, key: value})
        with pytest.raises(ValueError, match=f"paint and other do not compare: they differ in {key}"):
            check_comparable([first, other])
        with pytest.raises(ValueError, match="do not compare"):
            write_comparison([first, other], tmp_path / "c")
    other = dataclasses.replace(first, protocol={**first.protocol, "sampler": "jacobi", "batch_size": 1})
    check_comparable([first, other])
    with pytest.raises(ValueError, match="no metrics.json in"):
        load_report(tmp_path / "none")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="not a report"):
        load_report(tmp_path)


def test_a_drafters_passes_stand_apart(tmp_path: Path, extractor: Extractor, reference: Reference) -> None:
    first = evaluate(tmp_path / "a", extractor, reference)
    passes = {"generator": 2.0, "drafter": 8.0}
    drafted = dataclasses.replace(first, name="drafted", cost={**first.cost, "forward_passes_per_image": passes})
    several, student = {"drafter": 3.0, "refiner": 5.0}, {"generator": 2.0, "teacher": 20.0}
    turns = dataclasses.replace(first, name="turns", cost={**first.cost, "forward_passes_per_image": several})
    mixed = dataclasses.replace(first, name="mixed", cost={**first.cost, "forward_passes_per_image": student})
    header, *rows = table([first, drafted, turns, mixed])
    columns = [header.index(name) for name in ("passes/image", "drafter passes")]
    assert [[row[column] for column in columns] for row in rows[1:]] == [["2.0", "8.0"], ["8.0", "-"], ["22.0", "-"]]


def test_a_table_says_what_images_are_made_of(tmp_path: Path, extractor: Extractor, reference: Reference) -> None:
    snapped = evaluate(tmp_path / "a", extractor, reference)
    soft = dataclasses.replace(snapped, name="soft", protocol={**snapped.protocol, "image_of": "soft"})
    header, *rows = table([snapped, soft])
    assert header[:2] == ("run", "image of") and [row[1] for row in rows] == ["codes", "soft"]


@pytest.mark.parametrize(
    ("values", "ticks"), [((1.26, 39.1), [1, 2, 5, 10, 20, 50]), ((7.2, 7.9), [7.2, 7.4, 7.6, 7.8])]
)
def test_ticks_are_round_numbers(values: tuple[float, float], ticks: list[float]) -> None:
    axes = plot(x_name="cost", y_name="distance", log_x=True)
    axes.plot(values, values)
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert set(np.round(ticks, 6)) <= set(np.round(shown, 6)) and len(shown) < 12


def test_pareto_picture_marks_the_points(tmp_path: Path) -> None:
    points = [Point("slow", 256, 10.0), Point("fast", 8, 12.0), Point("bad", 64, 20.0), Point("worse", 300, 12.0)]
    assert [point.label for point in frontier(points)] == ["fast", "slow"]
    names = {"cost_name": "passes", "distance_name": "FD-Lite0"}
    path = draw_pareto(points, tmp_path / "p.png", **names)
    pixels = np.asarray(Image.open(path))[:, :, :3]
    assert (pixels == (40, 90, 180)).all(axis=-1).sum() > 300  # the frontier
    assert path.read_bytes() == draw_pareto(points, tmp_path / "q.png", **names).read_bytes()
    wordy = [Point("$x$" * 70, 1.0, 2.0), points[0]]
    wide = np.asarray(Image.open(draw_pareto(wordy, tmp_path / "w.png", **names)))
    assert wide.shape[1] > pixels.shape[1] and (wide[:, -5:, :3] == 255).all()  # no line is cut off
    single = draw_pareto(points[:1], tmp_path / "one.png", **names)
    same = draw_pareto([points[0]] * 3, tmp_path / "same.png", **names)
    ink = [(np.asarray(Image.open(image))[20:550, 100:, :3] < 90).all(axis=-1).sum() for image in (single, same)]
    assert ink[1] > ink[0] + 20  # the numbers of runs at one place do not cover each other
    assert "matplotlib.pyplot" not in sys.modules  # the process's own plots are left alone
    for wrong in ([], [Point("x", 0.0, 1.0)], [Point("x", 1.0, float("nan"))]):
        with pytest.raises(ValueError, match="above 0"):
            draw_pareto(wrong, tmp_path / "x.png", cost_name="passes", distance_name="FD")
    with pytest.raises(ValueError, match="ends in .png"):
        draw_pareto(points, tmp_path / "x.jpg", cost_name="passes", distance_name="FD")
