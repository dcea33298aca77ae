"""Masked generator of continuous tokens: any of them given any others, in a random order, several at a time.

Source: MAR, arXiv 2406.11838, LTH14/mar@fe470ac (modules and parameter names). Attributes and words are this
project's. Encoder and decoder see everything, so that there is no cache: a step is a whole pass.

B images, R rows (2B when guided), N tokens, K visible ones, L places that are asked for, C numbers of a token, D
width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, double, repeat
from visar.core.interface import TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.generators.raster import CAPTION_LENGTH
from visar.generators.training import GeneratorFamily, HeadObjective, shared_arguments
from visar.layers.bidirectional import BidirectionalBlock, truncated_normal
from visar.layers.conditioning import (
    CaptionPrefix,
    ConditionVector,
    check_condition,
    example_condition,
    null_condition,
)
from visar.layers.heads.chain import Head
from visar.layers.heads.families import build_head
from visar.layers.packable import Packable

# Released sizes (207.9 M, 478.3 M and 942.4 M parameters), for 16 x 16 tokens of 16 numbers.
MASKED_PRESETS: dict[str, dict] = {
    "mar-base": dict(width=768, encoder_layers=12, decoder_layers=12, num_heads=12)
    | dict(head_arguments=dict(width=1024, depth=6)),
    "mar-large": dict(width=1024, encoder_layers=16, decoder_layers=16, num_heads=16)
    | dict(head_arguments=dict(width=1280, depth=8)),
    "mar-huge": dict(width=1280, encoder_layers=20, decoder_layers=20, num_heads=16)
    | dict(head_arguments=dict(width=1536, depth=12)),
}


@dataclass
class MaskedState:
    """Decoding state of a batch.

    Attributes:
        tokens: float32 [B, N, C] in raster order, 0 where none is committed yet.
        vector_RD: what the images are conditioned on: one vector, or [R, P, D] those of a caption.
    """

    tokens: Tensor
    vector_RD: Tensor

    @property
    def parts(self) -> int:
        """Rows per image: 2 when guided, else 1."""
        return len(self.vector_RD) // len(self.tokens)


class MaskedGenerator(Packable, ModelMixin, ConfigMixin):
    """Encoder of the visible tokens, decoder of all places, and a head that draws tokens. MAR, arXiv 2406.11838.

    Args:
        channels: C.
        grid: (rows, columns) of the tokens.
        width, num_heads, mlp_ratio: D, heads, width of feed-forward parts over D.
        encoder_layers, decoder_layers: blocks.
        buffer_size: places in front of the tokens that hold the condition (MAR: 64).
        head, head_arguments: see `CausalContinuous`.
        head_draws: times and noises of every token in a training step (MAR: 4).
        mask_floor: smallest share of the tokens that is masked in training, whose law is a normal distribution around
            1 with deviation 0.25, cut off there and at 1 (MAR: 0.7).
        num_classes, attributes, word_vocab_size: see `visar.layers.conditioning.ConditionVector`.
        caption_width, caption_length: width and number of a text encoder's vectors, which stand in the places of the
            buffer, as many, instead of those conditions; width 0 = none. Places behind a caption's end hold nothing.
        attention_dropout, dropout: in training (MAR: 0.1 both).

    Raises:
        ValueError: no condition at all, or a size outside its range.
    """

    quantized_parts = ("encoder_blocks", "decoder_blocks")
    read_once_per_block = ("z_proj", "encoder_blocks", "decoder_embed", "decoder_blocks", "head_module")
    _supports_gradient_checkpointing = False
    _no_split_modules = ["BidirectionalBlock"]
    _repeated_blocks = ["BidirectionalBlock"]

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        grid: tuple[int, int] = (16, 16),
        width: int = 768,
        encoder_layers: int = 12,
        decoder_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        buffer_size: int = 64,
        head: str = "diffusion",
        head_arguments: dict[str, Any] | None = None,
        head_draws: int = 4,
        mask_floor: float = 0.7,
        num_classes: int = 1000,
        attributes: tuple[int, ...] = (),
        word_vocab_size: int = 0,
        caption_width: int = 0,
        caption_length: int = 120,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if caption_width and (num_classes or attributes or word_vocab_size):
            raise ValueError("captions of a text encoder exclude classes, attributes and words")
        if width % num_heads or min(channels, buffer_size, head_draws, encoder_layers, decoder_layers) < 1:
            raise ValueError(
                f"width {width}, num_heads {num_heads}, channels {channels}, buffer_size {buffer_size}, head_draws "
                f"{head_draws}, layers {encoder_layers} and {decoder_layers}; needed: a multiple of the heads, >= 1"
            )
        if not 0 < mask_floor < 1:
            raise ValueError(f"mask_floor {mask_floor}; needed: between 0 and 1")
        self.num_tokens = grid[0] * grid[1]
        self.buffer = caption_length if caption_width else buffer_size
        if caption_width:
            self.cls_embedding = CaptionPrefix(caption_width, caption_length, width)
        else:
            self.condition_vector = ConditionVector(width, num_classes, attributes, word_vocab_size)
        self.z_proj = nn.Linear(channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        places = self.buffer + self.num_tokens
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, places, width))
        self.encoder_blocks = self._blocks(encoder_layers)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, places, width))
        self.decoder_blocks = self._blocks(decoder_layers)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.num_tokens, width))
        self.head_module = build_head(head, channels, width, head_arguments)

    def _blocks(self, count: int) -> nn.ModuleList:
        config = self.config
        sizes = (config["width"], config["num_heads"], int(config["mlp_ratio"] * config["width"]))
        return nn.ModuleList(
            BidirectionalBlock(*sizes, config["attention_dropout"], config["dropout"]) for _ in range(count)
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from (MAR): Xavier for linear layers, N(0, 0.02) for embeddings and positions."""
        inside = set(self.head_module.modules())
        for module in self.modules():
            if module in inside:
                continue
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        if width := self.config["caption_width"]:
            nn.init.normal_(self.get_buffer("cls_embedding.uncond_embedding"), std=width**-0.5, generator=generator)
        self.head_module.reset_parameters(generator)

    @property
    def token_head(self) -> Head:
        """Draws a token given its hidden vector; a property, because Python's protocols do not see submodules."""
        return self.head_module

    # ------------------------------------------------------------------------------------------------- conditions
    def check_condition(self, condition: Condition) -> None:
        """Checks that the condition has what this model reads; errors as of `ConditionVector.check`."""
        if self.config["caption_width"]:
            return check_condition(self.config, condition)
        self.condition_vector.check(condition)

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that gives nothing, in the same shapes."""
        if self.config["caption_width"]:
            return null_condition(self, condition)
        return self.condition_vector.null(condition)

    def read_condition(self, condition: Condition) -> Tensor:
        """What the images are conditioned on, [R, D] or [R, P, D]: see `MaskedState`."""
        if not self.config["caption_width"]:
            return self.condition_vector(condition)
        assert condition.text_BTC is not None
        text_RPD = self.cls_embedding(condition.text_BTC.to(self.z_proj.weight.dtype))
        given_RP = condition.text_mask_BT
        return text_RPD if given_RP is None else text_RPD * given_RP[..., None].to(text_RPD.dtype)

    def example_condition(self, batch: int) -> Condition:
        """Some condition that this model takes, for `batch` images, on its device."""
        return example_condition(self.config, batch).to(self.device)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """One block: a pass reads and asks for any of the tokens. Which they are is the sampler's matter."""
        return (self.num_tokens,)

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """One kind."""
        return ("tokens",)

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Keys and values that stay from pass to pass: none."""
        return 0

    # ------------------------------------------------------------------------------------------------------ passes
    def encode(self, tokens_RNC: Tensor, visible_RK: Tensor, vector_RD: Tensor) -> Tensor:
        """Encoder's output [R, buffer + K, D] for the visible tokens.

        Args:
            tokens_RNC: tokens in raster order; only visible ones are read.
            visible_RK: int64 places of those, the same number in every row.
            vector_RD: from `read_condition`.
        """
        buffer, channels = self.buffer, tokens_RNC.shape[-1]
        slots_RPD = vector_RD[:, None] if vector_RD.ndim == 2 else vector_RD
        seen_RKC = tokens_RNC.gather(1, visible_RK[..., None].expand(-1, -1, channels))
        seen_RKD = self.z_proj(seen_RKC.to(self.z_proj.weight.dtype))
        positions_PD = self.encoder_pos_embed_learned[0]
        x = torch.cat(
            [
                slots_RPD.to(seen_RKD.dtype) + positions_PD[:buffer],
                seen_RKD + positions_PD[buffer + visible_RK],
            ],
            dim=1,
        )
        x = self.z_proj_ln(x)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded_RKD: Tensor, visible_RK: Tensor) -> Tensor:
        """Hidden vectors [R, N, D] of all places, masked or not, of the encoder's output."""
        buffer = self.buffer
        x = self.decoder_embed(encoded_RKD)
        masked = self.mask_token.to(x.dtype).expand(len(x), self.num_tokens, -1)
        index = visible_RK[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, :buffer], masked.scatter(1, index, x[:, buffer:])], dim=1)
        x = x + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self.diffusion_pos_embed_learned

    def hidden(self, tokens_RNC: Tensor, visible_RK: Tensor, vector_RD: Tensor) -> Tensor:
        """What the head reads of all places, [R, N, D]."""
        return self.decode(self.encode(tokens_RNC, visible_RK, vector_RD), visible_RK)

    def forward(self, tokens_BNC: Tensor, condition: Condition, random: torch.Generator) -> Tensor:
        """Loss of masked tokens given the visible ones, float32 [B, M].

        One share of masked tokens a batch (MAR), an order of its own an image.

        Args:
            tokens_BNC: float [B, N, C].
            condition: of the B images.
            random: on the device; mask, times and noises come from it.
        """
        batch, count, channels = tokens_BNC.shape
        device, draws = tokens_BNC.device, self.config["head_draws"]
        share = float(truncated_normal(1.0, 0.25, self.config["mask_floor"], 1.0, random, device))
        masked = math.ceil(count * share)
        order_BN = torch.rand(batch, count, generator=random, device=device).argsort(1)
        hidden_BND = self.hidden(tokens_BNC, order_BN[:, masked:], self.read_condition(condition))
        index_BM = order_BN[:, :masked, None]
        asked_BMD = hidden_BND.gather(1, index_BM.expand(-1, -1, hidden_BND.shape[-1]))
        target_BMC = tokens_BNC.gather(1, index_BM.expand(-1, -1, channels))
        shapes = (draws, *asked_BMD.shape), (draws, *target_BMC.shape)
        return self.head_module.loss(asked_BMD.expand(shapes[0]), target_BMC.expand(shapes[1]), random).mean(0)

    # --------------------------------------------------------------------------------------------------- decoding
    def start(
        self, condition: Condition, guidance: Guidance = OFF, *, state: MaskedState | None = None
    ) -> MaskedState:
        """Decoding state with no token committed.

        Args:
            condition: of the B images.
            guidance: one strength; where it is on, the batch is doubled. A sampler's steps say how strong it is.
            state: a state of the same batch and guidance, whose buffers are used again.

        Raises:
            ValueError: see `check_condition`.
        """
        self.check_condition(condition)
        guided = guidance.active(1)
        rows = double(condition, self.null_condition(condition)) if guided else condition
        vector_RD = self.read_condition(rows)
        if state is None:
            shape = (condition.batch, self.num_tokens, self.config["channels"])
            return MaskedState(torch.zeros(shape, device=vector_RD.device), vector_RD)
        state.tokens.zero_()
        state.vector_RD.copy_(vector_RD)
        return state

    def features_at(self, state: MaskedState, visible_BK: Tensor, places_BL: Tensor) -> Tensor:
        """What the head reads of some places, [R, L, D].

        Args:
            state: its tokens at the visible places are read.
            visible_BK: int64 places that are committed.
            places_BL: int64 places that are asked for.
        """
        tokens, visible, places = (repeat(each, state.parts) for each in (state.tokens, visible_BK, places_BL))
        hidden_RND = self.hidden(tokens, visible, state.vector_RD)
        return hidden_RND.gather(1, places[..., None].expand(-1, -1, hidden_RND.shape[-1]))

    def commit_at(self, state: MaskedState, places_BL: Tensor, tokens_BLC: Tensor) -> None:
        """Commits tokens at places int64 [B, L]."""
        state.tokens.scatter_(1, places_BL[..., None].expand_as(tokens_BLC), tokens_BLC)


