"""What samplers need of a generator, as types; see docs/design.md for what the calls mean."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from visar.condition import Condition
from visar.guidance import Guidance


class BlockGenerator(Protocol):
    """A model that predicts block after block.

    Attributes:
        block_sizes: tokens of every block.
        block_kinds: blocks of one kind do the same work (visar/runtime.py).
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
