"""Weights of D-AR (arXiv 2505.23660, showlab/D-AR@3fb0f2d): its diffusion tokenizer and its class-conditional
transformers.

Sizes are read off keys and shapes. A tokenizer's file cannot say how many tokens an image has, in how many groups, nor
the numbers of the time grid: the released ones are taken. The transformers have LlamaGen's keys and shapes, and other
rotary positions: such a file is D-AR's only where its user says so (--source dar, or an official name).
"""

import math
from collections.abc import Mapping

import torch

from visar.checkpoints import llamagen
from visar.checkpoints.common import State, build, count_modules, find_weights, fitted, read, rename, require
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, check_codes, expect
from visar.generators.raster import RasterGPT
from visar.tokenizers.diffusion import DiffusionTokenizer

_MARKS = ("query_embedding.weight", "quantize.embedding.weight", "diff_decoder.net.conv_in.weight")
_GPT_MARKS = (llamagen.GPT_MARK, "cls_embedding.embedding_table.weight")
_WHAT = "D-AR tokenizer"
# A head that only training reads, and a queue of recent ids that nobody reads.
_IGNORED = ("diff_decoder.net.repa_out.", "quantize.codebook_used")
_RENAMED = [
    (r"^diff_decoder\.net\.", "decoder."),
    (r"^quant_in_conv\.", "quant_in."),
    (r"^quant_out_conv\.", "quant_out."),
]
_BACK = [(r"^decoder\.", "diff_decoder.net."), (r"^quant_(in|out)\.", r"quant_\1_conv.")]
# Convolutions there, linear layers here; a patch is a vector with its channel slowest in both.
_CONVOLUTIONS = (
    "patchify.weight",
    "quant_in_conv.weight",
    "quant_out_conv.weight",
    "diff_decoder.net.conv_in.weight",
    "diff_decoder.net.conv_out.weight",
)
TOKENS, GROUPS = 256, 8
"""Tokens and groups of an image in the released tokenizer."""


def convert_tokenizer(
    content: Mapping[str, object],
    *,
    image_size: int = 256,
    num_tokens: int = TOKENS,
    num_groups: int = GROUPS,
    num_steps: int | None = None,
    time_shift: float = 2.0,
    data_std: float = 0.6,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `DiffusionTokenizer` from D-AR's tokenizer file.

    Args:
        content: of the file (`visar.checkpoints.common.read`), or its weights.
        image_size: side of the images that are decoded by default; the file works at all sizes.
        num_tokens, num_groups, num_steps, time_shift, data_std: see `DiffusionTokenizer`; the released model's by
            default, as the file does not tell them.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, or keys and shapes that do not fit together; all are named.
    """
    state = find_weights(content, _MARKS, source, "ema")
    state = {key: value for key, value in state.items() if not key.startswith(_IGNORED)}
    matrices = [*_MARKS[:2], "query_linear.weight", "decoder_embedding.weight", "diff_decoder.net.cond_mlp.weight"]
    norm = "encoder_layers.0.attention.q_norm.weight"
    sized = dict.fromkeys(matrices, 2) | dict.fromkeys(_CONVOLUTIONS, 4) | {norm: 1}
    require(state, sized, source, _WHAT)
    width, channels, patch_size, _ = state["patchify.weight"].shape
    pixel_width, pixels = state["diff_decoder.net.conv_in.weight"].shape[:2]
    max_tokens, condition_width = state["decoder_embedding.weight"].shape
    config = dict(
        image_size=image_size,
        image_channels=channels,
        patch_size=patch_size,
        encoder_width=width,
        num_encoder_layers=count_modules(state, "encoder_layers"),
        query_rank=state["query_linear.weight"].shape[1],
        num_tokens=num_tokens,
        max_tokens=max_tokens,
        num_groups=num_groups,
        codebook_size=state["quantize.embedding.weight"].shape[0],
        codebook_dim=state["quantize.embedding.weight"].shape[1],
        condition_width=condition_width,
        num_condition_layers=count_modules(state, "decoder_layers"),
        pixel_width=pixel_width,
        num_pixel_layers=count_modules(state, "diff_decoder.net.blocks"),
        pixel_patch_size=math.isqrt(pixels // channels),
        head_width=state[norm].shape[0],
        num_steps=num_steps,
        time_shift=time_shift,
        data_std=data_std,
    )
    flat = {key: value.flatten(1) if key in _CONVOLUTIONS else value for key, value in state.items()}
    return fitted(DiffusionTokenizer, config, rename(flat, _RENAMED, source), source)


def export_tokenizer(model: DiffusionTokenizer) -> dict[str, State]:
    """A file's content that D-AR's own loader takes (save it with `torch.save`)."""
    state = rename(model.state_dict(), _BACK)
    for key in _CONVOLUTIONS:
        side = model.config["patch_size"] if key == "patchify.weight" else 1
        state[key] = state[key].unflatten(1, (-1, side, side))
    return {"model": state}


# ------------------------------------------------------------------------------------------------- for visar convert
def _tokens(grid: tuple[int, int] | None) -> int:
    return TOKENS if grid is None else grid[0] * grid[1]


def _tokenizer(content: Content, num_tokens: int, file: str) -> DiffusionTokenizer:
    config, state = convert_tokenizer(content, num_tokens=num_tokens, source=file)
    return build(DiffusionTokenizer, config, state, file, torch.float32)


def _read_tokenizer(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    state = find_weights(content, _MARKS, file, options.weights)
    note = "groups and time grid are the released model's, which the file does not tell"
    return Models(tokenizer=_tokenizer(state, _tokens(options.grid), file), notes=(note,))


def _read_generator(options: Convert, content: Content, second: Content | None) -> Models:
    file, tokens = str(options.file), _tokens(options.grid)
    config, state = llamagen.convert_gpt(
        content,
        grid=(1, tokens),
        rope="1d",
        num_heads=options.num_heads,
        prefer_ema=options.weights == "ema",
        source=file,
    )
    tokenizer = None
    if options.tokenizer is not None:
        found = read(options.tokenizer)
        expect(found, TOKENIZER, options.tokenizer)
        # Those that D-AR samples with, whatever kind the generator's file has.
        weights = find_weights(found, TOKENIZER.marks, str(options.tokenizer), TOKENIZER.weights)
        tokenizer = _tokenizer(weights, tokens, str(options.tokenizer))
        codes = tokenizer.config["codebook_size"]
        check_codes(state, "tok_embeddings.weight", file, codes, options.tokenizer)
    return Models(tokenizer, build(RasterGPT, config, state, file, torch.float32))


TOKENIZER = Row("dar", "tokenizer", _MARKS, _read_tokenizer, takes=("grid",), weights="ema")
GENERATOR = Row(
    "dar", "generator", _GPT_MARKS, _read_generator, takes=("tokenizer", "grid", "num_heads"), only_if_named=True
)
ROWS = (TOKENIZER, GENERATOR)


def _official(file: str, scale: float) -> Official:
    return Official(
        source="dar",
        repository="showlab/D-AR",
        file=file,
        tokenizer_repository="showlab/D-AR",
        tokenizer_file="D-AR-tokenizer_v1.pt",
        grid=None,
        defaults={"guidance": {"scale": scale, "schedule": "linear", "start": 1.1}},
        note="ImageNet classes, 256 x 256; previews after every 32 tokens",
    )


# Guidance: best FID rows of arXiv 2505.23660.
OFFICIAL = {
    "dar-l": _official("D-AR-L-360K.pt", 8.0),
    "dar-xl": _official("D-AR-XL-360K.pt", 10.0),
}
