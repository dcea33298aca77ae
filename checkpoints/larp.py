"""Weights of LARP (arXiv 2410.21264, hywang66/LARP): its tokenizer of clips, which NAR's video models learn.

Depths and widths are read off keys and shapes. Patches are counted only, so the clip's shape is said, or the released
one. The released file also holds a model of the codes that shapes them in training (prior_model); it is left out.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from visar.checkpoints.common import State, build, count_modules, find_weights, fitted, read, require
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row
from visar.tokenizers.larp import LARPTokenizer

MARKS = ("encoder_latent_query_embed", "decoder_patch_query_token_type_embed", "x_embedder.proj.weight")
RELEASED = (4, 16, 16)
"""(frames, rows, columns) of patches of the released model, and of the box in which NAR counts its codes."""
_PRIOR = "prior_model."
_CODES, _WIDTH_OF_HEADS = "bottleneck.regularizer.embedding.weight", 64


def convert_tokenizer(
    content: Mapping[str, object],
    *,
    patches: tuple[int, int, int] = RELEASED,
    box: tuple[int, int, int] | None = None,
    num_heads: int | None = None,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `LARPTokenizer` from LARP's file.

    Args:
        content: of the file (`visar.checkpoints.common.read`).
        patches: (frames, rows, columns) of a clip's patches.
        box: (t, h, w) in which the codes are counted; None: that of the patches.
        num_heads: None: width / 64, as released.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, another number of patches or codes, or keys and shapes that do not fit
            together; all are named.
    """
    state = {key: value for key, value in find_weights(content, MARKS, source).items() if not key.startswith(_PRIOR)}
    sized = {MARKS[0]: 2, MARKS[2]: 5, "encoder_patch_pe": 3, _CODES: 2}
    require(state, sized, source, "LARP tokenizer")
    queries, width = state[MARKS[0]].shape
    patch = tuple(state[MARKS[2]].shape[2:])
    found, box = state["encoder_patch_pe"].shape[1], box or patches
    for what, count, shape in (("patches", found, patches), ("codes", queries, box)):
        if count != math.prod(shape):
            raise ValueError(
                f"{source}: clips of {count} {what}; the released model has {' x '.join(map(str, shape))}"
            )
    if num_heads is None and width % _WIDTH_OF_HEADS:
        raise ValueError(f"{source}: width {width} is of no released size; give num_heads (--num-heads)")
    config = dict(
        image_size=patches[1] * patch[1],
        num_frames=patches[0] * patch[0],
        patch=patch,
        box=box,
        width=width,
        num_layers=count_modules(state, "encoder.blocks"),
        num_heads=num_heads or width // _WIDTH_OF_HEADS,
        codebook_size=state[_CODES].shape[0],
        codebook_dim=state[_CODES].shape[1],
    )
    return fitted(LARPTokenizer, config, state, source)


def load_tokenizer(
    path: str | Path,
    *,
    patches: tuple[int, int, int] = RELEASED,
    box: tuple[int, int, int] | None = None,
    num_heads: int | None = None,
) -> LARPTokenizer:
    """The tokenizer of a file, in evaluation mode on the CPU, float32; arguments and errors as of
    `convert_tokenizer`."""
    config, state = convert_tokenizer(read(path), patches=patches, box=box, num_heads=num_heads, source=str(path))
    return build(LARPTokenizer, config, state, str(path), torch.float32)


def _read_tokenizer(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    config, state = convert_tokenizer(content, num_heads=options.num_heads, source=file)
    return Models(tokenizer=build(LARPTokenizer, config, state, file, torch.float32))


TOKENIZER = Row("larp", "tokenizer", MARKS, _read_tokenizer, takes=("num_heads",))
ROWS = (TOKENIZER,)

OFFICIAL: dict[str, Official] = {}  # a tokenizer alone makes no images
