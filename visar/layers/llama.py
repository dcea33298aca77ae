"""Transformer parts that two families or more share. D hidden size, F hidden size of the feed-forward part."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.kernels.invariance import attention
from visar.layers.cache import LayerCache
from visar.layers.rope import rotate


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 statistics, cast back, then the weight (Zhang and Sennrich, arXiv 1910.07467).

    The order "cast, then multiply" is LlamaGen's and matters in bfloat16.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden_width, bias=False)
        self.w3 = nn.Linear(width, hidden_width, bias=False)
        self.w2 = nn.Linear(hidden_width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(functional.silu(self.w1(x)) * self.w3(x)))

    def join(self) -> None:
        """Lays w1 and w3 side by side in memory, so that `gate_and_up` is one product.

        Names, values and saved files stay as they are. Moving or casting the module parts them again.
        """
        if self._plain() and self._joined() is None:
            both_2FD = torch.cat([self.w1.weight.detach(), self.w3.weight.detach()])
            self.w1.weight.data, self.w3.weight.data = both_2FD.chunk(2)

    def _plain(self) -> bool:
        """Whether no adapter has taken a layer's place and the weights are not quantised."""
        return all(type(layer) is nn.Linear and type(layer.weight) is nn.Parameter for layer in (self.w1, self.w3))

    def _joined(self) -> Tensor | None:
        """Both weights as one [2F, D], if they lie side by side."""
        if not self._plain():
            return None
        gate, up = self.w1.weight, self.w3.weight
        same = gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        if not (same and gate.is_contiguous() and up.storage_offset() - gate.storage_offset() == gate.numel()):
            return None
        return gate.detach().as_strided((2 * gate.shape[0], gate.shape[1]), gate.stride())

    def gate_and_up(self, x: Tensor) -> Tensor:
        """w1 x and w3 x side by side, [..., 2F]; not for training."""
        both_2FD = self._joined()
        if both_2FD is None:
            return torch.cat([self.w1(x), self.w3(x)], dim=-1)
        return functional.linear(x, both_2FD)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries, keys and values in one matrix."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_RLD: Tensor, rope: Tensor, mask: Tensor | None, cache: "LayerCache | None" = None) -> Tensor:
        query, key, value = self.wqkv(x_RLD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query, key = rotate(query, rope).transpose(1, 2), rotate(key, rope).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        out = attention(query, key, value, mask=mask, causal=mask is None)
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, hidden_width: int, dropout: float, ffn_dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, dropout)
        self.feed_forward = SwiGLU(width, hidden_width, ffn_dropout)
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)

    def forward(self, x_RLD: Tensor, rope: Tensor, mask: Tensor | None, cache: "LayerCache | None" = None) -> Tensor:
        x_RLD = x_RLD + self.attention(self.attention_norm(x_RLD), rope, mask, cache)
        return x_RLD + self.feed_forward(self.ffn_norm(x_RLD))
