"""Tables of the docs are those of docs/results: a figure that was changed in one place only is found."""

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from visar.bench.acceptance import AcceptanceRow
from visar.evaluate.comparison import write_comparison
from visar.evaluate.metrics import Metrics
from visar.evaluate.report import Report, markdown_table, table
from visar.generators.families import FAMILIES

DOCS = Path(__file__).parents[1] / "docs"
TABLES = runpy.run_path(str(DOCS / "tables.py"))
FILES = sorted(path.stem for path in (DOCS / "results").glob("*.json"))


def report(name: str, distance: float) -> Report:
    protocol = dict(protocol="generation", sampler="ancestral", sampler_options={}, uint8_rule="round")
    cost = dict(
        images_per_second=2.5, forward_passes_per_image={"generator": 8.0}, mean_tokens_per_pass=2.0,
        acceptance_rate=None,
    )  # fmt: skip
    return Report(name, protocol, Metrics("FD-Lite0", distance), cost, "0" * 64, 0)


def acceptance_row() -> dict:
    numbers = dict.fromkeys(AcceptanceRow.__dataclass_fields__, 0.5)
    return numbers | dict(sampler="jacobi:window=4", exact=True, batch=2, images=4)


@pytest.fixture
def docs(tmp_path) -> Path:
    """A copy of the docs' tables and their script."""
    for name in ("tables.py", "results.md"):
        shutil.copy(DOCS / name, tmp_path / name)
    shutil.copytree(DOCS / "results", tmp_path / "results")
    shutil.copy(DOCS.parent / "README.md", tmp_path.parent / "README.md")
    return tmp_path


def run(docs: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(docs / "tables.py"), *arguments], capture_output=True, text=True)


def test_the_docs_tables_are_those_of_their_files():
    checked = run(DOCS, "--check")
    assert checked.returncode == 0, checked.stderr
    shown = {match[2] for path in DOCS.glob("*.md") for match in TABLES["MARKED"].finditer(path.read_text())}
    assert shown | {"families"} == set(FILES)


def test_a_figure_that_differs_is_found_and_made_right(docs):
    path = docs / "results.md"
    whole = path.read_text()
    path.write_text(whole.replace("| emoji-vq | 28.90 |", "| emoji-vq | 28.91 |"))
    assert path.read_text() != whole
    checked = run(docs, "--check", str(path))
    assert checked.returncode == 1
    assert "table reconstruction is not that of results/reconstruction.json" in checked.stderr
    assert run(docs, str(path)).returncode == 0 and path.read_text() == whole
    # The other way round: figures that were measured anew reach the docs.
    file = docs / "results" / "reconstruction.json"
    file.write_text(file.read_text().replace("28.90", "29.01"))
    assert run(docs, "--check", str(path)).returncode == 1
    assert run(docs, str(path)).returncode == 0 and "| emoji-vq | 29.01 |" in path.read_text()


@pytest.mark.parametrize("name", FILES)
def test_figures_that_were_written_down_say_how_they_were_measured(name):
    content = TABLES["read"](DOCS / "results" / f"{name}.json")
    if "columns" not in content:
        return
    rows = TABLES["written"](content, name)
    assert rows or name == "families"
    with pytest.raises(ValueError, match="date of .* is not said|nothing says how they were measured"):
        broken = json.loads(json.dumps(content))
        broken["date"] = ""
        for row in broken["rows"]:
            if isinstance(row, dict):
                row["cells"][1] = "95.1"
        TABLES["written"](broken, name)


def test_families():
    content = TABLES["read"](DOCS / "results" / "families.json")
    names = [row["cells"][0] for row in content["rows"]]
    assert len(set(names)) == len(names) and set(names) <= set(FAMILIES)
    assert {"training minutes", "parameters", "samples", "FD-Lite0", "FD-CRAFT"} <= set(content["columns"])
    # A row appears once it is measured.
    facts = {"commands": ["visar eval x"], "device": "CPU", "dtype": "float32", "date": "2026-12-01"}
    content["rows"][0] = {"measured": facts, "cells": [names[0], *["1"] * (len(content["columns"]) - 1)]}
    assert TABLES["render"](content, "families").count("\n") == 3


def test_what_commands_write_becomes_a_table(tmp_path):
    reports = [report("one", 10.0), report("two", 25.0)]
    write_comparison(reports, tmp_path)
    made = TABLES["render"](TABLES["read"](tmp_path / "compare.json"), "compare")
    assert made.replace("---|", " --- |") == markdown_table(table(reports)) and "2.50x" in made
    row = acceptance_row()
    (tmp_path / "acceptance.json").write_text(json.dumps({"options": {}, "device": "cpu", "rows": [row]}))
    made = TABLES["render"](TABLES["read"](tmp_path / "acceptance.json"), "acceptance")
    assert "jacobi:window=4" in made and asdict(AcceptanceRow(**row)) == row
    lines = [{"kind": "sample", "model": "tiny", "batch": batch, "ms_per_step": 1.25} for batch in (1, 8)]
    (tmp_path / "bench.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    made = TABLES["render"](TABLES["read"](tmp_path / "bench.json"), "bench")
    assert made == "| model | batch | ms per step |\n|---|---|---|\n| tiny | 1 | 1.25 |\n| tiny | 8 | 1.25 |\n"
    found = {"figures": {"FID": 3.3, "IS": 274.4}, "found": {"FID": 3.41}}
    assert "| IS | 274.4 | - |" in TABLES["render"](found, "reproduction")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end of table -->", "table nothing: there is no nothing.json in results/"),
        ("<!-- table: reconstruction -->\n| a |\n", "a mark of a table stands alone"),
        ("| a |\n<!-- end of table -->\n", "a mark of a table stands alone"),
    ],
)
def test_marks_without_a_table(text, message):
    with pytest.raises(ValueError, match=message):
        TABLES["make"](text, DOCS / "results")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"columns": ["a", "b"], "rows": [["1"]]}, r"\['1'\] has 1 cells, the table 2 columns"),
        ({"columns": ["a"], "rows": [["1"]]}, "commands, device, dtype, date of 1 is not said"),
        ([], "no results of a kind that is known"),
    ],
)
def test_files_that_are_no_results(content, message):
    with pytest.raises(ValueError, match=message):
        TABLES["render"](content, "x")
