"""Makes the tables of the docs from the files of docs/results: python docs/tables.py [--check].

A table stands between <!-- table: NAME --> and <!-- end of table --> and is made of docs/results/NAME.json, which is

- what a command wrote: compare.json of `visar eval --compare`, acceptance.json of `visar acceptance`,
  reproduction.json of `visar reproduce`, or rows of `visar bench --out`;
- or figures that were written down: {"commands", "device", "dtype", "date", "columns", "rows"}, cells as they are
  printed. "families.json" is such a file with an entry "measured" per row.

With --check nothing is written, and a table that is not that of its file is named and makes the status 1.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
FACTS = ("commands", "device", "dtype", "date")
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
ORPHAN = re.compile(r"<!-- (?:table:|end of table)")
# Columns of a benchmark's rows that a table has, where a row has them.
BENCH = (
    ("model", "model"), ("batch", "batch"), ("path", "path"), ("sampler", "sampler"), ("window", "window"),
    ("pass_ms", "ms per pass"), ("ms_per_step", "ms per step"), ("of_floor", "of floor"), ("tokens_ms", "ms tokens"),
    ("decode_ms", "ms decoding"), ("together_ms", "ms together"), ("ours_ms", "ms"), ("peer_ms", "ms of the other"),
    ("ratio", "ratio"), ("images_per_s", "images/s"), ("peak_gib", "peak GiB"),
)  # fmt: skip


def read(path: Path) -> Any:
    """Content of a file of results: JSON, or a list of JSON lines.

    Raises:
        ValueError: it is neither.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def markdown(rows: list[tuple[str, ...]] | list[list[str]]) -> str:
    """Header and rows as a table of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return re.sub(r"\|  (?=\|)", "| ", "\n".join(lines)) + "\n"


def render(content: Any, name: str) -> str:
    """The table of a file's content.

    Raises:
        ValueError: no content of a kind that is known, or facts that are missing.
    """
    if isinstance(content, dict) and "columns" in content:
        return markdown([content["columns"], *written(content, name)])
    if isinstance(content, dict) and {"figures", "found"} <= content.keys():
        found = content["found"]
        names = dict.fromkeys((*content["figures"], *found))
        cells = [(key, _cell(content["figures"].get(key)), _cell(found.get(key))) for key in names]
        return markdown([("figure", "paper", "here"), *cells])
    if isinstance(content, dict) and "rows" in content and "options" in content:
        from visar.bench.acceptance import AcceptanceRow, table

        return markdown(table([AcceptanceRow(**row) for row in content["rows"]]))
    if isinstance(content, list) and content and "protocol" in content[0]:
        from visar.evaluate.report import report_of, table

        return markdown(table([report_of(row) for row in content]))
    if isinstance(content, list) and content and "kind" in content[0]:
        shown = [(key, title) for key, title in BENCH if any(row.get(key) is not None for row in content)]
        body = [tuple(_cell(row.get(key)) for key, _ in shown) for row in content]
        return markdown([tuple(title for _, title in shown), *body])
    raise ValueError(f"{name}: no results of a kind that is known")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def written(content: dict[str, Any], name: str) -> list[list[str]]:
    """Rows of figures that were written down, after checks; rows of families that nobody has measured are left out.

    Raises:
        ValueError: a row of another length, a cell that is no text, or a figure without its facts.
    """
    width, rows = len(content["columns"]), []
    for row in content["rows"]:
        cells, facts = (row["cells"], row["measured"]) if isinstance(row, dict) else (row, content)
        if len(cells) != width:
            raise ValueError(f"{name}: {cells[:1]} has {len(cells)} cells, the table {width} columns")
        if facts is None:
            if any(cells[1:]):
                raise ValueError(f"{name}: {cells[0]} has figures, but nothing says how they were measured")
            continue
        missing = [fact for fact in FACTS if not facts.get(fact)]
        if missing:
            raise ValueError(f"{name}: {', '.join(missing)} of {cells[0] or 'a row'} is not said")
        if not all(isinstance(cell, str) for cell in cells):
            raise ValueError(f"{name}: cells of {cells[0]} are no texts")
        rows.append(cells)
    return rows


def make(text: str, results: Path) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: a mark without its other half, or results that do not exist or are of no known kind.
    """

    def table(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.is_file():
            raise ValueError(f"table {match[2]}: there is no {path.name} in {results.name}/")
        return match[1] + render(read(path), match[2]) + match[4]

    rest = MARKED.sub("", text)
    if ORPHAN.search(rest):
        raise ValueError(f"a mark of a table stands alone: {rest[ORPHAN.search(rest).start() :][:60]!r}")
    return MARKED.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a table would change")
    parser.add_argument("documents", nargs="*", type=Path, help="documents; all of docs/ and the README")
    options = parser.parse_args()
    status = 0
    for path in options.documents or sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]):
        before = path.read_text(encoding="utf-8")
        after = make(before, DOCS / "results")
        if before == after:
            continue
        differing = [
            f"{path.name}: table {old[2]} is not that of results/{old[2]}.json"
            for old, new in zip(MARKED.finditer(before), MARKED.finditer(after), strict=True)
            if old[0] != new[0]
        ]
        if options.check:
            sys.stderr.write("\n".join(differing) + "\nrun python docs/tables.py\n")
            status = 1
        else:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write("\n".join(differing).replace("is not that of", "was made from") + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
