"""How much memory a run takes, said before its first step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_GIB = 2**30


def kept_bytes(loss: Callable[[], Tensor], outside: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Args:
        loss: runs the forward pass.
        outside: tensors that are there anyway, such as weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in outside}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # kept alive, so that no other takes its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(size for size, _ in kept.values())


def state_bytes(modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer], averaged: nn.Module) -> int:
    """Bytes of weights, their average, gradients, and what optimisers keep: two numbers a weight, Muon one."""
    weights = sum(tensor.nbytes for module in (*modules, averaged) for tensor in module.state_dict().values())
    total = weights
    for optimizer in optimizers:
        numbers = 1 if isinstance(optimizer, torch.optim.Muon) else 2
        for group in optimizer.param_groups:
            total += sum((1 + numbers) * parameter.nbytes for parameter in group["params"])
    return total


def activation_bytes(losses: Callable[[int], list[Callable[[], Tensor]]], rows: int, outside: list[Tensor]) -> int:
    """Bytes that a micro-batch keeps for the backward pass, found by two small ones.

    Args:
        losses: of a number of rows, those whose backward passes a step runs one after the other.
        rows: of a micro-batch.
        outside: see `kept_bytes`.
    """
    with torch.random.fork_rng():
        one, two = ([kept_bytes(loss, outside) for loss in losses(count)] for count in (1, 2))
    return max(first + (rows - 1) * (second - first) for first, second in zip(one, two, strict=True))


def sentence(state: int, activations: int, rows: int) -> str:
    """What a run says, such as "memory: about 5.3 GiB ..."."""
    return (
        f"memory: about {(state + activations) / _GIB:.2f} GiB; {state / _GIB:.2f} for weights, their average, "
        f"gradients and optimisers, {activations / _GIB:.2f} for what a step of {rows} rows keeps for its backward "
        "pass (--gradient-accumulation and --gradient-checkpointing make it less)"
    )


def checkpoint_blocks(modules: Iterable[Any]) -> None:
    """Makes modules compute their blocks' activations again in the backward pass instead of keeping them.

    Raises:
        ValueError: none of them can.
    """
    able = [part for module in modules for part in module.modules() if _can_checkpoint(part)]
    if not able:
        raise ValueError("gradient_checkpointing: this model has no blocks whose activations can be computed again")
    for part in able:
        part.enable_gradient_checkpointing()


def _can_checkpoint(module: Any) -> bool:
    return getattr(module, "_supports_gradient_checkpointing", False)
