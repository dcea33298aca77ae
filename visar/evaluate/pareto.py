"""A picture of quality against cost: one point a run, and the line of those that no other beats in both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from visar.files import atomic_write

_MARGIN = (90, 60, 40, 70)  # left, top, right, bottom
_INK, _FAINT, _LINE = (30, 30, 30), (220, 220, 220), (40, 90, 180)


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

    Raises:
        ValueError: no point, a cost that is not above 0, a distance that is not finite, or a path that is not .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"a picture is named .png, got {path}")
    wrong = [point for point in points if not point.cost > 0 or not math.isfinite(point.distance)]
    if not points or wrong:
        raise ValueError(f"{wrong[0] if wrong else 'no point'}: costs must be above 0 and distances finite")
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    left, top, right, bottom = _MARGIN
    low_x, high_x = _padded([math.log10(point.cost) for point in points])
    low_y, high_y = _padded([point.distance for point in points])

    def place(point: Point) -> tuple[float, float]:
        x = (math.log10(point.cost) - low_x) / (high_x - low_x)
        y = (point.distance - low_y) / (high_y - low_y)
        return left + x * (size[0] - left - right), size[1] - bottom - y * (size[1] - top - bottom)

    for step in range(5):
        x, y = place(Point("", 10 ** (low_x + (high_x - low_x) * step / 4), low_y + (high_y - low_y) * step / 4))
        draw.line([(x, top), (x, size[1] - bottom)], fill=_FAINT)
        draw.line([(left, y), (size[0] - right, y)], fill=_FAINT)
        draw.text((x, size[1] - bottom + 8), f"{10 ** (low_x + (high_x - low_x) * step / 4):.3g}", _INK, font, "mt")
        draw.text((left - 8, y), f"{low_y + (high_y - low_y) * step / 4:.4g}", _INK, font, "rm")
    draw.rectangle([left, top, size[0] - right, size[1] - bottom], outline=_INK)
    draw.text((left + (size[0] - left - right) / 2, size[1] - 18), cost_name, _INK, font, "mb")
    draw.text((left, top - 14), f"{distance_name} (lower is better)", _INK, font, "lb")
    best = frontier(points)
    draw.line([place(point) for point in best], fill=_LINE, width=2)
    for point in points:
        x, y = place(point)
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=_LINE if point in best else _INK)
        on_right = x > size[0] - right - 160
        draw.text((x - 9 if on_right else x + 9, y - 9), point.label, _INK, font, "rb" if on_right else "lb")
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.12 * (high - low) or 0.5
    return low - pad, high + pad
