"""One-step students in the arrangement of Distilled Decoding's released weights.

Source: microsoft/distilled_decoding@3b95d33f (LlamaGen/autoregressive/models/dd.py, VAR/models/dd.py). Differs from
our own students in three things: the condition's cell too is marked as data; students over scales add the mark again
inside of every block and before the heads, through a linear layer each; and the head of vectors is a norm that the
condition scales and shifts before its linear layer.

B images, N tokens, D width, C code width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.core.condition import Condition
from visar.generators.one_step import OneStepGenerator


class ModulatedHead(nn.Module):
    """Vectors [B, N, C] from hidden vectors: a norm without weights, scale and shift by the condition, and a linear
    layer."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.linear = nn.Linear(width, channels)

    def forward(self, hidden_BND: Tensor, condition_B1D: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + condition_B1D).unbind(1)
        normed = functional.layer_norm(hidden_BND, hidden_BND.shape[-1:], eps=1e-6)
        return self.linear(normed * (1 + scale[:, None]) + shift[:, None])


class ReleasedStudent(OneStepGenerator):
    """A student with the released parts; arguments as of `OneStepGenerator`, code_scale 1 and no velocity head."""

    def make_heads(self, width: int, channels: int) -> None:
        self.kind = nn.Embedding(2, width)
        layers = self.network.config["num_layers"] + 1 if "scales" in self.network.config else 0
        self.kind_layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.vector_head = ModulatedHead(width, channels)

    def reset_heads(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.kind.weight)
        linears: list[Any] = [self.vector_head.linear, *self.kind_layers]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, vectors_BNC: Tensor, known: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        kind = self.kind(known.long()).expand(*vectors_BNC.shape[:2], -1)
        cell = self.kind.weight[1].expand(len(kind), 1, -1)
        through = self._over_scales if len(self.kind_layers) else self._raster
        logits, vectors = through(vectors_BNC, torch.cat([cell, kind], dim=1), condition)
        return logits.float(), vectors.float()

    def _raster(self, vectors_BNC: Tensor, kind_BLD: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        network = self.network
        prefix_B1D, _ = network.prefix(condition)
        x = torch.cat([prefix_B1D, network.embed(vectors_BNC)], dim=1) + kind_BLD
        rope = network.rope(x.device)[None, : x.shape[1]]
        for layer in network.layers:
            x = layer(x, rope, None)
        x = x[:, 1:]
        return network.output(network.norm(x)), self.vector_head(x, prefix_B1D)

    def _over_scales(self, vectors_BNC: Tensor, kind_BLD: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        network = self.network
        condition_BD = network.condition_vector(condition)
        tokens = network.embed_map(vectors_BNC) + network.embed_positions(0, len(network.scales) - 1)
        x = torch.cat([network.start_input(condition_BD)[:, :1].to(tokens.dtype), tokens], dim=1) + kind_BLD
        modulations, sizes = network.modulate(condition_BD), (1, *network.block_sizes)
        for block, modulation, layer in zip(network.blocks, modulations["blocks"], self.kind_layers, strict=False):
            x = block(x, modulation, sizes, "own", between_RLD=layer(kind_BLD), method=network.attention_method)
        x = (x + self.kind_layers[-1](kind_BLD))[:, 1:]
        normed = network.head_nm(x, modulations["head"][0])
        return network.head(normed), self.vector_head(x, condition_BD[:, None])
