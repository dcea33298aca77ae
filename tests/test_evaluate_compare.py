"""Comparing models and samplers: runs given as text, settings of all samplers, and timing beside quality."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from visar.cli import compare as comparison
from visar.cli.compare import compare
from visar.evaluate import run as evaluation
from visar.evaluate.extractors import EXTRACTORS
from visar.evaluate.labels import Label, LabelPlan
from visar.evaluate.options import Compare, ScoreOptions
from visar.evaluate.pipeline import PipelineGenerator, Sampling
from visar.evaluate.report import card, load_report, save_report
from visar.evaluate.scoring import Scoring, load_scoring
from visar.evaluate.speed import Speed, measure_speed
from visar.generators.next_scale import NextScaleTransformer
from visar.pipelines.image import ImagePipeline
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
EVALUATION = runpy.run_path(str(FIXTURES / "evaluation.py"))
SCALES = (1, 2, 4)


def scale_pipeline(seed: int = 0) -> ImagePipeline:
    """Models of different seeds share their tokenizer."""
    tokenizer = MultiScaleVQTokenizer(
        codebook_size=24,
        codebook_dim=8,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        scales=SCALES,
    )
    generator = NextScaleTransformer(
        vocab_size=24, codebook_width=8, scales=SCALES, width=16, num_layers=1, num_heads=2, num_classes=3
    )
    for module, its_seed in ((tokenizer, 0), (generator, seed)):
        torch.manual_seed(its_seed)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    generator.set_tokenizer(tokenizer.quantizer)
    pipeline = ImagePipeline(tokenizer.eval(), generator.eval(), defaults={"sampler": "next_scale", "top_k": 8})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two saved models, a/model and b/model, in the current folder, and options of every comparison."""
    monkeypatch.setitem(EXTRACTORS, "tiny", EVALUATION["TINY"])
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        scale_pipeline(number).save_pretrained(tmp_path / name / "model")
    reference = str(FIXTURES / "sample_64.npz")
    return {"reference": reference, "num_samples": 8, "batch_size": 8, "device": "cpu", "extractor": "tiny"}


def run(common: dict[str, Any], *names: str, **options: Any) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The printed table's rows as dicts, and compare.json."""
    tables: list[list[tuple[str, ...]]] = []
    compare(Compare(names, **{**common, **options}), tables.append)
    header, *rows = tables[0]
    return [dict(zip(header, row, strict=True)) for row in rows], json.loads(
        Path("comparison/compare.json").read_text()
    )


