"""Convolutional encoder and decoder that the VQ, multi-scale VQ and KL tokenizers share.

Source: the latent-diffusion autoencoder (arXiv 2112.10752) in the form of LlamaGen (arXiv 2406.06525,
FoundationVision/LlamaGen@ce98ec4), whose module and parameter names are kept; the other tokenizers' converters rename.

A level holds residual blocks of one resolution. Encoder levels go from fine to coarse, decoder levels from coarse to
fine. B images, C channels, H W height and width of any level.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_GROUPS = 32


def check_widths(base_channels: int, channel_multipliers: Sequence[int]) -> None:
    """Checks that every level has a width that 32 norm groups divide.

    Raises:
        ValueError: no level, or a width that is not a positive multiple of 32.
    """
    if not channel_multipliers:
        raise ValueError("channel_multipliers is empty; one entry per level is needed")
    for multiplier in channel_multipliers:
        width = base_channels * multiplier
        if width <= 0 or width % NORM_GROUPS:
            raise ValueError(
                f"width {width} (base_channels {base_channels} x multiplier {multiplier}); "
                f"allowed: positive multiples of {NORM_GROUPS}"
            )


def mark(weight: Tensor) -> tuple[int, int]:
    """Two numbers of which one changes when a tensor is moved, cast or changed in place."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def group_norm(channels: int) -> nn.GroupNorm:
    """Norm of all tokenizers here: 32 groups, eps 1e-6."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x_BCHW)))
        hidden = self.conv2(self.dropout(functional.silu(self.norm2(hidden))))
        return hidden + (x_BCHW if self.nin_shortcut is None else self.nin_shortcut(x_BCHW))


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all positions; 1x1 convolutions, scale C^-0.5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed = self.norm(x_BCHW)
        # [B, 1 head, H * W, C]
        query, key, value = (conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(query, key, value)
        return x_BCHW + self.proj_out(out[:, 0].transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halves height and width: 3x3 convolution of stride 2; zeros are padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(functional.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked for; then perhaps a change of size."""

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, attention: bool, dropout: float
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.res = nn.ModuleList(
            ResnetBlock(before, after, dropout) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_res_blocks if attention else 0))

    def blocks(self, x_BCHW: Tensor) -> Tensor:
        """The level without its change of size."""
        for i, res in enumerate(self.res):
            x_BCHW = res(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        return x_BCHW


class EncoderLevel(Level):
    """Level that halves the resolution at its end, if `downsample`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        *,
        attention: bool,
        downsample: bool,
        dropout: float,
    ) -> None:
        super().__init__(in_channels, out_channels, num_res_blocks, attention, dropout)
        self.downsample = Downsample(out_channels) if downsample else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(x_BCHW)
        return x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class DecoderLevel(Level):
    """Level that doubles the resolution at its end, if `upsample`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        *,
        attention: bool,
        upsample: bool,
        dropout: float,
    ) -> None:
        super().__init__(in_channels, out_channels, num_res_blocks, attention, dropout)
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(x_BCHW)
        return x_BCHW if self.upsample is None else self.upsample(x_BCHW)


def middle(channels: int, dropout: float) -> nn.Sequential:
    """Residual block, attention, residual block at the coarsest resolution."""
    return nn.Sequential(
        ResnetBlock(channels, channels, dropout), AttentionBlock(channels), ResnetBlock(channels, channels, dropout)
    )


class _Checkpointable(nn.Module):
    """Runs its levels with activation checkpointing once `enable_gradient_checkpointing()` of the model was called."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[[nn.Module, Tensor], Tensor]

    def run(self, part: nn.Module, x_BCHW: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(part, x_BCHW)
        return part(x_BCHW)


class Encoder(_Checkpointable):
    """Image [B, C, H, W] to features [B, out_channels, H / f, W / f], f = 2^(number of levels - 1).

    Args:
        in_channels: channels of the image.
        out_channels: channels of the features.
        base_channels, channel_multipliers: width of level i (fine to coarse) is their product.
        num_res_blocks: residual blocks per level.
        attention: attention after every residual block of the coarsest level (always in the middle).
        dropout: inside residual blocks.

    Raises:
        ValueError: a width is not a multiple of 32.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths(base_channels, channel_multipliers)
        widths = [base_channels] + [base_channels * multiplier for multiplier in channel_multipliers]
        last = len(channel_multipliers) - 1
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            EncoderLevel(
                widths[i],
                widths[i + 1],
                num_res_blocks,
                attention=attention and i == last,
                downsample=i != last,
                dropout=dropout,
            )
            for i in range(last + 1)
        )
        self.mid = middle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = self.conv_in(image_BCHW)
        for level in self.conv_blocks:
            x = self.run(level, x)
        x = self.run(self.mid, x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Decoder(_Checkpointable):
    """Features [B, in_channels, h, w] to image [B, out_channels, f * h, f * w], not clamped; the encoder mirrored.

    Arguments as of the encoder (channel_multipliers fine to coarse too); every level has one residual block more.
    In inference on a GPU the fused form of visar/tokenizers/convnet_fused.py takes its place.

    Raises:
        ValueError: a width is not a multiple of 32.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths(base_channels, channel_multipliers)
        widths = [base_channels * multiplier for multiplier in reversed(channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], dropout)
        self.conv_blocks = nn.ModuleList(
            DecoderLevel(
                widths[max(i - 1, 0)],
                widths[i],
                num_res_blocks + 1,
                attention=attention and i == 0,
                upsample=i != last,
                dropout=dropout,
            )
            for i in range(last + 1)
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        x = self.run(self.mid, self.conv_in(latent_BChw))
        for level in self.conv_blocks:
            x = self.run(level, x)
        return self.conv_out(functional.silu(self.norm_out(x)))
