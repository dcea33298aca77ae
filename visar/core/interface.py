"""What samplers need of a generator, as types; see docs/design.md for what the calls mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import Guidance


class BlockGenerator(Protocol):
    """A model that predicts block after block.

    Attributes:
        block_sizes: tokens of every block.
        block_kinds: blocks of one kind do the same work (visar/core/runtime.py).
        config: constructor arguments.
    """

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

    def append(self, state: Any, tokens_BK: Tensor) -> None: ...


class CausalGenerator(BlockGenerator, Protocol):
    """A model of one token a block that also judges drafted windows, with a length of its own for every row."""

    num_tokens: int

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
        shapes: of every map of tokens, coarse to fine: (height, width), with the number of frames before it for a box,
            or (length,) for a sequence.
        arrangement: "grid" (one map, in raster order), "scales" (several maps, coarse to fine), "sequence" (tokens
            without places in the image) or "box" (one map of several frames).
        vocab_size: number of codes; 0 for tokens that are vectors of floats.
        channels: width of a code or of such a vector.
        previews: numbers of leading tokens that decode to an image of their own, ascending; empty where only all
            tokens do.
    """

    shapes: tuple[tuple[int, ...], ...]
    arrangement: Literal["grid", "scales", "sequence", "box"]
    vocab_size: int
    channels: int
    previews: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of every map."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return sum(self.sizes)
