"""Attention over a pyramid of scales: block-causal (each sees itself and coarser ones), block-diagonal (itself), or
"own" (a position sees coarser scales and itself, but not the others of its scale).

Which of the equivalent ways is fastest depends on the length (one H100, float16, 30 heads of 64, forward +
backward): at 680 tokens the dense mask; at 2240 FlexAttention; at 9451 FlexAttention or one unmasked call per scale.

R rows, N heads, L positions, E head width.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from visar.kernels.invariance import attention
from visar.kernels.mode import active

Pattern = Literal["causal", "diagonal", "own"]
Method = Literal["auto", "mask", "per_scale", "flex"]
_DENSE_LIMIT = 1024


def scale_mask(sizes: tuple[int, ...], pattern: Pattern, device: torch.device | str = "cpu") -> Tensor:
    """bool [L, L]: whether query position i sees key position j, for scales of these numbers of tokens."""
    scale_L = torch.repeat_interleave(
        torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device), output_size=sum(sizes)
    )
    query, key = scale_L[:, None], scale_L[None, :]
    if pattern == "own":
        return (query > key) | torch.eye(len(scale_L), dtype=torch.bool, device=device)
    return query >= key if pattern == "causal" else query == key


@functools.lru_cache(maxsize=16)
def _kept_mask(sizes: tuple[int, ...], pattern: Pattern, device: torch.device) -> Tensor:
    return scale_mask(sizes, pattern, device)


@torch.compiler.assume_constant_result
def _static_mask(sizes: tuple[int, ...], pattern: Pattern, device: torch.device) -> Tensor:
    # A constant of a compiled graph too, which would otherwise copy the sizes to the device, and wait for it.
    return _kept_mask(sizes, pattern, device)


@functools.lru_cache(maxsize=16)
def _flex_mask(sizes: tuple[int, ...], pattern: Pattern, device: torch.device) -> BlockMask:
    scale_L = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return scale_L[query] >= scale_L[key] if pattern == "causal" else scale_L[query] == scale_L[key]

    length = sum(sizes)
    return create_block_mask(sees, None, None, length, length, device=str(device))


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def per_scale_attention(
    query_RNLE: Tensor,
    key_RNLE: Tensor,
    value_RNLE: Tensor,
    sizes: tuple[int, ...],
    pattern: Pattern,
    softmax_scale: float,
) -> Tensor:
    """One unmasked call per scale, against its own keys or against all keys up to its end."""
    parts, begin = [], 0
    for size in sizes:
        end = begin + size
        first = 0 if pattern == "causal" else begin
        parts.append(
            attention(
                query_RNLE[:, :, begin:end],
                key_RNLE[:, :, first:end],
                value_RNLE[:, :, first:end],
                scale=softmax_scale,
            )
        )
        begin = end
    return torch.cat(parts, dim=2)


def scale_attention(
    query_RNLE: Tensor,
    key_RNLE: Tensor,
    value_RNLE: Tensor,
    sizes: tuple[int, ...],
    pattern: Pattern,
    *,
    softmax_scale: float,
    method: Method = "auto",
) -> Tensor:
    """Attention of positions that belong to scales of the given sizes.

    Args:
        query_RNLE, key_RNLE, value_RNLE: L = sum(sizes) positions, coarse to fine.
        sizes: tokens of every scale.
        pattern: "causal" (VAR), "diagonal" (HMAR) or "own" (one-step students; always by the dense mask).
        softmax_scale: multiplies query-key products.
        method: "mask" (dense mask), "per_scale" (one call per scale), "flex" (compiled FlexAttention, on GPUs), or
            "auto": the mask up to 1024 positions, beyond that flex on a GPU and per_scale elsewhere.

    Returns: [R, N, L, E]; all methods agree to rounding.

    Raises:
        ValueError: an unknown method.
    """
    if method not in ("auto", "mask", "per_scale", "flex"):
        raise ValueError(f"attention method {method!r}; choose auto, mask, per_scale or flex")
    if len(sizes) == 1:
        return attention(query_RNLE, key_RNLE, value_RNLE, scale=softmax_scale)
    if pattern == "own":  # the others have no form for a position alone
        method = "mask"
    if method == "auto":
        long = sum(sizes) > _DENSE_LIMIT
        method = ("flex" if query_RNLE.is_cuda and not active() else "per_scale") if long else "mask"
    if method == "per_scale":
        return per_scale_attention(query_RNLE, key_RNLE, value_RNLE, sizes, pattern, softmax_scale)
    if method == "flex":
        block_mask = _flex_mask(sizes, pattern, query_RNLE.device)
        return _compiled_flex()(query_RNLE, key_RNLE, value_RNLE, block_mask=block_mask, scale=softmax_scale)
    mask = _static_mask(sizes, pattern, query_RNLE.device)
    return attention(query_RNLE, key_RNLE, value_RNLE, mask=mask, scale=softmax_scale)
