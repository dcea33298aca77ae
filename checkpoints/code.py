"""Weights of CoDe (arXiv 2411.17787, czg1225/CoDe@bfb204d): a drafter and a refiner, both in VAR's layout.

The tokenizer is VAR's (`visar.checkpoints.var`). Without fine-tuning, any two of VAR's own transformers make a pair.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from visar.checkpoints.var import Scales, load_transformer
from visar.generators.next_scale import NextScaleTransformer
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer


@dataclass
class CollaborativePair:
    """Models for `sample_collaborative(drafter, ..., followers=[refiner], takes_over=[takes_over])`.

    Attributes:
        drafter: predicts the first scales.
        refiner: predicts the others.
        takes_over: scale N at which the refiner begins; the pair was fine-tuned for it.
    """

    drafter: NextScaleTransformer
    refiner: NextScaleTransformer
    takes_over: int


def takes_over_of(path: str | Path) -> int | None:
    """The scale in a released file's name (`drafter_8.pth`, `refiner_8.pth`); None if it has none."""
    match = re.fullmatch(r"(?:drafter|refiner)_(\d+)\.\w+", Path(path).name)
    return None if match is None else int(match[1])


def load_pair(
    drafter_path: str | Path,
    refiner_path: str | Path,
    tokenizer: MultiScaleVQTokenizer,
    *,
    takes_over: int | None = None,
    scales: Scales | None = None,
) -> CollaborativePair:
    """Reads `drafter_N.pth` and `refiner_N.pth`.

    Args:
        drafter_path, refiner_path: files.
        tokenizer: that both were trained with.
        takes_over: N; None reads it off the files' names.
        scales: see `visar.checkpoints.var.convert_transformer`.

    Raises:
        ValueError: damaged files, files of different N, an N that nothing tells, or models of different pyramids.
    """
    if takes_over is None:
        named = {takes_over_of(path) for path in (drafter_path, refiner_path)}
        if len(named) != 1 or None in named:
            raise ValueError(f"{Path(drafter_path).name}, {Path(refiner_path).name}: say at which scale, takes_over=8")
        takes_over = named.pop()
    drafter = load_transformer(drafter_path, tokenizer, scales=scales)
    refiner = load_transformer(refiner_path, tokenizer, scales=scales)
    if drafter.scales != refiner.scales:
        raise ValueError(f"the drafter has scales {drafter.scales}, the refiner {refiner.scales}")
    assert takes_over is not None
    return CollaborativePair(drafter, refiner, takes_over)
