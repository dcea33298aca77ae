"""Key/value caches of fixed size: allocated once, written in place, never grown.

Rejected drafts need no clean-up: a slot is only ever read by queries at its position or later, and it is written again
before such a query exists. Committing tokens is therefore nothing but moving on.

R rows (a guided batch has two rows per image), N heads, L new tokens, T slots, E head width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    pass


class KVCache:
    """Keys and values of every layer.

    Args:
        num_layers, rows, num_heads, num_slots, head_width: sizes.
        ragged: False when all rows always write the same positions (one index copy per layer), True when every row has
            positions of its own.
        device, dtype: of the buffers; dtype is the model's.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        rows: int,
        num_heads: int,
        num_slots: int,
        head_width: int,
        ragged: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, rows, num_heads, num_slots, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.ragged = ragged
        self._rows = torch.arange(rows, device=device)[:, None, None]
        self._heads = torch.arange(num_heads, device=device)[None, :, None]

    @property
    def num_slots(self) -> int:
        """Positions of a row."""
        return self.keys.shape[3]

    def update(
        self, layer: int, key_RNLE: Tensor, value_RNLE: Tensor, position: Tensor, bound: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Writes new keys and values at their positions and returns the layer's buffers.

        Args:
            layer: which layer.
            key_RNLE, value_RNLE: of the new tokens.
            position: int64 [1, L] (or [R, L] when ragged) slots to write.
            bound: number of leading slots to return, when the caller knows that no later one is needed; None is all.

        Returns: keys and values [R, N, T, E] (views).
        """
        keys, values = self.keys[layer], self.values[layer]
        # Autocast makes keys and values of another dtype than the weights', which is the cache's.
        key_RNLE, value_RNLE = key_RNLE.to(keys.dtype), value_RNLE.to(values.dtype)
        if self.ragged:
            index = (self._rows, self._heads, position[:, None, :])
            keys.index_put_(index, key_RNLE)
            values.index_put_(index, value_RNLE)
        else:
            keys.index_copy_(2, position[0], key_RNLE)
            values.index_copy_(2, position[0], value_RNLE)
        return (keys, values) if bound is None else (keys[:, :, :bound], values[:, :, :bound])

    def move(self, source_RK: Tensor, target_RK: Tensor) -> None:
        """Copies entries of every layer from slots to slots, int64 [R, K]; all are read before any is written."""
        for buffer in (self.keys, self.values):
            index = (slice(None), self._rows[:, 0], slice(None))
            buffer[*index, target_RK] = buffer[*index, source_RK]


def visible(position: Tensor, num_slots: int, key_valid_RT: Tensor | None = None) -> Tensor:
    """Mask of cached attention: query at `position` [1 or R, L] sees slots up to its own, bool [1 or R, 1, L, T].

    key_valid_RT: bool, False for slots that nobody sees (padding of a caption); None is all valid.
    """
    slots = torch.arange(num_slots, device=position.device)
    mask = (slots <= position[..., None])[:, None]
    return mask if key_valid_RT is None else mask & key_valid_RT[:, None, None, :num_slots]


def visible_tree(root_R1: Tensor, seen_RLL: Tensor, num_slots: int, key_valid_RT: Tensor | None = None) -> Tensor:
    """Mask of cached attention over a tree, bool [R, 1, L, T]: all slots up to the root's, and those of ancestors.

    Args:
        root_R1: int64 cache slot of the root; node i is at root + i.
        seen_RLL: see visar/core/window.py.
        num_slots: T. key_valid_RT: as in `visible`.
    """
    nodes = seen_RLL.shape[-1]
    offset_RT = torch.arange(num_slots, device=root_R1.device) - root_R1
    index_RLT = offset_RT.clamp(0, nodes - 1)[:, None].expand(-1, nodes, -1)
    mask_RLT = (offset_RT <= 0)[:, None] | (seen_RLL.gather(2, index_RLT) & (offset_RT < nodes)[:, None])
    mask = mask_RLT[:, None]
    return mask if key_valid_RT is None else mask & key_valid_RT[:, None, None, :num_slots]


@dataclass(frozen=True)
class LayerCache:
    """One layer's view of the cache during one call."""

    cache: KVCache
    layer: int
    position: Tensor
    bound: int | None

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(self.layer, key, value, self.position, self.bound)


def causal_mask(valid_RP: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Mask of reading L positions from the prefix on without a cache, bool [1 or R, 1, L, L].

    A position sees itself and those before it that are valid; all behind the prefix are, and all if valid_RP is None.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if valid_RP is None:
        return causal
    valid_RL = functional.pad(valid_RP[:, :length], (0, max(length - valid_RP.shape[1], 0)), value=True)
    return (causal & valid_RL[:, None, None]) | torch.eye(length, dtype=torch.bool, device=device)
