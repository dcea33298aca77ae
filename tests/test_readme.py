"""README.md does what it says: snippets run and pass type checkers, commands parse and run, links lead somewhere."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from visar.cli.main import COMMANDS, main, parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
OUTSIDE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in FENCED if language == "python"]
SHELL = [line for language, text in FENCED if language != "python" for line in text.splitlines()]
SHELL += re.findall(r"^ {4}(\S.*)$", OUTSIDE, re.MULTILINE)
LINES = [part.strip() for line in SHELL for part in line.split("&&") if part.strip().startswith("visar ")]
NAMED = sorted(set(re.findall(r"`visar ([a-z][^`]*)`", OUTSIDE)))
SAMPLES = [line for line in LINES if line.startswith("visar sample ")]
LINKS = re.findall(r"\]\((?!https?:)([^)#]+)\)", OUTSIDE)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_something_is_found():
    assert len(SNIPPETS) >= 3 and len(LINES) >= 3 and NAMED and LINKS
    assert README.count("```python") == len(SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "snippet"})


TYPES = """
from typing import assert_type
import PIL.Image
import torch
import visar

pipe = visar.load("emoji-raster")
assert_type(pipe(seed=0).images, list[PIL.Image.Image])
assert_type(pipe("heart", output_type="pt", sampler="jacobi").images, torch.Tensor)
pipe.to("cpu").save_pretrained("saved")
tokenizer = visar.load_tokenizer("emoji-vq").to("cpu")
assert_type(tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 64, 64))), torch.Tensor)
assert_type(pipe.generator.num_tokens, int)
assert_type(pipe.tokenizer.layout.vocab_size, int)
"""


@pytest.fixture
def scripts(place) -> list[str]:
    """The snippets as files of a user's folder, and one that is stricter."""
    names = [f"snippet{number}.py" for number in range(len(SNIPPETS) + 1)]
    for name, text in zip(names, [*SNIPPETS, TYPES], strict=True):
        (place / name).write_text(text)
    return names


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_snippets_pass_mypy(scripts, place, request):
    """With a user's settings; what torch and diffusers themselves declare is not read again, as that takes minutes."""
    skipped = "torch.*,torchvision.*,diffusers.*,transformers.*,numpy.*,torch_fidelity.*,huggingface_hub.*,timm.*"
    (place / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\n[mypy-{skipped}]\nfollow_imports = skip\n")
    cache = request.config.cache.mkdir("mypy")
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *scripts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_snippets_pass_pyright(scripts, place):
    (place / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line):
    assert callable(parse(shlex.split(line)[1:]))


@pytest.mark.parametrize("text", NAMED)
def test_commands_in_the_text_exist(text):
    first, *rest = text.split()
    assert first in COMMANDS or " ".join([first, *rest[:1]]) in COMMANDS
    if rest and rest[-1] != first and len(rest) > 1:
        assert callable(parse(shlex.split(text)))


@pytest.mark.parametrize("line", SAMPLES)
def test_sample_commands_run(line, place):
    """Those after the first with fewer images than they say, which is all that takes long."""
    words, first = shlex.split(line), min(SAMPLES, key=README.index)
    few = ["--num-images", "2"] if line != first and "--num-images" in words else []
    assert main([*words[1:], *few]) == 0
    with Image.open(place / words[words.index("--out") + 1]) as picture:
        assert min(picture.size) >= 64 and max(picture.size) >= 2 * 64


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
