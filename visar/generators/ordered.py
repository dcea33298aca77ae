"""Transformers that draw blocks of tokens in an order of their own: next-neighbor (NAR) and region-parallel (PAR).

A block's tokens are drawn independently given all blocks before, in one pass, and are then read in one pass that sees
all of them. What the two models differ in is the order (visar/generators/orders.py): its blocks, its learned inputs,
and which heads predict a token from which inputs of the latest pass. Where several do, their logits are averaged.

B images, R rows (2B when guided), P prefix positions, N tokens, I inputs behind the prefix, L inputs or tokens of one
call, H heads, D width, V codes, S cache slots.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, combine, double, repeat
from visar.core.interface import TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.generators.orders import Order
from visar.generators.training import shared_arguments
from visar.layers.cache import KVCache, LayerCache, causal_mask
from visar.layers.conditioning import (
    add_prefix,
    check_condition,
    check_sizes,
    example_condition,
    null_condition,
    prefix,
)
from visar.layers.llama import Block, RMSNorm
from visar.layers.packable import Packable
from visar.layers.rope import PrefixRotation, rope_table

Positions = Literal["rope", "learned"]


@dataclass(frozen=True)
class OrderTables:
    """An order as tensors on one device.

    Attributes:
        place_N: int64 places of all tokens in the order of the blocks.
        source_HN, weight_HN: int64 and float32, for every head and token in the order of the blocks: the input of the
            latest pass that the head reads, and its share of the token's logits.
        read_HN, share_HN: the same in the tokenizer's order, as indices of [last prefix position, all inputs].
        input_I: int64, what every input is, see `Order.inputs`.
        seen_II: bool; [i, j] is True where input i sees input j.
        rope: float32 [P + I, E / 2, 2] rotary angles of the prefix and of all inputs.
    """

    place_N: Tensor
    source_HN: Tensor
    weight_HN: Tensor
    read_HN: Tensor
    share_HN: Tensor
    input_I: Tensor
    seen_II: Tensor
    rope: Tensor

    @classmethod
    def of(cls, order: Order, rope: Tensor) -> "OrderTables":
        """Tables on the CPU; rope: of the prefix and of what `Order.inputs` names, in the order of its numbers."""
        with torch.device("cpu"):
            place_N, source_HN = torch.tensor(order.places), torch.tensor(order.sources)
            weight_HN = (source_HN >= 0).float() / (source_HN >= 0).sum(0)
            input_I = torch.tensor(order.inputs, dtype=torch.int64)
            pass_I = torch.tensor(order.passes, dtype=torch.int64)
            begins = [0, *(order.passes.index(number) + 1 for number in range(1, len(order.blocks)))]
            begin_N = torch.tensor(begins).repeat_interleave(torch.tensor(order.sizes))
            raster_N = place_N.argsort()
            prefix_length = rope.shape[0] - len(order.places) - sum(order.learned)
            return cls(
                place_N=place_N,
                source_HN=source_HN.clamp(min=0),
                weight_HN=weight_HN,
                read_HN=(source_HN.clamp(min=0) + begin_N)[:, raster_N],
                share_HN=weight_HN[:, raster_N],
                input_I=input_I,
                seen_II=pass_I[None] <= pass_I[:, None],
                rope=torch.cat([rope[:prefix_length], rope[prefix_length + input_I]]),
            )

    def to(self, device: torch.device) -> "OrderTables":
        """The same tables on another device."""
        return OrderTables(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def mean_of_heads(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits [R, L, V] from those of every head and its share of every token's, float32 [L]; shares add up to 1."""
    return reduce(torch.add, (logits_RLV * share_L[:, None].to(logits_RLV.dtype) for logits_RLV, share_L in parts))


