"""Plots by matplotlib, without its global state: no pyplot, no backend or setting of the process changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visar.io.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BLUE = "#1e1e1e", "#285ab4"
_DPI = 100


def plot(
    *, x_name: str, y_name: str, log_x: bool = False, log_y: bool = False, size: tuple[int, int] = (900, 600)
) -> "Axes":
    """Empty axes of a figure of their own, with ticks at round numbers.

    Args:
        x_name, y_name: written beside the axes.
        log_x, log_y: logarithmic scale, ticks at 1, 2 and 5 times powers of ten.
        size: width and height in pixels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'torch-visar[eval]' (or matplotlib)") from error
    figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot(xlabel=x_name, ylabel=y_name)
    for axis, log, set_scale in ((axes.xaxis, log_x, axes.set_xscale), (axes.yaxis, log_y, axes.set_yscale)):
        if log:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")
    axes.margins(0.12)
    axes.grid(color="#dcdcdc")
    axes.set_axisbelow(True)
    return axes


def label_points(axes: "Axes", labels: Sequence[tuple[float, float, str]]) -> None:
    """Writes (x, y, text) beside each point or, where another text is, further up. Call it when all data are drawn."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # places are known only after the layout
    for x, y, text in labels:
        others = [other.get_window_extent() for other in axes.texts]
        written = axes.annotate(text, (x, y), xytext=(6, 4), textcoords="offset points", color=INK)
        while any(written.get_window_extent().overlaps(other) for other in others):
            written.set_position((6, written.get_position()[1] + 4))


def save_plot(axes: "Axes", path: Path) -> None:
    """Writes the figure as PNG, as large as what stands outside of the axes needs; whole or not at all."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
