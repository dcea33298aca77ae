"""Raster-order autoregressive transformer: a Llama decoder over image tokens behind a prefix that says what to draw.

Source: LlamaGen, arXiv 2406.06525, FoundationVision/LlamaGen@ce98ec4 (modules and parameter names); with rope="1d" it
is D-AR's transformer, arXiv 2505.23660. Attributes, words and codebook input are this project's.

B images, R rows (2B when guided), P prefix positions, N image tokens, K drafted tokens, L positions of one call, D
width, V codes, C code width, S cache slots.
"""

from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, combine, double, repeat
from visar.core.interface import TokenLayout
from visar.core.window import DraftTree, Window
from visar.data.vocabulary import Vocabulary
from visar.generators import raster_fused as raster_kernels
from visar.generators.causal_state import RasterState
from visar.generators.training import GeneratorFamily, shared_arguments
from visar.layers.cache import LayerCache, causal_mask, visible, visible_tree
from visar.layers.conditioning import (
    CaptionPrefix,
    LabelPrefix,
    check_condition,
    example_condition,
    null_condition,
    prefix,
)
from visar.layers.llama import Block, RMSNorm
from visar.layers.packable import Packable
from visar.layers.rope import PrefixRotation, RopeKind, rope_table

# Released sizes, arXiv 2406.06525 table 1 (parameters of the class-conditional model: 111 M, 343 M, 775 M, 1.41 B,
# 3.10 B).
RASTER_PRESETS: dict[str, dict] = {
    "llamagen-b": dict(width=768, num_layers=12, num_heads=12, hidden_width=2048),
    "llamagen-l": dict(width=1024, num_layers=24, num_heads=16, hidden_width=2816),
    "llamagen-xl": dict(width=1280, num_layers=36, num_heads=20, hidden_width=3584),
    "llamagen-xxl": dict(width=1536, num_layers=48, num_heads=24, hidden_width=4096),
    "llamagen-3b": dict(width=3200, num_layers=24, num_heads=32, hidden_width=8704),
}


