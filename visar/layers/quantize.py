"""Weight-only quantisation of generators by torchao: int8 or float8 weights with a float scale for every output.

What is quantised are the matrices that every decoding step reads: those of the transformer blocks, and the head.
Activations keep their dtype. The layers stay `nn.Linear`; their weights become torchao's tensors, which its own
linear multiplies by; visar/kernels/product.py reads the same data.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

Quantization = Literal["none", "int8", "fp8"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


def check_quantization(kind: str) -> None:
    """Finds what stands against a kind before a model is loaded.

    Raises:
        ValueError: an unknown kind.
        ImportError: torchao is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantize {kind!r}; choose one of {', '.join(QUANTIZATIONS)}")
    if kind != "none" and importlib.util.find_spec("torchao") is None:
        raise ImportError(f"quantize {kind!r} needs torchao: pip install torchao")


def quantize_(model: nn.Module, kind: str) -> nn.Module:
    """Replaces the weights of a generator's blocks and head by quantised ones, in place; they no longer train.

    Args:
        model: a generator, on its device and in its dtype.
        kind: "int8"; "fp8" (float8_e4m3fn); or "none", which changes nothing.

    Raises:
        ValueError: an unknown kind, a device without the format, a model without such layers, or one that is
            quantised already.
        ImportError: torchao is not installed.
    """
    check_quantization(kind)
    if kind == "none":
        return model
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"quantize {kind!r}: {type(model).__name__} has no linear layers in blocks")
    if any(scaled(layer) for layer in layers.values()):
        raise ValueError("this model is quantised already")
    device = next(iter(layers.values())).weight.device
    if kind == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"quantize 'fp8': {torch.cuda.get_device_name(device)} has no float8 (compute capability 8.9)"
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as by_torchao

    config_class: Any = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    chosen = {id(layer) for layer in layers.values()}
    config = config_class(version=2, set_inductor_config=False)
    by_torchao(model, config, filter_fn=lambda module, name: id(module) in chosen)
    return model


def linear_layers(model: nn.Module, parts: Sequence[str]) -> dict[str, nn.Linear]:
    """Linear layers in some of a model's submodules, by name; those of adaptive norms, which read conditions, are not
    among them.

    Args:
        model: any.
        parts: names of its direct submodules; those that it does not have are none.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] in parts and "ada_lin" not in name
    }


def quantized_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of a generator that `quantize_` changes, by name."""
    return linear_layers(model, model.quantized_parts)


def scaled(layer: nn.Linear) -> bool:
    """Whether a layer's weight is quantised."""
    return type(layer.weight) is not nn.Parameter


def values(weight: Tensor) -> Tensor:
    """float32 values of a weight, quantised or not."""
    plain = type(weight) in (Tensor, nn.Parameter)
    return (weight.detach() if plain else cast(Any, weight).dequantize()).float()


@torch.no_grad()
def dequantize_(model: nn.Module) -> nn.Module:
    """Replaces quantised weights by plain float32 ones of the same values."""
    for layer in quantized_layers(model).values():
        if scaled(layer):
            layer.weight = nn.Parameter(values(layer.weight), requires_grad=False)
    return model


def stored(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """A layer's weight as it lies in memory, [N, K], and the float32 scale [N] of its rows (None = not quantised).

    Raises:
        TypeError: a tensor class that is not known, or one with another granularity.
    """
    weight: Any = layer.weight
    if type(weight) is nn.Parameter:
        return weight.detach(), None
    name = type(weight).__name__
    if name not in ("Int8Tensor", "Float8Tensor"):
        raise TypeError(f"a weight of class {name}; known are torchao's Int8Tensor and Float8Tensor")
    if weight.scale.numel() != weight.shape[0]:
        raise TypeError(f"a weight of {weight.shape[0]} rows with {weight.scale.numel()} scales; needed: one per row")
    return weight.qdata, weight.scale.flatten().float()


def weights_digest(model: nn.Module) -> str:
    """Hexadecimal sha256 over a model's tensors in the order of their names, as float32."""
    value = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value.update(name.encode() + values(tensor).cpu().numpy().tobytes())
    return value.hexdigest()


def fingerprint(model: Any) -> str:
    """Tells a model's weights from others, whatever dtype they were loaded in: 16 hexadecimal digits of the sha256 of
    the first 64 numbers of every tensor, rounded to bfloat16."""
    tensors = sorted(model.state_dict().items())
    plain = [tensor if type(tensor) in (Tensor, nn.Parameter) else values(tensor) for _, tensor in tensors]
    first = torch.cat([tensor.detach().flatten()[:64].to(torch.bfloat16) for tensor in plain]).cpu()
    value = hashlib.sha256(" ".join(name for name, _ in tensors).encode())
    value.update(first.view(torch.uint8).numpy().tobytes())
    return value.hexdigest()[:16]
