"""The small network that reads a noisy vector, its time and a transformer's hidden vector.

Source: MAR, arXiv 2406.11838 section 3.2; parameter names, initial weights and numerics of the network of its
diffusion loss in LTH14/mar@231d76f. What its output means (a velocity, noise, a mean and a variance) is its user's
matter.

C width of the vectors, D hidden size of the transformer, F width of the head.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

_FREQUENCIES = 128
_LONGEST_PERIOD = 10_000.0


def _linear(layers: nn.Module, index: int) -> nn.Linear:
    """A linear layer of a sequence."""
    return cast(nn.Linear, cast(nn.Sequential, layers)[index])


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """Cosines and sines of 128 frequencies of a time, and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        number = torch.arange(_FREQUENCIES, dtype=torch.float32, device=time.device)
        angle = time.float()[..., None] * torch.exp(number * (-math.log(_LONGEST_PERIOD) / _FREQUENCIES))
        waves = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        return self.mlp(waves.to(_linear(self.mlp, 0).weight.dtype))


class HeadBlock(nn.Module):
    """Residual block: a norm that the condition scales and shifts, two linear layers, a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(_modulate(self.in_ln(x), shift, scale))


class HeadOutput(nn.Module):
    """A norm that the condition scales and shifts, and the last linear layer."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class DiffusionHead(nn.Module):
    """Output for noisy vectors, each by itself, given their times and hidden vectors. MAR, arXiv 2406.11838.

    Args:
        channels: C.
        hidden_size: D.
        width: F (MAR: 1024 ... 1536).
        depth: residual blocks (MAR: 6 ... 12; 3 in its ablation).
        out_channels: width of the output; None = C. MAR's is 2 C, noise and a share of the variance.
    """

    def __init__(
        self, channels: int, hidden_size: int, width: int = 1024, depth: int = 3, out_channels: int | None = None
    ) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(hidden_size, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = HeadOutput(width, channels if out_channels is None else out_channels)
        self.reset_parameters(None)

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        """Weights to train from (MAR's): the blocks change nothing and the output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for layer in (0, 2):
            nn.init.normal_(_linear(self.time_embed.mlp, layer).weight, std=0.02, generator=generator)
        blocks = cast(Iterable[HeadBlock], self.res_blocks)
        modulations = [block.adaLN_modulation for block in blocks] + [self.final_layer.adaLN_modulation]
        for linear in (*(_linear(modulation, 1) for modulation in modulations), self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    def forward(self, vectors_LC: Tensor, time_L: Tensor, hidden_LD: Tensor) -> Tensor:
        """Output [..., L, out_channels] in the dtype of the weights.

        Args:
            vectors_LC: noisy vectors [..., L, C].
            time_L: their times [..., L], 0 ... 1000 as MAR counts them (parts of a step are fine).
            hidden_LD: hidden vectors [..., L, D]. Axes before L broadcast: several noisy vectors of one token share
                what is computed of its hidden vector.
        """
        condition = self.time_embed(time_L) + self.cond_embed(hidden_LD.to(self.cond_embed.weight.dtype))
        x = self.input_proj(vectors_LC.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)