@dataclass
class OrderedState:
    """Decoding state of a batch. All tensors are allocated by `start` and changed in place from then on.

    Attributes:
        tokens: int64 [B, N] committed ids in the tokenizer's order, 0 where none is committed yet.
        length: int64 [1] committed tokens.
        inputs: int64 [1] inputs read behind the prefix.
        prefix_last_RD: embedding of the last prefix position, which the first step reads.
        key_valid_RS: bool [R, S] slots that may be seen; None if all.
        scale_N: float32 [N] guidance of every token in the order of the blocks; None when guidance is off.
        features: what every head reads of the latest pass, [R, L, D] each; L is the most inputs of a pass.
        cache: keys and values, in the order of reading.
        block: index of the block about to be predicted or committed, set by the loop. Steps of one kind do not depend
            on it, so a captured one serves them all.
    """

    tokens: Tensor
    length: Tensor
    inputs: Tensor
    prefix_last_RD: Tensor
    key_valid_RS: Tensor | None
    scale_N: Tensor | None
    features: list[Tensor]
    cache: KVCache
    block: int = 0

    @property
    def batch(self) -> int:
        """Number of images B."""
        return self.tokens.shape[0]

    @property
    def parts(self) -> int:
        """Rows per image: 2 when guided, else 1."""
        return 1 if self.scale_N is None else 2


