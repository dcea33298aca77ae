"""Next-neighbor transformer: from the corner outwards, one diagonal per pass, one head per axis.

Source: NAR, arXiv 2503.10696, ThisisBillhe/NAR@225c1fb. The transformer is LlamaGen's with one more block per further
head. With several heads at a token, the mean of their logits is what is trained and sampled (the paper's text says
that every head has a loss of its own; the released code does as is done here).
"""

from typing import Any, Literal

from diffusers import ConfigMixin, ModelMixin  # noqa: F401  (their names stay visible here)
from diffusers.configuration_utils import register_to_config

from visar.core.interface import TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.generators.ordered import OrderedTransformer, Positions, connect_nothing, ordered_arguments
from visar.generators.orders import neighbor_order
from visar.generators.training import GeneratorFamily
from visar.layers.rope import PrefixRotation

_CAPTIONS = dict(num_classes=0, caption_width=2048, caption_length=120)
_XL = dict(width=1280, num_layers=36, num_heads=20, hidden_width=3584)

# Released sizes (130.6 M, 295.5 M, 372.5 M, 816.0 M and 1.46 B parameters; 819.2 M for captions).
NEXT_NEIGHBOR_PRESETS: dict[str, dict] = {
    "nar-b": dict(width=768, num_layers=12, num_heads=12, hidden_width=2048),
    "nar-m": dict(width=1024, num_layers=18, num_heads=16, hidden_width=2816),
    "nar-l": dict(width=1024, num_layers=24, num_heads=16, hidden_width=2816),
    "nar-xl": _XL,
    "nar-xxl": dict(width=1536, num_layers=48, num_heads=24, hidden_width=4096),
    "nar-t2i-stage1": _XL | _CAPTIONS,
    "nar-t2i-stage2": _XL | _CAPTIONS | dict(grid=(32, 32)),
}
_UCF = dict(vocab_size=8192, grid=(4, 16, 16), num_classes=101, positions="learned")
NEXT_NEIGHBOR_BOXES: dict[str, dict] = {
    "nar-ucf101-l": _UCF | dict(width=1024, num_layers=24, num_heads=16, hidden_width=2816),
    "nar-ucf101-lp": _UCF | dict(width=1280, num_layers=30, num_heads=20, hidden_width=3584),
}
"""Released sizes over frames, rows and columns (368.7 M and 693.6 M parameters)."""


class NextNeighborTransformer(OrderedTransformer):
    """Transformer over diagonals of a grid or box of tokens; the prefix says what to draw. NAR, arXiv 2503.10696.

    A pass predicts all tokens whose coordinates have one sum: rows + columns - 1 passes for an image, frames + rows +
    columns - 2 for a clip. The prefix is as of `RasterGPT`.

    Args:
        vocab_size: number of codes V.
        grid: (rows, columns) or (frames, rows, columns) of the tokens.
        width, num_layers, num_heads, hidden_width: D, depth before the first head, heads, feed-forward hidden width.
            There is one more block for every axis but the last.
        num_classes, attributes, word_vocab_size, num_words, words, caption_width, caption_length: see `RasterGPT`.
        positions: "rope" (2D rotary; images), or "learned" (a vector a place; clips).
        prefix_rotation: "zero" as NAR was trained, or "identity"; see visar/layers/rope.py.
        token_dropout, residual_dropout, ffn_dropout: on the input, after attention's and the feed-forward's
            projection (NAR: 0.1 each).

    Raises:
        ValueError: no condition at all, or settings that exclude each other.
    """

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
        positions: Positions = "rope",
        prefix_rotation: PrefixRotation = "zero",
        token_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self._build(
            neighbor_order(grid),
            vocab_size=vocab_size,
            grid=grid,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_width=hidden_width,
            num_classes=num_classes,
            attributes=attributes,
            word_vocab_size=word_vocab_size,
            num_words=num_words,
            words=words,
            caption_width=caption_width,
            caption_length=caption_length,
            positions=positions,
            prefix_rotation=prefix_rotation,
            dropouts=(token_dropout, residual_dropout, ffn_dropout),
        )


# -------------------------------------------------------------------------------------------- training and benchmark
def _fits(layout: TokenLayout) -> bool:
    return layout.arrangement in ("grid", "box") and layout.vocab_size > 0


def _arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    box = tokenizer.layout.arrangement == "box"
    positions: Positions = "learned" if box else "rope"
    return ordered_arguments(tokenizer, vocabulary, options, caption_width) | dict(positions=positions)


FAMILY = GeneratorFamily(
    model=NextNeighborTransformer,
    presets=NEXT_NEIGHBOR_PRESETS,
    tokenizer="vq-16",
    tiny=dict(vocab_size=128, grid=(4, 4), width=64, num_layers=2, num_heads=2, hidden_width=96, num_classes=4),
    fits=_fits,
    arguments=_arguments,
    connect=connect_nothing,
)
