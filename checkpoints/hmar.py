"""Weights of HMAR (arXiv 2506.04421, files of NVlabs/HMAR@595a9df): merged, or its two training phases.

The released weights are for research and non-commercial use. The tokenizer is VAR's (`visar.checkpoints.var`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visar.checkpoints import var
from visar.checkpoints.common import State, build, count_modules, find_weights, fitted, read, require
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, choose_weights, expect
from visar.checkpoints.var import Scales, to_ours, transformer_config
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

MERGED_MARK, PHASE_MARK = "mask_head.weight", "blocks.0.attn.mat_qkv.weight"
# What the second training phase has and no other file in VAR's layout.
SECOND_PHASE_MARK = "mask_embed.weight"


def convert(
    content: Mapping[str, object],
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `HierarchicalMaskedTransformer` from a released (merged) file.

    Args, Raises: as of `visar.checkpoints.var.convert_transformer`.
    """
    state = find_weights(content, MERGED_MARK, source)
    config = transformer_config(state, "ns_blocks.0", tokenizer, num_heads, scales, source)
    require(state, {"ns_head.weight": 2}, source, "HMAR transformer")
    refinement = count_modules(state, "ns_blocks")
    config |= dict(
        vocab_size=state["ns_head.weight"].shape[0],
        num_layers=count_modules(state, "base_blocks") + refinement,
        num_refinement_layers=refinement,
    )
    return fitted(HierarchicalMaskedTransformer, config, to_ours(state, tokenizer, source), source)


def load(
    path: str | Path,
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> HierarchicalMaskedTransformer:
    """The transformer of `hmar-d*.pth`, in evaluation mode on the CPU; arguments and errors as of `convert`."""
    config, state = convert(read(path), tokenizer, scales=scales, num_heads=num_heads, source=str(path))
    return nn.Module.to(build(HierarchicalMaskedTransformer, config, state, str(path), torch.float32), dtype)


def merge_phases(next_scale: State, refinement: State, num_refinement_layers: int = 8) -> State:
    """One state dict in the released names from those of the two training phases.

    Args:
        next_scale: first phase; `blocks.*`, `head.*`, a bias in `word_embed`.
        refinement: second phase, with `mask_embed.weight`.
        num_refinement_layers: blocks at the end that the second phase trained.

    Raises:
        ValueError: the phases differ in depth, or in blocks that the second one should have left alone.
    """
    depth = count_modules(next_scale, "blocks")
    if count_modules(refinement, "blocks") != depth or not 0 < num_refinement_layers <= depth:
        raise ValueError(
            f"phases of {depth} and {count_modules(refinement, 'blocks')} blocks, {num_refinement_layers} trained"
        )
    shared = depth - num_refinement_layers

    def renamed(state: State, end: str) -> State:
        result: State = {}
        for key, value in state.items():
            if match := re.match(r"blocks\.(\d+)\.(.*)", key):
                index = int(match[1])
                key = (
                    f"base_blocks.{index}.{match[2]}"
                    if index < shared
                    else f"{end}_blocks.{index - shared}.{match[2]}"
                )
            elif key.startswith(("head.", "head_nm.")):
                key = f"{end}_{key}"
            result["word_embed_bias" if key == "word_embed.bias" else key] = value
        return result

    first, second = renamed(next_scale, "ns"), renamed(refinement, "mask")
    differing = [
        key
        for key in first
        if key in second and not torch.equal(first[key], second[key]) and key.startswith("base_blocks")
    ]
    if differing:
        raise ValueError(
            f"the phases differ in {differing[0]}: more than the last {num_refinement_layers} blocks were trained in "
            f"the second, or they are of different runs"
        )
    return second | first


# ------------------------------------------------------------------------------------------------- for visar convert
# Settings of the released evaluation (config/evaluate), by depth.
DEFAULTS: dict[int, dict[str, Any]] = {
    16: var.scale_defaults("masked_refinement", 1.7, 1000, 0.99),
    20: var.scale_defaults("masked_refinement", 1.9, 950, 0.99),
    24: var.scale_defaults("masked_refinement", 2.1, 900, 0.99),
    30: var.scale_defaults("masked_refinement", 1.6, 650, 0.99),
}


def _models(state: State, tokenizer: MultiScaleVQTokenizer, scales: Scales, heads: int | None, file: str) -> Models:
    config, converted = convert(state, tokenizer, scales=scales, num_heads=heads, source=file)
    generator = build(HierarchicalMaskedTransformer, config, converted, file, torch.float32)
    return Models(tokenizer, generator, defaults=DEFAULTS.get(config["num_layers"], DEFAULTS[16]))


def _read_merged(options: Convert, content: Content, second: Content | None) -> Models:
    state, tokenizer, scales = var.read_parts(options, content, (MERGED_MARK,), "ns_head.weight")
    return _models(state, tokenizer, scales, options.num_heads, str(options.file))


def _read_phases(options: Convert, content: Content, second: Content | None) -> Models:
    file, second_file = str(options.file), str(options.second)
    state, tokenizer, scales = var.read_parts(options, content, var.GENERATOR_MARKS, "head.weight")
    if second is None:
        raise ValueError(f"{file} is one training phase of HMAR; say second, the file of the other")
    expect(second, PHASES, second_file)
    weights = choose_weights(second, (PHASE_MARK,), options.weights, PHASES.weights)
    refinement = find_weights(second, PHASE_MARK, second_file, weights)
    require(refinement, {SECOND_PHASE_MARK: 2}, second_file, "second phase of HMAR")
    merged = merge_phases(state, refinement, options.refinement_layers)
    return _models(merged, tokenizer, scales, options.num_heads, f"{file} with {second_file}")


MERGED = Row("hmar", "generator", (MERGED_MARK,), _read_merged, takes=("tokenizer", "scales", "num_heads"))
PHASES = Row(
    "hmar",
    "generator",
    var.GENERATOR_MARKS,
    _read_phases,
    takes=("tokenizer", "scales", "num_heads", "refinement_layers"),
    second=(*var.GENERATOR_MARKS, SECOND_PHASE_MARK),
)
ROWS = (var.TOKENIZER, MERGED, PHASES)

OFFICIAL = {
    f"hmar-d{depth}": var.released(
        "hmar",
        "nvidia/HMAR",
        f"hmar-d{depth}.pth",
        defaults,
        "ImageNet classes, 256 x 256; weights for research and non-commercial use only",
    )
    for depth, defaults in DEFAULTS.items()
}
