"""The command line: what it prints, what it refuses and how, and that a refusal leaves nothing behind."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visar
from visar.checkpoints.hub import embedded_names, official
from visar.cli.main import COMMANDS, main
from visar.cli.sample import Sample
from visar.cli.sampler_flags import take_sampler_options
from visar.evaluate.extractors import EXTRACTORS
from visar.generators.raster import RasterGPT
from visar.pipelines.image import ImagePipeline
from visar.samplers.index import SAMPLERS
from visar.tokenizers.vq import VQTokenizer

ROOT = Path(__file__).parent.parent
TRAINING = runpy.run_path(str(ROOT / "tests" / "fixtures" / "training.py"))
# A name here is part of commands that people have written down: add, do not rename.
SAMPLE_OPTIONS = """
    model class_name prompt attribute num_images seed out fps sampler guidance_scale temperature top_k top_p previews
    first_tokens_of num_first_tokens batch_size device dtype offload quantize
""".split()
TINY_TOKENIZER = '{"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1, "latent_channels": 16}'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test; it holds a file, to be mistaken for other things."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not what you think")
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 4 numbered classes."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        image_size=8,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=8,
        codebook_size=16,
    )
    generator = RasterGPT(
        vocab_size=16, grid=(4, 4), width=16, num_layers=1, num_heads=2, hidden_width=24, num_classes=4
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ImagePipeline(tokenizer, generator).save_pretrained(folder)
    return folder


def left(place: Path) -> list[str]:
    """What a command has left behind."""
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.name != "file")


# --------------------------------------------------------------------------------------------------------- what works
def test_usage_and_version(capsys):
    for arguments in ([], ["--help"], ["help"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert all(f"visar {name} " in printed for name in COMMANDS)
    for flag in ("--version", "-V"):
        assert main([flag]) == 0 and capsys.readouterr().out == f"visar {visar.__version__}\n"
    assert main(["train", "--help"]) == 0
    assert "visar train drafter" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: visar {name}" in printed and "-h, --help" in printed


def test_help_waits_for_no_framework():
    """In a process of its own: here torch has been imported."""
    program = f"""
import sys
from visar.cli import main
for name in {list(COMMANDS)}:
    assert main([*name.split(), "--help"]) == 0
    heavy = sorted({{"torch", "torchvision", "diffusers", "transformers"}} & sys.modules.keys())
    assert not heavy, (name, heavy)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_option_names_of_sample_are_frozen(capsys):
    assert [field.name for field in dataclasses.fields(Sample)] == SAMPLE_OPTIONS
    main(["sample", "--help"])
    printed = capsys.readouterr().out
    flags = [name.replace("_", "-") for name in SAMPLE_OPTIONS if name not in ("model", "class_name")]
    assert all(re.search(f"--{flag}[ ,]", printed) for flag in ("class", *flags))


def test_sample_a_grid_and_a_folder(place, capsys):
    assert main(shlex.split("sample emoji-raster --num-images 2 --seed 5 --class face-smiling --out grid.png")) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("seed 5: smileys-emotion/face-smiling, ") and lines[1].startswith("seed 6: ")
    assert lines[2].startswith("2 images in ") and lines[2].endswith(" 256 passes: grid.png") and len(lines) == 3
    bars = {line.partition(":")[0] for line in printed.err.replace("\r", "\n").splitlines() if line.strip()}
    assert bars == {"sampling"}
    assert main(shlex.split("sample emoji-raster --seed 6 --class face-smiling --out new/folder")) == 0
    assert left(place) == ["grid.png", "new", "new/folder", "new/folder/000006.png", "new/folder/seeds.txt"]
    assert capsys.readouterr().out.endswith(": new/folder\n")
    assert (place / "new/folder/seeds.txt").read_text() == f"6\t{lines[1].removeprefix('seed 6: ')}\n"
    # Convolutions of two images round other than those of one: a pixel may differ by 1.
    alone = np.asarray(Image.open(place / "new/folder/000006.png")).astype(int)
    both = np.asarray(Image.open(place / "grid.png")).astype(int)
    assert alone.shape == (64, 64, 3) and alone.std() > 5
    rows, columns = both.shape[0] - 63, both.shape[1] - 63
    assert any(abs(both[y : y + 64, x : x + 64] - alone).max() <= 1 for y in range(rows) for x in range(columns))


