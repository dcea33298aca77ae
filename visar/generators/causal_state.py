"""Decoding state of a raster transformer for a batch.

B images, R rows (2B when guided), P prefix positions, N image tokens, D hidden size, S cache slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.layers.cache import KVCache


@dataclass
class RasterState:
    """Decoding state of a batch. All tensors are allocated by `start` and changed in place from then on.

    Attributes:
        tokens: int64 [B, N + window + 1], the committed ids, or float32 [B, N + window + 1, C], the committed vectors;
            the slack takes writes beyond the last position.
        length: int64 [B] committed tokens of every row when ragged, else [1] for all.
        prefix_last_RD: embedding of the last prefix position, the input that predicts token 0.
        key_valid_RS: bool [R, S] slots that may be seen; None if all.
        scale_N: float32 [N + window + 1] guidance of every position; None when guidance is off.
        cache: keys and values.
        block: index of the block about to be predicted, set by the loop; on a CPU it says how much of the cache is in
            use. Nothing that a GPU runs depends on it, so a captured step serves every block.
        first_BS: int64 [B, N + window + 1], the ids that the images begin with, -1 where none is given; None where
            no image has any.
    """

    tokens: Tensor
    length: Tensor
    prefix_last_RD: Tensor
    key_valid_RS: Tensor | None
    scale_N: Tensor | None
    cache: KVCache
    block: int
    first_BS: Tensor | None = None

    @classmethod
    def allocate(
        cls, model: Any, prefix_RPD: Tensor, *, guided: bool, padded: bool, ragged: bool, window: int
    ) -> "RasterState":
        """Buffers on the prefix's device and in its dtype; `RasterGPT.start` fills them.

        Args:
            model: whose sizes they have.
            prefix_RPD: prefix of the batch, doubled when guided.
            guided: rows are doubled.
            padded: not all prefix positions are valid.
            ragged, window: as in `RasterGPT.start`.
        """
        device, dtype, rows, slack = prefix_RPD.device, prefix_RPD.dtype, prefix_RPD.shape[0], window + 1
        batch = rows // 2 if guided else rows
        slots = model.prefix_length + model.num_tokens + slack
        shape = model.token_shape
        kind = torch.float32 if shape else torch.int64
        cache = KVCache(
            num_layers=len(model.layers),
            rows=rows,
            num_heads=model.config["num_heads"],
            num_slots=slots,
            head_width=model.config["width"] // model.config["num_heads"],
            ragged=ragged,
            device=device,
            dtype=dtype,
        )
        return cls(
            tokens=torch.zeros(batch, model.num_tokens + slack, *shape, dtype=kind, device=device),
            length=torch.zeros(batch if ragged else 1, dtype=torch.int64, device=device),
            prefix_last_RD=torch.empty(rows, prefix_RPD.shape[-1], device=device, dtype=dtype),
            key_valid_RS=torch.ones(rows, slots, dtype=torch.bool, device=device) if padded else None,
            scale_N=torch.ones(model.num_tokens + slack, device=device) if guided else None,
            cache=cache,
            block=0,
        )

    @property
    def batch(self) -> int:
        """Number of images B."""
        return self.tokens.shape[0]

    @property
    def parts(self) -> int:
        """Rows per image: 2 when guided, else 1."""
        return 1 if self.scale_N is None else 2
