"""Weights of VAR (arXiv 2404.02905, FoundationVision/VAR@78b9539): the multi-scale tokenizer and the transformers.

CoDe's files have the same layout (`visar.checkpoints.code`), HMAR's a related one (`visar.checkpoints.hmar`). Sizes
are read off keys and shapes; a trainer's checkpoint, which nests its models, is unwrapped.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from visar.files import load_weights
from visar.generators.next_scale import SCALES_256, SCALES_512, SCALES_1024, NextScaleTransformer
from visar.tokenizers.multiscale_quantizer import ScalePyramid
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

State = dict[str, Tensor]
Scales = Sequence[int | Sequence[int]]

TOKENIZER_MARK, TRANSFORMER_MARK = "quantize.embedding.weight", "blocks.0.attn.mat_qkv.weight"
# Pyramids by (tokens, scales), for files without values in their table of levels.
_KNOWN_SCALES = {(sum(n * n for n in scales), len(scales)): scales for scales in (SCALES_256, SCALES_512, SCALES_1024)}
_DERIVED = re.compile(r"(lvl_1L|attn_bias_for_masking|.*\.zero_k_bias)$")
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
_HEAD_WIDTH = 64


# ---------------------------------------------------------------------------------------------------------- shared
def find_state(content: Mapping[str, object], mark: str, source: str) -> State:
    """The weights inside a checkpoint: its own mapping, or the only nested one that has a key `mark`.

    Wrappers' prefixes ("module.", "_orig_mod.") are dropped.

    Raises:
        ValueError: no mapping has the key, or several do (say which by passing that mapping).
    """
    found: dict[str, State] = {}

    def search(node: Mapping[str, object], path: str) -> None:
        tensors = {_PREFIXES.sub("", key): value for key, value in node.items() if isinstance(value, Tensor)}
        if mark in tensors:
            found[path or "top level"] = tensors
        for key, value in node.items():
            if isinstance(value, Mapping):
                search(value, f"{path}.{key}" if path else str(key))

    search(content, "")
    if len(found) != 1:
        where = f"found at {', '.join(found)}" if found else f"keys start with {', '.join(list(content)[:5])}"
        raise ValueError(f"{source}: one set of weights with {mark} is needed; {where}")
    return next(iter(found.values()))


def load_strictly(model: ModelMixin, state: State, source: str) -> None:
    """Gives the weights to the model (taking the tensors over where the model is on the meta device).

    Raises:
        ValueError: keys are missing or left over, or shapes differ; all are named.
    """
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(state))
    unused = sorted(set(state) - set(wanted))
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if missing or unused or wrong:
        raise ValueError(f"{source} does not fit: missing {missing}; unused {unused}; other shapes {wrong}")
    model.load_state_dict(state, assign=model.device.type == "meta")


def count_blocks(state: State, prefix: str) -> int:
    """How many numbered modules `prefix`.0, `prefix`.1 ... the keys name."""
    numbers = {int(match[1]) for key in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
    return max(numbers, default=-1) + 1


def sniff_scales(state: State, scales: Scales | None, source: str) -> Scales:
    """The pyramid that a transformer was trained for: as given, from its table of levels, or by its number of tokens.

    Raises:
        ValueError: none of them tells.
    """
    if scales is not None:
        return scales
    levels = state.get("lvl_1L")
    if levels is not None and levels.device.type != "meta":
        sizes = torch.bincount(levels.flatten()).tolist()
        sides = [round(size**0.5) for size in sizes]
        if [side * side for side in sides] == sizes:
            return sides
    known = (state["pos_1LC"].shape[1], state["lvl_embed.weight"].shape[0])
    if known not in _KNOWN_SCALES:
        raise ValueError(f"{source}: {known[0]} tokens in {known[1]} scales; say which with scales=(1, 2, ...)")
    return _KNOWN_SCALES[known]


def transformer_sizes(state: State, block: str, num_heads: int | None, scales: Scales | None, source: str) -> dict:
    """Constructor arguments that VAR's and HMAR's transformers have in common.

    Args:
        state: in the source's names.
        block: prefix of one transformer block.
        num_heads, scales: None reads them off.
        source: for error messages.
    """
    width, codebook_width = state["word_embed.weight"].shape
    scale_mul = state.get(f"{block}.attn.scale_mul_1H11")
    if num_heads is None:
        num_heads = scale_mul.shape[1] if scale_mul is not None else width // _HEAD_WIDTH
    return dict(
        codebook_width=codebook_width,
        scales=tuple(sniff_scales(state, scales, source)),
        width=width,
        num_heads=num_heads,
        mlp_ratio=state[f"{block}.ffn.fc1.weight"].shape[0] / width,
        num_classes=state["class_emb.weight"].shape[0] - 1,
        qk_norm=scale_mul is not None,
    )


def ours(state: State, pyramid: ScalePyramid) -> State:
    """A transformer's weights in our names, together with the tokenizer's codebook and phi.

    Raises:
        ValueError: a key bias that is not zero.
    """
    for key, value in state.items():
        if key.endswith(".zero_k_bias") and value.device.type != "meta" and value.any():
            raise ValueError(f"{key} is not zero: this is not a file of VAR's layout")
    renamed = {
        key.replace("class_emb.", "condition_vector.class_emb."): value
        for key, value in state.items()
        if not _DERIVED.match(key)
    }
    device = state["pos_1LC"].device
    return renamed | {f"pyramid.{key}": value.to(device) for key, value in ScalePyramid.state_dict(pyramid).items()}


# ------------------------------------------------------------------------------------------------------- tokenizer
def _tokenizer_key(key: str, num_levels: int) -> str:
    key = re.sub(r"\.mid\.block_([12])\.", lambda match: f".mid.{0 if match[1] == '1' else 2}.", key)
    key = key.replace(".mid.attn_1.", ".mid.1.")
    key = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", key)
    key = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.conv_blocks.{num_levels - 1 - int(match[1])}.", key)
    key = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", key)
    key = key.replace("quantize.embedding.", "quantizer.embedding.")
    return re.sub(r"^quantize\.quant_resi\.(?:qresi_ls\.(\d+)|qresi|(\d+))\.", _phi_key, key)


def _phi_key(match: re.Match) -> str:
    return f"quantizer.phi.{match[1] or match[2] or 0}."


def convert_tokenizer(
    state: State,
    *,
    scales: Scales | None = None,
    cosine: bool = False,
    phi_ratio: float = 0.5,
    source: str = "weights",
) -> MultiScaleVQTokenizer:
    """The tokenizer of a state dict in VAR's names; it may be on the meta device.

    Args:
        state: keys `encoder.*`, `decoder.*`, `quantize.*`, `quant_conv.*`, `post_quant_conv.*`.
        scales: the pyramid, which the weights do not tell; None is the released one of 256 px (the same file serves
            512 px with its own pyramid).
        cosine, phi_ratio: of the quantiser; no key tells them (released: False, 0.5).
        source: for error messages.

    Raises:
        ValueError: keys or shapes that do not fit.
    """
    num_levels = count_blocks(state, "encoder.down")
    base = state["encoder.conv_in.weight"].shape[0]
    levels = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(num_levels)]
    phis = {match[1] for key in state if (match := re.match(r"quantize\.quant_resi\.(.+)\.weight$", key))}
    codes = state["quantize.embedding.weight"]
    scales = SCALES_256 if scales is None else scales
    with torch.device("meta"):
        model = MultiScaleVQTokenizer(
            codebook_size=codes.shape[0],
            codebook_dim=codes.shape[1],
            scales=tuple(scales),
            image_channels=state["encoder.conv_in.weight"].shape[1],
            base_channels=base,
            channel_multipliers=tuple(width // base for width in levels),
            num_res_blocks=count_blocks(state, "encoder.down.0.block"),
            attention=f"encoder.down.{num_levels - 1}.attn.0.norm.weight" in state,
            quant_conv_size=state["quant_conv.weight"].shape[-1],
            num_phi=0 if any(name.isdigit() for name in phis) else len(phis),
            phi_ratio=phi_ratio,
            cosine=cosine,
        )
    renamed: State = {}
    for key, value in state.items():
        if key == "quantize.ema_vocab_hit_SV":  # a training statistic
            continue
        name = _tokenizer_key(key, num_levels)
        if ".qkv." in name:
            renamed |= {
                name.replace(".qkv.", f".{part}."): piece for part, piece in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            renamed[name] = value
    load_strictly(model, {key: value.float() for key, value in renamed.items()}, source)
    return model.eval()


def load_tokenizer(path: str | Path, *, scales: Scales | None = None) -> MultiScaleVQTokenizer:
    """Reads `vae_ch160v4096z32.pth`, or the tokenizer inside a trainer's checkpoint; see `convert_tokenizer`.

    Raises:
        ValueError: a damaged file, or one that holds something else.
    """
    return convert_tokenizer(
        find_state(load_weights(path), TOKENIZER_MARK, str(path)), scales=scales, source=str(path)
    )


# ----------------------------------------------------------------------------------------------------- transformer
def convert_transformer(
    state: State,
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
    source: str = "weights",
) -> NextScaleTransformer:
    """The transformer of a state dict in VAR's names; it may be on the meta device.

    Args:
        state: keys `blocks.*`, `word_embed.*`, ...
        tokenizer: that it was trained with; its codebook and phi become part of the model. Any pyramid: the model's
            own is used.
        scales: None reads the pyramid off the file's table of levels, or knows it by its number of tokens.
        num_heads: None reads it off the attention's scales, or, in files without them, takes heads of 64.
        source: for error messages.

    Raises:
        ValueError: keys or shapes that do not fit, or a pyramid that nothing tells.
    """
    sizes = transformer_sizes(state, "blocks.0", num_heads, scales, source)
    pyramid = tokenizer.with_scales(sizes["scales"]).quantizer
    with torch.device("meta"):
        model = NextScaleTransformer(
            vocab_size=state["head.weight"].shape[0],
            num_layers=count_blocks(state, "blocks"),
            shared_adaln="shared_ada_lin.1.weight" in state,
            num_phi=tokenizer.config["num_phi"],
            phi_ratio=tokenizer.config["phi_ratio"],
            **sizes,
        )
    load_strictly(model, ours(state, pyramid), source)
    return model.eval()


def load_transformer(
    path: str | Path,
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
) -> NextScaleTransformer:
    """Reads `var_d*.pth`, or the transformer inside a trainer's checkpoint; see `convert_transformer`.

    Raises:
        ValueError: a damaged file, or one that holds something else.
    """
    state = find_state(load_weights(path), TRANSFORMER_MARK, str(path))
    return convert_transformer(state, tokenizer, scales=scales, num_heads=num_heads, source=str(path))
