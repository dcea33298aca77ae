"""Transformer blocks that see everything, in the form of vision transformers.

Source: arXiv 2010.11929; names as in timm, whose blocks MAR, LTH14/mar@fe470ac, is made of.

R rows, L positions, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.kernels.invariance import attention


class SelfAttention(nn.Module):
    """Self-attention of all positions with biases.

    Args:
        width, num_heads: D and heads.
        dropout: of the weights of attention in training.
        projection_dropout: behind the last projection in training.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(projection_dropout)

    def forward(self, x_RLD: Tensor) -> Tensor:
        query, key, value = self.qkv(x_RLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.training and self.dropout:
            out_RNLE = functional.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout)
        else:
            out_RNLE = attention(query, key, value)
        return self.proj_drop(self.proj(out_RNLE.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden_width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_RLD: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(functional.gelu(self.fc1(x_RLD)))))


class BidirectionalBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        width, num_heads, hidden_width: D, heads, width of the feed-forward part.
        attention_dropout, dropout: in training; the second one behind projections.
    """

    def __init__(
        self, width: int, num_heads: int, hidden_width: int, attention_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, num_heads, attention_dropout, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = FeedForward(width, hidden_width, dropout)

    def forward(self, x_RLD: Tensor) -> Tensor:
        x_RLD = x_RLD + self.attn(self.norm1(x_RLD))
        return x_RLD + self.mlp(self.norm2(x_RLD))


def truncated_normal(
    mean: float, deviation: float, low: float, high: float, random: torch.Generator, device: torch.device
) -> Tensor:
    """One draw, float64, of a normal distribution cut off at both ends."""
    ends = torch.special.ndtr(torch.tensor([(low - mean) / deviation, (high - mean) / deviation], dtype=torch.float64))
    uniform = torch.rand((), generator=random, device=device, dtype=torch.float64).cpu()
    return mean + deviation * torch.special.ndtri(ends[0] + (ends[1] - ends[0]) * uniform)
