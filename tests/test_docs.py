"""The documentation: its commands parse, its snippets run, and every public name has an entry in the API pages."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import visar
from visar.checkpoints.hub import official
from visar.cli.main import parse
from visar.generators.families import FAMILIES as GENERATORS
from visar.samplers.index import SAMPLERS
from visar.tokenizers.families import FAMILIES as TOKENIZERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(DOCS / "tutorials").glob("*.md"),
        *(DOCS / f"{name}.md" for name in ("demo", "index", "official", "serving", "video")),
    ]
)
FENCED = [
    (page.name, language, text)
    for page in PAGES
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
]
LINES = [
    line.strip()
    for page in PAGES
    for line in re.findall(r"^(?: {4})?(visar [a-z].*)$", page.read_text(), re.MULTILINE)
]
NAMED = sorted(
    {text for page in PAGES for text in re.findall(r"`(visar [a-z][^`.]*(?:\.[a-z]+)?)`", page.read_text())}
)
ENTRIES = [
    entry
    for page in (DOCS / "api").glob("*.md")
    for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def test_something_is_found():
    assert len(LINES) >= 20 and len(FENCED) >= 12 and len(ENTRIES) >= 60 and len(NAMED) >= 5
    assert len(ENTRIES) == len(set(ENTRIES))


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line):
    assert callable(parse(shlex.split(line)[1:]))


@pytest.mark.parametrize("line", [line for line in NAMED if "..." not in line and len(line.split()) > 1])
def test_commands_in_the_text_are_commands(line):
    from visar.cli.main import COMMANDS

    assert line.split()[1] in {word for name in COMMANDS for word in name.split()}


@pytest.mark.parametrize(
    "snippet",  # that of index.md is README's, which has a test of its own
    [pytest.param(text, id=name) for name, language, text in FENCED if language == "python" and name != "index.md"],
)
def test_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_exist(entry):
    module, _, name = entry.rpartition(".")
    try:
        found = importlib.import_module(entry)
    except ModuleNotFoundError:
        found = getattr(importlib.import_module(module), name)
    assert inspect.getdoc(found)


def test_every_public_name_has_an_entry():
    def entered(module: str, name: str) -> bool:
        return module in ENTRIES or f"{module}.{name}" in ENTRIES

    public = [getattr(visar, name) for name in visar.__all__]
    named = [(each.__module__, each.__name__) for each in public if inspect.isclass(each) or inspect.isfunction(each)]
    named += list(GENERATORS.values()) + list(TOKENIZERS.values())
    named += [(f"visar.samplers.{row.module}", f"sample_{row.name}") for row in SAMPLERS.values()]
    missing = sorted({f"{module}.{name}" for module, name in named if not entered(module, name)})
    assert not missing, missing
    files = {
        f"visar.{room}.{'.'.join(file.relative_to(ROOT / room).with_suffix('').parts)}"
        for room in ("tokenizers", "samplers")
        for file in (ROOT / room).rglob("*.py")
        if file.name != "__init__.py"
    }
    parts = {"visar.tokenizers.checks", "visar.tokenizers.codebook_training", "visar.tokenizers.convnet"}
    parts |= {"visar.tokenizers.convnet_fused"}
    assert files - parts - set(ENTRIES) == set()


def test_public_functions_of_the_entries_say_what_they_do():
    silent = []
    for entry in ENTRIES:
        try:
            module = importlib.import_module(entry)
        except ModuleNotFoundError:  # a function
            continue
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == entry and (inspect.isclass(value) or inspect.isfunction(value))
            if own and not name.startswith("_") and not inspect.getdoc(value):
                silent.append(f"{entry}.{name}")
    assert not silent, silent


def test_every_official_name_is_on_its_page():
    page = (DOCS / "official.md").read_text()
    for name, row in official().items():
        files = f"| `{row.repository}`: `{row.file}` | `{row.tokenizer_repository}`: `{row.tokenizer_file}` |"
        assert re.search(rf"^\| `{re.escape(name)}` \| .* {re.escape(files)}", page, re.MULTILINE), name
