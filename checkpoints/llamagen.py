"""Weights of LlamaGen (arXiv 2406.06525, FoundationVision/LlamaGen@ce98ec4): its VQ tokenizers and transformers.

Our modules have the names of the files, so nothing is renamed. Sizes are read off keys and shapes. A file cannot say
what has no parameters: the grid of tokens, the kind of rotary embedding (D-AR's files look the same), whether codes
are normalised; those are arguments. Two keys are ignored: `freqs_cis` (rotary table in old files) and
`quantize.codebook_used` (a queue of recent ids, read by nobody).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from visar.checkpoints.common import State, build, count_modules, fitted, read, require, unwrap
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, check_codes, choose_weights, expect
from visar.generators.raster import RASTER_PRESETS, RasterGPT
from visar.layers.rope import RopeKind
from visar.tokenizers.vq import VQTokenizer

VQ_MARK, GPT_MARK = "encoder.conv_blocks.0.res.0.conv1.weight", "layers.0.attention.wqkv.weight"
IGNORED_VQ, IGNORED_GPT = ("quantize.codebook_used",), ("freqs_cis",)
# Length of the queue that upstream's strict loader wants to find.
_USAGE_QUEUE = 65536

# (layers, width) -> heads: the released sizes, then three that upstream defines and did not release.
NUM_HEADS: dict[tuple[int, int], int] = {
    (preset["num_layers"], preset["width"]): preset["num_heads"] for preset in RASTER_PRESETS.values()
} | {(48, 2560): 40, (22, 2048): 32, (32, 4096): 32}


def _weights(
    content: Mapping[str, object], source: str, prefer_ema: bool, mark: str, ignored: tuple[str, ...]
) -> State:
    """The state dict without ignored keys, checked to be of the wanted kind."""
    names = {VQ_MARK: "a LlamaGen VQ tokenizer", GPT_MARK: "a LlamaGen transformer (GPT)"}
    state = unwrap(content, source, prefer_ema=prefer_ema)
    other = next((name for key, name in names.items() if key != mark and key in state), None)
    if mark not in state and other is not None:
        raise ValueError(f"{source} is {other}, not {names[mark]}")
    require(state, {mark: 4 if mark == VQ_MARK else 2}, source, names[mark])
    return {key: value for key, value in state.items() if key not in ignored}


# ------------------------------------------------------------------------------------------------------- tokenizer
def convert_vq(
    content: Mapping[str, object],
    *,
    image_size: int = 256,
    normalize_codes: bool = True,
    prefer_ema: bool = False,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `VQTokenizer` from a LlamaGen tokenizer file.

    Args:
        content: of the file (`visar.checkpoints.common.read`).
        image_size: side of the images that `layout` describes; the file works at all sizes.
        normalize_codes: all released tokenizers do.
        prefer_ema: see `visar.checkpoints.common.unwrap`.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, or keys and shapes that do not fit together; all are named.
    """
    state = _weights(content, source, prefer_ema, VQ_MARK, IGNORED_VQ)
    levels = max(count_modules(state, "encoder.conv_blocks"), 1)
    first = "conv_blocks.{}.res.0.conv1.weight"
    encoder_keys = [f"encoder.{first.format(i)}" for i in range(levels)]
    # Decoder levels are stored from coarse to fine.
    decoder_keys = [f"decoder.{first.format(i)}" for i in reversed(range(levels))]
    convolutions = ["encoder.conv_in.weight", "encoder.conv_out.weight", *encoder_keys, *decoder_keys]
    sized = dict.fromkeys(convolutions, 4) | {"quantize.embedding.weight": 2}
    require(state, sized, source, "LlamaGen VQ tokenizer")
    base, image_channels = state["encoder.conv_in.weight"].shape[:2]
    codebook_size, codebook_dim = state["quantize.embedding.weight"].shape

    def multipliers(keys: list[str]) -> tuple[int, ...]:
        widths = [state[key].shape[0] for key in keys]
        if any(width % base for width in widths):
            raise ValueError(f"{source}: widths {widths} are not multiples of the base width {base}")
        return tuple(width // base for width in widths)

    encoder, decoder = multipliers(encoder_keys), multipliers(decoder_keys)
    config = dict(
        image_size=image_size,
        image_channels=image_channels,
        base_channels=base,
        channel_multipliers=encoder,
        decoder_channel_multipliers=None if decoder == encoder else decoder,
        num_res_blocks=count_modules(state, "encoder.conv_blocks.0.res"),
        latent_channels=state["encoder.conv_out.weight"].shape[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        normalize_codes=normalize_codes,
    )
    return fitted(VQTokenizer, config, state, source)


def load_vq(
    path: str | Path,
    *,
    image_size: int = 256,
    normalize_codes: bool = True,
    prefer_ema: bool = False,
    dtype: torch.dtype = torch.float32,
) -> VQTokenizer:
    """The tokenizer of a LlamaGen file, in evaluation mode on the CPU; arguments and errors as of `convert_vq`."""
    config, state = convert_vq(
        read(path),
        image_size=image_size,
        normalize_codes=normalize_codes,
        prefer_ema=prefer_ema,
        source=str(path),
    )
    return build(VQTokenizer, config, state, str(path), dtype)


def export_vq(model: VQTokenizer) -> dict[str, State]:
    """A file's content that LlamaGen's own loader takes (save it with `torch.save`)."""
    return {"model": model.state_dict() | {IGNORED_VQ[0]: torch.zeros(_USAGE_QUEUE)}}


# ----------------------------------------------------------------------------------------------------- transformer
def prefix_config(state: State, source: str) -> dict:
    """Arguments that say what the prefix is: a class or a caption."""
    table, caption = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"
    if table in state:
        require(state, {table: 2}, source, "LlamaGen transformer")
        return dict(num_classes=state[table].shape[0] - 1)
    if caption not in state:
        raise ValueError(f"{source} has neither {table} (classes) nor {caption} (captions)")
    rows = "cls_embedding.uncond_embedding"
    require(state, {caption: 2, rows: 2}, source, "LlamaGen transformer")
    return dict(num_classes=0, caption_width=state[caption].shape[1], caption_length=state[rows].shape[0])


def convert_gpt(
    content: Mapping[str, object],
    *,
    grid: tuple[int, int],
    rope: RopeKind = "2d",
    num_heads: int | None = None,
    prefer_ema: bool = False,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `RasterGPT` from a LlamaGen transformer file.

    Args:
        content: of the file (`visar.checkpoints.common.read`).
        grid: (rows, columns) of tokens: image size / 16 for the released models.
        rope: "2d"; "1d" for D-AR's files.
        num_heads: None looks it up by depth and width.
        prefer_ema: see `visar.checkpoints.common.unwrap`.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, an unknown number of heads, or keys and shapes that do not fit together; all
            are named.
    """
    state = _weights(content, source, prefer_ema, GPT_MARK, IGNORED_GPT)
    sized = ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"]
    require(state, dict.fromkeys(sized, 2), source, "LlamaGen transformer")
    vocab_size, width = state[sized[0]].shape
    num_layers = count_modules(state, "layers")
    if state[GPT_MARK].shape[0] != 3 * width:
        raise ValueError(
            f"{source}: {GPT_MARK} has {state[GPT_MARK].shape[0]} rows, {3 * width} needed: shared key and value "
            "heads are not supported (no released model has them)"
        )
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
        rope=rope,
        **prefix_config(state, source),
    )
    return fitted(RasterGPT, config, state, source)


def load_gpt(
    path: str | Path,
    *,
    grid: tuple[int, int],
    rope: RopeKind = "2d",
    num_heads: int | None = None,
    prefer_ema: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RasterGPT:
    """The transformer of a LlamaGen file, in evaluation mode on the CPU; arguments and errors as of `convert_gpt`."""
    config, state = convert_gpt(
        read(path), grid=grid, rope=rope, num_heads=num_heads, prefer_ema=prefer_ema, source=str(path)
    )
    return build(RasterGPT, config, state, str(path), dtype)


def export_gpt(model: RasterGPT) -> dict[str, dict[str, Tensor]]:
    """A file's content that LlamaGen's own loader takes (save it with `torch.save`).

    Raises:
        ValueError: the model has parts that LlamaGen does not (attributes, words, codebook input).
    """
    config, state = model.config, model.state_dict()
    foreign = [key for key in ("attributes", "word_vocab_size") if config[key]]
    if config["token_input"] != "table":
        foreign.append("token_input")
    if foreign:
        raise ValueError(f"LlamaGen has no place for {', '.join(f'{key}={config[key]!r}' for key in foreign)}")
    return {"model": state}


# ------------------------------------------------------------------------------------------------- for visar convert
def _read_tokenizer(options: Convert, content: Content, second: Content | None) -> Models:
    return Models(tokenizer=build_tokenizer(content, options.weights == "ema", options.grid, str(options.file)))


def build_tokenizer(content: Content, ema: bool, grid: tuple[int, int] | None, file: str) -> VQTokenizer:
    """The tokenizer of a file, for images of so many tokens; also of projects that use LlamaGen's.

    Args:
        content: of the file.
        ema: whether to take averaged weights where there are both.
        grid: (rows, columns) of tokens; None: 16 x 16.
        file: for error messages.
    """
    config, state = convert_vq(content, prefer_ema=ema, source=file)
    if grid is not None:
        factor = 2 ** (len(config["channel_multipliers"]) - 1)
        rows, columns = grid
        config["image_size"] = rows * factor if rows == columns else (rows * factor, columns * factor)
    return build(VQTokenizer, config, state, file, torch.float32)


def _read_generator(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    if options.grid is None:
        raise ValueError(
            f"{file}: the grid of tokens is not in the file; say grid, image size / 16 for the released models "
            "(16 16 for 256 px, 24 24 for 384 px, 32 32 for 512 px), or an official name (--like NAME)"
        )
    config, state = convert_gpt(
        content,
        grid=options.grid,
        rope=options.rope,
        num_heads=options.num_heads,
        prefer_ema=options.weights == "ema",
        source=file,
    )
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer_content = read(options.tokenizer)
        expect(tokenizer_content, TOKENIZER, options.tokenizer)
        ema = choose_weights(tokenizer_content, TOKENIZER.marks, options.weights, TOKENIZER.weights) == "ema"
        tokenizer = build_tokenizer(tokenizer_content, ema, options.grid, str(options.tokenizer))
        codes = tokenizer.config["codebook_size"]
        check_codes(state, "tok_embeddings.weight", file, codes, options.tokenizer)
    return Models(tokenizer, build(RasterGPT, config, state, file, torch.float32))


# LlamaGen's sampling scripts take the plain weights of both files (its reconstruction script the averaged ones).
TOKENIZER = Row("llamagen", "tokenizer", (VQ_MARK,), _read_tokenizer, takes=("grid",))
GENERATOR = Row(
    "llamagen", "generator", (GPT_MARK,), _read_generator, takes=("tokenizer", "grid", "rope", "num_heads")
)
ROWS = (TOKENIZER, GENERATOR)


def _classes(file: str, side: int, scale: float) -> Official:
    return Official(
        source="llamagen",
        repository="FoundationVision/LlamaGen",
        file=file,
        tokenizer_repository="FoundationVision/LlamaGen",
        tokenizer_file="vq_ds16_c2i.pt",
        grid=(side // 16, side // 16),
        defaults={"guidance_scale": scale},
        note=f"ImageNet classes, {side} x {side}",
    )


def _captions(file: str, side: int) -> Official:
    return Official(
        source="llamagen",
        repository="peizesun/llamagen_t2i",
        file=file,
        tokenizer_repository="peizesun/llamagen_t2i",
        tokenizer_file="vq_ds16_t2i.pt",
        grid=(side // 16, side // 16),
        defaults={"guidance_scale": 7.5, "top_k": 1000, "text_encoder": "flan-t5-xl"},
        note=f"captions through FLAN-T5-XL (fetched at the first prompt), {side} x {side}",
    )


# Guidance: best FID rows of arXiv 2406.06525 (tables 8 and 9) and the defaults of the released text sampler.
OFFICIAL = {
    "llamagen-c2i-b-256": _classes("c2i_B_256.pt", 256, 2.0),
    "llamagen-c2i-b-384": _classes("c2i_B_384.pt", 384, 2.25),
    "llamagen-c2i-l-256": _classes("c2i_L_256.pt", 256, 1.75),
    "llamagen-c2i-l-384": _classes("c2i_L_384.pt", 384, 2.0),
    "llamagen-c2i-xl-384": _classes("c2i_XL_384.pt", 384, 1.75),
    "llamagen-c2i-xxl-384": _classes("c2i_XXL_384.pt", 384, 1.75),
    "llamagen-c2i-3b-384": _classes("c2i_3B_384.pt", 384, 1.65),
    "llamagen-t2i-xl-256": _captions("t2i_XL_stage1_256.pt", 256),
    "llamagen-t2i-xl-512": _captions("t2i_XL_stage2_512.pt", 512),
}
