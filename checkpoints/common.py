"""What all converters share: reading a file, finding its weights, checking that they fit, building the model."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from visar.io.files import load_weights

State = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)

WRAPPERS = ("model", "module", "state_dict")
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")


def read(path: str | Path) -> dict[str, object]:
    """Contents of a weights file as `load_weights` reads it; command-line settings saved along are let through.

    Raises:
        ValueError: the file is missing, damaged, or asks for code to be run.
    """
    # A Namespace is a plain container; trainers save one under "args".
    with torch.serialization.safe_globals([argparse.Namespace]):
        return load_weights(path)


def unwrap(content: Mapping[str, object], source: str, *, prefer_ema: bool = False) -> State:
    """The weights in a checkpoint, which may nest them under "model", "module", "state_dict" or "ema", repeatedly.

    Prefixes that wrappers put before every key ("module.", "_orig_mod.") are dropped.

    Args:
        content: of the file.
        source: what error messages call it.
        prefer_ema: take the averaged weights where the file has both.

    Raises:
        ValueError: no weights at any of these places, or something that is no tensor among them.
    """
    names = ("ema", *WRAPPERS) if prefer_ema else (*WRAPPERS, "ema")
    node = content
    while not any(isinstance(value, Tensor) for value in node.values()):
        inner = next((value for name in names if isinstance(value := node.get(name), Mapping)), None)
        if inner is None:
            raise ValueError(
                f"{source} has no weights: keys are {_some(node)}; "
                f"looked for tensors, or a mapping under {_some(names)}"
            )
        node = inner
    strange = [f"{key} ({type(value).__name__})" for key, value in node.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{source} has values that are no tensors among its weights: {', '.join(strange)}")
    return {_PREFIXES.sub("", key): value for key, value in node.items() if isinstance(value, Tensor)}


def _some(names: Sequence[str] | Mapping[str, object], most: int = 8) -> str:
    shown = [str(name) for name in names][:most]
    return ", ".join(shown) + (" ..." if len(names) > most else "") if shown else "none"


def require(state: Mapping[str, object], keys: Sequence[str], source: str, what: str) -> None:
    """Checks that keys are there that sizes are read from.

    Raises:
        ValueError: naming all the missing ones.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{source} is not a complete {what}: missing {', '.join(missing)} (it has {_some(state)})")


def count_modules(state: Mapping[str, object], prefix: str) -> int:
    """How many numbered modules `prefix`.0, `prefix`.1 ... the keys name."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})


def rename(state: State, rules: Sequence[tuple[str, str]]) -> State:
    """Keys after every (regular expression, replacement) in order.

    Raises:
        ValueError: two keys become one.
    """
    renamed: State = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"two keys become {name} (one of them is {key})")
        renamed[name] = value
    return renamed


def check_keys(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Checks that a file has exactly the keys and shapes of a model.

    Raises:
        ValueError: naming every missing key, every unexpected one and every other shape.
    """
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {list(state[key].shape)} (needed {list(value.shape)})"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{source} does not fit the model. {listed}")


def load_strict(model: Model, state: State, source: str) -> Model:
    """Gives the weights to a model; one on the meta device takes the tensors over as they are.

    Raises:
        ValueError: see `check_keys`.
    """
    wanted = model.state_dict()
    check_keys(wanted, state, source)
    model.load_state_dict(state, assign=any(value.is_meta for value in wanted.values()))
    return model


def empty(model_class: type[Model], config: Mapping[str, object]) -> Model:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return model_class(**config)


def build(
    model_class: type[Model], config: Mapping[str, object], state: State, source: str, dtype: torch.dtype
) -> Model:
    """A model in evaluation mode with the weights in one dtype (integers keep theirs).

    Raises:
        ValueError: see `check_keys`.
    """
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    return load_strict(empty(model_class, config), cast, source).eval()
