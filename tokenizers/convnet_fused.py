"""The convolutional decoder channels-last, with fused norms and residuals: inference on a GPU.

It computes what `visar.tokenizers.convnet.Decoder` computes, from the same parameters; that file is the reference.
Convolutions run without their biases, which the kernels between them add (visar/kernels/convolution.py).

B images, C channels, H W height and width of any level, P = H * W positions.
"""

from collections.abc import Iterable
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from visar.kernels import on, usable
from visar.kernels.convolution import Moments, channels_last, group_norm, moments, upsample
from visar.tokenizers.convnet import AttentionBlock, Decoder, DecoderLevel, ResnetBlock, mark

# Kernels of convolutions in channels-last order, made when first needed, again after a change in place.
_LAID_OUT = WeakTensorKeyDictionary()


def laid_out(weight: Tensor) -> Tensor:
    """A convolution's weight in channels-last order: a copy, so that state dicts and optimisers see no change."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    now, stored = mark(weight), _LAID_OUT.get(weight)
    if stored is None or stored[0] != now:
        stored = (now, channels_last(weight.detach()))
        _LAID_OUT[weight] = stored
    return stored[1]


def applies(decoder: Decoder, latent_BChw: Tensor) -> bool:
    """Whether the fused decoder stands in for the plain one: inference, no autocast, and kernels that run here."""
    return (
        not (decoder.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        and not torch.is_autocast_enabled(latent_BChw.device.type)
        and latent_BChw.dtype == decoder.conv_in.weight.dtype
        and usable(latent_BChw)
    )


def _convolve(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """The convolution without its bias."""
    return functional.conv2d(x_BCHW, laid_out(conv.weight), None, conv.stride, conv.padding)  # type: ignore[arg-type]


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _resnet(block: ResnetBlock, x_BCHW: Tensor, stats: Moments) -> tuple[Tensor, Moments]:
    hidden = _convolve(block.conv1, group_norm(x_BCHW, stats, block.norm1, silu=True))
    hidden, inner = moments(hidden)
    hidden = group_norm(hidden, inner, block.norm2, silu=True, bias_C=block.conv1.bias)
    hidden = _convolve(block.conv2, hidden)
    if block.nin_shortcut is None:
        return moments(hidden, add_BCHW=x_BCHW, biases=[_bias(block.conv2)])
    shortcut = _convolve(block.nin_shortcut, x_BCHW)
    return moments(hidden, add_BCHW=shortcut, biases=[_bias(block.conv2), _bias(block.nin_shortcut)])


def _attention(block: AttentionBlock, x_BCHW: Tensor, stats: Moments) -> tuple[Tensor, Moments]:
    normed_BCHW = group_norm(x_BCHW, stats, block.norm, silu=False)
    normed_BPC = rearrange(normed_BCHW, "b c h w -> b h w c").flatten(1, 2)
    query, key, value = (
        functional.linear(normed_BPC, conv.weight.flatten(1), conv.bias)[:, None]
        for conv in (block.q, block.k, block.v)
    )
    out_BPC = functional.scaled_dot_product_attention(query, key, value)[:, 0]
    out_BPC = functional.linear(out_BPC, block.proj_out.weight.flatten(1))
    out_BCHW = rearrange(out_BPC.unflatten(1, x_BCHW.shape[2:]), "b h w c -> b c h w")
    return moments(out_BCHW, add_BCHW=x_BCHW, biases=[_bias(block.proj_out)])


def _level(level: DecoderLevel, x_BCHW: Tensor, stats: Moments) -> tuple[Tensor, Moments]:
    for index, res in enumerate(cast(Iterable[ResnetBlock], level.res)):
        x_BCHW, stats = _resnet(res, x_BCHW, stats)
        if len(level.attn):
            x_BCHW, stats = _attention(cast(AttentionBlock, level.attn[index]), x_BCHW, stats)
    if level.upsample is None:
        return x_BCHW, stats
    conv = level.upsample.conv
    return moments(_convolve(conv, upsample(x_BCHW)), biases=[_bias(conv)])


def decode(decoder: Decoder, latent_BChw: Tensor) -> Tensor:
    """What `decoder(latent)` is, to rounding: [B, C, H, W], contiguous."""
    with on(latent_BChw.device):
        x, stats = moments(_convolve(decoder.conv_in, channels_last(latent_BChw)), biases=[_bias(decoder.conv_in)])
        first, attention, last = decoder.mid
        x, stats = _resnet(cast(ResnetBlock, first), x, stats)
        x, stats = _attention(cast(AttentionBlock, attention), x, stats)
        x, stats = _resnet(cast(ResnetBlock, last), x, stats)
        for level in cast(Iterable[DecoderLevel], decoder.conv_blocks):
            x, stats = _level(level, x, stats)
        x = _convolve(decoder.conv_out, group_norm(x, stats, decoder.norm_out, silu=True))
        return (x + _bias(decoder.conv_out)[:, None, None]).contiguous()


def run(decoder: Decoder, latent_BChw: Tensor) -> Tensor:
    """The decoder's images, by the fused form where it applies."""
    return (
        decode(decoder, latent_BChw) if usable(latent_BChw) and applies(decoder, latent_BChw) else decoder(latent_BChw)
    )
