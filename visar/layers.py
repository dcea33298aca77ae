"""Transformer parts that two families or more share. D width, F hidden width of the feed-forward part."""

import torch
from torch import Tensor, nn
from torch.nn import functional


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


def swiglu_hidden_width(width: int, multiple_of: int = 256) -> int:
    """Llama's hidden width: 2/3 of 4 D, rounded up to a multiple."""
    hidden = int(2 * 4 * width / 3)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)
