"""docs/continuous.md does what it says: its commands parse, and at toy size they lead from a folder to images."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from visar.cli.main import main, parse

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "continuous.md").read_text(encoding="utf-8")
LINES = [shlex.split(line)[1:] for line in re.findall(r"^ {4}(visar .*)$", PAGE, re.MULTILINE)]
TRAINING = runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py"))

RUN = "--steps 2 --batch-size 8 --device cpu --mixed-precision no --tracker none --log-every 1 --save-every 0"
RUN += " --validate-every 0 --sample-every 0"
TOKENIZER = '{"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1, "latent_channels": 3}'
TOY = {
    "train tokenizer": f"{RUN} --image-size 8 --perceptual-weight 0 --model-options '{TOKENIZER}'",
    "train generator": f"{RUN} --width 16 --num-layers 1 --num-heads 2 --hidden-width 32 --variants 1",
    "sample": "--num-images 2",
    "acceptance": "--batch-sizes 1 --calls 1",
}


def toy(words: list[str]) -> list[str]:
    """A command at toy size; masked models have 16 tokens."""
    name = " ".join(words[:2]) if words[0] == "train" else words[0]
    line = [*words, *shlex.split(TOY.get(name, ""))]
    if "--sampler.steps" in line:
        line += ["--sampler.steps", "4", "--sampler.head-steps", "3"]
    return [word.replace('"width": 256, "depth": 3', '"width": 16, "depth": 1').replace('"steps": 25', '"steps": 3')
            for word in line]  # fmt: skip


def test_commands_parse():
    assert len(LINES) >= 9
    for words in LINES:
        assert callable(parse(list(words)))


def test_a_folder_becomes_images_edits_and_drafts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with np.load(TRAINING["write_images"](tmp_path / "images.npz")) as content:
        for index, (image, label) in enumerate(zip(content["images"], content["labels"], strict=True)):
            folder = tmp_path / "photos" / ("cat" if label == 1 else f"class {label}")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    for words in LINES:
        if words[0] != "eval":
            assert main(toy(words)) == 0, words
    for file in ("mar.png", "edited.png", "causal.png", "drafted.png"):
        with Image.open(tmp_path / file) as picture:
            assert min(picture.size) >= 8
    table = (tmp_path / "acceptance" / "acceptance.md").read_text()
    assert table.count("| exact |") == 3 and "| drafter head passes |" in table
