"""Weights of NAR (arXiv 2503.10696, ThisisBillhe/NAR@225c1fb): its image and video transformers.

Image files have LlamaGen's names, one block more, and a second norm and output called medusa. They do not tell the
grid: both text stages have the same tensors. Their codes are those of LlamaGen's tokenizers. The page of NAR lists,
for text stage 1, a file of LlamaGen itself, which has no second head; it is recognised as LlamaGen's.

Repositories on the hub: chenfeng1271/NAR-imagenet-256-B, -L, -XXL, yefly/NAR-imagenet-256-M, -XL,
yefly/NAR-XL-t2i-stage1, -stage2, chenfeng1271/NAR-ucf101-256-L, -LP. The name of B's file alone is known.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from visar.checkpoints import larp, llamagen
from visar.checkpoints.common import State, build, count_modules, find_weights, fitted, read, rename, require
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, check_codes, choose_weights, expect
from visar.generators.next_neighbor import NEXT_NEIGHBOR_BOXES, NEXT_NEIGHBOR_PRESETS, NextNeighborTransformer

MARKS = (llamagen.GPT_MARK, "medusa_norm.weight", "medusa_output.weight")
BOX_MARKS = (llamagen.GPT_MARK, "abs_pe", "output_R.weight", "output_D.weight", "output_B.weight")

# (blocks before the first head, width) -> heads.
NUM_HEADS: dict[tuple[int, int], int] = {
    (preset["num_layers"], preset["width"]): preset["num_heads"]
    for preset in (NEXT_NEIGHBOR_PRESETS | NEXT_NEIGHBOR_BOXES).values()
}

# Ours -> theirs, for images and for boxes of frames.
_IMAGE_NAMES = (("other_norms.0.", "medusa_norm."), ("other_outputs.0.", "medusa_output."))
_BOX_NAMES = (
    ("norm.", "norm_R."),
    ("output.", "output_R."),
    ("other_norms.0.", "norm_D."),
    ("other_outputs.0.", "output_D."),
    ("other_norms.1.", "norm_B."),
    ("other_outputs.1.", "output_B."),
)


def _rules(names: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """For `rename`: whole beginnings of keys."""
    return [(f"^{re.escape(before)}", after) for before, after in names]


def convert_generator(
    content: Mapping[str, object],
    *,
    grid: tuple[int, ...],
    num_heads: int | None = None,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `NextNeighborTransformer` from NAR's file of an image or video model.

    Args:
        content: of the file (`visar.checkpoints.common.read`), or its weights.
        grid: (rows, columns) of tokens, image size / 16 for the released models; (frames, rows, columns) of videos.
        num_heads: None looks it up by depth and width.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, an unknown number of heads, or keys and shapes that do not fit together; all
            are named.
    """
    box = len(grid) == 3
    state = find_weights(content, BOX_MARKS if box else MARKS, source)
    sized = ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"]
    require(state, dict.fromkeys(sized, 2) | ({"abs_pe": 3} if box else {}), source, "NAR transformer")
    vocab_size, width = state[sized[0]].shape
    num_layers = count_modules(state, "layers") - len(grid) + 1
    if num_heads is None:
        if (num_layers, width) not in NUM_HEADS:
            known = ", ".join(f"{layers} x {size}" for layers, size in NUM_HEADS)
            raise ValueError(
                f"{source}: the number of heads of {num_layers} layers x {width} is not in the file and not known "
                f"(known: {known}); give num_heads (--num-heads)"
            )
        num_heads = NUM_HEADS[num_layers, width]
    config = dict(
        vocab_size=vocab_size,
        grid=tuple(grid),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_width=state[sized[1]].shape[0],
        positions="learned" if box else "rope",
        **llamagen.prefix_config(state, source),
    )
    names = _BOX_NAMES if box else _IMAGE_NAMES
    ours = rename(state, _rules([(theirs, own) for own, theirs in names]), source)
    if box:
        ours["position_embedding"] = ours.pop("abs_pe")[0]
    return fitted(NextNeighborTransformer, config, ours, source)


