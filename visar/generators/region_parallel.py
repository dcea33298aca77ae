"""Region-parallel transformer: the first token of every region one by one, then one token of all regions per pass.

Source: PAR, arXiv 2412.15119, Epiphqny/PAR@d96acea. Its weights are not public.
"""

from typing import Literal

from diffusers import ConfigMixin, ModelMixin  # noqa: F401  (their names stay visible here)
from diffusers.configuration_utils import register_to_config

from visar.generators.ordered import OrderedTransformer, connect_nothing, fits_grid, ordered_arguments
from visar.generators.orders import region_order
from visar.generators.raster import RASTER_PRESETS
from visar.generators.training import GeneratorFamily
from visar.layers.rope import PrefixRotation

# Sizes of the paper's tables: LlamaGen's, on 24 x 24 tokens (384 px), 4 or 16 regions.
REGION_PARALLEL_PRESETS: dict[str, dict] = {
    f"par-{size}-{regions}x": RASTER_PRESETS[f"llamagen-{size}"] | dict(grid=(24, 24), regions=regions)
    for size, regions in (("l", 4), ("xl", 4), ("xxl", 4), ("3b", 4), ("xxl", 16), ("3b", 16))
}


class RegionParallelTransformer(OrderedTransformer):
    """Transformer over groups of distant tokens; the prefix says what to draw. PAR, arXiv 2412.15119.

    The grid is cut into M regions: M + (N - M) / M passes. The prefix is as of `RasterGPT`; with one region it is that
    model.

    Args:
        regions: M, a square number whose root divides rows and columns (PAR: 4, 16).
        vocab_size, grid, width, num_layers, num_heads, hidden_width: V, (rows, columns), D, depth, heads, feed-forward
            hidden width.
        num_classes, attributes, word_vocab_size, num_words, words, caption_width, caption_length: see `RasterGPT`.
        prefix_rotation: "zero" as PAR was trained, or "identity"; see visar/layers/rope.py.
        token_dropout, residual_dropout, ffn_dropout: on the input, after attention's and the feed-forward's
            projection (PAR: 0.1 each).

    Raises:
        ValueError: no condition at all, regions that do not divide the grid, or settings that exclude each other.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        grid: tuple[int, int] = (16, 16),
        regions: int = 4,
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
        prefix_rotation: PrefixRotation = "zero",
        token_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self._build(
            region_order(grid, regions),
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
            positions="rope",
            prefix_rotation=prefix_rotation,
            dropouts=(token_dropout, residual_dropout, ffn_dropout),
        )


FAMILY = GeneratorFamily(
    model=RegionParallelTransformer,
    presets=REGION_PARALLEL_PRESETS,
    tokenizer="vq-16",
    tiny=dict(vocab_size=128, grid=(4, 4), width=64, num_layers=2, num_heads=2, hidden_width=96, num_classes=4),
    fits=fits_grid,
    arguments=ordered_arguments,
    connect=connect_nothing,
)
