"""Autoregressive transformer over continuous tokens in raster order: the raster model, with a head that draws vectors.

Source: the causal ablation of MAR, arXiv 2406.11838 table 2; SphereAR, arXiv 2509.24335, has this shape too. Body,
cache, windows and kernels are those of `RasterGPT`.

B images, N tokens, C numbers of a token, D width, K drafted tokens, L positions of one call.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.interface import TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.generators.causal import CausalTransformer
from visar.generators.causal_state import RasterState
from visar.generators.raster import CAPTION_LENGTH
from visar.generators.training import GeneratorFamily, HeadObjective, shared_arguments
from visar.layers.heads.chain import Head
from visar.layers.heads.families import build_head
from visar.layers.heads.mixture import MixtureHead
from visar.layers.rope import PrefixRotation, RopeKind


class CausalContinuous(CausalTransformer):
    """Llama decoder over continuous tokens in raster order. arXiv 2406.11838.

    Args:
        channels: C, numbers of a token.
        grid: (rows, columns) of the token grid.
        head: what draws a token: "diffusion", "flow", "mixture" or "energy".
        head_arguments: of the head's class, without channels and hidden size.
        head_draws: times and noises of every token in a training step (MAR: 4); a mixture needs 1.
        width, num_layers, num_heads, hidden_width, num_classes, attributes, word_vocab_size, num_words, words,
        caption_width, caption_length, rope, prefix_rotation: see `RasterGPT`.
        token_dropout, residual_dropout, ffn_dropout: see `RasterGPT`.

    Raises:
        ValueError: no condition at all, an unknown head, or settings that exclude each other.
    """

    quantized_parts = ("layers",)
    read_once_per_block = ("token_proj", "layers", "head_module")

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        grid: tuple[int, int] = (16, 16),
        head: Literal["diffusion", "flow", "mixture", "energy"] = "diffusion",
        head_arguments: dict[str, Any] | None = None,
        head_draws: int = 4,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        hidden_width: int = 2048,
        num_classes: int = 1000,
        attributes: tuple[int, ...] = (),
        word_vocab_size: int = 0,
        num_words: int = 0,
        words: Literal["sum", "prefix"] = "sum",
        caption_width: int = 0,
        caption_length: int = 120,
        rope: RopeKind = "2d",
        prefix_rotation: PrefixRotation = "zero",
        token_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = dict(width=width, num_heads=num_heads, num_classes=num_classes, attributes=attributes)
        sizes |= dict(word_vocab_size=word_vocab_size, num_words=num_words, words=words, caption_width=caption_width)
        self._check_sizes(**sizes)
        if channels < 1 or head_draws < 1:
            raise ValueError(f"channels {channels}, head_draws {head_draws}; needed: >= 1")
        self.token_proj = nn.Linear(channels, width)
        self._build_body(
            **sizes,
            grid=grid,
            num_layers=num_layers,
            hidden_width=hidden_width,
            caption_length=caption_length,
            rope=rope,
            prefix_rotation=prefix_rotation,
            dropouts=(token_dropout, residual_dropout, ffn_dropout),
        )
        self.head_module = build_head(head, channels, width, head_arguments)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from: N(0, 0.02) for linear and embedding layers; the head's as its paper has them."""
        inside = set(self.head_module.modules())
        for module in self.modules():
            if module in inside:
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_proj.weight, std=0.2, generator=generator)
        if width := self.config["caption_width"]:
            nn.init.normal_(self.get_buffer("cls_embedding.uncond_embedding"), std=width**-0.5, generator=generator)
        self.head_module.reset_parameters(generator)

    @property
    def token_head(self) -> Head:
        """Draws a token given its hidden vector; a property, because Python's protocols do not see submodules."""
        return self.head_module

    @property
    def token_shape(self) -> tuple[int, ...]:
        """(C,)."""
        return (self.config["channels"],)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Input embedding [B, L, D] of tokens float [B, L, C]."""
        return self.token_proj(tokens_BL.to(self.token_proj.weight.dtype))

    def forward(self, tokens_BNC: Tensor, condition: Condition, random: torch.Generator) -> Tensor:
        """Teacher-forced loss of every token given the prefix and the tokens before it, float32 [B, N].

        Args:
            tokens_BNC: float [B, N, C].
            condition: of the B images.
            random: on the device; times and noises of the head come from it.
        """
        hidden_BND = self.hidden(tokens_BNC, condition)
        draws = self.config["head_draws"]
        shape = (draws, *tokens_BNC.shape)
        return self.head_module.loss(hidden_BND.expand(draws, -1, -1, -1), tokens_BNC.expand(shape), random).mean(0)

    def log_prob(self, tokens_BNC: Tensor, condition: Condition) -> Tensor:
        """Log-density of every token given those before it, nats, float32 [B, N]; of models with a mixture head.

        Raises:
            ValueError: the head's density is not known.
        """
        if not isinstance(self.head_module, MixtureHead):
            raise ValueError(f"head {self.config['head']!r} has no density in closed form; a mixture has")
        return self.head_module.log_prob(self.hidden(tokens_BNC, condition), tokens_BNC)

    def scales(self, state: RasterState, count: int) -> Tensor | None:
        """Guidance float32 [1 or B, L] of the next `count` places; None where nothing is guided."""
        if state.scale_N is None:
            return None
        place = state.length[:, None] + torch.arange(count, device=state.length.device)
        return state.scale_N[place].expand(state.batch, -1)


# -------------------------------------------------------------------------------------------- training and benchmark
def _arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    arguments: dict[str, Any] = shared_arguments(tokenizer, vocabulary, options)
    del arguments["vocab_size"], arguments["codebook_width"]
    arguments |= dict(channels=tokenizer.layout.channels, grid=tokenizer.layout.shapes[0])
    arguments |= dict(hidden_width=options.hidden_width)
    arguments |= dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), options.dropout)
    if options.words != "none":
        arguments |= dict(words=options.words, num_words=vocabulary.num_words)
    if caption_width:
        arguments |= dict(caption_width=caption_width, caption_length=CAPTION_LENGTH)
    return arguments


def _fits(layout: TokenLayout) -> bool:
    return layout.arrangement == "grid" and layout.vocab_size == 0


def _connect(model: CausalContinuous, tokenizer: Any) -> None:
    """It needs nothing of its tokenizer."""


_TINY: Mapping[str, Any] = dict(
    channels=4, grid=(4, 4), head_arguments=dict(width=32, depth=1, steps=4), width=64, num_layers=2, num_heads=2,
    hidden_width=96, num_classes=4,
)  # fmt: skip
FAMILY = GeneratorFamily(
    model=CausalContinuous,
    presets={},  # none is released
    tokenizer="kl-4-64",
    tiny=dict(_TINY),
    fits=_fits,
    arguments=_arguments,
    connect=_connect,
    phases={"next_scale": HeadObjective},
    sampler="continuous",
)
