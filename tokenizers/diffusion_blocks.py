"""Transformer blocks of the diffusion tokenizer: those over tokens, and those that denoise pixels.

Source: D-AR, arXiv 2505.23660, showlab/D-AR@3fb0f2d (architecture, parameter names).

B images, L positions, D hidden size, E head width, C channels, H W image pixels, K condition tokens, P patches.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from visar.layers.rope import rope_table, rotate

_EPSILON = 1e-6
_LONGEST_PERIOD = 10_000.0


def plain_norm(x: Tensor) -> Tensor:
    """Layer norm without weights over the last axis."""
    return functional.layer_norm(x, x.shape[-1:], eps=_EPSILON)


class Checkpointed:
    """A module whose blocks run with activation checkpointing once `enable_gradient_checkpointing()` was called."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """A block's output."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class GridRope:
    """Rotary tables of grids of patches, float32 [1, P, E / 2, 2]; made once for every size and device.

    The first half of a head's pairs is rotated by the row, the second by the column.
    """

    def __init__(self, head_width: int) -> None:
        self._head_width = head_width
        self._tables: dict[tuple[int, int, torch.device], Tensor] = {}

    def table(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The table of a grid, in raster order."""
        key = (rows, columns, device)
        if key not in self._tables:
            made = rope_table("2d", prefix_length=0, grid=(rows, columns), head_width=self._head_width)
            self._tables[key] = made[None].to(device)
        return self._tables[key]


class Past:
    """Keys and values [B, N, L, E] of the positions that a causal layer has read."""

    def __init__(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None

    def extend(self, key_BNLE: Tensor, value_BNLE: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in those of further positions; returns all."""
        if self._pair is not None:
            earlier_key, earlier_value = self._pair
            key_BNLE = torch.cat([earlier_key, key_BNLE], dim=2)
            value_BNLE = torch.cat([earlier_value, value_BNLE], dim=2)
        self._pair = key_BNLE, value_BNLE
        return self._pair


class NormedAttention(nn.Module):
    """Attention with biases whose queries and keys are normed head by head.

    Args:
        width: D.
        head_width: E, which divides D.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = width // head_width
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(head_width, eps=_EPSILON)
        self.k_norm = nn.LayerNorm(head_width, eps=_EPSILON)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x_BLD: Tensor,
        rope: Tensor | None = None,
        mask: Tensor | None = None,
        source_BKD: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Attention of x to itself, or to a source.

        Args:
            x_BLD: reads.
            rope: rotary table [1, L, E / 2, 2] of x; a source's keys are not rotated.
            mask: bool, True where a query sees a key.
            source_BKD: is read; None is x itself.
            past: earlier positions, which are read too, and are followed by these.
        """
        read = x_BLD if source_BKD is None else source_BKD
        heads = (self.num_heads, -1)
        value = self.v(read).unflatten(-1, heads)
        query = self.q_norm(self.q(x_BLD).unflatten(-1, heads)).to(value.dtype)
        key = self.k_norm(self.k(read).unflatten(-1, heads)).to(value.dtype)
        if rope is not None:
            query = rotate(query, rope)
            key = key if source_BKD is not None else rotate(key, rope)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if past is not None:
            key, value = past.extend(key, value)
        out_BNLE = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(out_BNLE.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.silu(self.fc1(x)))


class TokenBlock(nn.Module):
    """x + gate * attention(norm(x)), then x + gate * feed-forward(norm(x)); a gate is one number a channel."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPSILON)
        self.attention = NormedAttention(width, head_width)
        self.gate1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = FeedForward(width)
        self.gate2 = nn.Parameter(torch.ones(width))

    def forward(
        self, x_BLD: Tensor, rope: Tensor | None = None, mask: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """Arguments as of `NormedAttention`."""
        x_BLD = x_BLD + self.gate1 * self.attention(self.norm1(x_BLD), rope, mask, past=past)
        return x_BLD + self.gate2 * self.mlp(self.norm2(x_BLD))


class TimeEmbedding(nn.Module):
    """Cosines and sines of a time as vectors, and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, waves_BD: Tensor) -> Tensor:
        return self.mlp(waves_BD)


def time_waves(time_B: Tensor, width: int) -> Tensor:
    """Cosines and sines of 1000 times a time in 0 ... 1, float32 [B, D]."""
    number = torch.arange(width // 2, dtype=torch.float32, device=time_B.device)
    frequency = torch.exp(number * (-math.log(_LONGEST_PERIOD) / (width // 2)))
    angle = 1000.0 * time_B.float()[:, None] * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class PixelBlock(nn.Module):
    """A block over patches of pixels that every patch scales, shifts and gates by what it reads of the condition.

    Args:
        width: D.
        head_width: E.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.cross_attn = NormedAttention(width, head_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attention = NormedAttention(width, head_width)
        self.mlp = FeedForward(width)

    def forward(self, x_BPD: Tensor, waves_BD: Tensor, condition_BKD: Tensor, rope: Tensor) -> Tensor:
        read_BKD = plain_norm(self.cond_embed(condition_BKD))
        seen_BPD = self.cross_attn(plain_norm(x_BPD), rope, source_BKD=read_BKD)
        vectors = self.adaLN_modulation(self.time_embed(waves_BD)[:, None] + seen_BPD).chunk(6, dim=-1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = vectors
        x_BPD = x_BPD + gate * self.attention(plain_norm(x_BPD) * (1.0 + scale) + shift, rope)
        return x_BPD + ff_gate * self.mlp(plain_norm(x_BPD) * (1.0 + ff_scale) + ff_shift)


class PixelTransformer(Checkpointed, nn.Module):
    """Velocity of noisy images at a time, given some condition tokens.

    Args:
        channels: of the images.
        width: D.
        condition_width: of the condition tokens.
        patch_size: side of the patches of pixels.
        num_layers: blocks.
        head_width: E.
    """

    def __init__(
        self, channels: int, width: int, condition_width: int, patch_size: int, num_layers: int, head_width: int
    ) -> None:
        super().__init__()
        self.width, self.patch_size = width, patch_size
        self.conv_in = nn.Linear(channels * patch_size**2, width)
        self.cond_mlp = nn.Linear(condition_width, width)
        self.blocks = nn.ModuleList(PixelBlock(width, head_width) for _ in range(num_layers))
        self.conv_out = nn.Linear(width, channels * patch_size**2)
        self._rope = GridRope(head_width)

    def forward(self, x_BCHW: Tensor, time_B: Tensor, condition_BKD: Tensor) -> Tensor:
        """Velocity [B, C, H, W].

        Args:
            x_BCHW: noisy images.
            time_B: float32 [B or 1] in 0 (noise) ... 1 (image).
            condition_BKD: condition tokens [B, K, condition_width].
        """
        side, dtype = self.patch_size, self.conv_in.weight.dtype
        rows, columns = x_BCHW.shape[2] // side, x_BCHW.shape[3] // side
        rope = self._rope.table(rows, columns, x_BCHW.device)
        waves_BD = time_waves(time_B, self.width).to(dtype)
        condition_BKD = plain_norm(self.cond_mlp(condition_BKD))
        x_BPD = self.conv_in(patches(x_BCHW.to(dtype), side))
        for block in self.blocks:
            x_BPD = self.run(block, x_BPD, waves_BD, condition_BKD, rope)
        out_BPX = self.conv_out(plain_norm(x_BPD))
        return rearrange(out_BPX, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=side, q=side)


def patches(image_BCHW: Tensor, side: int) -> Tensor:
    """Patches of side x side pixels as vectors [B, P, C * side^2], channel slowest, in raster order."""
    return rearrange(image_BCHW, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
