"""Classifier-free guidance for models that predict block after block; the only place that doubles a batch.

Source: Ho and Salimans, arXiv 2207.12598. Two conventions are in use for logits c (conditional) and n (null):
"interpolate" n + s (c - n), neutral at s = 1 (LlamaGen, MAR, NAR, Infinity), and "extrapolate" (1 + t) c - t n,
neutral at t = 0 (VAR, HMAR, CoDe). They are the same with s = 1 + t.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visar.core.condition import Condition


@dataclass(frozen=True)
class Guidance:
    """How strongly a block's prediction follows the condition.

    Attributes:
        scale: one strength for all blocks, or one per block. Off: 1.0 for "interpolate", 0.0 for "extrapolate".
        convention: see above.
        schedule: "constant", or "linear": rises from `start` at the first block to `scale` at the last.
        start: strength of the first block of a linear schedule; None is the neutral one.
        interval: first and last block (inclusive, from 0) in which guidance is on; None is everywhere.

    Raises:
        ValueError: a setting outside those above.
    """

    scale: float | tuple[float, ...] = 1.0
    convention: Literal["interpolate", "extrapolate"] = "interpolate"
    schedule: Literal["constant", "linear"] = "constant"
    start: float | None = None
    interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.convention not in ("interpolate", "extrapolate"):
            raise ValueError(f"guidance convention {self.convention!r}; choose interpolate or extrapolate")
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"guidance schedule {self.schedule!r}; choose constant or linear")
        if self.schedule == "linear" and isinstance(self.scale, tuple):
            raise ValueError("a linear guidance schedule takes one scale, not one per block")
        if self.start is not None and self.schedule == "constant":
            raise ValueError("guidance start is for the linear schedule")
        values = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        wrong = [value for value in values if not 0.0 <= value < float("inf")]
        if wrong:
            raise ValueError(f"guidance scale {wrong[0]}; it must be a finite number >= 0")

    def at(self, block: int, num_blocks: int) -> float:
        """Strength of one block in the "interpolate" convention (1.0 = off); the progress is block / (num_blocks - 1).

        A sampler whose steps are no blocks of the model, such as a masked one, asks with its own steps.

        Raises:
            ValueError: as many scales as blocks are needed.
        """
        neutral = 1.0 if self.convention == "interpolate" else 0.0
        if isinstance(self.scale, tuple):
            if len(self.scale) != num_blocks:
                raise ValueError(f"{len(self.scale)} guidance scales for {num_blocks} blocks")
            value = self.scale[block]
        elif self.schedule == "linear":
            first = neutral if self.start is None else self.start
            value = first + (self.scale - first) / max(num_blocks - 1, 1) * block
        else:
            value = self.scale
        low, high = self.interval or (0, num_blocks - 1)
        value = value if low <= block <= high else neutral
        return value if neutral == 1.0 else value + 1.0

    def scales(self, num_blocks: int) -> list[float]:
        """Strength of every block, see `at`."""
        return [self.at(block, num_blocks) for block in range(num_blocks)]

    def active(self, num_blocks: int) -> bool:
        """Whether any block is guided; if none is, the null half of the batch is never run."""
        return any(scale != 1.0 for scale in self.scales(num_blocks))


OFF = Guidance()


def double(condition: Condition, null: Condition) -> Condition:
    """The doubled batch [condition; null] of 2B rows."""
    return condition.followed_by(null)


def repeat(tensor: Tensor, times: int) -> Tensor:
    """Rows of the un-doubled batch, once for every part of the doubled one (times = 1 or 2)."""
    return tensor if times == 1 else torch.cat([tensor] * times)


def combine(logits: Tensor, scale: Tensor | float) -> Tensor:
    """Guided float32 logits [B, ...] from the doubled batch's [2B, ...]; "interpolate" scale, broadcast."""
    conditional, null = logits.float().chunk(2)
    return null + (conditional - null) * scale
