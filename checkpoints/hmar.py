"""Weights of HMAR (arXiv 2506.04421, files of NVlabs/HMAR@595a9df): merged, or its two training phases.

The released weights are for research and non-commercial use. The tokenizer is VAR's (`visar.checkpoints.var`).
"""

import re
from pathlib import Path

import torch

from visar.checkpoints.var import Scales, State, count_blocks, find_state, load_strictly, ours, transformer_sizes
from visar.files import load_weights
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

MERGED_MARK, PHASE_MARK = "mask_head.weight", "blocks.0.attn.mat_qkv.weight"


def convert(
    state: State,
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
    source: str = "weights",
) -> HierarchicalMaskedTransformer:
    """The transformer of a merged state dict in the released names; it may be on the meta device.

    Args:
        state: keys `base_blocks.*`, `ns_blocks.*`, `mask_blocks.*`, `ns_head.*`, `mask_head.*` ...
        tokenizer, scales, num_heads, source: see `visar.checkpoints.var.convert_transformer`.

    Raises:
        ValueError: keys or shapes that do not fit.
    """
    sizes = transformer_sizes(state, "ns_blocks.0", num_heads, scales, source)
    refinement = count_blocks(state, "ns_blocks")
    pyramid = tokenizer.with_scales(sizes["scales"]).quantizer
    with torch.device("meta"):
        model = HierarchicalMaskedTransformer(
            vocab_size=state["ns_head.weight"].shape[0],
            num_layers=count_blocks(state, "base_blocks") + refinement,
            num_refinement_layers=refinement,
            num_phi=tokenizer.config["num_phi"],
            phi_ratio=tokenizer.config["phi_ratio"],
            **sizes,
        )
    load_strictly(model, ours(state, pyramid), source)
    return model.eval()


def load(
    path: str | Path,
    tokenizer: MultiScaleVQTokenizer,
    *,
    scales: Scales | None = None,
    num_heads: int | None = None,
) -> HierarchicalMaskedTransformer:
    """Reads `hmar-d*.pth`; see `convert`.

    Raises:
        ValueError: a damaged file, or one that holds something else.
    """
    state = find_state(load_weights(path), MERGED_MARK, str(path))
    return convert(state, tokenizer, scales=scales, num_heads=num_heads, source=str(path))


def merge_phases(next_scale: State, refinement: State, num_refinement_layers: int = 8) -> State:
    """One state dict in the released names from those of the two training phases.

    Args:
        next_scale: first phase; `blocks.*`, `head.*`, a bias in `word_embed`.
        refinement: second phase, with `mask_embed.weight`.
        num_refinement_layers: blocks at the end that the second phase trained.

    Raises:
        ValueError: the phases differ in depth, or in blocks that the second one should have left alone.
    """
    depth = count_blocks(next_scale, "blocks")
    if count_blocks(refinement, "blocks") != depth or not 0 < num_refinement_layers <= depth:
        raise ValueError(
            f"phases of {depth} and {count_blocks(refinement, 'blocks')} blocks, {num_refinement_layers} trained"
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


def load_phases(
    next_scale_path: str | Path,
    refinement_path: str | Path,
    tokenizer: MultiScaleVQTokenizer,
    *,
    num_refinement_layers: int = 8,
    scales: Scales | None = None,
) -> HierarchicalMaskedTransformer:
    """Reads the checkpoints of the two training phases (nested or not) and merges them; see `merge_phases`.

    Raises:
        ValueError: damaged files, or phases that do not belong together.
    """
    states = [find_state(load_weights(path), PHASE_MARK, str(path)) for path in (next_scale_path, refinement_path)]
    merged = merge_phases(states[0], states[1], num_refinement_layers)
    return convert(merged, tokenizer, scales=scales, source=f"{next_scale_path} + {refinement_path}")