# -------------------------------------------------------------------------------------------- training and benchmark
def _arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    arguments: dict[str, Any] = shared_arguments(tokenizer, vocabulary, options)
    layers = arguments.pop("num_layers")
    del arguments["vocab_size"], arguments["codebook_width"]
    arguments |= dict(channels=tokenizer.layout.channels, grid=tokenizer.layout.shapes[0])
    arguments |= dict(encoder_layers=layers - layers // 2, decoder_layers=max(1, layers // 2))
    if caption_width:
        arguments |= dict(caption_width=caption_width, caption_length=CAPTION_LENGTH)
    return arguments | dict(attention_dropout=options.dropout, dropout=options.dropout)


def _fits(layout: TokenLayout) -> bool:
    return layout.arrangement == "grid" and layout.vocab_size == 0


def _connect(model: MaskedGenerator, tokenizer: Any) -> None:
    """It needs nothing of its tokenizer."""


_TINY_HEAD = dict(width=32, depth=1, steps=4)
FAMILY = GeneratorFamily(
    model=MaskedGenerator,
    presets=MASKED_PRESETS,
    tokenizer="kl-16",
    tiny=dict(channels=4, grid=(4, 4), width=64, encoder_layers=1, decoder_layers=1, num_heads=2, buffer_size=2)
    | dict(head_arguments=_TINY_HEAD, num_classes=4),
    fits=_fits,
    arguments=_arguments,
    connect=_connect,
    phases={"next_scale": HeadObjective},
    sampler="masked",
)
