"""Transformer parts of generators over scales: condition vector, adaptive norms, attention by cosine similarity.

Source: VAR, arXiv 2404.02905; parameter names and numerics of FoundationVision/VAR@78b9539.

B images, R rows (2B when guided), L positions, D hidden size, N heads, E head width, F feed-forward width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.kernels import on, usable
from visar.layers.cache import KVCache
from visar.layers.scale_attention import Method, Pattern, scale_attention

_LOG_LARGEST_SCALE = math.log(100.0)


@dataclass(frozen=True)
class LayerCache:
    """One layer's view of the cache during one call: positions [1, L] to write, the last L of the `bound` slots that
    are then in use."""

    cache: KVCache
    layer: int
    position: Tensor
    bound: int

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(self.layer, key, value, self.position, self.bound)

    def slots(self) -> tuple[Tensor, Tensor]:
        """The layer's buffers of keys and values, [R, N, T, E]."""
        return self.cache.keys[self.layer], self.cache.values[self.layer]


class ScaleSelfAttention(nn.Module):
    """Self-attention with biases on queries and values only, and cosine similarity with a learned scale per head.

    Args:
        width, num_heads: D, N.
        qk_norm: l2-normalise queries and keys; the softmax scale is then exp(min(scale_mul, log 100)). Without it the
            softmax scale is 0.25 / sqrt(E).
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // num_heads)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if qk_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_RLD: Tensor, sizes: tuple[int, ...], pattern: Pattern, cache: LayerCache | None, method: Method
    ) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = functional.linear(x_RLD, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.qk_norm:
            scale = self.scale_mul_1H11.float().clamp(max=_LOG_LARGEST_SCALE).exp()
            query = (functional.normalize(query.float(), dim=-1) * scale).to(value.dtype)
            key = functional.normalize(key.float(), dim=-1).to(value.dtype)
        if cache is not None:
            key, value = cache.update(key, value)
        out = scale_attention(query, key, value, sizes, pattern, softmax_scale=self.softmax_scale, method=method)
        return self.proj(out.transpose(1, 2).flatten(2))

    def fused(
        self, x_RLD: Tensor, sizes: tuple[int, ...], pattern: Pattern, cache: LayerCache | None, method: Method
    ) -> Tensor:
        """`forward` with one kernel for biases, unit lengths, scales and the cache: inference on a GPU."""
        from visar.kernels.scales import split_heads

        rows, length, width = x_RLD.shape
        qkv = functional.linear(x_RLD, self.mat_qkv.weight)
        if cache is None:
            key, value = x_RLD.new_empty(2, rows, self.num_heads, length, width // self.num_heads).unbind(0)
            begin = 0
        else:
            key, value = cache.slots()
            begin = cache.bound - length
        log_scale = self.scale_mul_1H11 if self.qk_norm else None
        query = split_heads(qkv, self.q_bias, self.v_bias, log_scale, key, value, begin)
        if cache is not None:
            key, value = key[:, :, : cache.bound], value[:, :, : cache.bound]
        out = scale_attention(query, key, value, sizes, pattern, softmax_scale=self.softmax_scale, method=method)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """fc2(gelu_tanh(fc1 x))."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))

    def fused(self, x_RLD: Tensor) -> Tensor:
        """`forward`, on a GPU with the activation inside the first product: inference only."""
        if not x_RLD.is_cuda or type(self.fc1.weight) is not nn.Parameter:  # quantised
            return self(x_RLD)
        # cuBLASLt's epilogue: bias and the tanh form of gelu on the float32 sums.
        hidden_MF = torch._addmm_activation(self.fc1.bias, x_RLD.flatten(0, 1), self.fc1.weight.t(), use_gelu=True)
        return self.fc2(hidden_MF).view_as(x_RLD)


class AdaLNBlock(nn.Module):
    """Transformer block whose norms are scaled, shifted and gated by the condition.

    Args:
        width, num_heads, hidden_width: D, N, F.
        qk_norm: see `ScaleSelfAttention`.
        shared_adaln: the six vectors come from a layer that all blocks share, plus a learned offset of the block's
            own.
        drop_path: chance that a residual branch is left out for a row in training.
        dropout: of the elements of both branches in training.
        eps: of the norms.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden_width: int,
        *,
        qk_norm: bool = True,
        shared_adaln: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.drop_path, self.dropout, self.eps = drop_path, dropout, eps
        self.attn = ScaleSelfAttention(width, num_heads, qk_norm)
        self.ffn = FeedForward(width, hidden_width)
        if shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.shared_adaln = shared_adaln

    def modulation(self, condition_RD: Tensor, shared_R6D: Tensor | None) -> Tensor:
        """[R, 6, D]: gate of attention and of the feed-forward part, then both scales, then both shifts."""
        if self.shared_adaln:
            assert shared_R6D is not None
            return shared_R6D + self.ada_gss[0]
        return self.ada_lin(condition_RD).unflatten(-1, (6, -1))

    def _norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift

    def _drop(self, x_RLD: Tensor) -> Tensor:
        x_RLD = functional.dropout(x_RLD, self.dropout, self.training)
        if not (self.training and self.drop_path):
            return x_RLD
        return x_RLD * functional.dropout(x_RLD.new_ones(x_RLD.shape[0], 1, 1), self.drop_path)

    def forward(
        self,
        x_RLD: Tensor,
        modulation_R6D: Tensor,
        sizes: tuple[int, ...],
        pattern: Pattern,
        *,
        cache: LayerCache | None = None,
        method: Method = "auto",
        between_RLD: Tensor | None = None,
    ) -> Tensor:
        """between_RLD: added between attention and the feed-forward part."""
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = modulation_R6D[:, :, None].unbind(1)
        attended = self.attn(self._norm(x_RLD, scale_1, shift_1), sizes, pattern, cache, method)
        x_RLD = x_RLD + gate_1 * self._drop(attended)
        if between_RLD is not None:
            x_RLD = x_RLD + between_RLD
        return x_RLD + gate_2 * self._drop(self.ffn(self._norm(x_RLD, scale_2, shift_2)))


class AdaLNOutputNorm(nn.Module):
    """Norm before the head, scaled and shifted by the condition."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition_RD: Tensor) -> Tensor:
        """[R, 2, D]: scale, then shift."""
        return self.ada_lin(condition_RD).unflatten(-1, (2, -1))

    def forward(self, x_RLD: Tensor, modulation_R2D: Tensor) -> Tensor:
        scale, shift = modulation_R2D[:, :, None].unbind(1)
        normed = functional.layer_norm(x_RLD.float(), x_RLD.shape[-1:], eps=self.eps)
        return (normed * (1 + scale.float()) + shift.float()).to(x_RLD.dtype)