class OrderedTransformer(Packable, ModelMixin, ConfigMixin):
    """A Llama decoder over blocks of tokens behind a prefix that says what to draw; see the module's text.

    The heads read after the last blocks, one each: with H heads the last H - 1 blocks are theirs. Subclasses call
    `_build`.
    """

    quantized_parts = ("layers", "output", "other_outputs")
    read_once_per_block = ("layers", "output", "other_outputs")
    prefix_length: int
    words_as_prefix: bool

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    def _build(
        self,
        order: Order,
        *,
        vocab_size: int,
        grid: tuple[int, ...],
        width: int,
        num_layers: int,
        num_heads: int,
        hidden_width: int,
        num_classes: int,
        attributes: tuple[int, ...],
        word_vocab_size: int,
        num_words: int,
        words: str,
        caption_width: int,
        caption_length: int,
        positions: Positions,
        prefix_rotation: PrefixRotation,
        dropouts: tuple[float, float, float],
    ) -> None:
        """Makes all layers and tables; arguments as of `NextNeighborTransformer`."""
        conditions: dict[str, Any] = dict(num_classes=num_classes, attributes=attributes, caption_width=caption_width)
        conditions |= dict(word_vocab_size=word_vocab_size, num_words=num_words, words=words)
        check_sizes(width=width, num_heads=num_heads, **conditions)
        if positions not in ("rope", "learned") or (positions == "rope" and len(grid) != 2):
            raise ValueError(f"positions {positions!r} on {len(grid)} axes; choose learned, or rope for two axes")
        token_dropout, residual_dropout, ffn_dropout = dropouts
        self.order, self.num_tokens, heads = order, len(order.places), len(order.sources)
        self.learns_positions = positions == "learned"
        self.tok_embeddings = nn.Embedding(vocab_size, width)
        add_prefix(self, width=width, caption_length=caption_length, **conditions)
        if learned := sum(order.learned):
            self.learned_inputs = nn.Parameter(torch.randn(learned, width) * 0.02)
        if self.learns_positions:
            self.position_embedding = nn.Parameter(torch.randn(self.prefix_length + self.num_tokens, width) * 0.02)
        self.input_dropout = nn.Dropout(token_dropout)
        self.layers = nn.ModuleList(
            Block(width, num_heads, hidden_width, residual_dropout, ffn_dropout) for _ in range(num_layers + heads - 1)
        )
        self.other_norms = nn.ModuleList(RMSNorm(width) for _ in range(heads - 1))
        self.other_outputs = nn.ModuleList(nn.Linear(width, vocab_size, bias=False) for _ in range(heads - 1))
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        # Not buffers: they stay as they are when the weights are cast, and have values on the meta device.
        self._tables = OrderTables.of(order, self._rope(grid, width // num_heads, positions, prefix_rotation))
        self._widths = order.widths
        starts = [sum(order.learned[:block]) for block in range(len(order.blocks))]
        self._learned = tuple(zip(starts, order.learned, strict=True))

    def _rope(
        self, grid: tuple[int, ...], head_width: int, positions: Positions, prefix_rotation: PrefixRotation
    ) -> Tensor:
        """Rotary angles [P + N + learned, E / 2, 2] of the prefix, the grid and the learned inputs, in this order.

        Learned inputs have none, as a prefix with prefix_rotation="zero" (PAR). Learned positions rotate nothing.
        """
        learned = sum(self.order.learned)
        if positions == "learned":
            with torch.device("cpu"):
                count = self.prefix_length + self.num_tokens + learned
                return torch.tensor([1.0, 0.0]).expand(count, head_width // 2, 2).clone()
        table = rope_table(
            "2d",
            prefix_length=self.prefix_length,
            grid=(grid[0], grid[1]),
            head_width=head_width,
            prefix_rotation=prefix_rotation,
        )
        return torch.cat([table, table.new_zeros(learned, *table.shape[1:])])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from: N(0, 0.02) for linear and embedding layers, zero heads (LlamaGen)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        if width := self.config["caption_width"]:
            nn.init.normal_(self.get_buffer("cls_embedding.uncond_embedding"), std=width**-0.5, generator=generator)
        for output in self._outputs:
            nn.init.zeros_(output.weight)

    @property
    def _norms(self) -> list[Any]:
        """Norm of every head."""
        return [self.norm, *self.other_norms]

    @property
    def _outputs(self) -> list[Any]:
        """Linear layer from hidden vectors to logits of every head."""
        return [self.output, *self.other_outputs]

    def tables(self, device: torch.device) -> OrderTables:
        """The order's tables on the device."""
        if self._tables.place_N.device != device:
            self._tables = self._tables.to(device)
        return self._tables

    # ------------------------------------------------------------------------------------------------- conditions
    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens of every block."""
        return self.order.sizes

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """Blocks of one kind do the same work (see visar/core/runtime.py): those of as many tokens and learned inputs.

        The first also reads the end of the prefix; the last is drawn and not read.
        """
        kinds = []
        last = len(self.order.blocks) - 1
        for block, (size, learned) in enumerate(zip(self.order.sizes, self.order.learned, strict=True)):
            ends = "first " * (block == 0) + "last " * (block == last)
            kinds.append(f"{ends}block of {size}" + f" and {learned} learned" * (learned > 0))
        return tuple(kinds)

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Bytes of keys and values of some rows and positions; None is all positions, the prefix included."""
        positions = self.prefix_length + sum(self._widths) if positions is None else positions
        return 2 * len(self.layers) * self.config["width"] * self.norm.weight.dtype.itemsize * rows * positions

    def check_condition(self, condition: Condition) -> None:
        """Checks that the condition has what this model reads, in the right shape.

        Raises:
            ValueError: a field is missing, has the wrong number of columns, or a label is outside its table.
        """
        check_condition(self.config, condition)

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that gives nothing, in the same shapes; captions keep their mask (NAR)."""
        return null_condition(self, condition)

    def example_condition(self, batch: int) -> Condition:
        """Some condition that this model takes, for `batch` images, on its device: to time or measure it."""
        return example_condition(self.config, batch).to(self.device)

    def prefix(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Prefix embeddings [B, P, D] and bool [B, P] of the valid ones (None if all are)."""
        embedded_BPD, valid_BP = prefix(self, condition)
        if self.learns_positions:
            embedded_BPD = embedded_BPD + self.position_embedding[: self.prefix_length]
        return embedded_BPD, valid_BP

    def embed(self, tokens_BL: Tensor, place_L: Tensor, learned: slice) -> Tensor:
        """Embeddings [B, I, D] of tokens, which stand at some places, and behind them of some learned inputs."""
        x = self.tok_embeddings(tokens_BL)
        if self.learns_positions:
            x = x + self.position_embedding[self.prefix_length + place_L]
        if learned.start == learned.stop:
            return x
        return torch.cat([x, self.learned_inputs[learned].expand(x.shape[0], -1, -1)], dim=1)

    # -------------------------------------------------------------------------------------------- teacher forcing
    def forward(self, tokens_BN: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced conditionals of every token given the condition and the blocks before its own.

        Args:
            tokens_BN: int64 ids [B, N] in the tokenizer's order (those of the last block are not read).
            condition: of the B images.

        Returns: logits [B, N, V] in the model's dtype; row n is the conditional of token n.
        """
        tables, begin = self.tables(tokens_BN.device), self.prefix_length
        prefix_BPD, valid_BP = self.prefix(condition)
        place_N = torch.arange(self.num_tokens, device=tokens_BN.device)
        behind_BID = self.embed(tokens_BN, place_N, slice(0, sum(self.order.learned)))[:, tables.input_I]
        x = self.input_dropout(torch.cat([prefix_BPD, behind_BID], dim=1))
        mask = causal_mask(valid_BP, x.shape[1], x.device)
        mask[:, :, begin:, begin:] |= tables.seen_II
        features = self._run(x, tables.rope[None], mask)
        parts = zip(features, self._outputs, tables.read_HN, tables.share_HN, strict=True)
        return mean_of_heads(
            (output(hidden[:, begin - 1 + read_N]), share_N) for hidden, output, read_N, share_N in parts
        )

    def _run(self, x: Tensor, rope: Tensor, mask: Tensor, caches: Sequence[LayerCache] | None = None) -> list[Tensor]:
        """What every head reads [R, L, D] (normed); with activation checkpointing once
        `enable_gradient_checkpointing()` was called."""
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled() and caches is None
        features, first = [], len(self.layers) - len(self._norms)
        for index, layer in enumerate(self.layers):
            if checkpointing:
                x = self._gradient_checkpointing_func(layer, x, rope, mask)
            else:
                x = layer(x, rope, mask, None if caches is None else caches[index])
            if index >= first:
                features.append(self._norms[index - first](x))
        return features

    # --------------------------------------------------------------------------------------------------- decoding
    def start(
        self, condition: Condition, guidance: Guidance = OFF, *, state: OrderedState | None = None
    ) -> OrderedState:
        """Decoding state with the prefix read, but for its last position, and no token committed.

        Args:
            condition: of the B images.
            guidance: over blocks; when none is guided the batch is not doubled.
            state: a state of the same batch and guidance, whose buffers are used again.

        Raises:
            ValueError: see `check_condition`.
        """
        self.check_condition(condition)
        blocks = len(self.order.blocks)
        guided = guidance.active(blocks)
        rows = double(condition, self.null_condition(condition)) if guided else condition
        prefix_RPD, valid_RP = self.prefix(rows)
        if state is None:
            padded = valid_RP is not None or bool(self.config["caption_width"])
            state = self._allocate(condition.batch, prefix_RPD, guided=guided, padded=padded)
        for counter in (state.tokens, state.length, state.inputs):
            counter.zero_()
        state.prefix_last_RD.copy_(prefix_RPD[:, -1])
        if state.scale_N is not None:
            scales = torch.tensor(guidance.scales(blocks))
            state.scale_N.copy_(scales.repeat_interleave(torch.tensor(self.order.sizes)))
        if state.key_valid_RS is not None:
            prefix_valid_RS = state.key_valid_RS[:, : self.prefix_length]
            prefix_valid_RS.fill_(True) if valid_RP is None else prefix_valid_RS.copy_(valid_RP)
        self.tables(prefix_RPD.device)
        if self.prefix_length > 1:
            length = self.prefix_length - 1
            position = torch.arange(length, device=prefix_RPD.device)[None]
            mask = causal_mask(valid_RP, length, prefix_RPD.device)
            self._read(state, prefix_RPD[:, :length], position, mask, length)
        state.block = 0
        return state

    def _allocate(self, batch: int, prefix_RPD: Tensor, *, guided: bool, padded: bool) -> OrderedState:
        """Buffers on the prefix's device and in its dtype."""
        device, dtype, (rows, length, width) = prefix_RPD.device, prefix_RPD.dtype, prefix_RPD.shape
        slots = length + sum(self._widths)
        most = max((1, *self._widths))
        cache = KVCache(
            num_layers=len(self.layers),
            rows=rows,
            num_heads=self.config["num_heads"],
            num_slots=slots,
            head_width=width // self.config["num_heads"],
            device=device,
            dtype=dtype,
        )
        return OrderedState(
            tokens=torch.zeros(batch, self.num_tokens, dtype=torch.int64, device=device),
            length=torch.zeros(1, dtype=torch.int64, device=device),
            inputs=torch.zeros(1, dtype=torch.int64, device=device),
            prefix_last_RD=torch.empty(rows, width, device=device, dtype=dtype),
            key_valid_RS=torch.ones(rows, slots, dtype=torch.bool, device=device) if padded else None,
            scale_N=torch.ones(self.num_tokens, device=device) if guided else None,
            features=[torch.zeros(rows, most, width, device=device, dtype=dtype) for _ in self._norms],
            cache=cache,
        )

    def _read(self, state: OrderedState, x: Tensor, position: Tensor, mask: Tensor, bound: int) -> list[Tensor]:
        """Writes keys and values of inputs [R, L, D] and returns what the heads read of them.

        Args:
            position: int64 [1, L] slots.
            mask: bool [1 or R, 1, L, bound].
            bound: number of slots that may be seen.
        """
        rope = self.tables(x.device).rope[position]
        caches = [LayerCache(state.cache, index, position, bound) for index in range(len(self.layers))]
        return self._run(x, rope, mask, caches)

    def _read_block(self, state: OrderedState, x: Tensor, first: Tensor) -> None:
        """Reads inputs that see each other and all before them, from slot `first`, int64 [1], on."""
        length, slots = x.shape[1], state.cache.num_slots
        position = (first + torch.arange(length, device=x.device))[None]
        mask = (torch.arange(slots, device=x.device) < first + length)[None, None, None]
        if state.key_valid_RS is not None:
            mask = mask & state.key_valid_RS[:, None, None]
        features = self._read(state, x, position, mask.expand(-1, -1, length, -1), slots)
        for buffer, each in zip(state.features, features, strict=True):
            buffer[:, :length].copy_(each)

    def _now(self, state: OrderedState) -> Tensor:
        """Numbers of the block's tokens in the order of the blocks, int64 [L]."""
        size = self.order.sizes[state.block]
        return state.length + torch.arange(size, device=state.length.device)

    def raw_logits(self, state: OrderedState) -> Tensor:
        """Unguided logits [R, L, V] of block `state.block`; commits nothing."""
        if state.block == 0:
            self._read_block(state, state.prefix_last_RD[:, None], state.inputs + (self.prefix_length - 1))
        tables, now_L = self.tables(state.tokens.device), self._now(state)
        parts = zip(state.features, self._outputs, tables.source_HN, tables.weight_HN, strict=True)
        return mean_of_heads(
            (output(features_RLD.index_select(1, source_N[now_L])), weight_N[now_L])
            for features_RLD, output, source_N, weight_N in parts
        )

    def predict(self, state: OrderedState) -> Tensor:
        """Guided float32 logits [B, L, V] of block `state.block`."""
        logits_RLV = self.raw_logits(state)
        if state.scale_N is None:
            return logits_RLV.float()
        return combine(logits_RLV, state.scale_N[self._now(state)][:, None])

    def positions(self, state: OrderedState) -> Tensor:
        """Where the tokens of block `state.block` stand in the tokenizer's order, int64 [1, L]."""
        return self.tables(state.tokens.device).place_N[self._now(state)][None]

    def result(self, state: OrderedState) -> Tensor:
        """The image's tokens int64 [B, N] in the tokenizer's order, 0 where none is committed yet; a view."""
        return state.tokens

    def append(self, state: OrderedState, tokens_BL: Tensor) -> None:
        """Commits block `state.block` and reads it with the learned inputs behind it; the last block is not read."""
        place_L = self.positions(state)[0]
        state.tokens.index_copy_(1, place_L, tokens_BL)
        state.length += tokens_BL.shape[1]
        if state.block + 1 < len(self.order.blocks):
            begin, count = self._learned[state.block]
            x = repeat(self.embed(tokens_BL, place_L, slice(begin, begin + count)), state.parts)
            self._read_block(state, x, state.inputs + self.prefix_length)
            state.inputs += x.shape[1]


# -------------------------------------------------------------------------------------------- training and benchmark
CAPTION_LENGTH = 20
"""Vectors of a caption in models trained here, as of `RasterGPT`."""


def fits_grid(layout: TokenLayout) -> bool:
    """Whether tokens are ids of one map."""
    return layout.arrangement == "grid" and layout.vocab_size > 0


def ordered_arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    """Constructor arguments of a transformer over blocks; see `GeneratorFamily.arguments`."""
    arguments = shared_arguments(tokenizer, vocabulary, options)
    del arguments["codebook_width"]
    arguments |= dict(grid=tokenizer.layout.shapes[0], hidden_width=options.hidden_width)
    arguments |= dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), options.dropout)
    if options.words != "none":
        arguments |= dict(words=options.words, num_words=vocabulary.num_words)
    if caption_width:
        arguments |= dict(caption_width=caption_width, caption_length=CAPTION_LENGTH)
    return arguments


def connect_nothing(model: OrderedTransformer, tokenizer: Any) -> None:
    """They need nothing of their tokenizer."""
