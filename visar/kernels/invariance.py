"""A mode in which decoding does not depend on the number of rows: products and attention of visar/kernels/fixed_order.

Inside `batch_invariant` every matrix product of torch on tensors that kernels run on is one of those, whoever asks for
it: blocks, heads, conditions, drafters. What chooses between kernels by the number of rows asks `active`. The mode
belongs to a thread, as autocast does, and changes no setting of torch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from visar.kernels import available, on, usable
from visar.kernels.mode import MODE, active

DETERMINISTIC = ("auto", "batch", "off")


def check_deterministic(value: object) -> None:
    """Checks a setting of what decoding is invariant to.

    Raises:
        ValueError: an unknown one.
    """
    if value not in DETERMINISTIC:
        raise ValueError(f"deterministic {value!r}; choose one of {', '.join(DETERMINISTIC)}")


def wanted(deterministic: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether decoding in this dtype on this device is to be invariant to its batch, and can be.

    Args:
        deterministic: "batch" in every dtype, "off" in none, "auto" in float32, where it costs little of what such a
            call takes and where results are asked for to the last digit.
        dtype: of the weights.
        device: where they are. On a CPU nothing is replaced.
    """
    return deterministic != "off" and (deterministic == "batch" or dtype in AUTO_DTYPES) and available(device)


AUTO_DTYPES: tuple[torch.dtype, ...] = (torch.float32,)
"""Dtypes whose decoding is invariant to the batch unless that is switched off."""


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside, a row's results do not depend on its batch, where kernels run; without them, nothing changes.

    Inference only. 16-bit and float32 tensors; float32 at its full precision.

    Args:
        enabled: False = nothing changes.
    """
    if not enabled or active():
        yield
        return
    MODE.invariant = True
    try:
        with _Products():
            yield
    finally:
        MODE.invariant = False


def attention(
    query_RNLE: Tensor,
    key_RNTE: Tensor,
    value_RNTE: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Torch's attention, or in the mode that of a fixed order.

    Args:
        query_RNLE, key_RNTE, value_RNTE: R rows, N heads.
        scale: multiplies query-key products; None = E^-0.5.
        mask: bool, broadcastable to [R, 1, L, T], True where a query sees a key; None = everywhere.
        causal: query i sees keys 0 ... i only.
    """
    if not (active() and usable(query_RNLE)):
        return functional.scaled_dot_product_attention(
            query_RNLE, key_RNTE, value_RNTE, attn_mask=mask, is_causal=causal, scale=scale
        )
    from visar.kernels import fixed_order

    chosen = query_RNLE.shape[-1] ** -0.5 if scale is None else scale
    with on(query_RNLE.device):
        return fixed_order.attention(query_RNLE, key_RNTE, value_RNTE, scale=chosen, mask=mask, causal=causal)


# ----------------------------------------------------------------------------------------------------------- products
def _mm(x: Tensor, weight: Tensor) -> Tensor:
    from visar.kernels.fixed_order import product

    return product(x, weight.mT)


def _add(bias: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    """gelu(bias + x W); a bias that is no vector is added behind the product."""
    from visar.kernels.fixed_order import product

    if bias.dim() == 1 and bias.is_contiguous() and bias.dtype == x.dtype and bias.shape[0] == weight.shape[-1]:
        return product(x, weight.mT, bias, gelu=gelu)
    out = product(x, weight.mT) + bias
    return functional.gelu(out, approximate="tanh") if gelu else out


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if (beta, alpha) != (1, 1):
        return beta * bias + alpha * _mm(x, weight)
    return _add(bias, x, weight, gelu=False)


def _addmm_activation(
    bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
) -> Tensor:
    if use_gelu and (beta, alpha) == (1, 1):
        return _add(bias, x, weight, gelu=True)
    out = _addmm(bias, x, weight, beta=beta, alpha=alpha)
    return functional.gelu(out, approximate="tanh") if use_gelu else functional.relu(out)


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    _aten.mm.default: _mm,
    _aten.bmm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.baddbmm.default: _addmm,
    _aten._addmm_activation.default: _addmm_activation,
}
# Made of those above; torch takes them apart itself, but not under torch.inference_mode().
_COMPOSED = (_aten.linear.default, _aten.matmul.default)


class _Products(TorchDispatchMode):
    """Replaces torch's matrix products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSED:
            with self:
                return func.decompose(*args, **kwargs)
        replaced = _PRODUCTS.get(func)
        if replaced is None or not _all_usable(args):
            return func(*args, **kwargs)
        with on(args[0].device):
            return replaced(*args, **kwargs)


def _all_usable(args: Any) -> bool:
    """Whether kernels take a product's tensors: plain ones of one dtype."""
    tensors = [each for each in args if isinstance(each, Tensor)]
    plain = all(type(each) in (Tensor, torch.nn.Parameter) and each.dtype == tensors[0].dtype for each in tensors)
    return plain and usable(tensors[0])
