"""Weights of VAR (arXiv 2404.02905, FoundationVision/VAR@78b9539): the multi-scale tokenizer and the transformers.

CoDe's files have the same layout (`visar.checkpoints.code`), HMAR's a related one (`visar.checkpoints.hmar`). Sizes
are read off keys and shapes. Ignored: `lvl_1L` and `attn_bias_for_masking` (they follow from the pyramid, which is
read off the first), `zero_k_bias` (checked to be zero), `quantize.ema_vocab_hit_SV` (a count of uses that nobody
reads).

A transformer's configuration and weights include the tokenizer's codebook and phi; see visar/generators/scales.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visar.checkpoints.common import (
    State,
    autoencoder_export_rules,
    autoencoder_rules,
    autoencoder_sizes,
    build,
    count_modules,
    find_weights,
    fitted,
    read,
    rename,
    require,
)
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, check_codes, choose_weights, expect
from visar.generators.next_scale import SCALES_256, SCALES_512, SCALES_1024, NextScaleTransformer
from visar.layers.scale_attention import scale_mask
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

Scales = Sequence[int | Sequence[int]]

VQ_MARK, TRANSFORMER_MARK = "quantize.embedding.weight", "blocks.0.attn.mat_qkv.weight"
# Pyramids by (tokens, scales), for files without values in their table of levels.
_KNOWN_SCALES = {(sum(n * n for n in scales), len(scales)): scales for scales in (SCALES_256, SCALES_512, SCALES_1024)}
_DERIVED = re.compile(r"(lvl_1L|attn_bias_for_masking|.*\.zero_k_bias)$")
_HEAD_WIDTH = 64
_CLASS = "class_emb.weight"


# ------------------------------------------------------------------------------------------------------- tokenizer
def _vq_rules(levels: int) -> list[tuple[str, str]]:
    return [
        *autoencoder_rules(levels),
        (r"^quantize\.embedding\.", "quantizer.embedding."),
        (r"^quantize\.quant_resi\.qresi\.", "quantizer.phi.0."),
        (r"^quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.", r"quantizer.phi.\1."),
    ]


def _split_qkv(state: State) -> State:
    """Attention's one convolution for queries, keys and values as three."""
    split: State = {}
    for key, value in state.items():
        if ".qkv." not in key:
            split[key] = value
            continue
        for part, piece in zip("qkv", value.chunk(3), strict=True):
            split[key.replace(".qkv.", f".{part}.")] = piece
    return split