def load_generator(
    path: str | Path,
    *,
    grid: tuple[int, ...],
    num_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> NextNeighborTransformer:
    """The transformer of a file, in evaluation mode on the CPU; arguments and errors as of `convert_generator`."""
    config, state = convert_generator(read(path), grid=grid, num_heads=num_heads, source=str(path))
    return build(NextNeighborTransformer, config, state, str(path), dtype)


def export_generator(model: NextNeighborTransformer) -> dict[str, State]:
    """A file's content that NAR's own loader takes (save it with `torch.save`).

    Raises:
        ValueError: the model has parts that NAR does not (attributes, words, other positions).
    """
    config, state, box = model.config, model.state_dict(), len(model.config["grid"]) == 3
    foreign = [key for key in ("attributes", "word_vocab_size") if config[key]]
    foreign += [] if config["positions"] == ("learned" if box else "rope") else ["positions"]
    if foreign:
        raise ValueError(f"NAR has no place for {', '.join(f'{key}={config[key]!r}' for key in foreign)}")
    if box:
        state["abs_pe"] = state.pop("position_embedding")[None]
    return {"model": rename(state, _rules(_BOX_NAMES if box else _IMAGE_NAMES))}


# ------------------------------------------------------------------------------------------------- for visar convert
def _read_image(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    if options.grid is None:
        raise ValueError(
            f"{file}: the grid of tokens is not in the file; say grid, image size / 16 for the released models (16 16 "
            "for 256 px, 32 32 for text stage 2), or an official name (--like NAME)"
        )
    state = find_weights(content, MARKS, file, options.weights)
    config, converted = convert_generator(state, grid=options.grid, num_heads=options.num_heads, source=file)
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer_content = read(options.tokenizer)
        row = llamagen.TOKENIZER
        expect(tokenizer_content, row, options.tokenizer)
        ema = choose_weights(tokenizer_content, row.marks, options.weights, row.weights) == "ema"
        tokenizer = llamagen.build_tokenizer(tokenizer_content, ema, options.grid, str(options.tokenizer))
        codes = tokenizer.config["codebook_size"]
        check_codes(converted, "tok_embeddings.weight", file, codes, options.tokenizer)
    generator = build(NextNeighborTransformer, config, converted, file, torch.float32)
    return Models(tokenizer, generator, defaults=CAPTION_DEFAULTS if config.get("caption_width") else CLASS_DEFAULTS)


def _read_box(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    state = find_weights(content, BOX_MARKS, file, options.weights)
    require(state, {"abs_pe": 3}, file, "NAR video transformer")
    released: tuple[int, ...] = next(iter(NEXT_NEIGHBOR_BOXES.values()))["grid"]
    tokens = state["abs_pe"].shape[1] - 1
    if tokens != math.prod(released):
        shape = " x ".join(map(str, released))
        raise ValueError(f"{file}: a video of {tokens} tokens; the released models have {shape}")
    config, converted = convert_generator(state, grid=released, num_heads=options.num_heads, source=file)
    generator = build(NextNeighborTransformer, config, converted, file, torch.float32)
    if options.tokenizer is None:
        return Models(generator=generator)
    expect(read(options.tokenizer), larp.TOKENIZER, options.tokenizer)
    tokenizer = larp.load_tokenizer(options.tokenizer)
    check_codes(converted, "tok_embeddings.weight", file, tokenizer.config["codebook_size"], options.tokenizer)
    return Models(tokenizer, generator, defaults=VIDEO_DEFAULTS)


# Guidance of the paper's tables of classes and of videos, and of the released demonstration of captions.
CLASS_DEFAULTS = {"guidance_scale": 2.0}
VIDEO_DEFAULTS = {"guidance_scale": 1.25}
CAPTION_DEFAULTS = {"guidance_scale": 7.5, "text_encoder": "flan-t5-xl"}
GENERATOR = Row("nar", "generator", MARKS, _read_image, takes=("tokenizer", "grid", "num_heads"))
BOX = Row("nar", "generator", BOX_MARKS, _read_box, takes=("tokenizer", "num_heads"))
ROWS = (GENERATOR, BOX)

# Files of the other sizes have names that we do not know: `visar convert` takes them.
OFFICIAL: dict[str, Official] = {
    "nar-c2i-b-256": Official(
        source="nar",
        repository="chenfeng1271/NAR-imagenet-256-B",
        file="last_version.pt",
        tokenizer_repository="FoundationVision/LlamaGen",
        tokenizer_file="vq_ds16_c2i.pt",
        grid=(16, 16),
        defaults=CLASS_DEFAULTS,
        note="ImageNet classes, 256 x 256",
    )
}
