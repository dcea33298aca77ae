"""What autoregressive transformers in raster order share, whatever a token is: conditions, cache, windows, commits.

Source: LlamaGen, arXiv 2406.06525, FoundationVision/LlamaGen@ce98ec4 (modules and parameter names).

B images, R rows (2B when guided), P prefix positions, N image tokens, K drafted tokens, L positions of one call, D
width, C numbers of a token, S cache slots.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, double, repeat
from visar.core.window import Window
from visar.generators import raster_fused as raster_kernels
from visar.generators.causal_state import RasterState
from visar.layers.cache import LayerCache, causal_mask, visible, visible_tree
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
from visar.layers.rope import PrefixRotation, RopeKind, rope_table


class CausalTransformer(Packable, ModelMixin, ConfigMixin):
    """A Llama decoder over image tokens in raster order behind a prefix that says what to draw; see `RasterGPT`.

    Subclasses make the input layer, `_build_body` and what reads the last hidden vectors, in this order.
    """

    fused: Literal["auto", "off"] = "auto"
    """"auto" decodes by the kernels of visar/kernels where they can run, "off" by plain PyTorch, the reference."""

    prefix_length: int
    words_as_prefix: bool

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    _check_sizes = staticmethod(check_sizes)

    def _build_body(
        self,
        *,
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
        rope: RopeKind,
        prefix_rotation: PrefixRotation,
        dropouts: tuple[float, float, float],
    ) -> None:
        """Makes the prefix's embeddings, the blocks and the rotary table."""
        token_dropout, residual_dropout, ffn_dropout = dropouts
        self.num_tokens = math.prod(grid)
        add_prefix(
            self,
            width=width,
            num_classes=num_classes,
            attributes=attributes,
            word_vocab_size=word_vocab_size,
            num_words=num_words,
            words=words,
            caption_width=caption_width,
            caption_length=caption_length,
        )
        self.input_dropout = nn.Dropout(token_dropout)
        self.layers = nn.ModuleList(
            Block(width, num_heads, hidden_width, residual_dropout, ffn_dropout) for _ in range(num_layers)
        )
        self.norm = RMSNorm(width)
        # Not a buffer: it stays float32 when the weights are cast, and has values when they are on the meta device.
        self._rope = rope_table(
            rope,
            prefix_length=self.prefix_length,
            grid=tuple(grid),
            head_width=width // num_heads,
            prefix_rotation=prefix_rotation,
        )

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of one token: () for ids, (C,) for vectors."""
        return ()

    @abstractmethod
    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Input embedding [B, L, D] of tokens [B, L, *token_shape]."""

    def rope(self, device: torch.device) -> Tensor:
        """Rotary table [P + N, E / 2, 2] on the device; float32."""
        if self._rope.device != device:
            self._rope = self._rope.to(device)
        return self._rope

    # ------------------------------------------------------------------------------------------------ conditions
    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens of every block: one each."""
        return (1,) * self.num_tokens

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """Blocks of one kind do the same work (see visar/core/runtime.py): all of them do."""
        return ("token",) * self.num_tokens

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Bytes of keys and values of some rows and positions; None is all positions, the prefix included."""
        positions = self.prefix_length + self.num_tokens if positions is None else positions
        return 2 * len(self.layers) * self.config["width"] * self.norm.weight.dtype.itemsize * rows * positions

    def check_condition(self, condition: Condition) -> None:
        """Checks that the condition has what this model reads, in the right shape.

        Raises:
            ValueError: a field is missing, has the wrong number of columns, or a label is outside its table.
        """
        check_condition(self.config, condition)

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that gives nothing, in the same shapes; captions keep their mask (LlamaGen)."""
        return null_condition(self, condition)

    def example_condition(self, batch: int) -> Condition:
        """Some condition that this model takes, for `batch` images, on its device: to time or measure it."""
        return example_condition(self.config, batch).to(self.device)

    def prefix(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Prefix embeddings [B, P, D] and bool [B, P] of the valid ones (None if all are)."""
        return prefix(self, condition)

    # -------------------------------------------------------------------------------------------- teacher forcing
    def hidden(self, tokens_BN: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced last hidden vectors [B, N, D] (normed): row n is what token n is predicted from."""
        prefix_BPD, valid_BP = self.prefix(condition)
        x = self.input_dropout(torch.cat([prefix_BPD, self.embed(tokens_BN[:, : self.num_tokens - 1])], dim=1))
        length = x.shape[1]
        mask = None if valid_BP is None else causal_mask(valid_BP, length, x.device)
        rope = self.rope(x.device)[None, :length]
        return self.norm(self._run_layers(x, rope, mask)[:, self.prefix_length - 1 :])

    def _run_layers(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """All blocks over whole sequences [B, L, D]; with activation checkpointing once
        `enable_gradient_checkpointing()` was called."""
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = self._gradient_checkpointing_func(layer, x, rope, mask) if checkpointing else layer(x, rope, mask)
        return x

    # --------------------------------------------------------------------------------------------------- decoding
    def start(
        self,
        condition: Condition,
        guidance: Guidance = OFF,
        *,
        ragged: bool = False,
        window: int = 0,
        state: RasterState | None = None,
    ) -> RasterState:
        """Decoding state with the prefix read and no token committed.

        Args:
            condition: of the B images.
            guidance: blocks are tokens; when no token is guided the batch is not doubled.
            ragged: rows commit numbers of tokens of their own.
            window: most drafted tokens of a `verify` call.
            state: a state of the same batch, guidance and settings, whose buffers are used again.

        Raises:
            ValueError: see `check_condition`.
        """
        self.check_condition(condition)
        if raster_kernels.usable(self):
            raster_kernels.prepare(self)
        guided = guidance.active(self.num_tokens)
        rows = double(condition, self.null_condition(condition)) if guided else condition
        prefix_RPD, valid_RP = self.prefix(rows)
        if state is None:
            padded = valid_RP is not None or bool(self.config["caption_width"])
            state = RasterState.allocate(self, prefix_RPD, guided=guided, padded=padded, ragged=ragged, window=window)
        state.length.zero_()
        state.tokens.zero_()
        state.prefix_last_RD.copy_(prefix_RPD[:, -1])
        if state.scale_N is not None:
            state.scale_N[: self.num_tokens].copy_(torch.tensor(guidance.scales(self.num_tokens)))
        if state.key_valid_RS is not None:
            prefix_valid_RS = state.key_valid_RS[:, : self.prefix_length]
            prefix_valid_RS.fill_(True) if valid_RP is None else prefix_valid_RS.copy_(valid_RP)
        if self.prefix_length > 1:
            self._read_prefix(state, prefix_RPD[:, :-1], valid_RP)
        state.block = 0
        return state

    def _read_prefix(self, state: RasterState, x: Tensor, valid_RP: Tensor | None) -> None:
        """Writes keys and values of all prefix positions but the last (which every first step reads anew)."""
        length = x.shape[1]
        position = torch.arange(length, device=x.device).expand(x.shape[0] if state.cache.ragged else 1, -1)
        mask = causal_mask(valid_RP, length, x.device)
        rope = self.rope(x.device)[None, :length]
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, LayerCache(state.cache, i, position, length))

    def features(self, state: RasterState, window: Window | None = None) -> Tensor:
        """Last hidden vectors [R, L, D] (normed) that predict what comes after every slot of a window.

        Commits nothing. window: drafted tokens, a chain or a tree; None is slot 0 alone, which predicts the next
            token.
        """
        if raster_kernels.usable(self):
            return raster_kernels.features(self, state, window)
        x = self._inputs(state, None if window is None else window.tokens_BM)
        seen_BLL, place_BL = (None, None) if window is None else (window.seen_BLL, window.place_BL)
        root = state.length[:, None] + self.prefix_length - 1
        position = root + torch.arange(x.shape[1], device=x.device)
        place = position if place_BL is None else root + place_BL
        if state.cache.ragged:
            root, position, place = (repeat(value, state.parts) for value in (root, position, place))
        table = self.rope(x.device)
        rope = table[place.clamp(max=table.shape[0] - 1)]
        slots = state.cache.num_slots
        if x.device.type == "cpu" and not state.cache.ragged:
            slots = self.prefix_length + state.block + x.shape[1] - 1
        if seen_BLL is None:
            mask = visible(position, slots, state.key_valid_RS)
        else:
            mask = visible_tree(root, repeat(seen_BLL, state.parts), slots, state.key_valid_RS)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, LayerCache(state.cache, i, position, slots))
        return self.norm(x)

    def _inputs(self, state: RasterState, draft_BK: Tensor | None) -> Tensor:
        """Input embeddings [R, K + 1, D] of the last committed position and of the drafted tokens."""
        length = state.length[:, None]
        previous = tokens_at(state.tokens, (length - 1).clamp(min=0).expand(state.batch, 1))
        tokens_BL = previous if draft_BK is None else torch.cat([previous, draft_BK], dim=1)
        x = repeat(self.embed(tokens_BL), state.parts)
        at_start = repeat((length == 0).expand(state.batch, 1), state.parts)
        first = torch.where(at_start, state.prefix_last_RD, x[:, 0])
        return torch.cat([first[:, None], x[:, 1:]], dim=1)

    def positions(self, state: RasterState) -> Tensor:
        """Where the next token stands in the tokenizer's order, int64 [1 or B, 1]."""
        return state.length[:, None].clone()

    def result(self, state: RasterState) -> Tensor:
        """The image's tokens int64 [B, N] in the tokenizer's order, 0 where none is committed yet; a view."""
        return state.tokens[:, : self.num_tokens]

    def append(self, state: RasterState, tokens_BK: Tensor) -> None:
        """Commits K tokens to every row."""
        offset = torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
        position = (state.length[:, None] + offset).expand(state.batch, -1)
        state.tokens.scatter_(1, _spread(position, tokens_BK), tokens_BK)
        state.length += tokens_BK.shape[1]

    def commit(self, state: RasterState, tokens_BK: Tensor, count_B: Tensor) -> None:
        """Commits the first count_B tokens (0 ... K) of every row of a ragged state, none beyond the last position."""
        if not self.token_shape and raster_kernels.usable(self):
            return raster_kernels.commit(self, state, tokens_BK, count_B)
        offset = torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
        position = state.length[:, None] + offset
        position = position.clamp(max=state.tokens.shape[1] - 1)
        state.tokens.scatter_(1, _spread(position, tokens_BK), tokens_BK)
        state.length.copy_((state.length + count_B).clamp(max=self.num_tokens))

    def commit_path(self, state: RasterState, slots_BK: Tensor, tokens_BL: Tensor, count_B: Tensor) -> None:
        """Commits nodes of the tree read last, and the token after them.

        Args:
            slots_BK: int64 slots of the committed nodes, from the root down; any value behind the last.
            tokens_BL: the nodes' tokens and the one drawn after them, as in `commit`, L = K + 1.
            count_B: how many of them are committed, 0 ... L.
        """
        if raster_kernels.usable(self):
            raster_kernels.move_path(self, state, slots_BK)
        else:
            root = state.length[:, None] + self.prefix_length - 1
            target = root + 1 + torch.arange(slots_BK.shape[1], device=slots_BK.device)
            state.cache.move(repeat(root + slots_BK, state.parts), repeat(target, state.parts))
        self.commit(state, tokens_BL, count_B)


def _spread(position_BK: Tensor, tokens: Tensor) -> Tensor:
    """Positions for gather and scatter along axis 1 of tokens [B, K, ...]."""
    return position_BK.reshape(*position_BK.shape, *[1] * (tokens.ndim - 2)).expand(
        *position_BK.shape, *tokens.shape[2:]
    )


def tokens_at(tokens: Tensor, position_BK: Tensor) -> Tensor:
    """Tokens [B, K, ...] at positions of every row."""
    return tokens.gather(1, _spread(position_BK, tokens))
