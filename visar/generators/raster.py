"""Raster-order autoregressive transformer: a Llama decoder over image tokens behind a prefix that says what to draw.

Source: LlamaGen, arXiv 2406.06525, FoundationVision/LlamaGen@ce98ec4 (modules and parameter names); with rope="1d" it
is D-AR's transformer, arXiv 2505.23660. Attributes, words and codebook input are this project's.

B images, R rows (2B when guided), P prefix positions, N image tokens, K drafted tokens, L positions of one call, D
width, V codes, C code width, S cache slots.
"""

from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin  # noqa: F401  (their names stay visible here)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, combine
from visar.core.interface import TokenLayout
from visar.core.window import DraftTree, Window
from visar.data.vocabulary import Vocabulary
from visar.generators import raster_fused as raster_kernels
from visar.generators.causal import CausalTransformer
from visar.generators.causal_state import RasterState
from visar.generators.training import GeneratorFamily, shared_arguments
from visar.layers.cache import causal_mask
from visar.layers.rope import PrefixRotation, RopeKind

# Released sizes, arXiv 2406.06525 table 1 (parameters of the class-conditional model: 111 M, 343 M, 775 M, 1.41 B,
# 3.10 B).
RASTER_PRESETS: dict[str, dict] = {
    "llamagen-b": dict(width=768, num_layers=12, num_heads=12, hidden_width=2048),
    "llamagen-l": dict(width=1024, num_layers=24, num_heads=16, hidden_width=2816),
    "llamagen-xl": dict(width=1280, num_layers=36, num_heads=20, hidden_width=3584),
    "llamagen-xxl": dict(width=1536, num_layers=48, num_heads=24, hidden_width=4096),
    "llamagen-3b": dict(width=3200, num_layers=24, num_heads=32, hidden_width=8704),
}


class RasterGPT(CausalTransformer):
    """Llama decoder over image tokens in raster order; the prefix says what to draw. arXiv 2406.06525.

    Sequence: [prefix of P positions, N image tokens]; position P - 1 + n predicts token n. The
    prefix is one of: a label token (class plus attributes, plus the mean of the words' vectors when words="sum");
    the words one by one and then the label token (words="prefix"); a text encoder's 120 projected vectors
    (caption_width > 0).

    Args:
        vocab_size: number of codes V.
        grid: (rows, columns) of the token grid; (frames, rows, columns) of a clip, drawn frame after frame.
        width, num_layers, num_heads, hidden_width: D, depth, heads, feed-forward hidden width.
        num_classes: classes of column 0 of the labels; 0 = not conditioned on a class.
        attributes: number of values of every further label column.
        word_vocab_size: size of the word table (ids 0 padding, 1 "not given"); 0 = no words.
        num_words: most words of a caption.
        words: "sum" or "prefix", see above.
        caption_width, caption_length: width and number of a text encoder's vectors; width 0 = none.
        rope: "2d" (LlamaGen), "1d" (D-AR) or "3d" (clips). Checkpoints do not tell them apart.
        prefix_rotation: "zero" as LlamaGen was trained, or "identity"; see visar/layers/rope.py.
        token_input: "table" (embedding of the id) or "codebook" (linear map of the code's vector).
        codebook_width: C, for token_input="codebook".
        token_dropout, residual_dropout, ffn_dropout: on the input, after attention's and the feed-forward's
            projection.

    Raises:
        ValueError: no condition at all, or settings that exclude each other.
    """

    quantized_parts = ("layers", "output")
    read_once_per_block = ("codebook_proj", "layers", "output")

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        grid: tuple[int, ...] = (16, 16),
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
        sizes: dict[str, Any] = dict(width=width, num_heads=num_heads, num_classes=num_classes, attributes=attributes)
        sizes |= dict(word_vocab_size=word_vocab_size, num_words=num_words, words=words, caption_width=caption_width)
        self._check_sizes(**sizes)
        if token_input not in ("table", "codebook"):
            raise ValueError(f"token_input {token_input!r}; choose table or codebook")
        if token_input == "table":
            self.tok_embeddings = nn.Embedding(vocab_size, width)
        else:
            self.register_buffer("codebook", torch.zeros(vocab_size, codebook_width))
            self.codebook_proj = nn.Linear(codebook_width, width)
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
        self.output = nn.Linear(width, vocab_size, bias=False)

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

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Input embedding [B, L, D] of ids int64 [B, L] or (token_input="codebook") code vectors [B, L, C]."""
        if self.config["token_input"] == "table":
            return self.tok_embeddings(tokens_BL)
        vectors = self.codebook[tokens_BL] if tokens_BL.dtype == torch.int64 else tokens_BL
        return self.codebook_proj(vectors.to(self.codebook_proj.weight.dtype))

    def check_condition(self, condition: Condition) -> None:
        """Checks that the condition has what this model reads, in the right shape; it may have first tokens.

        Raises:
            ValueError: a field is missing, has the wrong number of columns, or a label or a first token is outside its
                table.
        """
        if condition.first_BK is not None:
            check_first(condition.first_BK, self.num_tokens, self.config["vocab_size"])
        super().check_condition(condition.without_first())

    def start(
        self,
        condition: Condition,
        guidance: Guidance = OFF,
        *,
        ragged: bool = False,
        window: int = 0,
        state: RasterState | None = None,
    ) -> RasterState:
        """See `CausalTransformer.start`. Where first tokens are given, their places have no other code: samplers that
        are exact draw them, and the others given them.

        Raises:
            ValueError: see `check_condition`, or a state of a batch without first tokens for one with some.
        """
        self.check_condition(condition)
        first_BK = condition.first_BK
        if state is not None and (state.first_BS is None) != (first_BK is None):
            raise ValueError("a state of images with first tokens, and one without, do not serve each other")
        begun = super().start(condition.without_first(), guidance, ragged=ragged, window=window, state=state)
        if first_BK is not None:
            first_BS = torch.empty_like(begun.tokens) if begun.first_BS is None else begun.first_BS
            first_BS.fill_(-1)
            first_BS[:, : first_BK.shape[1]].copy_(first_BK)
            begun.first_BS = first_BS
        return begun

    # -------------------------------------------------------------------------------------------- teacher forcing
    def forward(self, tokens_BN: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced conditionals of every token given the prefix and the tokens before it.

        Args:
            tokens_BN: int64 ids [B, N] (the last is not read), or code vectors [B, N, C].
            condition: of the B images.

        Returns: logits [B, N, V] in the model's dtype; row n is the conditional of token n.
        """
        return self.output(self.hidden(tokens_BN, condition))

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
        return self.norm(self._run_layers(x, rope, mask)[:, self.prefix_length :])

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

    def raw_logits(self, state: RasterState, draft_BK: Tensor | None = None) -> Tensor:
        """Unguided logits [R, K + 1, V] of the next token and of those after each drafted token; commits nothing."""
        return self._head(self.features(state, None if draft_BK is None else Window.chain(draft_BK)))

    def _head(self, features_RLD: Tensor) -> Tensor:
        """Logits [R, L, V] of features while decoding."""
        return raster_kernels.logits(self, features_RLD) if raster_kernels.usable(self) else self.output(features_RLD)

    def guided_logits(self, state: RasterState, features_RLD: Tensor, place_BL: Tensor | None = None) -> Tensor:
        """Guided float32 logits [B, L, V] from `features`; place_BL: see Window."""
        logits_BLV = self._free_logits(state, features_RLD, place_BL)
        if state.first_BS is None:
            return logits_BLV
        if place_BL is None:
            place_BL = torch.arange(logits_BLV.shape[1], device=logits_BLV.device)
        last = state.first_BS.shape[1] - 1
        place_BL = (state.length[:, None] + place_BL).clamp(max=last).expand(state.batch, -1)
        first_BL1 = state.first_BS.gather(1, place_BL)[..., None]
        code_V = torch.arange(logits_BLV.shape[2], device=logits_BLV.device)
        only_BLV = torch.where(code_V == first_BL1, 0.0, NEVER)
        return torch.where(first_BL1 < 0, logits_BLV, only_BLV)

    def _free_logits(self, state: RasterState, features_RLD: Tensor, place_BL: Tensor | None) -> Tensor:
        """Guided float32 logits, as if no first token were given."""
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


