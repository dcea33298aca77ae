"""Every program of examples/ does what it says, at toy size."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.pipelines.loading import load

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
PROGRAMS = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
TINY = runpy.run_path(str(FIXTURES / "tiny.py"))
FAULTS = runpy.run_path(str(FIXTURES / "faults.py"))


def program(name: str) -> dict:
    return runpy.run_path(str(PROGRAMS[name]))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with a tiny pipeline per family and a folder of images of three classes."""
    monkeypatch.chdir(tmp_path)
    for kind, made in (("raster", "tiny_pipeline"), ("scales", "pyramid_pipeline")):
        pipeline = FAULTS[made]()
        for parameter in pipeline.generator.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        pipeline.save_pretrained(tmp_path / kind)
    draws = np.random.default_rng(0)
    for number, name in enumerate(("ants", "bees", "cats")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            image = np.clip(draws.integers(0, 40, (8, 8, 3)) + 80 * number, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path


def test_every_program_is_listed_and_tested():
    listed = (ROOT / "examples" / "README.md").read_text()
    tested = Path(__file__).read_text()
    assert PROGRAMS and all(f"`{name}.py`" in listed and f'program("{name}")' in tested for name in PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        program(name)["main"](["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


def test_sample(place, capsys):
    program("sample")["main"](["--model", "raster", "--num-images", "3", "--class-label", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    assert sorted(path.name for path in (place / "samples").iterdir()) == ["7.png", "8.png", "9.png"]
    assert "seed 9: class 2" in said and "the last one alone is the same: True" in said
    passes = [int(line.split(": ", 1)[1].split(":")[1].strip(" }")) for line in said.splitlines() if "passes" in line]
    assert passes[0] == 16 and 1 < passes[1] <= 16


@pytest.mark.parametrize("rank", [0, 2])
def test_fine_tune(place, rank, capsys):
    words = ["photos", "--model", "raster", "--steps", "60", "--batch-size", "8", "--learning-rate", "0.02"]
    if rank:
        pytest.importorskip("peft", reason="the extra lora is not installed")
        words += ["--lora", str(rank)]
    losses = program("fine_tune")["main"]([*words, "--device", "cpu"])
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5]), losses
    assert "starts anew: cls_embedding" in capsys.readouterr().out
    before, after = load("raster", device="cpu"), load("fine_tuned/model", device="cpu")
    assert after.vocabulary.attributes["class"] == ("ants", "bees", "cats")
    assert after("bees", seed=0).images[0].size == (8, 8)
    old, new = before.generator.state_dict(), after.generator.state_dict()
    moved = {key for key in old if old[key].shape == new[key].shape and not torch.equal(old[key], new[key])}
    blocks = {
        key for key in moved if key.startswith("layers.") and key.rsplit(".", 2)[1] in ("wqkv", "wo", "w1", "w2", "w3")
    }
    assert blocks
    if rank:
        # Adapters of low rank, and nothing else but the classes.
        assert moved == blocks
        for key in blocks:
            assert torch.linalg.matrix_rank((new[key] - old[key]).double(), rtol=1e-4) <= rank, key
        assert list((place / "fine_tuned" / "adapter").glob("adapter_model.*"))
    else:
        assert moved > blocks


def test_distil(place, capsys):
    words = "--teacher scales --num-pairs 64 --pair-batch 16 --steps 60 --batch-size 16 --flow-steps 3 --device cpu"
    agreement = program("distil")["main"](words.split())
    said = capsys.readouterr().out
    assert "passes {'generator': 3} and {'generator': 1}" in said
    assert agreement > 2 / 16  # codes of the teacher: far more than by chance, 1 in 16
    with Image.open(place / "distilled" / "teacher_and_student.png") as sheet:
        assert sheet.size == (2 + 8 * 10, 2 + 2 * 10)


def test_imagenet_fid(place, parity, monkeypatch, capsys):
    from visar.checkpoints import hub
    from visar.evaluate.extractors import EXTRACTORS

    tests = runpy.run_path(str(Path(__file__).parent / "test_evaluate_reproduce.py"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    monkeypatch.setitem(EXTRACTORS, "tiny", runpy.run_path(str(FIXTURES / "evaluation.py"))["TINY"])
    entry = hub.official()["var-d16"]
    tests["keep"](place / "cache", entry.repository, entry.file, parity("var").checkpoint())
    tests["keep"](place / "cache", entry.tokenizer_repository, entry.tokenizer_file, parity("var_vqvae").checkpoint())
    np.savez("ref.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    words = "var-d16 --reference ref.npz --extractor tiny --num-samples 6 --batch-size 3 --device cpu"
    program("imagenet_fid")["main"](words.split())
    said = capsys.readouterr().out
    assert "deviation: 6 images instead of 50,000" in said and "FD-tiny" in said
    assert (place / "imagenet_fid" / "card.md").is_file()


@torch.no_grad()
def test_own_sampler(place, capsys):
    own = program("own_sampler")
    own["main"](["--model", "scales", "--device", "cpu", "--num-images", "2"])
    assert sorted(path.name for path in (place / "min_p").iterdir()) == ["0.png", "1.png"]
    # It has the distribution that it says: every sequence of a tiny model, guided, batch above 1.
    model, guidance, share = TINY["tabular"](3, sharpness=0.5), Guidance(2.0), 0.15
    condition = TINY["many"](1, 4000)
    tokens_BN = own["sample_min_p"](
        model, condition, noise=Noise(list(range(4000))), guidance=guidance, share=share
    ).tokens
    expected = joint(model, own["min_p"], guidance, share)
    counts = torch.bincount((tokens_BN * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    assert not counts[expected == 0].any() and 40 < (expected > 0).sum() < 81
    likely = expected > 0
    statistic = ((counts - 4000 * expected)[likely] ** 2 / (4000 * expected[likely])).sum()
    assert statistic < 1.6 * likely.sum() + 20, statistic
    # The same seed is the same image alone.
    alone = own["sample_min_p"](model, TINY["many"](1, 1), noise=Noise([7]), guidance=guidance, share=share).tokens
    assert torch.equal(alone, tokens_BN[7:8])
    with pytest.raises(ValueError, match=r"share 0.0; it must be in \(0, 1\]"):
        own["sample_min_p"](model, condition, noise=Noise([0]), share=0.0)


def joint(model, rule, guidance: Guidance, share: float) -> torch.Tensor:
    """Probabilities of all sequences of four codes of three, by the rule."""
    sequences = torch.cartesian_prod(*[torch.arange(3)] * 4)
    condition = Condition(labels_BA=torch.ones(81, 1, dtype=torch.int64))
    state, total = model.start(condition, guidance), torch.ones(81, dtype=torch.float64)
    for n in range(4):
        probs_BV = rule(model.predict(state)[:, 0], share).double().softmax(-1)
        total *= probs_BV.gather(1, sequences[:, n : n + 1])[:, 0]
        model.append(state, sequences[:, n : n + 1])
    return total