def fusible(x_RLD: Tensor, weight: Tensor) -> bool:
    """Whether `run_blocks` takes fused kernels: inference, no autocast, and kernels that run here."""
    return (
        not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and x_RLD.dtype == weight.dtype
        and usable(x_RLD)
        and not torch.is_autocast_enabled(x_RLD.device.type)
    )


def run_blocks(
    blocks: Sequence[AdaLNBlock],
    modulations_MR6D: Sequence[Tensor] | Tensor,
    x_RLD: Tensor,
    norm: AdaLNOutputNorm,
    norm_modulation_R2D: Tensor,
    sizes: tuple[int, ...],
    pattern: Pattern,
    *,
    caches: Sequence[LayerCache] | None = None,
    method: Method = "auto",
    checkpoint: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Blocks one after the other and the norm before the head, [R, L, D].

    In inference on a GPU every norm is one kernel together with the gated residual before it; elsewhere, and in
    training, the modules' own forwards run. Both agree to rounding.

    Args:
        blocks: M blocks.
        modulations_MR6D: of every block.
        x_RLD: input.
        norm, norm_modulation_R2D: what follows the last block.
        sizes, pattern, method: see `scale_attention`.
        caches: of every block; None for models that see these positions only.
        checkpoint: calls a block so that its activations are computed again in the backward pass; None keeps them.
    """
    views: Sequence[LayerCache | None] = [None] * len(blocks) if caches is None else caches
    if not blocks or norm.training or not fusible(x_RLD, blocks[0].attn.q_bias):
        for block, modulation, view in zip(blocks, modulations_MR6D, views, strict=True):
            call = partial(block, cache=view, method=method)
            arguments = (x_RLD, modulation, sizes, pattern)
            x_RLD = call(*arguments) if checkpoint is None else checkpoint(call, *arguments)
        return norm(x_RLD, norm_modulation_R2D)
    from visar.kernels.scales import modulated_norm

    with on(x_RLD.device):
        x, (scale, shift) = x_RLD.contiguous(), modulations_MR6D[0][:, 2::2].unbind(1)
        x, normed = modulated_norm(x, scale, shift, blocks[0].eps)
        for index, (block, modulation, view) in enumerate(zip(blocks, modulations_MR6D, views, strict=True)):
            gate_1, gate_2, _, scale, _, shift = modulation.unbind(1)
            branch = block.attn.fused(normed, sizes, pattern, view, method)
            x, normed = modulated_norm(x, scale, shift, block.eps, branch_RLD=branch, gate_RD=gate_1)
            branch = block.ffn.fused(normed)
            if index + 1 < len(blocks):
                (scale, shift), eps = modulations_MR6D[index + 1][:, 2::2].unbind(1), blocks[index + 1].eps
            else:
                (scale, shift), eps = norm_modulation_R2D.unbind(1), norm.eps
            x, normed = modulated_norm(x, scale, shift, eps, branch_RLD=branch, gate_RD=gate_2)
        return normed


def reset_blocks(
    blocks: nn.ModuleList, width: int, depth: int, gate: float, generator: torch.Generator | None
) -> None:
    """VAR's start of a transformer's blocks.

    N(0, sqrt(1 / (3 D))) for linear layers, residual projections divided by sqrt(2 depth), adaLN halved and its gates
    multiplied by `gate` (1e-3 ... 5e-6, smaller for deeper models).
    """
    std = (1 / width / 3) ** 0.5
    for block in cast(Iterable[AdaLNBlock], blocks):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            block.attn.proj.weight.div_(math.sqrt(2 * depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
            if block.shared_adaln:
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].mul_(gate)
            else:
                weight = cast(nn.Linear, block.ada_lin[1]).weight
                weight[2 * width :].mul_(0.5)
                weight[: 2 * width].mul_(gate)
