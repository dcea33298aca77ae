"""What samplers need of a generator, as types; see docs/design.md for what the calls mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import Guidance


class BlockGenerator(Protocol):
    """A model that predicts block after block.

    `positions` says where the next block's tokens stand in the tokenizer's order, int64 [1 or B, K]; `result` gives
    the image's tokens int64 [B, N] in that order, 0 where none is committed yet.

    Attributes:
        num_tokens: tokens of an image.
        block_sizes: tokens of every block.
        block_kinds: blocks of one kind do the same work (visar/core/runtime.py).
        config: constructor arguments.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def block_sizes(self) -> tuple[int, ...]: ...

    @property
    def block_kinds(self) -> tuple[Any, ...]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    def __call__(self, tokens_BN: Tensor, condition: Condition) -> Tensor: ...

    def parameters(self) -> Any: ...

    def null_condition(self, condition: Condition) -> Condition: ...

    def start(self, condition: Condition, guidance: Guidance = ..., *, state: Any = None) -> Any: ...

    def predict(self, state: Any) -> Tensor: ...

    def positions(self, state: Any) -> Tensor: ...

    def append(self, state: Any, tokens_BK: Tensor) -> None: ...

    def result(self, state: Any) -> Tensor: ...


class CausalGenerator(BlockGenerator, Protocol):
    """A model of one token a block that also judges drafted windows, with a length of its own for every row."""

    def start(
        self,
        condition: Condition,
        guidance: Guidance = ...,
        *,
        ragged: bool = False,
        window: int = 0,
        state: Any = None,
    ) -> Any: ...

    def verify(self, state: Any, draft_BK: Tensor) -> Tensor: ...

    def commit(self, state: Any, tokens_BK: Tensor, count_B: Tensor) -> None: ...


Generator = Any
"""An nn.Module that predicts one token a step: config, num_tokens, start, verify and commit (see RasterGPT).

Samplers say what else they call. Not a protocol, so that one's own subclass of nn.Module is not forced to repeat it.
"""


@dataclass(frozen=True)
class TokenLayout:
    """How a tokenizer arranges an image's tokens.

    Attributes:
        kind: "grid" (ids of one grid, raster order), "scales" (ids of several grids, coarse to fine) or "continuous"
            (float vectors of one grid).
        scales: (height, width) of every grid, coarse to fine; one entry unless kind is "scales".
        vocab_size: number of codes; 0 for continuous tokens.
        channels: width of a code or of a continuous token.
    """

    kind: Literal["grid", "scales", "continuous"]
    scales: tuple[tuple[int, int], ...]
    vocab_size: int
    channels: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return sum(height * width for height, width in self.scales)
