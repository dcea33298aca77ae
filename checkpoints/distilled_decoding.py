"""Weights of Distilled Decoding's students (arXiv 2412.17153, microsoft/distilled_decoding@3b95d33f).

Students of LlamaGen-B and -L, and of VAR-d16, -d20 and -d24, all for ImageNet classes at 256 px. Their layouts are
those of the teachers' files with a mark of data and noise (`n_d_embed`), the linear layers that bring it into the
blocks (`layerwise_n_d_embed`, VAR), and a second head (`final_layer_conti`). The table of LlamaGen's ids is a linear
map of code vectors; VAR's levels and positions begin with those of the condition's cell. What files do not say: which
steps a student was trained for, and from which block on its vectors are used; these are the released commands'.

Codes become part of the model, so the tokenizer is needed.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from visar.checkpoints import llamagen, var
from visar.checkpoints.common import State, build, count_modules, find_weights, fitted, read, rename, require
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, check_codes, choose_weights, expect
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.generators.released_student import ReleasedStudent
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import VQTokenizer

KIND, HEAD = "n_d_embed.weight", "final_layer_conti.linear.weight"
DEFAULTS: dict[str, Any] = {"sampler": "one_step", "guidance_scale": 1.0}
_OWN = [
    (r"^n_d_embed\.", "kind."),
    (r"^layerwise_n_d_embed\.", "kind_layers."),
    (r"^final_layer_conti\.", "vector_head."),
]
_PARTS = re.compile(r"(n_d_embed|layerwise_n_d_embed|final_layer_conti)\.")


def _student(
    network: type, arguments: dict[str, Any], weights: State, state: State, start: int, late: int, source: str
) -> tuple[dict[str, Any], State]:
    """Configuration and weights of a student, checked.

    Args:
        network, arguments, weights: class, constructor arguments and weights of the teacher's network.
        state: of the file; the student's own parts are read.
        start, late: block that a second step starts from, and from which on vectors are used.
        source: for error messages.
    """
    own = rename({key: value for key, value in state.items() if _PARTS.match(key)}, _OWN, source)
    config = dict(network_class=network.__name__, arguments=arguments, starts=(0, start), output="vectors", late=late)
    together = own | {f"network.{key}": value for key, value in weights.items()}
    return fitted(ReleasedStudent, config, together, source)


# ------------------------------------------------------------------------------------------------ LlamaGen's students
def convert_raster(
    content: Mapping[str, object],
    tokenizer: VQTokenizer,
    *,
    grid: tuple[int, int] = (16, 16),
    num_heads: int | None = None,
    weights: Any = "ema",
    source: str = "the checkpoint",
) -> tuple[dict[str, Any], State]:
    """Configuration and weights of a `ReleasedStudent` of LlamaGen.

    Args:
        content: of the file (`visar.checkpoints.common.read`).
        tokenizer: LlamaGen's.
        grid: (rows, columns) of tokens: (16, 16) for the released ones.
        num_heads: None looks it up by depth and width.
        weights: "ema" or "plain", where the file has both.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, or keys and shapes that do not fit together; all are named.
    """
    state = find_weights(content, RASTER.marks, source, weights)
    embedding = "tok_embeddings.weight"
    require(state, {embedding: 2, "output.weight": 2}, source, "student of LlamaGen")
    plain = {key: value for key, value in state.items() if not _PARTS.match(key) and key != "freqs_cis"}
    # What LlamaGen's converter reads sizes off: a table of ids of this width.
    width, channels = state[embedding].shape
    table = torch.empty(state["output.weight"].shape, device="meta")
    like = {key: value for key, value in plain.items() if key != "tok_embeddings.bias"} | {embedding: table}
    arguments, _ = llamagen.convert_gpt(like, grid=grid, num_heads=num_heads, source=source)
    arguments |= dict(token_input="codebook", codebook_width=channels)
    network = rename(plain, [(r"^tok_embeddings\.", "codebook_proj.")], source)
    network["codebook"] = tokenizer.codebook.detach().float()
    tokens, small = grid[0] * grid[1], (arguments["num_layers"], width) == (12, 768)
    start, late = 80 * tokens // 256, (80 if small else 130) * tokens // 256
    return _student(RasterGPT, arguments, network, state, start, late, source)


def _read_raster(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    if options.tokenizer is None:
        raise ValueError(f"{file}: a student includes its tokenizer's codes; say tokenizer (vq_ds16_c2i.pt)")
    grid = options.grid or (16, 16)
    tokenizer_content = read(options.tokenizer)
    expect(tokenizer_content, llamagen.TOKENIZER, options.tokenizer)
    row = llamagen.TOKENIZER
    kind = choose_weights(tokenizer_content, row.marks, None, row.weights)
    tokenizer = llamagen.build_tokenizer(tokenizer_content, kind == "ema", grid, str(options.tokenizer))
    state = find_weights(content, RASTER.marks, file, options.weights)
    check_codes(state, "output.weight", file, tokenizer.config["codebook_size"], options.tokenizer)
    config, converted = convert_raster(
        content, tokenizer, grid=grid, num_heads=options.num_heads, weights=options.weights, source=file
    )
    return Models(tokenizer, build(ReleasedStudent, config, converted, file, torch.float32), defaults=DEFAULTS)


# ----------------------------------------------------------------------------------------------------- VAR's students
def convert_scales(
    content: Mapping[str, object],
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: var.Scales | None = None,
    num_heads: int | None = None,
    weights: Any = "ema",
    source: str = "the checkpoint",
) -> tuple[dict[str, Any], State]:
    """Configuration and weights of a `ReleasedStudent` of VAR.

    Args:
        content, weights, source: as of `convert_raster`.
        tokenizer: VAR's.
        scales: the pyramid, without the condition's cell; None knows it by its number of tokens.
        num_heads: None reads it off the attention's scales.

    Raises:
        ValueError: another kind of file, keys and shapes that do not fit together (all are named), or a pyramid that
            nothing tells.
    """
    state = find_weights(content, SCALES.marks, source, weights)
    require(state, {"pos_1LC": 3, "lvl_embed.weight": 2, "pos_start": 3, "head.weight": 2}, source, "student of VAR")
    plain = {key: value for key, value in state.items() if not _PARTS.match(key) and key != "lvl_1L"}
    position, level = state["pos_1LC"], state["lvl_embed.weight"]
    # The cell's own level and position are part of what it starts from.
    plain["pos_start"] = state["pos_start"] + position[:, :1] + level[:1]
    plain["pos_1LC"], plain["lvl_embed.weight"] = position[:, 1:], level[1:]
    arguments = var.transformer_config(plain, "blocks.0", tokenizer, num_heads, scales, source)
    arguments |= dict(
        vocab_size=state["head.weight"].shape[0],
        num_layers=count_modules(plain, "blocks"),
        shared_adaln="shared_ada_lin.1.weight" in plain,
    )
    late = min(5 if arguments["num_layers"] == 16 else 4, len(arguments["scales"]) - 1)
    network = var.to_ours(plain, tokenizer, source)
    return _student(NextScaleTransformer, arguments, network, state, late, late, source)


def _read_scales(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    if options.tokenizer is None:
        raise ValueError(f"{file}: a student includes its tokenizer's codes; say tokenizer (vae_ch160v4096z32.pth)")
    tokenizer_content, row = read(options.tokenizer), var.TOKENIZER
    expect(tokenizer_content, row, options.tokenizer)
    kind = choose_weights(tokenizer_content, row.marks, None, row.weights)
    vq = find_weights(tokenizer_content, row.marks, str(options.tokenizer), kind)
    state = find_weights(content, SCALES.marks, file, options.weights)
    check_codes(state, "head.weight", file, vq[var.VQ_MARK].shape[0], options.tokenizer)
    scales = options.scales or var.SCALES_256
    tokenizer = var.make_tokenizer(vq, scales, str(options.tokenizer))
    config, converted = convert_scales(
        content, tokenizer, scales=scales, num_heads=options.num_heads, weights=options.weights, source=file
    )
    return Models(tokenizer, build(ReleasedStudent, config, converted, file, torch.float32), defaults=DEFAULTS)


# ------------------------------------------------------------------------------------------------- for visar convert
RASTER = Row(
    "distilled_decoding",
    "generator",
    (llamagen.GPT_MARK, KIND, HEAD),
    _read_raster,
    takes=("tokenizer", "grid", "num_heads"),
    weights="ema",
)
SCALES = Row(
    "distilled_decoding",
    "generator",
    (*var.GENERATOR_MARKS, KIND, HEAD),
    _read_scales,
    takes=("tokenizer", "scales", "num_heads"),
    weights="ema",
)
ROWS = (RASTER, SCALES)


def _released(file: str, repository: str, tokenizer: str) -> Official:
    return Official(
        source="distilled_decoding",
        repository="microsoft/distilled_decoding",
        file=file,
        tokenizer_repository=repository,
        tokenizer_file=tokenizer,
        grid=None,
        defaults=DEFAULTS,
        note="one-step student, ImageNet classes, 256 x 256",
    )


OFFICIAL = {
    **{
        f"dd1-llamagen-{size.lower()}": _released(
            f"LlamaGen-DD/llamagen-{size}.pt", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt"
        )
        for size in "BL"
    },
    **{
        f"dd1-var-d{depth}": _released(f"VAR-DD/var-d{depth}.pth", "FoundationVision/var", "vae_ch160v4096z32.pth")
        for depth in (16, 20, 24)
    },
}
