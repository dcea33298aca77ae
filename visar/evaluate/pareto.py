"""A picture of quality against cost: one point a run, and the line of those that no other beats in both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visar.files import atomic_write
from visar.plots import BLUE, INK, Axes


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
    """Writes the picture as PNG: cost to the right on a logarithmic scale, distance upwards, frontier as a line.

    Points are numbered in their order; what the numbers are stands below.

    Args:
        points: of the runs.
        path: of the picture.
        cost_name, distance_name: written beside the axes.
        size: of the plot without the lines below it, in pixels.

    Raises:
        ValueError: no point, a cost that is not above 0, a distance that is not finite, or a path that is not .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"a picture is named .png, got {path}")
    wrong = [point for point in points if not point.cost > 0 or not math.isfinite(point.distance)]
    if not points or wrong:
        raise ValueError(f"{wrong[0] if wrong else 'no point'}: costs must be above 0 and distances finite")
    distances = [point.distance for point in points]
    axes = Axes(
        [point.cost for point in points],
        distances,
        x_name=cost_name,
        y_name=f"{distance_name} (lower is better)",
        log_x=True,
        log_y=min(distances) > 0 and max(distances) > 2 * min(distances),
        size=size,
    )
    best = frontier(points)
    axes.line([(point.cost, point.distance) for point in best])
    names = []
    for number, point in enumerate(points, start=1):
        axes.point(point.cost, point.distance, str(number), BLUE if point in best else INK)
        names.append(f"{number}  {point.label}  ({point.cost:.3g}, {point.distance:.4g})")
    axes.legend(names)
    with atomic_write(path) as temporary:
        axes.image.save(temporary, format="PNG")
    return path
