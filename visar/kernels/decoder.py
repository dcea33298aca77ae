"""The layers of a raster transformer on new positions: products by the library, four kernels of ours a layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from visar.cache import KVCache
from visar.kernels.attention import cached_attention
from visar.kernels.elementwise import add_rms_norm_, silu_multiply
from visar.layers import RMSNorm

if TYPE_CHECKING:
    from visar.generators.raster import Block


def decode_layers(
    layers: Sequence["Block"],
    last_norm: RMSNorm,
    x_RLD: Tensor,
    cache: KVCache,
    rope_PE2: Tensor,
    length: Tensor,
    *,
    ahead: int,
    batch: int,
    key_valid_RS: Tensor | None,
) -> Tensor:
    """Normed last hidden vectors [R, L, D] of new positions, whose keys and values enter the cache.

    Args:
        layers: blocks; last_norm: the norm behind them.
        x_RLD: input embeddings, contiguous; overwritten.
        cache: of all layers. The other arguments: see `cached_attention`.
    """
    norms = [norm for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)] + [last_norm]
    shape, residual_MD = x_RLD.shape[:2], x_RLD.flatten(0, 1)
    place: dict = dict(ahead=ahead, batch=batch, key_valid_RS=key_valid_RS)
    normed_MD = add_rms_norm_(residual_MD, None, norms[0].weight, norms[0].eps)
    for i, layer in enumerate(layers):
        after_attention, after_feed_forward = norms[2 * i + 1 : 2 * i + 3]
        qkv_RLX = layer.attention.wqkv(normed_MD).unflatten(0, shape)
        mixed_RLD = cached_attention(qkv_RLX, cache.keys[i], cache.values[i], rope_PE2, length, **place)
        delta_MD = layer.attention.wo(mixed_RLD.flatten(0, 1))
        normed_MD = add_rms_norm_(residual_MD, delta_MD, after_attention.weight, after_attention.eps)
        delta_MD = layer.feed_forward.w2(silu_multiply(layer.feed_forward.gate_and_up(normed_MD)))
        normed_MD = add_rms_norm_(residual_MD, delta_MD, after_feed_forward.weight, after_feed_forward.eps)
    return normed_MD.unflatten(0, shape)
