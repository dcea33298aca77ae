"""Where a raster transformer is in decoding a batch.

B images, R rows (2B when guided), N image tokens, D width, S cache slots.
"""

from dataclasses import dataclass

from torch import Tensor

from visar.cache import KVCache


@dataclass
class RasterState:
    """Decoding state of a batch. All tensors are allocated by `start` and changed in place from then on.

    Attributes:
        tokens: int64 [B, N + window + 1], the committed ids; the slack takes writes beyond the last position.
        length: int64 [B] committed tokens of every row when ragged, else [1] for all.
        prefix_last_RD: embedding of the last prefix position, the input that predicts token 0.
        key_valid_RS: bool [R, S] slots that may be seen; None if all.
        scale_N: float32 [N + window + 1] guidance of every position; None when guidance is off.
        cache: keys and values.
        block: index of the block about to be predicted, set by the loop; on a CPU it says how much of the cache is in
            use. Nothing that a GPU runs depends on it, so a captured step serves every block.
    """

    tokens: Tensor
    length: Tensor
    prefix_last_RD: Tensor
    key_valid_RS: Tensor | None
    scale_N: Tensor | None
    cache: KVCache
    block: int

    @property
    def batch(self) -> int:
        """Number of images B."""
        return self.tokens.shape[0]

    @property
    def parts(self) -> int:
        """Rows an image: 2 when guided, else 1."""
        return 1 if self.scale_N is None else 2
