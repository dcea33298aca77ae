"""Curves of a run, drawn from its metrics.jsonl."""

import json
from pathlib import Path

from visar.io.plots import label_points, plot, save_plot

_USE = "validation/code_perplexity_"


def draw_codebook_use(folder: Path) -> Path | None:
    """Draws how many codes every scale uses (perplexity of their frequencies) against the step.

    A scale whose line falls to 1 has collapsed: all its positions get the same code.

    Args:
        folder: folder of a run that trains a multi-scale tokenizer.

    Returns: the plot, codebook-use.png in the folder; None where no validation has measured it.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [line for line in lines if any(name.startswith(_USE) for name in line)]
    if not measured:
        return None
    curves = {
        name.removeprefix(_USE): [(line["step"], max(line[name], 1.0)) for line in measured]
        for name in measured[0]
        if name.startswith(_USE)
    }
    axes = plot(
        x_name="optimiser steps",
        y_name="effective number of codes (perplexity) of every scale",
        log_y=True,
    )
    for curve in curves.values():
        axes.plot(*zip(*curve, strict=True), marker="o", markevery=[-1])
    label_points(axes, [(*curve[-1], scale) for scale, curve in curves.items()])
    path = folder / "codebook-use.png"
    save_plot(axes, path)
    return path
