"""Papers' figures by one command: protocols as rows of papers.json, the run, and its figure beside the paper's.

A row's own entries go before its project's, and deviations of both are told. Sampler, guidance and filters are those
of the official name (visar.checkpoints.hub); a row adds only what its figure needs beyond them.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from visar.checkpoints import hub
from visar.evaluate.options import RunOptions, ScoreOptions
from visar.evaluate.pipeline import Sampling
from visar.evaluate.report import Report
from visar.evaluate.run import evaluate_pipeline
from visar.io.files import atomic_write
from visar.io.progress import Progress
from visar.io.shards import World
from visar.pipelines.components import DTYPES
from visar.pipelines.loading import load

TABLE = Path(__file__).with_name("papers.json")
FULL = 50_000
"""Images behind every figure of the table."""


@dataclass(frozen=True)
class Published:
    """A figure of a paper and the protocol behind it.

    Attributes:
        name: of the row.
        model: official name, whose files, converter and sampling settings apply.
        paper: where the figures stand.
        figures: FID, IS, and those of sFID, precision and recall that the paper gives.
        labels: policy of the labels.
        uint8_rule: key of UINT8_RULES.
        dtype, tokenizer_dtype: of the weights.
        reference: key of `references`.
        sampler_options: settings of the sampler beyond the official name's.
        scored_size: side in pixels that images are resized to before they are scored; None leaves them.
        others: further figures for the same weights, and whose they are.
        deviations: what is not done as the authors did it.
    """

    name: str
    model: str
    paper: str
    figures: dict[str, float]
    labels: Literal["balanced", "random"]
    uint8_rule: Literal["round", "truncate"]
    dtype: str
    tokenizer_dtype: str
    reference: str
    sampler_options: dict[str, Any] = field(default_factory=dict)
    scored_size: int | None = None
    others: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def references() -> dict[str, dict[str, str]]:
    """File name and address of the reference batches, by name."""
    return _table()["references"]


def published() -> dict[str, Published]:
    """All rows by name."""
    rows = {}
    for name, row in _table()["rows"].items():
        project = _table()["projects"][row["project"]]
        own = {**project, **{key: value for key, value in row.items() if key != "project"}}
        deviations = (*project.get("deviations", ()), *row.get("deviations", ()))
        rows[name] = Published(name, **{**own, "deviations": deviations, "others": tuple(row.get("others", ()))})
    return rows


def find(name: str) -> Published:
    """The row of a name.

    Raises:
        ValueError: there is none.
    """
    rows = published()
    if name not in rows:
        raise ValueError(f"no row {name!r}; choose one of {', '.join(rows)}")
    return rows[name]


def plan(row: Published, count: int = FULL) -> list[str]:
    """What a run fetches and does, a line each; nothing is fetched, but the hub is asked for sizes."""
    entry = hub.official()[row.model]
    lines = [f"{row.name}: {row.paper}", "files:"]
    lines += [
        f"  {repository}/{file}: {_size(*hub.file_size(repository, file))}"
        for repository, file in (
            (entry.repository, entry.file),
            (entry.tokenizer_repository, entry.tokenizer_file),
        )
    ]
    reference = references()[row.reference]
    lines.append(f"  {reference['file']}: give it as --reference; from {reference['url']}")
    lines.append("  weights of inception-v3: torch-fidelity fetches them; or give --extractor-weights")
    grid = "" if entry.grid is None else f", grid {entry.grid[0]} x {entry.grid[1]}"
    lines += [
        f"converter: {entry.source}{grid}; {entry.note}",
        f"sampling: {_settings({'sampler': 'ancestral', **entry.defaults, **row.sampler_options})}",
        f"dtype: generator {row.dtype}, tokenizer {row.tokenizer_dtype}",
        f"labels: {row.labels}; seeds: image i has seed + i; {count:,} images",
        f"pixels: {row.uint8_rule} to uint8"
        + ("" if row.scored_size is None else f", resized to {row.scored_size} x {row.scored_size} before"),
        f"figures of the paper: {_settings(row.figures)}",
        *(f"  {other}" for other in row.others),
        "deviations:",
        *(f"  - {text}" for text in row.deviations),
        "command for 8 GPUs:",
        f"  torchrun --nproc-per-node 8 -m visar reproduce {row.name} --reference {shlex.quote(reference['file'])}",
    ]
    return lines


def _size(count: int | None, cached: bool) -> str:
    if count is None:
        return "size not known (the hub could not be asked)"
    text = f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    return f"{text}, {'in the cache' if cached else 'to be fetched; a broken download resumes'}"


def _settings(values: dict[str, Any]) -> str:
    texts = {name: _settings(value) if isinstance(value, dict) else str(value) for name, value in values.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def deviations(row: Published, *, count: int, extractor: str, dtype: str, reference: str) -> list[str]:
    """All deviations of a run from the paper, those that its options add among them."""
    found = list(row.deviations)
    if count != FULL:
        found.append(f"{count:,} images instead of {FULL:,}: the distance is larger for fewer, by chance alone")
    if extractor != "inception-v3":
        found.append(f"features of {extractor}, so no FID: the distance does not compare with the paper's at all")
    if dtype != row.dtype:
        found.append(f"generator in {dtype} instead of {row.dtype}")
    if Path(reference).name != references()[row.reference]["file"]:
        found.append(f"reference {Path(reference).name} instead of {references()[row.reference]['file']}")
    return found


def comparison(row: Published, report: Report) -> list[tuple[str, ...]]:
    """Header and rows: every figure of the paper, the run's, and their difference where they are of one kind."""
    metrics = report.metrics
    found = {
        metrics.distance_name: metrics.distance,
        f"s{metrics.distance_name}": metrics.spatial_distance,
        "IS": metrics.inception_score,
        "precision": metrics.precision,
        "recall": metrics.recall,
    }
    rows: list[tuple[str, ...]] = [("figure", "paper", "here", "difference")]
    for name in dict.fromkeys((*row.figures, *found)):
        paper, here = row.figures.get(name), found.get(name)
        if paper is None and here is None:
            continue
        # Scores by other networks are no scores of the paper's kind.
        same = metrics.distance_name == "FID" and paper is not None and here is not None
        difference = f"{(here or 0.0) - (paper or 0.0):+.3f}" if same else "-"
        rows.append((name, *("-" if value is None else f"{value:.3f}" for value in (paper, here)), difference))
    return rows


