"""README.md does what it says: snippets run, commands parse, the first one is run, links lead somewhere."""

import re
import shlex
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


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line):
    assert callable(parse(shlex.split(line)[1:]))


@pytest.mark.parametrize("text", NAMED)
def test_commands_in_the_text_exist(text):
    first, *rest = text.split()
    assert first in COMMANDS or " ".join([first, *rest[:1]]) in COMMANDS
    if rest and rest[-1] != first and len(rest) > 1:
        assert callable(parse(shlex.split(text)))


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("visar sample ")])
def test_sample_commands_run(line, place):
    words = shlex.split(line)
    assert main(words[1:]) == 0
    with Image.open(place / words[words.index("--out") + 1]) as picture:
        assert min(picture.size) >= 3 * 64


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
