"""Version, environment and completion: what somebody meets before the first image."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import visar
from visar.cli import env
from visar.cli.completion import completion, flags_of
from visar.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["visar", "visar.cli"])
def test_the_module_is_the_command(module):
    run = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stdout == f"visar {visar.__version__}\n" and not run.stderr


def test_the_environment(capsys, monkeypatch):
    import torch

    monkeypatch.setenv("VISAR_TRITON", "0")
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert lines["visar"] == visar.__version__ and torch.__version__.startswith(lines["torch"].split("+")[0])
    assert lines["VISAR_TRITON"] == "0"
    # To be pasted in public: nobody's names, folders or keys.
    assert "secret" not in said and str(Path.home()) not in said and str(ROOT) not in said


def test_the_environment_of_a_broken_torch(monkeypatch):
    def broken() -> list:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(env, "_devices", broken)
    assert env.facts()[-1] == ("torch fails", "OSError: libcudart.so: cannot open shared object file")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sa"], "sample samplers"),
        (["train", ""], "tokenizer generator drafter"),
        (["train", "gen"], "generator"),
        (["train", "generator", "--rec"], "--recipe"),
        (["train", "tokenizer", "--codebook-d"], "--codebook-decay"),
        (["eval", "--sp"], "--spatial"),
        (["eval", "--compare", "--speed"], "--speed-batches"),
        (["eval", "emoji-raster", "--num"], "--num-samples"),
        (["reproduce", "--dry"], "--dry-run"),
        (["edit", "here.p"], "here.png"),
        (["nothing", "--x"], ""),
    ],
)
def test_completion(words, expected, tmp_path, monkeypatch):
    (tmp_path / "here.png").touch()
    (tmp_path / "visar.sh").write_text(completion("bash", COMMANDS))
    program = 'source visar.sh; COMP_WORDS=(visar "$@"); COMP_CWORD=$#; _visar; echo "${COMPREPLY[*]}"'
    run = subprocess.run(["bash", "-c", program, "x", *words], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == expected and not run.stderr


def test_completion_knows_every_flag(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("autoload") and "bashcompinit" in script
    for name, (_, command) in COMMANDS.items():
        flags = flags_of(command()[0])
        assert "--help" in flags and all(f" {flag}" in script or f'"{flag}' in script for flag in flags), name


def test_the_citation_and_the_package_say_the_same():
    text = (ROOT / "CITATION.cff").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {visar.__version__}\n" in text and f"license: {project['license']}\n" in text
    versions = {int(row.rsplit(".", 1)[1]) for row in project["classifiers"] if "Python :: 3." in row}
    assert min(versions) == int(project["requires-python"].rsplit(".", 1)[1])
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert "name: " in path.read_text() or path.name == "config.yml"


def test_papers_ship_with_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.json" in data["visar.evaluate"]
    json.loads((ROOT / "visar" / "evaluate" / "papers.json").read_text())
