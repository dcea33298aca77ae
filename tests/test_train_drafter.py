"""Training of drafters: it raises acceptance, goes on exactly, and what it writes loads for its target alone."""

import json
import runpy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visar.bench.acceptance import (
    Acceptance,
    acceptance,
    background_tokens,
    default_samplers,
    markdown,
    measure_acceptance,
    probs_statistics,
)
from visar.checkpoints import hub
from visar.cli.main import main
from visar.core.guidance import Guidance
from visar.evaluate.extractors import EXTRACTORS
from visar.pipelines.drafters import load_drafter
from visar.pipelines.loading import load
from visar.samplers.drafters.eagle import FeatureDrafter
from visar.samplers.drafters.heads import SpatialHeads
from visar.samplers.drafters.model import ModelDrafter
from visar.samplers.drafters.ngram import NgramDrafter
from visar.samplers.index import find_sampler
from visar.train.drafter import train_drafter
from visar.train.options import RunOptions, TrainDrafter
from visar.train.recipes import RECIPES

OPTIONS = """
    data target kind tokens variants augment num_heads hidden_width num_right law_weight input_noise offset_decay
    label_dropout weight_decay guidance_scale save_dtype
"""
ACCEPTANCE_OPTIONS = """
    model out samplers drafters batch_sizes calls seed background guidance_scale temperature top_k top_p device dtype
"""
FIXTURES = Path(__file__).parent / "fixtures"
TRAINING = SimpleNamespace(**runpy.run_path(str(FIXTURES / "training.py")))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pictures, a tokenizer's run and two generators' runs."""
    root = tmp_path_factory.mktemp("drafters")
    data = TRAINING.write_images(root / "images.npz")
    tokenizer = TRAINING.train_tokenizer(TRAINING.tokenizer_options(data, root / "tokenizer")).out / "model"
    for seed, name in enumerate(("generator", "another")):
        options = TRAINING.generator_options(data, tokenizer, root / name, seed=seed)
        TRAINING.train_generator(options)
    return root


def options(place: Path, out: Path, **changes: Any) -> TrainDrafter:
    made: dict[str, Any] = dict(
        data=place / "images.npz",
        target=str(place / "generator" / "model"),
        out=out,
        steps=40,
        batch_size=8,
        learning_rate=1e-2,
        variants=2,
        augment="drawings",
        **TRAINING._COMMON,
    )
    return TrainDrafter(**{**made, **changes})


@pytest.fixture(scope="module")
def trained(place) -> dict[str, Path]:
    """Folders of trained drafters by kind."""
    return {kind: train_drafter(options(place, place / kind, kind=kind)).out / "model" for kind in ("eagle", "heads")}


def validations(out: Path) -> list[dict[str, float]]:
    return [line for line in TRAINING.curves(out) if "validation/acceptance" in line]


@pytest.mark.parametrize("kind", ["eagle", "heads"])
def test_training_raises_acceptance(place, trained, kind):
    found = validations(place / kind)
    assert TRAINING.losses(place / kind)[-1] < TRAINING.losses(place / kind)[0]
    assert all(0 <= line["validation/top1"] <= 1 and 0 < line["validation/acceptance"] <= 1 for line in found)
    assert found[-1]["validation/acceptance"] > found[0]["validation/acceptance"]
    drafter = load_drafter(trained[kind], load(place / "generator" / "model", device="cpu").generator)
    assert isinstance(drafter, FeatureDrafter if kind == "eagle" else SpatialHeads)
    assert drafter.config["target"] == str(place / "generator" / "model") and drafter.config["target_digest"]
    weights = load_file(trained[kind] / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["eagle", "heads"])
def test_a_stopped_run_goes_on_exactly(place, tmp_path, kind):
    whole = options(place, tmp_path / "whole", kind=kind, steps=6, tokens=tmp_path / "tokens.safetensors")
    train_drafter(whole)
    stopped = train_drafter(
        options(place, tmp_path / "parts", kind=kind, steps=6, tokens=whole.tokens, max_minutes=1e-6)
    )
    assert not stopped.finished and stopped.steps < 6
    train_drafter(options(place, tmp_path / "parts", kind=kind, steps=6, tokens=whole.tokens))
    assert TRAINING.curves(tmp_path / "parts") == TRAINING.curves(tmp_path / "whole")
    name = "model/diffusion_pytorch_model.safetensors"
    one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_names_of_drafters(place, trained, tmp_path, monkeypatch):
    target = load(place / "generator" / "model", device="cpu").generator
    assert isinstance(load_drafter("ngram", target), NgramDrafter)
    assert isinstance(load_drafter(place / "generator" / "model", target), ModelDrafter)
    another = load(place / "another" / "model", device="cpu").generator
    with pytest.raises(ValueError, match=r"was trained for .*generator/model"):
        load_drafter(trained["eagle"], another)
    assert load_drafter(place / "eagle", target).config == load_drafter(trained["eagle"], target).config
    with pytest.raises(ValueError, match="unknown drafter 'eagel'; allowed: ngram, eagle, heads"):
        load_drafter("eagel", target)
    with pytest.raises(ValueError, match="vocabulary and grid"):
        load_drafter("emoji-raster", target)
    with pytest.raises(ValueError, match="VQTokenizer is no class that may be loaded here"):
        load_drafter(place / "tokenizer" / "model", target)
    # Embedded drafters are found by kind and target.
    embedded = tmp_path / "embedded"
    embedded.mkdir()
    (embedded / "tiny-eagle").symlink_to(trained["eagle"])
    (trained["eagle"] / "about.json").write_text(json.dumps({"kind": "drafter"}))
    monkeypatch.setattr(hub, "EMBEDDED_FOLDER", embedded)
    assert hub.embedded_names() == ["tiny-eagle"]
    for name in ("eagle", "tiny-eagle"):
        assert isinstance(load_drafter(name, target), FeatureDrafter)
    with pytest.raises(ValueError, match="no embedded heads drafter for this generator .*tiny-eagle for "):
        load_drafter("heads", target)
    with pytest.raises(ValueError, match="no embedded eagle drafter"):
        load_drafter("eagle", another)
    with pytest.raises(ValueError, match="tiny-eagle is a drafter"):
        load("tiny-eagle", device="cpu")


def test_sampling_with_a_drafter_by_name(place, trained, tmp_path, capsys):
    pipeline = load(place / "generator" / "model", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    named = dict(drafter=str(trained["heads"]), branches="2,1")
    one = pipeline(num_images=2, seed=3, sampler="static_tree", sampler_options=named)
    drafter = load_drafter(trained["heads"], pipeline.generator)
    other = pipeline(
        num_images=2, seed=3, sampler="static_tree", sampler_options=dict(drafter=drafter, branches=(2, 1))
    )
    assert torch.equal(one.tokens, other.tokens) and one.statistics.forward_passes["drafter"] > 0
    line = f"sample {place / 'generator' / 'model'} --seed 3 --out {tmp_path / 'a.png'} --sampler static_tree"
    assert main([*line.split(), "--sampler.drafter", str(trained["heads"]), "--sampler.branches", "2,1"]) == 0
    assert " passes + " in capsys.readouterr().out
    assert main([*line.split(), "--sampler.drafter", "eagel"]) == 1
    assert "unknown drafter 'eagel'" in capsys.readouterr().err


def test_eval_compares_settings_of_one_model(place, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXTRACTORS, "tiny", runpy.run_path(str(FIXTURES / "evaluation.py"))["TINY"])
    common = ["--extractor", "tiny", "--device", "cpu"]
    reference = str(tmp_path / "real.npz")
    assert main(["stats", str(place / "images.npz"), "--out", reference, *common]) == 0
    samplers = ["ancestral", f"static_tree:branches=2,1,drafter={trained['heads']}", "jacobi:window=4"]
    line = ["eval", "--compare", str(place / "generator" / "model"), "--reference", reference, "--num-samples", "4"]
    capsys.readouterr()
    assert main([*line, "--samplers", *samplers, "--out", str(tmp_path / "out"), *common]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == samplers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target="emoji-rastr"), "unknown model 'emoji-rastr'"),
        (dict(num_right=0), "num_right 0"),
        (dict(target="emoji-raster", tokens=None), "attribute 'group'"),
        (dict(steps=0), "steps 0"),
    ],
)
def test_bad_options(place, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_drafter(options(place, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_option_names_are_frozen():
    """A name here is part of commands that people have written down: add, do not rename."""
    own = [field.name for field in fields(TrainDrafter)][len(fields(RunOptions)) :]
    assert own == OPTIONS.split()
    assert {field.name for field in fields(Acceptance)} == set(ACCEPTANCE_OPTIONS.split())


def test_recipes(capsys):
    drafters = {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, TrainDrafter)}
    assert {recipe.target for recipe in drafters.values()} == {"emoji-raster", "emoji-raster-4096"}
    for name, recipe in drafters.items():
        assert name == f"{recipe.target}-{recipe.kind}" == recipe.out.name
        assert main(["train", "drafter", "--recipe", name, "--help"]) == 0
        assert f"(default: {recipe.out})" in " ".join(capsys.readouterr().out.split())


# -------------------------------------------------------------------------------------------------------- acceptance
def test_background_tokens():
    image = torch.full((2, 3, 8, 8), 1.0)
    image[0, 2, 0, 7] = 245 / 127.5 - 1
    image[1, :, 4:, :4] = -1.0
    assert background_tokens(image, (2, 2)).tolist() == [[True, False, True, True], [True, True, False, True]]
    assert background_tokens(image, (2, 2), "black").tolist() == [[False] * 4, [False, False, True, False]]
    with pytest.raises(ValueError, match="background 'grey'"):
        background_tokens(image, (2, 2), "grey")


def test_probs_statistics(place):
    pipeline = load(place / "generator" / "model", device="cpu")
    seeds = [0, 1, 2]
    condition, _ = pipeline.prepare_condition(seeds)
    settings = pipeline.sampling_settings(guidance_scale=2.0)
    tokens = pipeline.sample_tokens(condition, seeds, **settings).tokens
    top, entropy = probs_statistics(pipeline.generator, tokens, condition, Guidance(2.0), (1.0, 0, 1.0), rows=2)
    state = pipeline.generator.start(condition, Guidance(2.0), ragged=True, window=5)
    probs = torch.softmax(pipeline.generator.verify(state, tokens[:, :5]), -1)
    torch.testing.assert_close(top[:, :6], probs.amax(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy[:, :6], -(probs * probs.log()).sum(-1), atol=1e-4, rtol=1e-4)
    one, _ = probs_statistics(pipeline.generator, tokens, condition, Guidance(), (1.0, 1, 1.0))
    torch.testing.assert_close(one, torch.ones(3, 16))


def test_acceptance_table(place, trained, tmp_path):
    drafters = ("ngram", str(trained["eagle"]), str(trained["heads"]))
    seen: list[tuple] = []
    rows = acceptance(
        Acceptance(
            str(place / "generator" / "model"),
            out=tmp_path / "out",
            drafters=drafters,
            batch_sizes=(2,),
            calls=1,
            device="cpu",
        ),
        seen.extend,
    )
    assert [row.sampler for row in rows] == ["ancestral", *default_samplers(drafters)]
    written = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert len(written["rows"]) == len(rows) == len(seen) - 1 and written["dtype"] == "float32"
    assert (tmp_path / "out" / "acceptance.md").read_text() == markdown(rows)
    first, *others = rows
    assert (first.passes, first.tokens_per_pass, first.speedup, first.acceptance) == (16.0, 1.0, 1.0, None)
    for row in others:
        assert row.images == row.batch == 2 and row.seconds > 0 and row.tokens_per_pass >= 1.0
        assert 0 <= row.acceptance <= 1 and 0 < row.top1 <= 1 and row.entropy >= 0
        assert row.exact == find_sampler(row.sampler.partition(":")[0]).exact
        assert (row.drafter_passes > 0) == ("model" in row.sampler)


def test_acceptance_checks_first(place):
    pipeline = load(place / "generator" / "model", device="cpu")
    for samplers, settings, message in (
        (("jacobi:window=wide",), {}, "a whole number"),
        (("jacobi",), {"batch_sizes": (0,)}, "batch_sizes"),
        (("jacobi",), {"calls": 0}, "calls 0"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_acceptance(pipeline, samplers, **settings)
    assert main(["acceptance", "emoji-rastr"]) == 1


@pytest.mark.gpu
def test_acceptance_captured(place, trained, tmp_path):
    found = acceptance(
        Acceptance(
            str(place / "generator" / "model"),
            out=tmp_path,
            drafters=("ngram", str(trained["eagle"]), str(trained["heads"])),
            batch_sizes=(1, 4),
            calls=2,
            device="cuda",
        ),
        lambda rows: None,
    )
    assert all(row.tokens_per_pass >= 1.0 and row.seconds > 0 for row in found)