def reproduce(
    row: Published,
    run: RunOptions,
    *,
    reference: str,
    extractor: str = "inception-v3",
    extractor_weights: Path | None = None,
    world: World,
    dtype: str | None = None,
    report: Callable[[str], object] = lambda line: None,
    progress: Progress | None = None,
) -> list[tuple[str, ...]] | None:
    """Makes a row's images and scores them; writes reproduction.json beside what an evaluation writes.

    Args:
        row: of the table.
        run: images, batch, seed and folder; labels are the row's.
        reference: as of `visar eval`.
        extractor, extractor_weights: the network.
        world: the processes.
        dtype: of the generator's weights; None is the row's.
        report: told a deviation, a line each.
        progress: told (what, done, total).

    Returns: the table of `comparison` in the first process, None in the others.

    Raises:
        ValueError: files that cannot be had or do not fit, or as of `evaluate_pipeline`.
    """
    kind = dtype or row.dtype
    told = deviations(row, count=run.num_samples, extractor=extractor, dtype=kind, reference=reference)
    pipeline = load(row.model, device=world.device, dtype=kind)
    nn.Module.to(pipeline.tokenizer, dtype=DTYPES[row.tokenizer_dtype])
    made = evaluate_pipeline(
        pipeline,
        Sampling(sampler_options=row.sampler_options),
        ScoreOptions(
            reference=reference,
            extractor=extractor,
            extractor_weights=extractor_weights,
            spatial=extractor == "inception-v3" and "sFID" in row.figures,
        ),
        run,
        name=row.name,
        uint8_rule=row.uint8_rule,
        scored_size=row.scored_size,
        world=world,
        progress=progress,
    )
    if made is None:
        return None
    rows = comparison(row, made)
    content = {
        "row": row.name,
        "paper": row.paper,
        "figures": row.figures,
        "others": row.others,
        "found": {name: float(here) for name, _, here, _ in rows[1:] if here != "-"},
        "distance_name": made.metrics.distance_name,
        "deviations": told,
        "protocol": made.protocol,
        "images_sha256": made.images_sha256,
    }
    with atomic_write(run.out / "reproduction.json") as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for line in told:
        report(f"deviation: {line}")
    return rows