def test_sample_by_number(place, tiny, capsys):
    assert main(["sample", str(tiny), "--class", "3", "--num-images", "3", "--batch-size", "2", "--out", "a.png"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("seed 0: class 3\nseed 1: class 3\nseed 2: class 3\n3 images in ")
    assert "32 passes" in printed


def test_models(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*embedded_names(), *official()]
    assert "emoji-raster" in embedded_names()
    assert main(["models", "--classes", "emoji-raster"]) == 0
    columns = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(columns) == ["class", "group", "style", "tone"]
    assert "smileys-emotion/face-smiling" in columns["class"].split(", ") and "noto" in columns["style"].split(", ")


def test_samplers(capsys):
    assert main(["samplers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, "exact" if entry.exact else "lossy"] for name, entry in SAMPLERS.items()
    ]
    for line, entry in zip(lines[1:], SAMPLERS.values(), strict=True):
        assert all(key in line for key in entry.settings())


def test_sampler_settings_are_read_by_their_types():
    line = "model --sampler next_scale --sampler.num-scales 3 --seed 2 --sampler.smooth=True"
    assert take_sampler_options(shlex.split(line)) == (
        ["model", "--sampler", "next_scale", "--seed", "2"],
        {"num_scales": 3, "smooth": True},
    )
    assert take_sampler_options(["model", "--sampler=ancestral"]) == (["model", "--sampler=ancestral"], {})


def test_stats_eval_and_compare(place, tiny, capsys, monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "tiny", runpy.run_path(str(ROOT / "tests" / "fixtures" / "evaluation.py"))["TINY"])
    common = ["--extractor", "tiny", "--device", "cpu"]
    with np.load(ROOT / "tests" / "fixtures" / "sample_64.npz") as file:
        np.savez("images.npz", images=file["images"][:12])
    assert main(["stats", "images.npz", "--out", "real.npz", *common]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("layer") and "images: 100%" in printed.err
    line = f"eval {tiny} --reference real.npz --num-samples 10 --batch-size 4 --sampler ancestral"
    for scale in ("1.0", "3.0"):
        assert main([*line.split(), "--guidance-scale", scale, "--out", scale, *common]) == 0
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 2 and "images: 100%" in printed.err and "10/10" in printed.err
        report = json.loads((place / scale / "metrics.json").read_text())
        assert report["protocol"]["guidance"]["scale"] == float(scale)
    assert main("eval --compare 1.0 3.0 --out both".split()) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 3 and (place / "both" / "pareto.png").is_file()
    assert main("eval 1.0 3.0 --out again --compare".split()) == 0
    assert capsys.readouterr().out == table


def test_train_says_how_it_ended(place, capsys):
    data = TRAINING["write_images"](place / "images.npz")
    line = f"train tokenizer --data {data} --steps 2 --batch-size 8 --tracker none --perceptual-weight 0 --device cpu"
    small = ["--model-options", TINY_TOKENIZER, "--codebook-size", "32"]
    assert main([*line.split(), *small, "--out", "run", "--mixed-precision", "no"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("finished after 2 steps, best validation ") and printed.endswith(": run/model\n")
    assert main([*line.split(), *small, "--out", "file/run"]) == 1
    assert "file/run" in capsys.readouterr().err


def test_recipes_replace_defaults(capsys):
    for recipe in ("--recipe emoji-raster-text", "--recipe=emoji-raster-text"):
        assert main(["train", "generator", *recipe.split(), "--help"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "(default: runs/emoji-raster-text)" in printed and "(default: emoji-vq)" in printed


# -------------------------------------------------------------------------------------------------------- what is not
@pytest.mark.parametrize(
    ("line", "status", "pieces"),
    [
        ("sampel", 2, "unknown command 'sampel'"),
        ("train", 2, "choose one of visar train tokenizer, visar train generator"),
        ("sample", 2, "Required options"),
        ("sample emoji-raster --tempratur 1", 2, "--tempratur | --temperature"),
        ("sample emoji-raster --num-images two", 2, "--num-images | 'two'"),
        ("sample emoji-rastr", 1, "unknown model 'emoji-rastr' | nearest: emoji-raster"),
        ("sample emoji-vq", 1, "emoji-vq is a tokenizer"),
        ("sample file", 1, "unknown model 'file'"),
        ("sample .", 1, "no model_index.json"),
        ("sample emoji-raster --class face-smilng", 1, "unknown class 'face-smilng' | nearest: face-smiling"),
        ("sample emoji-raster --class 81", 1, "class 81; the numbers are 0 ... 80"),
        ("sample emoji-raster --class -1", 1, "class -1; the numbers are 0 ... 80"),
        ("sample emoji-raster --attribute style", 1, "attribute 'style'; write it as name=value"),
        ("sample emoji-raster --attribute style=notoo", 1, "unknown style 'notoo' | nearest: noto"),
        ("sample emoji-raster --prompt 'red heart'", 1, "conditioned on classes"),
        ("sample emoji-raster-text --class heart", 1, "conditioned on words"),
        ("sample emoji-raster-text --prompt 'red haert'", 1, "'haert'; nearest: heart"),
        ("sample emoji-raster --num-images 0", 1, "num_images 0"),
        ("sample emoji-raster --num-images -3", 1, "num_images -3"),
        ("sample emoji-raster --batch-size 0", 1, "batch_size 0"),
        ("sample emoji-raster --seed -1", 1, "seed -1"),
        ("sample emoji-raster --top-p 0", 1, "top_p 0.0; it must be in (0, 1]"),
        ("sample emoji-raster --top-p 1.5", 1, "top_p 1.5; it must be in (0, 1]"),
        ("sample emoji-raster --top-k -1", 1, "top_k -1"),
        ("sample emoji-raster --temperature 0", 1, "temperature 0.0"),
        ("sample emoji-raster --device gpu", 1, "unknown device 'gpu'"),
        ("sample emoji-raster --dtype half", 1, "dtype 'half'; choose one of float32"),
        ("sample emoji-raster --sampler jacoby", 2, "unknown sampler 'jacoby'; choose one of ancestral"),
        ("sample emoji-raster --sampler next_scale", 1, "does not fit a RasterGPT | ancestral, jacobi, speculative"),
        ("sample emoji-raster --sampler ancestral --sampler.window 3", 2, "sampler ancestral has no setting 'window'"),
        ("sample emoji-raster --sampler next_scale --sampler.smooth maybe", 2, "maybe"),
        ("sample emoji-raster --sampler.smooth True", 2, "--sampler.smooth | --sampler NAME"),
        ("sample emoji-raster --sampler edit", 2, "sampler edit needs --sampler.given_tokens"),
        ("sample emoji-raster --out file/grid.png", 1, "cannot write file/grid.png"),
        ("sample emoji-raster --out file", 1, "cannot write file"),
        ("models --classes nothing", 1, "unknown model 'nothing'"),
        ("models --classes emoji-vq", 1, "emoji-vq is a tokenizer"),
        ("models --classes llamagen-c2i-b-256", 1, "numbers only"),
        ("eval emoji-raster", 2, "--reference"),
        ("eval emoji-raster --reference nowhere --out out", 1, "no images at nowhere"),
        ("eval emoji-rastr --reference nowhere --out out", 1, "unknown model 'emoji-rastr'"),
        ("eval emoji-raster --reference nowhere --num-samples 0 --out out", 2, "num_samples 0"),
        ("eval emoji-raster --reference nowhere --device gpu", 1, "unknown device 'gpu'"),
        ("eval emoji-raster --reference nowhere --sampler jacoby", 2, "unknown sampler 'jacoby'"),
        ("sample emoji-raster --previews", 1, "a model over scales is needed"),
        ("acceptance emoji-raster --drafters nope --device cpu --out out", 1, "unknown drafter 'nope'"),
        ("eval emoji-raster --reference emoji64-lite0-f320 --sampler edit --out out", 2, "sampler edit needs"),
        ("eval emoji-raster --reference nowhere --sampler next_scale --out out", 1, "does not fit a RasterGPT"),
        ("eval --compare --runs emoji-raster/ancestral emoji-raster/static_tree:drafter=no --reference a", 1, "'no'"),
        ("eval --compare nowhere --out out", 1, "no metrics.json in nowhere"),
        ("eval nowhere --compare --out out", 1, "no metrics.json in nowhere"),
        ("eval --compare --out out", 1, "at least one"),
        ("eval --tokenizer emoji-vq --images nowhere --out out", 1, "no images at nowhere"),
        ("stats nowhere --out out.npz", 1, "no images at nowhere"),
        ("bench", 1, "give a model or --preset"),
        ("bench --preset llamagen-z", 1, "unknown preset 'llamagen-z'; choose one of llamagen-b"),
        ("bench --preset llamagen-b --device gpu", 1, "unknown device 'gpu'"),
        ("bench --preset llamagen-b --batch 0", 1, "batch (0,)"),
        ("train tokenizer --out run", 2, "--data"),
        ("train tokenizer --data nowhere --out run", 1, "no image set at nowhere"),
        ("train tokenizer --data file --out run", 1, "file is not an image set"),
        ("train tokenizer --data . --out run --steps 0", 1, "steps 0; allowed: 1 ... 1000000000"),
        ("train generator --data nowhere --tokenizer emoji-vq --out run", 1, "no image set at nowhere"),
        ("train generator --data . --tokenizer emoji-vqq --out run", 1, "unknown model 'emoji-vqq' | emoji-vq"),
        ("train tokenizer --recipe emoji-raster", 2, "unknown recipe 'emoji-raster' | emoji-vq, emoji-vq-4096"),
        ("train generator --recipe", 2, "unknown recipe ''"),
        ("convert file --out out", 1, "file"),
    ],
)
def test_bad_input(line, status, pieces, place, capsys):
    assert main(shlex.split(line)) == status
    printed = capsys.readouterr()
    assert all(piece in printed.err for piece in pieces.split(" | ")), printed.err
    assert "Traceback" not in printed.err and ("visar: " in printed.err or status == 2)
    assert not left(place)


def test_damaged_weights(place, tiny, capsys):
    shutil.copytree(tiny, "model")
    weights = place / "model" / "generator" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    before = left(place)
    for kept in (content[: len(content) // 2], b"", content[:4]):
        weights.write_bytes(kept)
        assert main(["sample", "model", "--out", "grid.png"]) == 1
        assert "visar: model/generator is damaged or incomplete" in capsys.readouterr().err
    assert left(place) == before


def test_weights_of_another_architecture(place, tiny, capsys):
    shutil.copytree(tiny, "model")
    config = place / "model" / "generator" / "config.json"
    values = json.loads(config.read_text())
    for change, piece in (
        ({"width": 24}, "tok_embeddings.weight"),
        ({"num_layers": 2}, "layers.1."),
        ({"num_heads": 3}, "3"),
    ):
        config.write_text(json.dumps({**values, **change}))
        assert main(["sample", "model", "--out", "grid.png"]) == 1
        message = capsys.readouterr().err
        assert message.startswith("visar: ") and piece in message
    config.write_text("{")
    assert main(["sample", "model", "--out", "grid.png"]) == 1
    assert "visar: model/generator" in capsys.readouterr().err
    assert not (place / "grid.png").exists()


def test_what_torchao_makes_others_log_stays_off_the_screen(place):
    line = [sys.executable, "-m", "visar.cli", "models", "--classes", "emoji-raster"]
    ended = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "torchao" not in ended.stderr and "register_constant" not in ended.stderr


def test_processes_end_with_a_status_and_without_a_traceback(place):
    def start(line: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "visar.cli", *line.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    wrong, stopped = start("sample emoji-rastr --out new/a.png"), start("sample emoji-raster --out new/b.png")
    assert stopped.stderr is not None
    shown = ""
    while "/256" not in shown:  # the bar is there: it samples
        shown += stopped.stderr.read(1) or pytest.fail(f"ended early: {shown}")
    stopped.send_signal(signal.SIGINT)
    for process, status, message in ((wrong, 1, "visar: unknown model"), (stopped, 130, "visar: interrupted")):
        out, error = process.communicate(timeout=120)
        assert process.returncode == status and message in error and "Traceback" not in error and not out
    assert not left(place)
