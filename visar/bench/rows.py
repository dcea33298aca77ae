"""Rows of a benchmark in files, and whether one got slower."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visar.io.files import atomic_write, json_object, read_text

Row = dict[str, Any]
# Rows that agree in these are about the same thing.
IDENTITY = (
    "kind",
    "device",
    "model",
    "batch",
    "path",
    "sampler",
    "sampler_options",
    "grid",
    "window",
    "guidance_scale",
    "top_k",
    "top_p",
    "dtype",
    "quantize",
    "deterministic",
)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of JSON lines.

    Raises:
        ValueError: no such file, or a line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json_object(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is no row of a benchmark ({error})") from error
    return rows


def add_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file; what is there stays.

    Raises:
        ValueError: it cannot be written.
    """
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with atomic_write(path) as temporary:
        temporary.write_text(before + "".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def identity(row: Row) -> str:
    """What a row is about, as text to compare."""
    return json.dumps([row.get(name) for name in IDENTITY])


def slower(row: Row, stored: Row) -> list[str]:
    """Medians of a row that are worse than the stored ones by more than max(3 %, 2 x the larger spread), in words."""
    found = []
    for name in sorted(row):
        if not name.endswith("_spread"):
            continue
        column = name.removesuffix("_spread") + "_ms"
        if row.get(column) is None or stored.get(column) is None:
            continue
        allowed = max(0.03, 2 * max(row[name], stored.get(name, 0.0)))
        change = row[column] / stored[column] - 1.0
        if change > allowed:
            found.append(
                f"{row.get('model')} batch {row.get('batch')} {row.get('path')} {column}: {stored[column]:.4g} -> "
                f"{row[column]:.4g} (+{change:.0%}, allowed {allowed:.0%})"
            )
    return found


def compare_with_baseline(rows: Iterable[Row], baseline: Iterable[Row]) -> tuple[int, list[str]]:
    """How many rows the baseline knows (its last row of a kind counts), and what got slower."""
    stored = {identity(row): row for row in baseline}
    known = [row for row in rows if identity(row) in stored]
    return len(known), [text for row in known for text in slower(row, stored[identity(row)])]