def test_runs_are_pairs_of_model_and_sampler(common: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[ScoreOptions] = []

    def watched(score: ScoreOptions, *arguments: Any, **settings: Any) -> Scoring:
        loaded.append(score)
        return load_scoring(score, *arguments, **settings)

    monkeypatch.setattr(comparison, "load_scoring", watched)
    runs = ("a/model/next_scale", "b/model/collaborative:followers=a/model,takes_over=1,top_k=3,2,1")
    rows, reports = run(common, runs=runs)
    assert len(loaded) == 1  # the runs share networks and references
    assert [row["run"] for row in rows] == [text.replace("model/", "model ", 1) for text in runs]
    assert [report["protocol"]["model"] for report in reports] == ["a/model", "b/model"]
    assert reports[1]["protocol"]["sampler_options"] == {"followers": ["a/model"], "takes_over": [1]}
    assert [report["protocol"]["top_k"] for report in reports] == [8, [3, 2, 1]]
    assert rows[0]["passes ratio"] == "1.00x" and rows[0]["tokens/pass"] == "7.00"
    assert not any("at" in column.split() for column in rows[0])
    product, _ = run(common, "a/model", "b/model", samplers=("next_scale",))
    assert [row["run"] for row in product] == ["a/model next_scale", "b/model next_scale"]
    assert product[0]["FD-tiny"] == rows[0]["FD-tiny"]  # the same folder


def test_settings_of_a_run_replace_those_of_the_model_and_of_the_command(common: dict[str, Any]) -> None:
    texts = (
        "next_scale",
        "next_scale:guidance_scale=4,guidance_schedule=linear,temperature=0.5,top_k=0,top_p=0.8",
        "next_scale:guidance-schedule=linear,top_p=0.9,0.8,0.7,smooth=true",
    )
    rows, reports = run(common, "a/model", samplers=texts, guidance_scale=2.0)
    assert [row["run"] for row in rows] == list(texts)  # one model: its name is not repeated
    found = [report["protocol"] for report in reports]
    assert [(one["guidance"]["scale"], one["guidance"]["schedule"]) for one in found] == [
        (2.0, "constant"),
        (4.0, "linear"),
        (2.0, "linear"),
    ]
    assert [(one["temperature"], one["top_k"], one["top_p"]) for one in found] == [
        (1.0, 8, 1.0),
        (0.5, 0, 0.8),
        (1.0, 8, [0.9, 0.8, 0.7]),
    ]
    assert found[2]["sampler_options"] == {"smooth": True}
    assert len({report["images_sha256"] for report in reports}) == 3


def test_one_value_a_scale_is_the_value_of_all() -> None:
    pipeline = scale_pipeline()
    labels: list[Label] = [(0,), (2,)]
    made = [
        PipelineGenerator(pipeline, Sampling(top_k=top_k, top_p=0.9))([3, 4], labels)[0]
        for top_k in (5, (5, 5, 5), (5, 5, 1))
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_smoothed_images_are_not_those_of_codes() -> None:
    pipeline = scale_pipeline()
    settings = [PipelineGenerator(pipeline, Sampling("next_scale", {"smooth": on})).settings() for on in (False, True)]
    assert "image_of" not in settings[0] and settings[1]["image_of"] == "soft"


def test_speed_stands_beside_quality_and_is_kept(common: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def watched(generate: Any, plan: LabelPlan, batch: int, **settings: Any) -> Speed:
        measured.append(batch)
        return measure_speed(generate, plan, batch, **settings)

    monkeypatch.setattr(evaluation, "measure_speed", watched)
    runs = ("a/model/next_scale", "a/model/next_scale:guidance_scale=3")
    rows, reports = run(common, runs=runs, speed_batches=(1, 4))
    assert measured == [1, 4, 1, 4]
    assert rows[0]["speed ratio at 1 / 4"] == "1.00x / 1.00x"
    for row, report in zip(rows, reports, strict=True):
        at_once = float(row["images/s at 1 / 4"].split(" / ")[0])
        assert float(row["ms at batch 1"]) == pytest.approx(1000 / at_once, rel=0.01)
        assert all(float(cell) > 0 for cell in row["images/s at 1 / 4"].split(" / "))
        assert row["peak GiB at 1 / 4"] == "- / -"
        assert [speed["batch"] for speed in report["speed"]] == [1, 4]
        assert all(speed["images_per_s"] > 0 and speed["spread"] >= 0 for speed in report["speed"])
        assert all(speed["peak_gib"] is None for speed in report["speed"])

    assert run(common, runs=runs, speed_batches=(1, 4)) == (rows, reports)
    assert run(common, runs=runs[:1])[1] == reports[:1]
    assert measured == [1, 4, 1, 4]
    folders = sorted(str(path.parent) for path in Path("comparison").glob("*/metrics.json"))
    again, _ = run({}, *folders)
    assert [row["run"] for row in again] == [f"a/model next_scale:guidance_scale={scale}" for scale in (1.0, 3.0)]
    assert [row["images/s at 1 / 4"] for row in again] == [row["images/s at 1 / 4"] for row in rows]
    assert "- speed at batch 4: images_per_s=" in Path(folders[0], "card.md").read_text()

    other, reports = run(common, runs=runs[:1], speed_batches=(4, 2))
    assert measured == [1, 4, 1, 4, 2]
    assert other[0]["images/s at 2 / 4"].split(" / ")[1] == rows[0]["images/s at 1 / 4"].split(" / ")[1]
    assert not any("ratio" in column for column in other[0])

    moved = load_report(folders[0])
    save_report(dataclasses.replace(moved, protocol={**moved.protocol, "device": "another"}), folders[0])
    run(common, runs=runs[:1], speed_batches=(4,))
    assert measured == [1, 4, 1, 4, 2, 4]


def test_reports_of_several_batch_sizes_share_a_table(common: dict[str, Any]) -> None:
    run(common, runs=("a/model/next_scale",), speed_batches=(1,))
    folder = next(Path("comparison").glob("*/metrics.json")).parent
    report = load_report(folder)
    gpu = dataclasses.replace(report, speed=(Speed(2, 12.345, 0.1, 0.5), Speed(64, 1234.5, 0.1, 20.25)))
    save_report(gpu, "gpu")
    assert load_report("gpu") == gpu and "peak_gib=20.25" in card(gpu)
    rows, _ = run({}, str(folder), "gpu")
    assert (
        rows[1]["images/s at 1 / 2 / 64"] == "- / 12.35 / 1234" and rows[1]["speed ratio at 1 / 2 / 64"] == "- / - / -"
    )
    assert rows[1]["peak GiB at 1 / 2 / 64"] == "- / 0.50 / 20.25"
    content = json.loads(Path("gpu/metrics.json").read_text())
    del content["speed"]  # as reports were written before
    Path("gpu/metrics.json").write_text(json.dumps(content))
    assert load_report("gpu").speed == ()


def test_timed_calls_make_the_images_of_the_run() -> None:
    calls: list[tuple[list[int], list]] = []

    def paint(seeds: list[int], labels: list) -> Any:
        calls.append((seeds, labels))
        return EVALUATION["paint"](seeds, labels)

    plan = LabelPlan("balanced", num_classes=3)
    speed = measure_speed(paint, plan, 2, seed=10, device=torch.device("cpu"), calls=3)
    assert speed.batch == 2 and speed.images_per_s > 0 and speed.peak_gib is None
    assert [seeds for seeds, _ in calls] == [[10, 11], [12, 13], [10, 11], [12, 13], [14, 15]]
    assert calls[-1][1] == [(1,), (2,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "name at least one model or folder to compare, or give --runs"),
        (dict(names=("a",), runs=("a/ancestral",)), "not both"),
        (dict(samplers=("ancestral",), runs=("a/ancestral",)), "not both"),
        (dict(runs=("a/ancestral",)), "--reference is needed"),
        (dict(names=("a",), speed_batches=(1,)), "--speed-batches needs --samplers or --runs"),
        (
            dict(runs=("a/ancestral",), reference="r", speed_batches=(1, 0)),
            r"speed_batches \(1, 0\); they must be >= 1",
        ),
        (dict(runs=("a/ancestral",), reference="r", speed_batches=(2, 2)), "each given once"),
        (dict(runs=("emoji-var",), reference="r"), "run 'emoji-var': write MODEL/SAMPLER or"),
        (dict(runs=("/ancestral",), reference="r"), "run '/ancestral': write MODEL/SAMPLER or"),
        (dict(runs=("runs/var/model",), reference="r"), "unknown sampler 'model'"),
        (
            dict(runs=("a/ancestral:guidance_schedule=linear",), reference="r"),
            "guidance_schedule needs guidance_scale",
        ),
    ],
)
def test_slips_show_before_the_first_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(Compare(**options), lambda rows: None)
