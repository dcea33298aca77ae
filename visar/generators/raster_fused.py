"""Decoding a raster transformer by the kernels of visar/kernels; the plain counterparts are in RasterGPT's methods.

B images, R rows (2B when guided), N image tokens, K drafted tokens, L positions of one call, D hidden size, V codes.
"""

from typing import Any, cast

import torch
from torch import Tensor

from visar import kernels
from visar.core.window import Window
from visar.generators.causal_state import RasterState
from visar.layers.llama import Block


def usable(model: Any) -> bool:
    """Whether the model decodes by kernels: not in training, where dropout and gradients are needed."""
    weight = model.layers[0].attention.wqkv.weight
    inference = not (model.training or (weight.requires_grad and torch.is_grad_enabled()))
    mixed = torch.is_autocast_enabled(weight.device.type) or weight.dtype != model.norm.weight.dtype
    return model.fused == "auto" and inference and not mixed and kernels.usable(weight)


def prepare(model: Any) -> None:
    """Lays weights out as the kernels like them; names, values and saved files stay."""
    for layer in _blocks(model):
        layer.feed_forward.join()


def features(model: Any, state: RasterState, window: Window | None) -> Tensor:
    """What `RasterGPT.features` does, in 5 or 8 launches per layer."""
    from visar.kernels.attention import cached_attention
    from visar.kernels.elementwise import first_inputs
    from visar.kernels.overlap import overlaps
    from visar.layers.llama_fused import decode_layers

    draft_BK = None if window is None else window.tokens_BM
    # A chain needs no table: the kernel knows what its slots see and where they stand.
    tree = None if window is None or window.place_BL is None else window
    rope, cache = model.rope(state.tokens.device), state.cache
    place: dict = dict(ahead=model.prefix_length - 1, batch=state.batch, key_valid_RS=state.key_valid_RS, tree=tree)

    def attend(i: int, qkv_RLX: Tensor, overlap: bool) -> Tensor:
        return cached_attention(qkv_RLX, cache.keys[i], cache.values[i], rope, state.length, **place, overlap=overlap)

    with kernels.on(state.tokens.device):
        if model.config.get("token_input") == "table":
            table = model.tok_embeddings.weight
            early = overlaps(table.device)
            x_RLD = first_inputs(state.tokens, draft_BK, state.length, table, state.prefix_last_RD, early)
        else:
            x_RLD = model._inputs(state, draft_BK)
        return decode_layers(_blocks(model), model.norm, x_RLD, attend)


def logits(model: Any, features_RLD: Tensor) -> Tensor:
    """Logits [R, L, V] of features."""
    from visar.layers.llama_fused import head

    with kernels.on(features_RLD.device):
        return head(model.output, features_RLD)


def guided(logits_RLV: Tensor, scale_N: Tensor, length: Tensor, place_BL: Tensor | None) -> Tensor:
    """Guided float32 logits [B, L, V]; place_BL as in `RasterGPT.guided_logits`."""
    from visar.kernels.elementwise import guide
    from visar.kernels.overlap import overlaps

    with kernels.on(logits_RLV.device):
        overlap = place_BL is None and overlaps(logits_RLV.device)
        return guide(logits_RLV, scale_N, length, overlap, place_BL)


def commit(model: Any, state: RasterState, tokens_BK: Tensor, count_B: Tensor) -> None:
    """See `RasterGPT.commit`."""
    from visar.kernels.verify import commit as launch

    with kernels.on(tokens_BK.device):
        launch(state.tokens, state.length, tokens_BK, count_B, model.num_tokens)


def move_path(model: Any, state: RasterState, slots_BK: Tensor) -> None:
    """Moves a path's keys and values to where they would be had its nodes been read one by one."""
    from visar.kernels.tree_paths import move_path as launch

    with kernels.on(slots_BK.device):
        launch(state.cache.keys, state.cache.values, state.length, slots_BK, ahead=model.prefix_length - 1)


def _blocks(model: Any) -> list["Block"]:
    return cast(list["Block"], list(model.layers))
