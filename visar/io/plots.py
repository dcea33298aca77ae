"""Plots drawn with Pillow: axes with ticks, and lines and points on them."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, BLUE = (30, 30, 30), (220, 220, 220), (40, 90, 180)
COLORS = (BLUE, (200, 80, 30), (40, 140, 60), (150, 60, 150), (190, 150, 20), (30, 150, 160), (120, 90, 60), INK)
_MARGIN = (90, 60, 40, 70)  # left, top, right, bottom


class Axes:
    """A white picture with two axes that hold the given values.

    Args:
        x_values, y_values: what must fit; above 0 on a logarithmic axis.
        x_name, y_name: written beside the axes.
        log_x, log_y: logarithmic scale.
        size: width and height in pixels.
    """

    def __init__(
        self,
        x_values: Sequence[float],
        y_values: Sequence[float],
        *,
        x_name: str,
        y_name: str,
        log_x: bool = False,
        log_y: bool = False,
        size: tuple[int, int] = (900, 600),
    ) -> None:
        self.size, self.log_x, self.log_y = size, log_x, log_y
        self.image = Image.new("RGB", size, "white")
        self.draw, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(size=15)
        self._labels: list[tuple[float, float, float, float]] = []
        self._x = _padded([self._scaled(value, log_x) for value in x_values])
        self._y = _padded([self._scaled(value, log_y) for value in y_values])
        left, top, right, bottom = _MARGIN
        width, height = size
        for step in range(5):
            tick_x, tick_y = (low + (high - low) * step / 4 for low, high in (self._x, self._y))
            x, y = self._pixel(tick_x, tick_y)
            self.draw.line([(x, top), (x, height - bottom)], fill=FAINT)
            self.draw.line([(left, y), (width - right, y)], fill=FAINT)
            self.draw.text((x, height - bottom + 8), f"{10**tick_x if log_x else tick_x:.3g}", INK, self.font, "mt")
            self.draw.text((left - 8, y), f"{10**tick_y if log_y else tick_y:.4g}", INK, self.font, "rm")
        self.draw.rectangle([left, top, width - right, height - bottom], outline=INK)
        self.draw.text((left + (width - left - right) / 2, height - 18), x_name, INK, self.font, "mb")
        self.draw.text((left, top - 14), y_name, INK, self.font, "lb")

    @staticmethod
    def _scaled(value: float, log: bool) -> float:
        return math.log10(value) if log else value

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = _MARGIN
        across = (x - self._x[0]) / (self._x[1] - self._x[0])
        up = (y - self._y[0]) / (self._y[1] - self._y[0])
        return (
            left + across * (self.size[0] - left - right),
            self.size[1] - bottom - up * (self.size[1] - top - bottom),
        )

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a pair of values."""
        return self._pixel(self._scaled(x, self.log_x), self._scaled(y, self.log_y))

    def line(self, points: Sequence[tuple[float, float]], color: tuple[int, int, int] = BLUE) -> None:
        """A line through pairs of values."""
        self.draw.line([self.place(x, y) for x, y in points], fill=color, width=2)

    def point(self, x: float, y: float, label: str, color: tuple[int, int, int] = INK) -> None:
        """A disc at a pair of values, and its label beside it or, where another one is, further up."""
        across, up = self.place(x, y)
        self.draw.ellipse([across - 5, up - 5, across + 5, up + 5], fill=color)
        on_right = across > self.size[0] - _MARGIN[2] - 160
        place, anchor = (across + (-9 if on_right else 9), up - 9.0), "rb" if on_right else "lb"
        box = self.draw.textbbox(place, label, self.font, anchor)
        while any(_overlap(box, other) for other in self._labels):
            place = (place[0], place[1] - 4)
            box = self.draw.textbbox(place, label, self.font, anchor)
        self._labels.append(box)
        self.draw.text(place, label, INK, self.font, anchor)

    def legend(self, lines: Sequence[str]) -> None:
        """Lines of text below the plot; the picture grows, to the right too where a line is long."""
        width, height = self.image.size
        longest = max((math.ceil(self.draw.textlength(line, self.font)) for line in lines), default=0)
        wide = max(width, _MARGIN[0] + longest + _MARGIN[2])
        grown = Image.new("RGB", (wide, height + 20 * len(lines) + 10), "white")
        grown.paste(self.image)
        self.image, self.draw = grown, ImageDraw.Draw(grown)
        for index, line in enumerate(lines):
            self.draw.text((_MARGIN[0], height + 20 * index), line, INK, self.font)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (left, top, right, bottom) share a point."""
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.12 * (high - low) or 0.5
    return low - pad, high + pad
