"""Weights of CoDe (arXiv 2411.17787, czg1225/CoDe@bfb204d): a drafter and a refiner, both in VAR's layout.

The tokenizer is VAR's (`visar.checkpoints.var`). Without fine-tuning, any two of VAR's own transformers make a pair.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from visar.checkpoints import var
from visar.checkpoints.common import find_weights
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, check_codes, choose_weights, expect
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


# ------------------------------------------------------------------------------------------------- for visar convert
# Settings of the released evaluation, without its temperature of 1.1 on the first seven scales.
DEFAULTS = var.scale_defaults("next_scale", 1.5, 600, 0.96)


def _read(options: Convert, content: Content, second: Content | None) -> Models:
    file, second_file = str(options.file), str(options.second)
    state, tokenizer, scales = var.read_parts(options, content, var.GENERATOR_MARKS, "head.weight")
    if second is None:
        raise ValueError(f"{file}: CoDe's models are pairs; say second, the refiner's file")
    expect(second, PAIR, second_file)
    weights = choose_weights(second, var.GENERATOR_MARKS, options.weights, PAIR.weights)
    refining = find_weights(second, var.GENERATOR_MARKS, second_file, weights)
    check_codes(refining, "head.weight", second_file, tokenizer.quantizer.vocab_size, options.tokenizer or file)
    drafter = var.make_transformer(state, tokenizer, scales, options.num_heads, file)
    # The refiner's heads are read off its own file: the option is for the drafter.
    refiner = var.make_transformer(refining, tokenizer, scales, None, second_file)
    named = {takes_over_of(path) for path in (file, second_file)} - {None}
    scale = str(named.pop()) if len(named) == 1 else ""
    return Models(
        tokenizer,
        drafter,
        refiner,
        folders=("drafter", "refiner"),
        defaults=DEFAULTS,
        notes=(f"by their names the refiner takes over at scale {scale}",) if scale else (),
        options=f"--sampler collaborative --followers {{second}} --takes-over {scale or 'SCALE'}",
    )


PAIR = Row(
    "code",
    "generator",
    var.GENERATOR_MARKS,
    _read,
    takes=("tokenizer", "scales", "num_heads"),
    second=var.GENERATOR_MARKS,
)
ROWS = (var.TOKENIZER, PAIR)

# The released pairs (Zigeng/VAR_CoDe) are two generators each, which one pipeline does not hold: `visar convert`.
OFFICIAL: dict[str, Official] = {}