class RasterGPT(Packable, ModelMixin, ConfigMixin):
    """Llama decoder over image tokens in raster order; the prefix says what to draw. arXiv 2406.06525.

    Sequence: [prefix of P positions, N = rows * columns image tokens]; position P - 1 + n predicts token n. The
    prefix is one of: a label token (class plus attributes, plus the mean of the words' vectors when words="sum");
    the words one by one and then the label token (words="prefix"); a text encoder's 120 projected vectors
    (caption_width > 0).

    Args:
        vocab_size: number of codes V.
        grid: (rows, columns) of the token grid.
        width, num_layers, num_heads, hidden_width: D, depth, heads, feed-forward hidden width.
        num_classes: classes of column 0 of the labels; 0 = not conditioned on a class.
        attributes: number of values of every further label column.
        word_vocab_size: size of the word table (ids 0 padding, 1 "not given"); 0 = no words.
        num_words: most words of a caption.
        words: "sum" or "prefix", see above.
        caption_width, caption_length: width and number of a text encoder's vectors; width 0 = none.
        rope: "2d" (LlamaGen) or "1d" (D-AR). Checkpoints do not tell them apart.
        prefix_rotation: "zero" as LlamaGen was trained, or "identity"; see visar/layers/rope.py.
        token_input: "table" (embedding of the id) or "codebook" (linear map of the code's vector).
        codebook_width: C, for token_input="codebook".
        token_dropout, residual_dropout, ffn_dropout: on the input, after attention's and the feed-forward's
            projection.

    Raises:
        ValueError: no condition at all, or settings that exclude each other.
    """

    fused: Literal["auto", "off"] = "auto"
    """"auto" decodes by the kernels of visar/kernels where they can run, "off" by plain PyTorch, the reference."""

    quantized_parts = ("layers", "output")
    read_once_per_block = ("codebook_proj", "layers", "output")
    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        grid: tuple[int, int] = (16, 16),
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
        token_input: Literal["table", "codebook"] = "table",
        codebook_width: int = 8,
        token_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if caption_width and (num_classes or attributes or word_vocab_size):
            raise ValueError("captions of a text encoder exclude classes, attributes and words")
        if not (caption_width or num_classes or word_vocab_size):
            raise ValueError("a class (num_classes), words (word_vocab_size) or captions (caption_width) are needed")
        if token_input not in ("table", "codebook"):
            raise ValueError(f"token_input {token_input!r}; choose table or codebook")
        if words not in ("sum", "prefix"):
            raise ValueError(f"words {words!r}; choose sum or prefix")
        if width % num_heads or (width // num_heads) % 4:
            raise ValueError(f"width {width} / num_heads {num_heads} must be a multiple of 4")
        rows, columns = grid
        self.num_tokens = rows * columns
        self.words_as_prefix = bool(word_vocab_size) and words == "prefix"
        self.prefix_length = caption_length if caption_width else 1 + (num_words if self.words_as_prefix else 0)
        if token_input == "table":
            self.tok_embeddings = nn.Embedding(vocab_size, width)
        else:
            self.register_buffer("codebook", torch.zeros(vocab_size, codebook_width))
            self.codebook_proj = nn.Linear(codebook_width, width)
        if caption_width:
            self.cls_embedding: nn.Module = CaptionPrefix(caption_width, caption_length, width)
        elif num_classes:
            self.cls_embedding = LabelPrefix(num_classes, width)
        else:
            self.begin_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.attribute_embeddings = nn.ModuleList(LabelPrefix(size, width) for size in attributes)
        if word_vocab_size:
            self.word_embedding = nn.Embedding(word_vocab_size, width)
        if self.words_as_prefix:
            self.word_position = nn.Parameter(torch.randn(num_words, width) * 0.02)
        self.input_dropout = nn.Dropout(token_dropout)
        self.layers = nn.ModuleList(
            Block(width, num_heads, hidden_width, residual_dropout, ffn_dropout) for _ in range(num_layers)
        )
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        # Not a buffer: it stays float32 when the weights are cast, and has values when they are on the meta device.
        self._rope = rope_table(
            rope,
            prefix_length=self.prefix_length,
            grid=(rows, columns),
            head_width=width // num_heads,
            prefix_rotation=prefix_rotation,
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from: N(0, 0.02) for linear and embedding layers, zero output head (LlamaGen)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config["token_input"] == "codebook":
            # Code vectors have unit length: a larger map makes the input as wide as the other embeddings.
            nn.init.normal_(self.codebook_proj.weight, std=0.2, generator=generator)
        if width := self.config["caption_width"]:
            nn.init.normal_(self.get_buffer("cls_embedding.uncond_embedding"), std=width**-0.5, generator=generator)
        nn.init.zeros_(self.output.weight)

    def rope(self, device: torch.device) -> Tensor:
        """Rotary table [P + N, E / 2, 2] on the device; float32."""
        if self._rope.device != device:
            self._rope = self._rope.to(device)
        return self._rope

    def set_codebook(self, codebook_VC: Tensor) -> None:
        """Takes over the tokenizer's code vectors as looked up (token_input="codebook").

        Raises:
            ValueError: the shape is not [vocab_size, codebook_width].
        """
        if self.config["token_input"] != "codebook":
            raise ValueError('this model embeds ids (token_input="table"); it has no codebook')
        if codebook_VC.shape != self.codebook.shape:
            raise ValueError(f"codebook {tuple(codebook_VC.shape)}; this model needs {tuple(self.codebook.shape)}")
        self.codebook.copy_(codebook_VC)

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
        return 2 * len(self.layers) * self.config["width"] * self.output.weight.dtype.itemsize * rows * positions

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

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Input embedding [B, L, D] of ids int64 [B, L] or (token_input="codebook") code vectors [B, L, C]."""
        if self.config["token_input"] == "table":
            return self.tok_embeddings(tokens_BL)
        vectors = self.codebook[tokens_BL] if tokens_BL.dtype == torch.int64 else tokens_BL
        return self.codebook_proj(vectors.to(self.codebook_proj.weight.dtype))

    # -------------------------------------------------------------------------------------------- teacher forcing
    def forward(self, tokens_BN: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced conditionals of every token given the prefix and the tokens before it.

        Args:
            tokens_BN: int64 ids [B, N] (the last is not read), or code vectors [B, N, C].
            condition: of the B images.

        Returns: logits [B, N, V] in the model's dtype; row n is the conditional of token n.
        """
        return self.output(self.hidden(tokens_BN, condition))

    def hidden(self, tokens_BN: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced last hidden vectors [B, N, D] (normed): what `output` makes the logits from."""
        prefix_BPD, valid_BP = self.prefix(condition)
        x = self.input_dropout(torch.cat([prefix_BPD, self.embed(tokens_BN[:, : self.num_tokens - 1])], dim=1))
        length = x.shape[1]
        mask = None if valid_BP is None else causal_mask(valid_BP, length, x.device)
        rope = self.rope(x.device)[None, :length]
        for layer in self.layers:
            x = layer(x, rope, mask)
        return self.norm(x[:, self.prefix_length - 1 :])

    def history(self, vectors_BNC: Tensor) -> Tensor:
        """What `hidden` reads where tokens are vectors [B, N, C], codes or not (token_input="codebook")."""
        return vectors_BNC

    def parallel_hidden(self, vectors_BNC: Tensor, extra_BND: Tensor, condition: Condition) -> Tensor:
        """Last hidden vectors [B, N, D] of all tokens in one pass without a shift: row n reads the prefix and the
        inputs up to its own. For one-step students (token_input="codebook").

        Args:
            vectors_BNC: code vectors, or noise.
            extra_BND: added to the embedded vectors.
            condition: of the B images.
        """
        prefix_BPD, valid_BP = self.prefix(condition)
        x = torch.cat([prefix_BPD, self.embed(vectors_BNC) + extra_BND], dim=1)
        mask = None if valid_BP is None else causal_mask(valid_BP, x.shape[1], x.device)
        rope = self.rope(x.device)[None, : x.shape[1]]
        for layer in self.layers:
            x = layer(x, rope, mask)
        return self.norm(x[:, self.prefix_length :])

    def logits_of(self, hidden_BND: Tensor) -> Tensor:
        """Logits [B, N, V] of last hidden vectors."""
        return self.output(hidden_BND)

    @property
    def codes(self) -> Tensor:
        """Code vectors [V, C] that the input is made of (token_input="codebook")."""
        return self.codebook

    def latents_of(self, vectors_BNC: Tensor) -> Tensor:
        """The tokenizer's latents [B, C, rows, columns] of code vectors."""
        return vectors_BNC.transpose(1, 2).unflatten(2, tuple(self.config["grid"]))

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
        previous = state.tokens.gather(1, (length - 1).clamp(min=0).expand(state.batch, 1))
        tokens_BL = previous if draft_BK is None else torch.cat([previous, draft_BK], dim=1)
        x = repeat(self.embed(tokens_BL), state.parts)
        at_start = repeat((length == 0).expand(state.batch, 1), state.parts)
        first = torch.where(at_start, state.prefix_last_RD, x[:, 0])
        return torch.cat([first[:, None], x[:, 1:]], dim=1)

    def raw_logits(self, state: RasterState, draft_BK: Tensor | None = None) -> Tensor:
        """Unguided logits [R, K + 1, V] of the next token and of those after each drafted token; commits nothing."""
        return self._head(self.features(state, None if draft_BK is None else Window.chain(draft_BK)))

    def _head(self, features_RLD: Tensor) -> Tensor:
        """Logits [R, L, V] of features while decoding."""
        return raster_kernels.logits(self, features_RLD) if raster_kernels.usable(self) else self.output(features_RLD)

    def guided_logits(self, state: RasterState, features_RLD: Tensor, place_BL: Tensor | None = None) -> Tensor:
        """Guided float32 logits [B, L, V] from `features`; place_BL: see Window."""
        logits_RLV = self._head(features_RLD)
        if state.scale_N is None:
            return logits_RLV.float()
        if raster_kernels.usable(self):
            return raster_kernels.guided(logits_RLV, state.scale_N, state.length, place_BL)
        if place_BL is None:
            place_BL = torch.arange(logits_RLV.shape[1], device=logits_RLV.device)
        return combine(logits_RLV, state.scale_N[state.length[:, None] + place_BL][..., None])

    def verify(self, state: RasterState, draft_BK: Tensor) -> Tensor:
        """Guided float32 logits [B, K + 1, V].

        Slot j is the conditional of position length + j given the first j drafts.
        """
        return self.guided_logits(state, self.features(state, Window.chain(draft_BK)))

    def verify_tree(self, state: RasterState, tree: DraftTree) -> Tensor:
        """Guided float32 logits [B, M + 1, V] of what follows the root and every node; the state is a ragged one."""
        return self.guided_logits(state, self.features(state, tree), tree.place_BL)

    def predict(self, state: RasterState) -> Tensor:
        """Guided float32 logits [B, 1, V] of the next token."""
        return self.guided_logits(state, self.features(state))

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
        state.tokens.scatter_(1, position, tokens_BK)
        state.length += tokens_BK.shape[1]

    def commit(self, state: RasterState, tokens_BK: Tensor, count_B: Tensor) -> None:
        """Commits the first count_B tokens (0 ... K) of every row of a ragged state, none beyond the last position."""
        if raster_kernels.usable(self):
            return raster_kernels.commit(self, state, tokens_BK, count_B)
        offset = torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
        position = state.length[:, None] + offset
        state.tokens.scatter_(1, position.clamp(max=state.tokens.shape[1] - 1), tokens_BK)
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


# -------------------------------------------------------------------------------------------- training and benchmark
CAPTION_LENGTH = 20
"""Vectors of a caption in models trained here: the longest of emoji64 has 19 for minilm."""


def _arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    arguments = shared_arguments(tokenizer, vocabulary, options)
    arguments |= dict(grid=tokenizer.layout.shapes[0], hidden_width=options.hidden_width)
    arguments |= dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), options.dropout)
    if options.words != "none":
        arguments |= dict(words=options.words, num_words=vocabulary.num_words)
    if caption_width:
        arguments |= dict(caption_width=caption_width, caption_length=CAPTION_LENGTH)
    return arguments


def _fits(layout: TokenLayout) -> bool:
    return layout.arrangement == "grid" and layout.vocab_size > 0


def _connect(model: RasterGPT, tokenizer: Any) -> None:
    if model.config["token_input"] == "codebook":
        model.set_codebook(tokenizer.codebook.detach().cpu())


FAMILY = GeneratorFamily(
    model=RasterGPT,
    presets=RASTER_PRESETS,
    tokenizer="vq-16",
    tiny=dict(vocab_size=128, grid=(4, 4), width=64, num_layers=2, num_heads=2, hidden_width=96, num_classes=4),
    fits=_fits,
    arguments=_arguments,
    connect=_connect,
)
