"""What all converters share: reading a file, finding its weights, checking that they fit, building the model."""

import argparse
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visar.io.files import load_weights

State = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)
Weights = Literal["ema", "plain"]

WRAPPERS = ("model", "module", "state_dict")
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
_EMA = re.compile(r"(^|[._])ema($|[._])", re.IGNORECASE)
# Calls of torch while a model is made: released ones need up to 2,400, sizes that a damaged file says without end.
_MOST_CALLS = 20_000


def _settings(path: str | Path) -> list[tuple[type, str]]:
    """Names of classes called Config in a file, with what stands for them: nothing of theirs is imported or run."""
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        return []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file: reading it says so
        return []
    return [(OrderedDict, name) for name in names if name.rpartition(".")[2] == "Config"]


def read(path: str | Path) -> dict[str, object]:
    """Contents of a weights file as `load_weights` reads it; settings saved along are let through: those of a command
    line, and objects of a class Config, which become dictionaries.

    Raises:
        ValueError: the file is missing, damaged, or asks for code to be run.
    """
    # A Namespace is a plain container; trainers save one under "args".
    with torch.serialization.safe_globals([argparse.Namespace, *_settings(path)]):
        return load_weights(path)


# ------------------------------------------------------------------------------------------------ finding the weights
def mappings(content: Mapping[Any, object]) -> Iterator[tuple[str, Mapping[Any, object]]]:
    """Every mapping in a checkpoint with its path such as "trainer.vae", the whole first; each once, even where
    mappings hold themselves."""
    queue, seen = [("", content)], {id(content)}
    for path, node in queue:
        yield path, node
        for key, value in node.items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                queue.append((f"{path}.{key}" if path else str(key), value))


def tensor_names(node: Mapping[Any, object]) -> set[str]:
    """Names of a mapping's tensors, without the prefixes that wrappers put before every key."""
    return {_PREFIXES.sub("", str(key)) for key, value in node.items() if isinstance(value, Tensor)}


def holds(content: Mapping[str, object], marks: Sequence[str]) -> bool:
    """Whether a file has tensors of these names side by side."""
    return any(tensor_names(node).issuperset(marks) for _, node in mappings(content))


def kinds_of_weights(content: Mapping[str, object], marks: Sequence[str]) -> set[Weights]:
    """Which kinds of the marked weights a file has: averaged ones ("ema"), those of the last step ("plain")."""
    return {
        "ema" if _EMA.search(path) else "plain"
        for path, node in mappings(content)
        if tensor_names(node).issuperset(marks)
    }


def tensors_of(node: Mapping[Any, object], source: str) -> State:
    """A mapping's tensors without the prefixes that wrappers put before every key ("module.", "_orig_mod.").

    Raises:
        ValueError: two keys become one, or tensors that are complex, sparse, quantised or without values.
    """
    state: State = {}
    strange = []
    for key, value in node.items():
        if not isinstance(value, Tensor):
            continue
        name = _PREFIXES.sub("", str(key))
        if name in state:
            raise ValueError(f"{source} has the weights {name} twice: with and without a prefix such as module.")
        state[name] = value
        if value.is_complex() or value.is_quantized or value.layout != torch.strided:
            kind = "quantised" if value.is_quantized else "complex" if value.is_complex() else "sparse"
            strange.append(f"{name} ({kind}, {str(value.dtype).removeprefix('torch.')})")
    if strange:
        raise ValueError(f"{source} has weights that are no ordinary numbers: {_some(strange)}")
    return state


