"""docs/distill.md does what it says: its commands parse, and at toy size they lead from a folder to a student."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visar.cli.main import main, parse
from visar.distill.dd1 import DD1Task

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")
LINES = [shlex.split(line)[1:] for line in re.findall(r"^ {4}(visar .*)$", PAGE, re.MULTILINE)]
TRAINING = runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py"))

RUN = "--steps 4 --batch-size 8 --device cpu --mixed-precision no --tracker none --log-every 1 --save-every 1"
RUN += " --validate-every 0 --sample-every 0"
TOKENIZER = '{"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1, "scales": [1, 2, 3, 4]}'
TOY = {
    "train tokenizer": f"{RUN} --image-size 8 --perceptual-weight 0 --codebook-size 32 --model-options '{TOKENIZER}'",
    "train generator": f"{RUN} --width 16 --num-layers 1 --num-heads 2 --hidden-width 32 --variants 2",
    "distill pairs": "--num-pairs 64 --pair-batch 16 --flow-steps 3",
    "distill dd1": f"{RUN} --num-pairs 64 --first-pairs 32 --pair-batch 16 --flow-steps 3",
    "distill dd2": f"{RUN} --num-pairs 64 --pair-batch 16 --flow-steps 3 --held-out 8 --tuning-steps 2 --first-fake 1",
    "distill independent": "--num-pairs 64 --pair-batch 16 --flow-steps 3",
}


class Killed(BaseException):
    pass


def test_commands_parse():
    assert len(LINES) >= 10
    for words in LINES:
        assert callable(parse(list(words)))


def test_a_folder_becomes_a_student_that_was_killed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with np.load(TRAINING["write_images"](tmp_path / "images.npz")) as content:
        for index, (image, label) in enumerate(zip(content["images"], content["labels"], strict=True)):
            folder = tmp_path / "photos" / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    step, reached = DD1Task.step, []

    def killed(self, number):
        reached.append(number)
        if len(reached) == 3:
            raise Killed
        return step(self, number)

    monkeypatch.setattr(DD1Task, "step", killed)
    for words in LINES:
        name = " ".join(words[:2])
        line = [*words, *shlex.split(TOY.get(name, ""))]
        if name == "eval --compare":
            continue
        if name == "distill dd1":
            with pytest.raises(Killed):
                main(line)
        assert main(line) == 0, line
    assert reached == [0, 1, 2, 2, 3]
    assert len(list((tmp_path / "runs" / "pairs").glob("block-*"))) == 4
    for file in ("map.png", "one.png", "two.png", "mixed.png"):
        with Image.open(tmp_path / file) as picture:
            assert min(picture.size) >= 8
    for run in ("student", "better", "independent"):
        assert (tmp_path / "runs" / run / "model" / "model_index.json").is_file()
