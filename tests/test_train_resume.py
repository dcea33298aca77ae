"""A run that is killed goes on to the same numbers; several processes compute what one computes."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from visar.pipelines.components import load_tokenizer
from visar.pipelines.loading import load
from visar.train.generator import train_generator
from visar.train.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "fixtures" / "training.py"
TINY = SimpleNamespace(**runpy.run_path(str(PROGRAM)))
curves, losses = TINY.curves, TINY.losses
tokenizer_options, generator_options = TINY.tokenizer_options, TINY.generator_options
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return TINY.write_images(tmp_path_factory.mktemp("data") / "bars.npz")


@pytest.fixture(scope="module")
def tokenizer_run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tokenizer"
    assert train_tokenizer(tokenizer_options(data, out)).finished
    return out


@pytest.fixture(scope="module")
def generator_run(data, tokenizer_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "generator"
    assert train_generator(generator_options(data, tokenizer_run / "model", out)).finished
    return out


def kill_at(step: int, kind: str, out: Path, **changes: str) -> None:
    """Starts a run in another process and kills it when its log shows the step."""
    text = json.dumps({"out": str(out), **changes})
    process = subprocess.Popen([sys.executable, str(PROGRAM), kind, text], env=ENVIRONMENT, stderr=subprocess.PIPE)
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert max(line["step"] for line in curves(out)) < 20


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_killed_tokenizer_run_goes_on_exactly(data, tokenizer_run, tmp_path):
    out = tmp_path / "killed"
    kill_at(7, "tokenizer", out, data=str(data))
    result = train_tokenizer(tokenizer_options(data, out))
    assert (result.finished, result.steps) == (True, 20)
    assert curves(out) == curves(tokenizer_run)
    assert_same_weights(out / "model", tokenizer_run / "model")


def test_killed_generator_run_goes_on_exactly(data, tokenizer_run, generator_run, tmp_path):
    out = tmp_path / "killed"
    kill_at(7, "generator", out, data=str(data), tokenizer=str(tokenizer_run / "model"))
    assert train_generator(generator_options(data, tokenizer_run / "model", out)).finished
    assert curves(out) == curves(generator_run)
    assert_same_weights(out / "model" / "generator", generator_run / "model" / "generator")


def test_killed_run_with_muon_goes_on_exactly(data, tokenizer_run, tmp_path):
    model, whole, killed = tokenizer_run / "model", tmp_path / "whole", tmp_path / "killed"
    train_generator(generator_options(data, model, whole, optimizer="muon"))
    kill_at(7, "generator", killed, data=str(data), tokenizer=str(model), optimizer="muon")
    assert train_generator(generator_options(data, model, killed, optimizer="muon")).finished
    assert curves(killed) == curves(whole) != []
    assert_same_weights(killed / "model" / "generator", whole / "model" / "generator")


def test_losses_fall_and_results_load(tokenizer_run, generator_run):
    for out in (tokenizer_run, generator_run):
        found = losses(out)
        assert sum(found[-4:]) < 0.8 * sum(found[:4])
    tokenizer = load_tokenizer(tokenizer_run / "model", device="cpu", dtype="float32")
    assert (tokenizer.layout.shapes, tokenizer.layout.vocab_size) == (((4, 4),), 32)
    pipeline = load(generator_run / "model", device="cpu", dtype="float32")
    images = pipeline(class_labels=["2", "0"], seed=0, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert [path.name for path in sorted((generator_run / "samples").iterdir())] == ["samples-00000020.png"]


def test_fine_tuning_starts_from_a_saved_model(data, tokenizer_run, generator_run, tmp_path):
    model = tokenizer_run / "model"
    trained = losses(tokenizer_run)
    train_tokenizer(tokenizer_options(data, tmp_path / "tokenizer", initial=model, steps=1))
    assert losses(tmp_path / "tokenizer")[0] < sum(trained[:3]) / 3
    options = generator_options(data, model, tmp_path / "generator", initial=generator_run / "model", steps=1)
    train_generator(options)
    assert losses(tmp_path / "generator")[0] < sum(losses(generator_run)[:3]) / 3
    with pytest.raises(ValueError, match=r"(?s)holds another architecture.*tok_embeddings"):
        train_generator(replace(options, out=tmp_path / "other", width=64))


def test_other_options_are_refused(data, tokenizer_run):
    with pytest.raises(
        ValueError, match=r"batch_size: saved 8, given 4\n(.*\n)*.*learning_rate: saved 0.002, given 1.0"
    ):
        train_tokenizer(tokenizer_options(data, tokenizer_run, batch_size=4, learning_rate=1.0))


def test_finished_run_stays_as_it_is(data, tokenizer_run):
    before = curves(tokenizer_run)
    assert train_tokenizer(tokenizer_options(data, tokenizer_run)).steps == 20
    assert curves(tokenizer_run) == before


def test_time_limit_stops_and_the_run_goes_on(data, tokenizer_run, tmp_path, caplog):
    options = tokenizer_options(data, tmp_path / "limited", max_minutes=1e-9)
    first = train_tokenizer(options)
    assert (first.finished, first.steps) == (False, 1)
    assert "step 1 of 20" in caplog.text
    assert (tmp_path / "limited" / "model" / "config.json").is_file()
    assert train_tokenizer(replace(options, max_minutes=0.0)).finished
    assert curves(options.out) == curves(tokenizer_run)


def test_restart_begins_anew(data, tokenizer_run, tmp_path):
    options = tokenizer_options(data, tmp_path / "again", steps=2)
    train_tokenizer(options)
    changed = replace(options, seed=1, resume="restart")
    train_tokenizer(changed)
    assert [line["step"] for line in curves(options.out)] == [1, 2, 2]
    assert losses(options.out)[0] != losses(tokenizer_run)[0]


def run_processes(count: int, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run([*command, str(PROGRAM), *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_processes_compute_what_one_computes(data, tokenizer_run, tmp_path):
    # Nothing that is drawn a process: no augmentation, no dropout, no revival from a process's own latents.
    tokenizer_changes = dict(augment="none", revive_every=0, steps=6)
    generator_changes = dict(
        variants=1, dropout=0.0, label_dropout=0.0, attribute_dropout=0.0, word_dropout=0.0, steps=6
    )
    model = tokenizer_run / "model"
    run_processes(
        2,
        [
            "tokenizer",
            json.dumps({"data": str(data), "out": str(tmp_path / "two-tokenizer"), **tokenizer_changes}),
            "generator",
            json.dumps(
                {
                    "data": str(data),
                    "tokenizer": str(model),
                    "out": str(tmp_path / "two-generator"),
                    "gradient_accumulation": 2,
                    **generator_changes,
                }
            ),
        ],
    )
    train_tokenizer(tokenizer_options(data, tmp_path / "one-tokenizer", **tokenizer_changes))
    train_generator(generator_options(data, model, tmp_path / "one-generator", **generator_changes))
    # A latent between two codes may fall to the other one when sums are made in another order.
    for kind, tolerance in (("tokenizer", 5e-3), ("generator", 1e-4)):
        one, two = losses(tmp_path / f"one-{kind}"), losses(tmp_path / f"two-{kind}")
        assert two == pytest.approx(one, rel=tolerance)
        assert two[-1] < two[0]