NEVER = -1e20
"""Logit of a code that is never drawn: its probability is 0 in float32 at any temperature that is used."""


def check_first(first_BK: Tensor, num_tokens: int, vocab_size: int) -> None:
    """Checks first tokens; values are not looked at on a GPU.

    Raises:
        ValueError: no integers [B, K] with K of 1 ... N, or one that is no code.
    """
    if first_BK.ndim != 2 or first_BK.dtype != torch.int64 or not 1 <= first_BK.shape[1] <= num_tokens:
        raise ValueError(
            f"first tokens of shape {tuple(first_BK.shape)}, {first_BK.dtype}; needed: int64 [B, 1 ... {num_tokens}]"
        )
    if not first_BK.is_cuda and not (0 <= int(first_BK.min()) and int(first_BK.max()) < vocab_size):
        low, high = int(first_BK.min()), int(first_BK.max())
        raise ValueError(f"first token {low if low < 0 else high}; allowed: 0 ... {vocab_size - 1}")


# -------------------------------------------------------------------------------------------- training and benchmark
CAPTION_LENGTH = 20
"""Vectors of a caption in models trained here: the longest of emoji64 has 19 for minilm."""


def _arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    arguments = shared_arguments(tokenizer, vocabulary, options)
    layout = tokenizer.layout
    arguments |= dict(hidden_width=options.hidden_width)
    # A sequence's tokens have no rows: they are rotated by their place in it.
    of_sequence = dict(grid=(1, layout.num_tokens), rope="1d")
    arguments |= of_sequence if layout.arrangement == "sequence" else dict(grid=layout.shapes[0])
    if layout.arrangement == "box":
        arguments |= dict(rope="3d", prefix_rotation="identity")
    arguments |= dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), options.dropout)
    if options.words != "none":
        arguments |= dict(words=options.words, num_words=vocabulary.num_words)
    if caption_width:
        arguments |= dict(caption_width=caption_width, caption_length=CAPTION_LENGTH)
    return arguments


def _fits(layout: TokenLayout) -> bool:
    return layout.arrangement in ("grid", "sequence", "box") and layout.vocab_size > 0


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