def convert_vq(
    content: Mapping[str, object],
    *,
    scales: Scales = SCALES_256,
    phi_ratio: float = 0.5,
    cosine: bool = False,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `MultiScaleVQTokenizer` from VAR's tokenizer file or trainer checkpoint.

    Args:
        content: of the file (`visar.checkpoints.common.read`).
        scales: the pyramid, which the file does not tell: the released file serves 256 and 512 px, with a pyramid
            each.
        phi_ratio, cosine: of the quantiser; the file does not tell them (released: 0.5, False).
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, or keys and shapes that do not fit together; all are named.
    """
    state = find_weights(content, VQ_MARK, source)
    sizes = autoencoder_sizes(state, {VQ_MARK: 2}, source, "VAR tokenizer")
    levels = len(sizes["channel_multipliers"])
    phis = {match[1] for key in state if (match := re.match(r"quantize\.quant_resi\.(.+)\.weight$", key))}
    config = sizes | dict(
        codebook_size=state[VQ_MARK].shape[0],
        codebook_dim=state[VQ_MARK].shape[1],
        scales=tuple(scales),
        attention=f"encoder.down.{levels - 1}.attn.0.norm.weight" in state,
        quant_conv_size=state["quant_conv.weight"].shape[-1],
        num_phi=0 if any(name.isdigit() for name in phis) else len(phis),
        phi_ratio=phi_ratio,
        cosine=cosine,
    )
    kept = {key: value for key, value in state.items() if key != "quantize.ema_vocab_hit_SV"}
    renamed = _split_qkv(rename(kept, _vq_rules(levels), source))
    return fitted(MultiScaleVQTokenizer, config, renamed, source)


def load_vq(
    path: str | Path, *, scales: Scales = SCALES_256, dtype: torch.dtype = torch.float32
) -> MultiScaleVQTokenizer:
    """The tokenizer of `vae_ch160v4096z32.pth` or of a trainer checkpoint, in evaluation mode on the CPU.

    The quantiser stays float32. Arguments and errors as of `convert_vq`.
    """
    config, state = convert_vq(read(path), scales=scales, source=str(path))
    return nn.Module.to(build(MultiScaleVQTokenizer, config, state, str(path), torch.float32), dtype)


def export_vq(model: MultiScaleVQTokenizer) -> State:
    """A file's content that VAR's own loader takes (save it with `torch.save`)."""
    state = {key: value for key, value in model.state_dict().items() if not re.search(r"\.[qkv]\.(weight|bias)$", key)}
    for key, value in model.state_dict().items():
        if match := re.match(r"(.*)\.q\.(weight|bias)$", key):
            others = [model.state_dict()[f"{match[1]}.{part}.{match[2]}"] for part in "kv"]
            state[f"{match[1]}.qkv.{match[2]}"] = torch.cat([value, *others])
    levels, num_phi = len(model.config["channel_multipliers"]), model.config["num_phi"]
    phi = {0: "", 1: "qresi."}.get(num_phi, "qresi_ls.")
    rules = [
        *autoencoder_export_rules(levels),
        (r"^quantizer\.embedding\.", "quantize.embedding."),
        (
            r"^quantizer\.phi\.(\d+)\.",
            f"quantize.quant_resi.{phi}" if num_phi == 1 else rf"quantize.quant_resi.{phi}\1.",
        ),
    ]
    uses = torch.zeros(len(model.quantizer.scales), model.quantizer.vocab_size)
    return rename(state, rules) | {"quantize.ema_vocab_hit_SV": uses}


# ----------------------------------------------------------------------------------------------------- transformer
def sniff_scales(state: State, scales: Scales | None, source: str) -> tuple:
    """The pyramid that a transformer was trained for: as given, from its table of levels, or by its number of tokens.

    Raises:
        ValueError: none of them tells.
    """
    if scales is not None:
        return tuple(scales)
    levels = state.get("lvl_1L")
    if levels is not None and not levels.is_meta:
        if levels.is_floating_point() or not levels.numel() or not 0 <= int(levels.min()) <= int(levels.max()) < 1000:
            raise ValueError(f"{source}: its table of levels (lvl_1L) holds no numbers of scales")
        sizes = torch.bincount(levels.flatten()).tolist()
        sides = tuple(round(size**0.5) for size in sizes)
        if [side * side for side in sides] == sizes:
            return sides
    known = (state["pos_1LC"].shape[1], state["lvl_embed.weight"].shape[0])
    if known not in _KNOWN_SCALES:
        raise ValueError(f"{source}: {known[0]} tokens in {known[1]} scales; say which with scales=(1, 2, ...)")
    return _KNOWN_SCALES[known]


def transformer_config(
    state: State,
    block: str,
    tokenizer: MultiScaleVQTokenizer,
    num_heads: int | None,
    scales: Scales | None,
    source: str,
) -> dict:
    """Constructor arguments that VAR's and HMAR's transformers have in common.

    Args:
        state: in the source's names.
        block: prefix of one transformer block.
        tokenizer: that the transformer was trained with.
        num_heads, scales: None reads them off.
        source: for error messages.

    Raises:
        ValueError: keys are missing that sizes are read from, or nothing tells the number of heads.
    """
    matrices = ["word_embed.weight", "lvl_embed.weight", _CLASS, f"{block}.ffn.fc1.weight"]
    require(state, dict.fromkeys(matrices, 2) | {"pos_1LC": 3}, source, "transformer in VAR's layout")
    width, codebook_width = state["word_embed.weight"].shape
    scale_mul = state.get(f"{block}.attn.scale_mul_1H11")
    if scale_mul is not None:
        require(state, {f"{block}.attn.scale_mul_1H11": 4}, source, "transformer in VAR's layout")
    if num_heads is None:
        if scale_mul is None and width % _HEAD_WIDTH:
            raise ValueError(
                f"{source}: width {width} is not a number of heads of {_HEAD_WIDTH}; give num_heads (--num-heads)"
            )
        num_heads = width // _HEAD_WIDTH if scale_mul is None else scale_mul.shape[1]
    return dict(
        codebook_width=codebook_width,
        scales=sniff_scales(state, scales, source),
        num_phi=tokenizer.config["num_phi"],
        phi_ratio=tokenizer.config["phi_ratio"],
        width=width,
        num_heads=num_heads,
        mlp_ratio=state[f"{block}.ffn.fc1.weight"].shape[0] / width,
        num_classes=state[_CLASS].shape[0] - 1,
        qk_norm=scale_mul is not None,
    )


def to_ours(state: State, tokenizer: MultiScaleVQTokenizer, source: str) -> State:
    """A transformer's weights in our names, with the tokenizer's codebook and phi.

    Raises:
        ValueError: a key bias that is not zero.
    """
    for key, value in state.items():
        if key.endswith(".zero_k_bias") and not value.is_meta and value.any():
            raise ValueError(f"{source}: {key} is not zero; VAR has no bias on keys")
    kept = {key: value for key, value in state.items() if not _DERIVED.match(key)}
    pyramid = tokenizer.quantizer.state_dict(prefix="pyramid.")
    return rename(kept, [(rf"^{re.escape(_CLASS)}$", f"condition_vector.{_CLASS}")], source) | pyramid


def convert_transformer(
    content: Mapping[str, object],
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `NextScaleTransformer` from VAR's transformer file or trainer checkpoint.

    Args:
        content: of the file (`visar.checkpoints.common.read`).
        tokenizer: that it was trained with; its codebook and phi become part of the model, its pyramid does not
            matter.
        scales: None reads the pyramid off the file's table of levels, or knows it by its number of tokens.
        num_heads: None reads it off the attention's scales or, in files without them, takes heads of 64.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, keys and shapes that do not fit together (all are named), or a pyramid that
            nothing tells.
    """
    state = find_weights(content, TRANSFORMER_MARK, source)
    config = transformer_config(state, "blocks.0", tokenizer, num_heads, scales, source)
    require(state, {"head.weight": 2}, source, "VAR transformer")
    config |= dict(
        vocab_size=state["head.weight"].shape[0],
        num_layers=count_modules(state, "blocks"),
        shared_adaln="shared_ada_lin.1.weight" in state,
    )
    return fitted(NextScaleTransformer, config, to_ours(state, tokenizer, source), source)


def load_transformer(
    path: str | Path,
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> NextScaleTransformer:
    """The transformer of `var_d*.pth` or of a trainer checkpoint, in evaluation mode on the CPU.

    Codebook and phi stay float32. Arguments and errors as of `convert_transformer`.
    """
    config, state = convert_transformer(read(path), tokenizer, scales=scales, num_heads=num_heads, source=str(path))
    return nn.Module.to(build(NextScaleTransformer, config, state, str(path), torch.float32), dtype)


def export_transformer(model: NextScaleTransformer) -> State:
    """A file's content that VAR's own loader takes (save it with `torch.save`).

    Raises:
        ValueError: the model has parts that VAR does not (attributes, words, no classes).
    """
    config = model.config
    foreign = [key for key in ("attributes", "word_vocab_size") if config[key]]
    if foreign or not config["num_classes"]:
        raise ValueError(f"VAR has classes only, and no place for {', '.join(foreign) or 'a model without them'}")
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith("pyramid.")}
    exported = rename(kept, [(r"^condition_vector\.", "")])
    for index in range(len(model.blocks)):
        exported[f"blocks.{index}.attn.zero_k_bias"] = torch.zeros(config["width"])
    sizes = model.block_sizes
    exported["lvl_1L"] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    hidden = torch.zeros(model.num_tokens, model.num_tokens).masked_fill(~scale_mask(sizes, "causal"), float("-inf"))
    exported["attn_bias_for_masking"] = hidden[None, None]
    return exported


# ------------------------------------------------------------------------------------------------- for visar convert
def scale_defaults(sampler: str, strength: float, top_k: int, top_p: float) -> dict[str, Any]:
    """Sampling settings in the form that VAR's and HMAR's authors give them.

    Args:
        sampler: name in the index of samplers.
        strength: t of guided = (1 + t) c - t n at the last scale; it rises linearly from 0 at the first one.
        top_k, top_p: filters of all scales.
    """
    guidance = {"scale": strength, "convention": "extrapolate", "schedule": "linear"}
    return {"sampler": sampler, "guidance": guidance, "top_k": top_k, "top_p": top_p}


# Settings of the released evaluation (README).
DEFAULTS = scale_defaults("next_scale", 1.5, 900, 0.96)


def _read_tokenizer(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    state = find_weights(content, TOKENIZER.marks, file, options.weights)
    return Models(tokenizer=make_tokenizer(state, options.scales or SCALES_256, file))


def make_tokenizer(state: State, scales: Scales, file: str) -> MultiScaleVQTokenizer:
    """The tokenizer of a file's weights for a pyramid; errors as of `convert_vq`."""
    config, converted = convert_vq(state, scales=scales, source=file)
    return build(MultiScaleVQTokenizer, config, converted, file, torch.float32)


def make_transformer(
    state: State, tokenizer: MultiScaleVQTokenizer, scales: Scales, num_heads: int | None, file: str
) -> NextScaleTransformer:
    """The transformer of a file's weights; arguments and errors as of `convert_transformer`."""
    config, converted = convert_transformer(state, tokenizer, scales=scales, num_heads=num_heads, source=file)
    return build(NextScaleTransformer, config, converted, file, torch.float32)


def read_parts(
    options: Convert, content: Content, marks: Sequence[str], head: str
) -> tuple[State, MultiScaleVQTokenizer, tuple]:
    """What the files in VAR's layout have in common: a generator's weights, its tokenizer and the pyramid.

    Args:
        options: whose tokenizer file is read, or the first file where it holds the tokenizer too.
        content: of the first file.
        marks: keys of the generator.
        head: its key whose first axis is the number of codes.

    Raises:
        ValueError: no tokenizer, or files that do not go together.
    """
    file, tokenizer_file = str(options.file), str(options.tokenizer or options.file)
    if options.tokenizer is None and not TOKENIZER.sniff(content):
        raise ValueError(
            f"{file}: a model of scales includes its tokenizer's codebook; say tokenizer (vae_ch160v4096z32.pth for "
            "the released models)"
        )
    tokenizer_content = content if options.tokenizer is None else read(options.tokenizer)
    expect(tokenizer_content, TOKENIZER, tokenizer_file)
    weights = choose_weights(tokenizer_content, TOKENIZER.marks, options.weights, TOKENIZER.weights)
    vq = find_weights(tokenizer_content, TOKENIZER.marks, tokenizer_file, weights)
    require(vq, {VQ_MARK: 2}, tokenizer_file, "VAR tokenizer")
    state = find_weights(content, marks, file, options.weights)
    require(state, {"pos_1LC": 3, "lvl_embed.weight": 2}, file, "transformer in VAR's layout")
    check_codes(state, head, file, vq[VQ_MARK].shape[0], tokenizer_file)
    scales = sniff_scales(state, options.scales, file)
    return state, make_tokenizer(vq, scales, tokenizer_file), scales


def _read_generator(options: Convert, content: Content, second: Content | None) -> Models:
    state, tokenizer, scales = read_parts(options, content, GENERATOR_MARKS, "head.weight")
    generator = make_transformer(state, tokenizer, scales, options.num_heads, str(options.file))
    return Models(tokenizer, generator, defaults=DEFAULTS)


GENERATOR_MARKS = (TRANSFORMER_MARK, "head.weight")
TOKENIZER = Row(
    "var", "tokenizer", (VQ_MARK, "encoder.down.0.block.0.conv1.weight"), _read_tokenizer, takes=("scales",)
)
GENERATOR = Row("var", "generator", GENERATOR_MARKS, _read_generator, takes=("tokenizer", "scales", "num_heads"))
ROWS = (TOKENIZER, GENERATOR)


def released(source: str, repository: str, file: str, defaults: dict[str, Any], note: str) -> Official:
    """The row of an official name whose tokenizer is VAR's."""
    return Official(
        source=source,
        repository=repository,
        file=file,
        tokenizer_repository="FoundationVision/var",
        tokenizer_file="vae_ch160v4096z32.pth",
        grid=None,
        defaults=defaults,
        note=note,
    )


OFFICIAL = {
    f"var-d{depth}": released(
        "var", "FoundationVision/var", f"var_d{depth}.pth", DEFAULTS, f"ImageNet classes, {side} x {side}"
    )
    for depth, side in ((16, 256), (20, 256), (24, 256), (30, 256), (36, 512))
}
