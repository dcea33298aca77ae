"""The commands, on real pictures and on a tiny real pipeline."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from visar.cli.compare import compare
from visar.cli.evaluate import Eval, EvalTokenizer, Stats, evaluate, evaluate_tokenizer, read_prompts, stats
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.data.images import load_image_set
from visar.data.vocabulary import Vocabulary, build_vocabulary
from visar.evaluate.extractors import EXTRACTORS, load_extractor
from visar.evaluate.images import UINT8_RULES, ArrayImages
from visar.evaluate.labels import LabelTable
from visar.evaluate.options import Compare
from visar.evaluate.pipeline import PipelineGenerator, Sampling
from visar.evaluate.references import make_statistics
from visar.evaluate.report import card, load_report
from visar.evaluate.run import label_plan
from visar.generators.raster import RasterGPT
from visar.pipelines.image import ImagePipeline
from visar.tokenizers.vq import VQTokenizer

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"
COMMANDS = (Eval, Stats, EvalTokenizer, Compare)
FIXTURE = runpy.run_path(str(Path(__file__).parent / "fixtures" / "evaluation.py"))
TINY = FIXTURE["TINY"]


class Tiniest(FIXTURE["TinyExtractor"]):
    """Another network whose layers have the same names."""

    def forward(self, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(255 - image_BCHW.flip(-1))


@pytest.fixture
def tables() -> list[list[tuple[str, ...]]]:
    return []


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRACTORS, "tiny", TINY)
    monkeypatch.setitem(EXTRACTORS, "tiniest", dataclasses.replace(TINY, network=Tiniest, distance="FD-tiniest"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 12 real pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    with np.load(SAMPLE) as file:
        for i, image in enumerate(file["images"][:12]):
            Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def tiny_pipeline(
    num_classes: int = 4,
    attributes: tuple[int, ...] = (),
    word_vocab_size: int = 0,
    vocabulary: Vocabulary | None = None,
) -> ImagePipeline:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        image_size=16,
        base_channels=32,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=32,
        codebook_size=32,
        codebook_dim=4,
    )
    generator = RasterGPT(
        vocab_size=32,
        grid=(4, 4),
        width=32,
        num_layers=1,
        num_heads=2,
        hidden_width=64,
        num_classes=num_classes,
        attributes=attributes,
        word_vocab_size=word_vocab_size,
        num_words=0 if vocabulary is None else vocabulary.num_words,
    )
    names = None if vocabulary is None else vocabulary.to_dict()
    pipeline = ImagePipeline(tokenizer.eval(), generator.eval(), names, {"guidance_scale": 1.5, "top_k": 8})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_stats_then_eval_of_pictures(tmp_path: Path, pictures: Path, tables: list) -> None:
    stats(Stats(str(pictures), tmp_path / "real.npz", keep_features=True, device="cpu"), tables.append)
    assert tables[0][0] == ("layer", "images", "features", "null constant") and tables[0][1][:3] == (
        "320",
        "12",
        "320",
    )
    with pytest.warns(UserWarning, match="singular"):
        report = evaluate(
            Eval(
                str(SAMPLE),
                reference=str(tmp_path / "real.npz"),
                out=tmp_path / "out",
                train=str(pictures),
                device="cpu",
            ),
            {},
            tables.append,
        )
    assert report is not None and report.metrics.distance_name == "FD-Lite0"
    assert tables[1][0][1] == "FD-Lite0" and tables[1][1][0] == "sample_64.npz"
    assert report.copies is not None and report.copies["copy_rate"] == pytest.approx(12 / 64, abs=0.05)
    assert report.images_per_second is None and report.protocol["num_samples"] == 64
    card = (tmp_path / "out" / "card.md").read_text()
    assert "FD-Lite0 is not FID" in card and report.protocol["reference_sha256"] in card
    with pytest.warns(UserWarning, match="singular"):
        again = evaluate(
            Eval(str(pictures), reference=str(tmp_path / "real.npz"), out=tmp_path / "again", device="cpu"),
            {},
            tables.append,
        )
    assert again is not None and abs(again.metrics.distance) < 1e-3 and again.metrics.precision == 1.0


def test_eval_of_a_saved_pipeline_and_compare(tmp_path: Path, pictures: Path, tables: list) -> None:
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    common: dict[str, Any] = {"reference": str(pictures), "num_samples": 10, "batch_size": 5, "device": "cpu"}
    common["extractor"] = "tiny"
    report = evaluate(Eval(str(model), out=tmp_path / "a", **common), {}, tables.append)
    assert report is not None
    protocol = report.protocol
    assert protocol["guidance"]["scale"] == 1.5 and protocol["top_k"] == 8 and protocol["temperature"] == 1.0
    assert protocol["dtype"] == "float32" and protocol["labels"].startswith("balanced: image i has class i mod 4")
    assert report.cost["forward_passes_per_image"] == {"generator": 16.0}
    assert report.images_per_second is not None and report.images_per_second > 0
    parts = sorted(path.name for path in (tmp_path / "a" / "parts").iterdir())
    assert parts == ["part-00000000-00000005.npz", "part-00000005-00000010.npz"]
    strong = Eval(str(model), out=tmp_path / "b", guidance_scale=3.0, temperature=2.0, **common)
    warm = evaluate(strong, {}, tables.append)
    assert warm is not None and warm.images_sha256 != report.images_sha256
    with pytest.raises(ValueError, match=r"another run: guidance .*3.0"):
        evaluate(Eval(str(model), out=tmp_path / "a", guidance_scale=3.0, **common), {}, tables.append)
    compare(Compare((str(tmp_path / "a"), str(tmp_path / "b")), out=tmp_path / "c"), tables.append)
    assert len(tables[-1]) == 3 and (tmp_path / "c" / "pareto.png").is_file()
    compare(Compare((str(model),), out=tmp_path / "d", samplers=("ancestral",), **common), tables.append)
    assert tables[-1][1][0] == "ancestral"
    rows = json.loads((tmp_path / "d" / "compare.json").read_text())
    assert rows[0]["images_sha256"] == report.images_sha256
    with pytest.raises(ValueError, match="--reference"):
        compare(Compare((str(model),), samplers=("ancestral",)), tables.append)
    with pytest.raises(ValueError, match="--guidance-schedule linear needs"):
        evaluate(Eval(str(model), guidance_schedule="linear", out=tmp_path / "e", **common), {}, tables.append)


def test_pipeline_generator_conditions_on_what_the_plan_says() -> None:
    generate = PipelineGenerator(tiny_pipeline(4, (3,)), Sampling(guidance=Guidance(2.0), top_k=4))
    assert generate.label_columns == 2 and generate.num_classes == 4
    labels = [(1, 2), (3, 0)]
    images, statistics = generate([5, 6], labels)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 16, 16)
    assert statistics.forward_passes == {"generator": 16}
    again, _ = generate([6], [(3, 0)])
    assert torch.equal(again[0], images[1])
    other, _ = generate([6], [(0, 1)])
    assert not torch.equal(other[0], images[1])
    settings = generate.settings()
    assert settings["guidance"]["scale"] == 2.0 and settings["top_k"] == 4 and settings["uint8_rule"] == "round"
    with pytest.raises(ValueError, match="choose round, truncate"):
        PipelineGenerator(tiny_pipeline(), Sampling(), "ceil")


def test_labels_follow_the_reference_that_holds_them(tmp_path: Path, tables: list) -> None:
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    table = LabelTable.of([(0,)] * 5 + [(2,)] * 3)
    with np.load(SAMPLE) as file:
        images = ArrayImages(file["images"][:12])
    make_statistics(images, load_extractor("tiny"), tmp_path / "labelled.npz", labels=table)
    options = Eval(
        str(model),
        reference=str(tmp_path / "labelled.npz"),
        out=tmp_path / "out",
        num_samples=16,
        batch_size=8,
        device="cpu",
        extractor="tiny",
    )
    report = evaluate(options, {}, tables.append)
    assert report is not None and report.protocol["labels"].startswith("histogram: labels of the 8 training images")
    assert report.metrics.kid is None  # the file holds no features


def test_labels_of_a_reference_of_other_classes_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    named = PipelineGenerator(tiny_pipeline(2, vocabulary=Vocabulary({"class": ("cat", "dog")})), Sampling())
    table = named.training_table(LabelTable.of([(0,), (0,), (1,)], ("DOG", "cat")))
    assert table == LabelTable(((0,), (1,)), (1, 2)) and not caplog.records
    assert named.training_table(LabelTable.of([(0,), (1,)], ("bird", "cat"))) is None
    assert "1 classes of the reference are none of the model's: bird" in caplog.records[-1].getMessage()
    numbered = PipelineGenerator(tiny_pipeline(4), Sampling())
    assert numbered.training_table(LabelTable.of([(0,), (1,)], ("cat", "dog"))) is None
    assert numbered.training_table(LabelTable.of([(0,), (2,)])) == LabelTable(((0,), (2,)), (1, 1))
    assert label_plan("auto", num_classes=4, table=None).policy == "balanced"


def test_histogram_labels_are_rows_of_the_models_vocabulary() -> None:
    captions = ["red cat", "blue cat", "red dog", "red cat"]
    labels = np.array([[0, 1], [0, 0], [1, 1], [0, 1]])
    attributes = {"class": ("cat", "dog"), "colour": ("blue", "red")}
    vocabulary = build_vocabulary(attributes, labels, captions, np.arange(4))
    pipeline = tiny_pipeline(2, (2,), len(vocabulary.words), vocabulary)
    generate = PipelineGenerator(pipeline, Sampling())
    table = generate.training_table(LabelTable(((0,),), (1,)))
    assert table is not None and table.total == 4 and max(table.counts) == 2
    plan = label_plan("auto", num_classes=generate.num_classes, table=table)
    assert plan.policy == "histogram"
    rows = plan.labels(range(4), range(4))
    assert sorted(rows) == sorted(tuple(row) for row in vocabulary.rows.tolist())
    images, _ = generate([0, 1], rows[:2])
    words = vocabulary.encode_texts([vocabulary.texts[row[0]] for row in rows[:2]])
    condition = Condition(labels_BA=torch.tensor([row[1:] for row in rows[:2]]), words_BT=words)
    expected = pipeline(condition=condition, seeds=[0, 1], output_type="pt").images
    assert torch.equal(images, UINT8_RULES["round"](expected))
    by_class, _ = generate([3, 4], [(0,), (1,)])
    assert by_class.shape == (2, 3, 16, 16)
    words_only = PipelineGenerator(tiny_pipeline(0, (), len(vocabulary.words), vocabulary), Sampling())
    assert words_only.num_classes == 0
    prompted, _ = words_only([5], ["red dog"])
    row = next(row for row in vocabulary.rows.tolist() if vocabulary.texts[row[0]] == "red dog")
    assert torch.equal(words_only([5], [tuple(row)])[0], prompted)
    assert words_only([5], [None])[0].shape == (1, 3, 16, 16)


def test_tokenizer_is_evaluated(tmp_path: Path, pictures: Path, tables: list) -> None:
    tiny_pipeline().tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = EvalTokenizer(str(tmp_path / "tokenizer"), str(pictures), tmp_path / "out", device="cpu")
    with pytest.warns(UserWarning, match="12 reconstructions"):
        evaluate_tokenizer(options, tables.append)
    assert tables[0][0] == ("images", "PSNR", "SSIM", "rFD-Lite0", "codes used", "perplexity")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"] == "reconstruction"


def test_prompts_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n two dogs \n")
    assert read_prompts(tmp_path / "p.txt") == ("a cat", "two dogs")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="none.txt"):
        read_prompts(tmp_path / "none.txt")


def test_options_are_read_from_flags_and_their_names_are_frozen() -> None:
    flags = ["emoji", "--reference", "r.npz", "--labels", "random", "--keep-images", "npz", "--num-samples", "50000"]
    options = tyro.cli(Eval, args=flags)
    assert (options.model, options.labels, options.keep_images, options.num_samples) == (
        "emoji",
        "random",
        "npz",
        50000,
    )
    assert tyro.cli(Compare, args=["a", "b", "--samplers", "ancestral", "x:y=1"]).samplers == ("ancestral", "x:y=1")
    flags = ["--runs", "a/ancestral", "b/next_scale:top_k=3", "--speed-batches", "1", "8", "--reference", "r.npz"]
    options = tyro.cli(Compare, args=flags)
    assert (options.names, options.runs, options.speed_batches) == (
        (),
        ("a/ancestral", "b/next_scale:top_k=3"),
        (1, 8),
    )
    score = "reference extractor extractor_weights layer spatial resize image_size train held_out second_extractor "
    score += "second_reference"
    run = "out num_samples batch_size seed labels captions keep_images"
    names = {kind.__name__: {field.name for field in dataclasses.fields(kind)} for kind in COMMANDS}
    no_flags = {"metrics", "extractor_dtype"}
    assert {kind: found - no_flags for kind, found in names.items()} == {
        "Eval": {
            *f"model prompts sampler guidance_scale guidance_schedule temperature top_k top_p {score} {run}".split(),
            *("uint8_rule", "device", "dtype", "quantize"),
        },
        "Stats": {
            *"source out protocol extractor extractor_weights layer spatial resize image_size keep_features".split(),
            *("batch_size", "device"),
        },
        "EvalTokenizer": set(
            "tokenizer images out extractor extractor_weights resize image_size batch_size device dtype".split()
        ),
        "Compare": set(f"names samplers runs speed_batches guidance_scale device dtype {score} {run}".split()),
    }
    for flag in ("--extractor-dtype", "--metrics"):
        with pytest.raises(SystemExit):
            tyro.cli(Eval, args=["a", "--reference", "b", flag, "float64"])


# ------------------------------------------------------------------------------------------------ a second extractor
def test_a_second_extractor_scores_the_same_images(tmp_path: Path, pictures: Path, tables: list) -> None:
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    common: dict[str, Any] = {"reference": str(pictures), "num_samples": 12, "batch_size": 6, "device": "cpu"}
    one = evaluate(Eval(str(model), out=tmp_path / "one", extractor="tiny", **common), {}, tables.append)
    other = evaluate(Eval(str(model), out=tmp_path / "other", extractor="tiniest", **common), {}, tables.append)
    assert one is not None and other is not None and one.second is None
    both: dict[str, Any] = {**common, "extractor": "tiny", "second_extractor": "tiniest"}
    samplers = ("ancestral", "ancestral:top_k=1")
    compare(Compare((str(model),), out=tmp_path / "c", samplers=samplers, **both), tables.append)
    header, *rows = tables[-1]
    by_both = [name for name in header if name.startswith("FD-tin") or name.endswith("tiniest") or name == "ranks"]
    assert by_both == [
        *("FD-tiny", "FD-tiny ratio", "FD-tiniest", "FD-tiniest ratio", "ranks"),
        *("KID by tiniest", "precision by tiniest", "recall by tiniest"),
    ]
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert found[0]["metrics"] == json.loads(json.dumps(dataclasses.asdict(one.metrics)))
    assert found[0]["second"] == json.loads(json.dumps(dataclasses.asdict(other.metrics)))
    assert found[0]["images_sha256"] == one.images_sha256
    assert found[0]["protocol"]["second_extractor"] == "tiniest"
    ranks = [row[header.index("ranks")].split(" / ") for row in rows]
    for side, key in enumerate(("metrics", "second")):
        first, second = (report[key]["distance"] for report in found)
        assert [pair[side] for pair in ranks] == (["1", "2"] if first < second else ["2", "1"])
    run = load_report(next(path for path in (tmp_path / "c").iterdir() if path.is_dir()))
    assert run.second is not None and "FD-tiniest" in card(run)
    with pytest.raises(ValueError, match="another run: second_extractor"):
        evaluate(Eval(str(model), out=tmp_path / "one", **both), {}, tables.append)
    images = evaluate(Eval(str(pictures), out=tmp_path / "images", **both), {}, tables.append)
    assert images is not None and images.second is not None and abs(images.second.distance) < 1e-3
    with pytest.raises(ValueError, match="needs a second_extractor"):
        evaluate(Eval(str(model), out=tmp_path / "x", second_reference="r.npz", **common), {}, tables.append)


# ------------------------------------------------------------------------------------------------- unseen captions
def test_captions_of_another_split_are_asked_for(
    tmp_path: Path, pictures: Path, tables: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = np.arange(40)
    with np.load(SAMPLE) as file:
        arrays = {"images": file["images"][:40], "labels": number % 2, "classes": np.array(["cat", "dog"])}
    captions = np.array([f"{'cat dog'.split()[i % 2]} {i // 2}" for i in number])
    np.savez(tmp_path / "set.npz", captions=captions, **arrays)
    found = load_image_set(tmp_path / "set.npz")
    unseen = {captions[i] for i in found.indices("val")}
    assert unseen and not unseen & set(found.vocabulary.texts)
    pipeline = tiny_pipeline(2, (), len(found.vocabulary.words), found.vocabulary)

    generate = PipelineGenerator(pipeline, Sampling())
    before = generate.settings()
    table = generate.ask_for(f"{tmp_path / 'set.npz'}@val")
    assert {generate.texts[row[0]] for row in table.rows} == unseen
    assert generate.settings().keys() - before.keys() == {"captions", "captions_sha256"}
    row = table.rows[0]
    text, label = generate.texts[row[0]], row[1]
    assert label == ("cat", "dog").index(text.split()[0])
    condition = Condition(labels_BA=torch.tensor([[label]]), words_BT=found.vocabulary.encode_texts([text]))
    expected = pipeline(condition=condition, seeds=[4], output_type="pt").images
    assert torch.equal(generate([4], [row])[0], UINT8_RULES["round"](expected))

    pipeline.save_pretrained(tmp_path / "model")
    options = Eval(
        str(tmp_path / "model"),
        reference=str(pictures),
        out=tmp_path / "out",
        captions=f"{tmp_path / 'set.npz'}@val",
        num_samples=8,
        extractor="tiny",
        device="cpu",
    )
    report = evaluate(options, {}, tables.append)
    assert report is not None and f"images of {tmp_path / 'set.npz'}@val" in report.protocol["labels"]
    for wrong, message in (
        ("set.npz", "write PLACE@train or PLACE@val or PLACE@test"),
        (f"{tmp_path / 'other.npz'}@val", "do not have the same label columns"),
    ):
        np.savez(tmp_path / "other.npz", **{**arrays, "classes": np.array(["cat", "cow"])})
        with pytest.raises(ValueError, match=message):
            generate.ask_for(wrong)
    with pytest.raises(ValueError, match="captions bring their own"):
        dataclasses.replace(options, labels="balanced")
    # A model may read fewer columns than the set has.
    labels = torch.stack([found.labels_NA[:, 0], torch.arange(40) % 3], dim=1)
    names = dataclasses.replace(
        found.vocabulary, attributes={"class": ("cat", "dog"), "style": ("a", "b", "c")}, rows=np.zeros((0, 3))
    )
    wider = dataclasses.replace(found, labels_NA=labels, vocabulary=names)
    monkeypatch.setattr("visar.evaluate.pipeline.image_set", lambda *_: wider)
    assert generate.ask_for("set@val") == table