def find_weights(
    content: Mapping[str, object], marks: str | Sequence[str], source: str, weights: Weights | None = None
) -> State:
    """The weights in a checkpoint: the tensors of the one mapping, at any depth, that has the keys `marks`.

    Prefixes that wrappers put before every key ("module.", "_orig_mod.") are dropped.

    Args:
        content: of the file.
        marks: one key or several.
        source: what error messages call the file.
        weights: which to take of a file with averaged (ema) and plain ones; None = plain.

    Raises:
        ValueError: no mapping has the keys, or several have; or see `tensors_of`.
    """
    marks = [marks] if isinstance(marks, str) else list(marks)
    found = {path: node for path, node in mappings(content) if tensor_names(node).issuperset(marks)}
    if len({bool(_EMA.search(path)) for path in found}) == 2:
        found = {path: node for path, node in found.items() if bool(_EMA.search(path)) == (weights == "ema")}
    if len(found) != 1:
        places = ", ".join(path or "the top level" for path in found)
        where = f"found at {places}" if found else f"keys are {_some(content)}"
        raise ValueError(f"{source}: one set of weights with the key {', '.join(marks)} is needed; {where}")
    return tensors_of(next(iter(found.values())), source)


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
    node, seen = content, {id(content)}
    while not any(isinstance(value, Tensor) for value in node.values()):
        inner = next((value for name in names if isinstance(value := node.get(name), Mapping)), None)
        if inner is None or id(inner) in seen:
            raise ValueError(
                f"{source} has no weights: keys are {_some(node)}; "
                f"looked for tensors, or a mapping under {_some(names)}"
            )
        node = inner
        seen.add(id(node))
    strange = [f"{key} ({type(value).__name__})" for key, value in node.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{source} has values that are no tensors among its weights: {', '.join(strange)}")
    return tensors_of(node, source)


def _some(names: Sequence[str] | Mapping[str, object], most: int = 8) -> str:
    shown = [str(name) for name in names][:most]
    return ", ".join(shown) + (" ..." if len(names) > most else "") if shown else "none"


def require(state: Mapping[str, Tensor], keys: Mapping[str, int], source: str, what: str) -> None:
    """Checks that keys are there that sizes are read from.

    Args:
        state: weights.
        keys: and the number of axes of each.
        source: for error messages.
        what: the file should be.

    Raises:
        ValueError: naming all that are missing, or of another number of axes or empty.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{source} is not a complete {what}: missing {', '.join(missing)} (it has {_some(state)})")
    wrong = [
        f"{key} {list(state[key].shape)}"
        for key, axes in keys.items()
        if state[key].ndim != axes or 0 in state[key].shape
    ]
    if wrong:
        raise ValueError(f"{source} is no {what}: tensors of impossible shapes: {_some(wrong)}")


def count_modules(state: Mapping[str, object], prefix: str) -> int:
    """How many numbered modules `prefix`.0, `prefix`.1 ... the keys name."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})


def rename(state: State, rules: Sequence[tuple[str, str]], source: str = "the checkpoint") -> State:
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
            raise ValueError(f"{source}: two keys become {name} (one of them is {key})")
        renamed[name] = value
    return renamed


def autoencoder_rules(levels: int) -> list[tuple[str, str]]:
    """Latent diffusion's names of an autoencoder of so many levels (arXiv 2112.10752), as ours; for `rename`."""
    return [
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
        (r"^encoder\.down\.", "encoder.conv_blocks."),
        # Decoder levels are numbered from fine to coarse there, from coarse to fine here.
        *((rf"^decoder\.up\.{level}\.", f"decoder.conv_blocks.{levels - 1 - level}.") for level in range(levels)),
        (r"(conv_blocks\.\d+)\.block\.", r"\1.res."),
    ]


def autoencoder_export_rules(levels: int) -> list[tuple[str, str]]:
    """The way back of `autoencoder_rules`."""
    return [
        (r"(conv_blocks\.\d+)\.res\.", r"\1.block."),
        (r"\.mid\.0\.", ".mid.block_1."),
        (r"\.mid\.1\.", ".mid.attn_1."),
        (r"\.mid\.2\.", ".mid.block_2."),
        (r"^encoder\.conv_blocks\.", "encoder.down."),
        *((rf"^decoder\.conv_blocks\.{level}\.", f"decoder.up.{levels - 1 - level}.") for level in range(levels)),
    ]


def autoencoder_sizes(state: State, marks: Mapping[str, int], source: str, what: str) -> dict[str, Any]:
    """Sizes of an autoencoder in latent diffusion's names, as its tokenizer's constructor takes them.

    Args:
        state: weights.
        marks: further keys that must be there, and the number of axes of each.
        source, what: for error messages, see `require`.

    Raises:
        ValueError: keys that sizes are read from are missing, or widths that are no multiples of the first.
    """
    levels = max(count_modules(state, "encoder.down"), 1)
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    convolutions = ["encoder.conv_in.weight", "quant_conv.weight", *firsts]
    require(state, dict.fromkeys(convolutions, 4) | dict(marks), source, what)
    base, image_channels = state["encoder.conv_in.weight"].shape[:2]
    widths = [state[key].shape[0] for key in firsts]
    if any(width % base for width in widths):
        raise ValueError(f"{source}: widths {widths} are not multiples of the base width {base}")
    return dict(
        image_channels=image_channels,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=count_modules(state, "encoder.down.0.block"),
    )


def check_keys(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Checks that a file has exactly the keys and shapes of a model.

    Raises:
        ValueError: naming every missing key, every unexpected one, every other shape, and integers for floats.
    """
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {list(state[key].shape)} (needed {list(value.shape)})"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ],
        "of another kind": [
            f"{key} {str(state[key].dtype).removeprefix('torch.')}"
            for key, value in wanted.items()
            if key in state and state[key].is_floating_point() != value.is_floating_point()
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


class _Bounded(TorchFunctionMode):
    """Ends the making of a model of absurd sizes, such as 10^9 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > _MOST_CALLS:
            raise ValueError("the model would have far more layers than any that fits into memory")
        return func(*args, **(kwargs or {}))


def empty(model_class: type[Model], config: Mapping[str, Any]) -> Model:
    """The model on the meta device: shapes without memory.

    Raises:
        ValueError: sizes that make no model.
        TypeError: arguments that the class does not take.
    """
    try:
        with torch.device("meta"), _Bounded():
            return model_class(**config)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError) as error:
        raise ValueError(f"these sizes make no {model_class.__name__}: {error or type(error).__name__}") from error


def fitted(
    model_class: type[Model], config: dict[str, Any], state: State, source: str
) -> tuple[dict[str, Any], State]:
    """Configuration and weights, checked to be those of a model of the class.

    Raises:
        ValueError: sizes that make no model, or see `check_keys`.
    """
    try:
        wanted = empty(model_class, config).state_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    check_keys(wanted, state, source)
    return config, state


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Checks that all weights are finite numbers.

    Raises:
        ValueError: naming those that are not.
    """
    wrong = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise ValueError(f"{source} has weights that are not finite (NaN or infinite): {_some(wrong)}")


def build(
    model_class: type[Model], config: Mapping[str, object], state: State, source: str, dtype: torch.dtype
) -> Model:
    """A model in evaluation mode with the weights in one dtype (integers keep theirs).

    Raises:
        ValueError: weights that are not finite, or see `check_keys`.
    """
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    check_finite(cast, source)
    return load_strict(empty(model_class, config), cast, source).eval()
