"""A plot of quality against cost: one point per run, and the line of those that no other beats in both."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from visar.evaluate.report import Report, markdown_table, table
from visar.io.files import atomic_write
from visar.io.plots import BLUE, INK, label_points, plot, save_plot


@dataclass(frozen=True)
class Point:
    """A run: lower is better on both axes; cost must be above 0."""

    label: str
    cost: float
    distance: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: another one with at most the same cost and distance, one of them smaller."""
    kept = [
        point
        for point in points
        if not any(
            other.cost <= point.cost
            and other.distance <= point.distance
            and (other.cost < point.cost or other.distance < point.distance)
            for other in points
        )
    ]
    return sorted(kept, key=lambda point: (point.cost, point.distance))


def draw_pareto(
    points: Sequence[Point],
    path: str | Path,
    *,
    cost_name: str,
    distance_name: str,
    size: tuple[int, int] = (900, 600),
) -> Path:
    """Writes the plot as PNG: cost to the right on a logarithmic scale, distance upwards, frontier as a line.

    Points are numbered in their order; what the numbers are stands below.

    Args:
        points: points of the runs.
        path: path of the plot.
        cost_name, distance_name: written beside the axes.
        size: about that of the plot without the lines below it, in pixels.

    Raises:
        ValueError: no point, a cost that is not above 0, a distance that is not finite, or a path that is not .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"the name of a plot ends in .png, got {path}")
    wrong = [point for point in points if not point.cost > 0 or not math.isfinite(point.distance)]
    if not points or wrong:
        raise ValueError(f"{wrong[0] if wrong else 'no point'}: costs must be above 0 and distances finite")
    distances = [point.distance for point in points]
    axes = plot(
        x_name=cost_name,
        y_name=f"{distance_name} (lower is better)",
        log_x=True,
        log_y=min(distances) > 0 and max(distances) > 2 * min(distances),
        size=(size[0], size[1] + 20 * len(points)),
    )
    best = frontier(points)
    axes.plot([point.cost for point in best], [point.distance for point in best], color=BLUE)
    drawn = [axes.scatter(point.cost, point.distance, color=BLUE if point in best else INK) for point in points]
    names = [
        f"{number}  {point.label}  ({point.cost:.3g}, {point.distance:.4g})" for number, point in enumerate(points, 1)
    ]
    legend = axes.figure.legend(drawn, names, loc="outside lower left", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name is one
    label_points(axes, [(point.cost, point.distance, str(number)) for number, point in enumerate(points, 1)])
    save_plot(axes, path)
    return path


def write_comparison(reports: list[Report], out: str | Path) -> None:
    """Writes compare.json, compare.md and pareto.png of comparable reports; the first row is what ratios refer to.

    In pareto.png the cost is the time of an image at the largest batch size that was timed (`--speed-batches`) in all
    runs, else the number of forward passes; without either there is no plot.

    Raises:
        ValueError: the reports do not compare, or there is none.
    """
    if not reports:
        raise ValueError("no run to compare")
    out = Path(out)
    rows = table(reports)
    protocol = reports[0].protocol
    shared = {key: value for key, value in protocol.items() if all(r.protocol.get(key) == value for r in reports)}
    lines = [markdown_table(rows), "Common protocol:", "", *(f"- {key}: {value}" for key, value in shared.items())]
    with atomic_write(out / "compare.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with atomic_write(out / "compare.json") as path:
        path.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n", encoding="utf-8")
    costs = _costs(reports)
    if costs is not None:
        cost_name, values = costs
        draw_pareto(
            [Point(r.name, cost, r.metrics.distance) for r, cost in zip(reports, values, strict=True)],
            out / "pareto.png",
            cost_name=cost_name,
            distance_name=reports[0].metrics.distance_name,
        )


def _costs(reports: list[Report]) -> tuple[str, list[float]] | None:
    """What a run costs, by name and for every report; None where it is not known of all."""
    timed = [{row.batch: row.images_per_s for row in report.speed} for report in reports]
    common = set(timed[0]).intersection(*timed[1:])
    if common:
        batch = max(common)
        return f"ms an image at batch {batch}", [1000 / rates[batch] for rates in timed]
    if all(report.passes for report in reports):
        return "forward passes per image", [report.passes or 0.0 for report in reports]
    return None
