"""The layers of a raster transformer on new positions: 5 launches per layer for a few rows, 8 for more.

For a few rows all products are visar/kernels/product.py's, with norms, SwiGLU and residuals inside, and every kernel
reads its weights or its cache while the one before it ends. For more rows products are the library's; those of
quantised weights `scaled_product`'s, because torchao writes the weights out in 16 bits before every product. In the
mode of visar/kernels/invariance.py no kernel is chosen by the number of rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from visar.kernels import fixed_order, usable
from visar.kernels.elementwise import add_rms_norm_, silu_multiply
from visar.kernels.mode import active
from visar.kernels.overlap import overlaps
from visar.kernels.product import MAX_ROWS, MAX_SCALED_ROWS, Weight, product, scaled_product
from visar.layers.llama import Block, RMSNorm, SwiGLU
from visar.layers.quantize import scaled, stored

FEW_ROWS = 4
"""Most rows (of all positions together) whose products are not the library's; MAX_ROWS with quantised weights."""
FEW_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
"""Of the activations; float32 keeps the library's products, whose rounding the plain path shares."""


def are_few(rows: int, layer: nn.Linear) -> bool:
    """Whether so many rows go through the kernels of visar/kernels/product.py; an adapter's layer never does."""
    if active() or type(layer) is not nn.Linear or layer.weight.dtype not in FEW_DTYPES:
        return False
    return rows <= (MAX_ROWS if scaled(layer) else FEW_ROWS)


def head(layer: nn.Linear, features_RLD: Tensor) -> Tensor:
    """The layer's outputs [R, L, N] of features."""
    features_MD = features_RLD.flatten(0, 1)
    if not are_few(features_MD.shape[0], layer) or layer.bias is not None:
        return _linear(layer, features_MD).unflatten(0, features_RLD.shape[:2])
    weight = Weight(*stored(layer))
    out_MN = product(features_MD.contiguous(), weight, overlap=overlaps(features_MD.device), tile="head")
    return out_MN.unflatten(0, features_RLD.shape[:2])


def _takes_scaled(rows: int, layer: nn.Linear) -> bool:
    """Whether so many rows go through `scaled_product`."""
    known = not active() and type(layer) is nn.Linear and scaled(layer) and layer.bias is None
    return known and layer.weight.dtype in FEW_DTYPES and rows <= MAX_SCALED_ROWS


def _linear(layer: nn.Linear, x_MK: Tensor) -> Tensor:
    """The layer's outputs [M, N]: the library's product, or of 8-bit weights or in the invariant mode ours."""
    if active() and type(layer) is nn.Linear and not scaled(layer) and usable(x_MK):
        parts = fixed_order.parts_of(*layer.weight.shape)
        return fixed_order.product(x_MK, layer.weight, layer.bias, parts=parts)
    if not _takes_scaled(x_MK.shape[0], layer):
        return layer(x_MK)
    return scaled_product(x_MK.contiguous(), Weight(*stored(layer)))


def _gate_and_up(feed_forward: SwiGLU, x_MD: Tensor) -> Tensor:
    """`SwiGLU.gate_and_up`, [M, 2F]."""
    if not all(_takes_scaled(x_MD.shape[0], layer) for layer in (feed_forward.w1, feed_forward.w3)):
        return feed_forward.gate_and_up(x_MD)
    both_M2F = x_MD.new_empty(x_MD.shape[0], 2 * feed_forward.w1.out_features)
    for layer, half_MF in zip((feed_forward.w1, feed_forward.w3), both_M2F.chunk(2, dim=-1), strict=True):
        scaled_product(x_MD, Weight(*stored(layer)), half_MF)
    return both_M2F


def decode_layers(
    layers: Sequence["Block"], last_norm: RMSNorm, x_RLD: Tensor, attend: Callable[[int, Tensor, bool], Tensor]
) -> Tensor:
    """Normed last hidden vectors [R, L, D] of new positions.

    Args:
        layers: blocks; last_norm: the norm behind them.
        x_RLD: input embeddings, contiguous; overwritten.
        attend: number of a layer, its qkv_RLX, and whether launches overlap, to what its attention mixes, [R, L, D];
            keys and values enter the cache.
    """
    shape, residual_MD = x_RLD.shape[:2], x_RLD.flatten(0, 1)
    rows = residual_MD.shape[0]
    if all(are_few(rows, linear) for layer in layers for linear in linears(layer)):
        overlap = overlaps(x_RLD.device)
        for i, layer in enumerate(layers):
            wqkv, wo, w1, w3, w2 = (Weight(*stored(linear)) for linear in linears(layer))
            qkv_MX = product(residual_MD, wqkv, norm=layer.attention_norm, overlap=overlap, tile="qkv")
            mixed_RLD = attend(i, qkv_MX.unflatten(0, shape), overlap)
            product(mixed_RLD.flatten(0, 1), wo, residual_MN=residual_MD, overlap=overlap, tile="wo")
            hidden_MF = product(residual_MD, w1, up=w3, norm=layer.ffn_norm, overlap=overlap, tile="gated")
            product(hidden_MF, w2, residual_MN=residual_MD, overlap=overlap, tile="down")
        return add_rms_norm_(residual_MD, None, last_norm.weight, last_norm.eps, overlap).unflatten(0, shape)

    norms = [norm for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)] + [last_norm]
    normed_MD = add_rms_norm_(residual_MD, None, norms[0].weight, norms[0].eps)
    for i, layer in enumerate(layers):
        after_attention, after_feed_forward = norms[2 * i + 1 : 2 * i + 3]
        qkv_RLX = _linear(layer.attention.wqkv, normed_MD).unflatten(0, shape)
        mixed_RLD = attend(i, qkv_RLX, False)
        delta_MD = _linear(layer.attention.wo, mixed_RLD.flatten(0, 1))
        normed_MD = add_rms_norm_(residual_MD, delta_MD, after_attention.weight, after_attention.eps)
        delta_MD = _linear(layer.feed_forward.w2, silu_multiply(_gate_and_up(layer.feed_forward, normed_MD)))
        normed_MD = add_rms_norm_(residual_MD, delta_MD, after_feed_forward.weight, after_feed_forward.eps)
    return normed_MD.unflatten(0, shape)


def linears(layer: "Block") -> tuple[nn.Linear, ...]:
    """A block's matrices: queries, keys and values; output; gate; up; down."""
    return (
        layer.attention.wqkv,
        layer.attention.wo,
        layer.feed_forward.w1,
        layer.feed_forward.w3,
        layer.feed_forward.w2,
    )
