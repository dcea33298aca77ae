"""Settings of samplers: as text, on a command line or in a list of samplers to compare, and as values from Python."""

import ast
import collections.abc
import inspect
import re
import types
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch

from visar.core.guidance import Guidance
from visar.generators.scales import ScaleGenerator
from visar.samplers.drafters.interface import Drafter
from visar.samplers.filtering import check_filters
from visar.samplers.index import find_sampler

SEQUENCES = (tuple, collections.abc.Sequence)


def setting(sampler: str, name: str) -> inspect.Parameter:
    """A sampler's setting of that name.

    Raises:
        ValueError: no such sampler or setting; lists those there are.
    """
    settings = find_sampler(sampler).settings()
    if name not in settings:
        allowed = ", ".join(settings) or "none"
        raise ValueError(f"sampler {sampler} has no setting {name!r}; its settings: {allowed}")
    return settings[name]


def take_setting(sampler: str, name: str, value: Any) -> Any:
    """A sampler's setting, given as text or as a value, in the type of its annotation.

    Text: numbers and words as they are, true and false in any case, tuples as 4,2,1 (those of tuples as a Python
    literal, such as "((0,), (1,), (0, 0))"); drafters and models stay text: pipelines load them. Values: NumPy's
    numbers are numbers, any sequence is a tuple, and so is one value alone; a pipeline stands for its generator.

    Raises:
        ValueError: no such sampler or setting, or no value of it; names the allowed ones.
    """
    annotation = setting(sampler, name).annotation
    try:
        return _take(annotation, value)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"sampler {sampler}: {name} {value!r}; allowed: {describe(annotation)}") from error


def describe(annotation: Any) -> str:
    """What may be written for an annotation, in words."""
    if annotation is Drafter:
        return "ngram, eagle, heads, a drafter's folder, or a smaller model's name or folder"
    if annotation is ScaleGenerator:
        return "a model's name or folder"
    if annotation is type(None):
        return "none"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    if annotation in words:
        return words[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, arguments))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if get_origin(annotation) in SEQUENCES:
        members = get_args(arguments[0]) if get_origin(arguments[0]) in (Union, types.UnionType) else arguments[:1]
        single = [describe(member) for member in members if get_origin(member) not in SEQUENCES]
        return f"{' or '.join(single)}, or several as in 4,2,1" if single else "tuples such as ((0,), (1,), (0, 0))"
    return f"a {getattr(annotation, '__name__', annotation)}, which cannot be given as text"


def _read(annotation: Any, text: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (Drafter, ScaleGenerator, str):
        if not text:
            raise ValueError
        return text
    if annotation is type(None):
        if text.lower() != "none":
            raise ValueError
        return None
    if annotation is bool:
        return text.lower() == "true" if text.lower() in ("true", "false") else _fail()
    if annotation in (int, float):
        return annotation(text)
    if origin is Literal:
        found = [value for value in arguments if str(value) == text]
        return found[0] if found else _fail()
    if origin in (Union, types.UnionType):
        return _first(sorted(arguments, key=lambda argument: argument is not type(None)), text)
    if origin in SEQUENCES and get_origin(arguments[0]) in SEQUENCES:
        value = ast.literal_eval(text)
        return tuple(tuple(_read(get_args(arguments[0])[0], str(item)) for item in inner) for inner in value)
    if origin in SEQUENCES:
        return tuple(_read(arguments[0], part.strip()) for part in text.strip("()[]").rstrip(",").split(","))
    return _fail()


def _take(annotation: Any, value: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(value, str):
        return _read(annotation, value.strip())
    if annotation is Drafter:
        return value if all(callable(getattr(value, name, None)) for name in ("key", "start")) else _fail()
    if annotation is ScaleGenerator:
        value = getattr(value, "generator", value)
    if annotation is bool:
        return value if isinstance(value, bool) else _fail()
    if annotation in (int, float):
        kind = Integral if annotation is int else Real
        return annotation(value) if isinstance(value, kind) and not isinstance(value, bool) else _fail()
    if origin is Literal:
        return value if value in arguments else _fail()
    if origin in (Union, types.UnionType):
        return _first(list(arguments), value)
    if origin in SEQUENCES:
        value = value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value
        several = value if isinstance(value, collections.abc.Sequence) else (value,)
        return tuple(_take(arguments[0], each) for each in several)
    return value if isinstance(value, annotation) else _fail()


def _first(annotations: list[Any], value: Any) -> Any:
    for annotation in annotations:
        try:
            return _take(annotation, value)
        except (ValueError, SyntaxError, TypeError):
            continue
    return _fail()


def _fail() -> Any:
    raise ValueError


FILTERS: dict[str, type[int] | type[float]] = {"temperature": float, "top_k": int, "top_p": float}


GENERAL = ("guidance_scale", "guidance_schedule", *FILTERS)
"""Settings that every sampler has, beside its own."""


def parse_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:setting=value,setting=value to the name and its settings; values as on the command line, so that
    static_tree:branches=2,1,drafter=ngram has two settings.

    Raises:
        ValueError: unknown names, a part that is not setting=value, or a value that is none of the setting.
    """
    name = text.partition(":")[0]
    find_sampler(name)
    return name, {key: take_setting(name, key, value) for key, value in _settings(text)}


def parse_sampling(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """NAME:setting=value,setting=value as `parse_sampler`, where settings may also be those of GENERAL.

    Samplers over scales take temperature, top_k and top_p for all scales or one a scale: top_p=0.9,0.9,0.8.

    Returns: the sampler's name, its own settings, and the general ones that are given.

    Raises:
        ValueError: as `parse_sampler`, a general setting out of range, or one that the sampler needs is not given.
    """
    name = text.partition(":")[0]
    entry = find_sampler(name)
    own = entry.settings()
    settings: dict[str, Any] = {}
    general: dict[str, Any] = {}
    for key, value in _settings(text):
        if key in own:
            settings[key] = take_setting(name, key, value)
        elif key in GENERAL:
            general[key] = _read_general(name, key, value)
        else:
            raise ValueError(
                f"sampler {name} has no setting {key!r}; its settings: {', '.join(own) or 'none'}; those of every "
                f"sampler: {', '.join(GENERAL)}"
            )
    missing = entry.missing(settings)
    if missing:
        raise ValueError(f"sampler {text!r} needs {' and '.join(missing)}")
    return name, settings, general


def _settings(text: str) -> Iterator[tuple[str, str]]:
    for pair in filter(None, re.split(r",(?=[A-Za-z_-]+=)", text.partition(":")[2])):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"sampler {text!r}: write settings as NAME:setting=value,setting=value")
        yield key.replace("-", "_"), value


def _read_general(sampler: str, name: str, text: str) -> Any:
    if name == "guidance_schedule":
        if text not in ("constant", "linear"):
            raise ValueError(f"sampler {sampler}: guidance_schedule {text!r}; choose constant or linear")
        return text
    kind = FILTERS.get(name, float)
    several = name in FILTERS and find_sampler(sampler).takes_one_a_scale(name)
    try:
        values = [kind(part) for part in (text.split(",") if several else [text])]
    except ValueError as error:
        allowed = f"a {'whole ' * (kind is int)}number{', or one a scale as in 4,2,1' * several}"
        raise ValueError(f"sampler {sampler}: {name} {text!r}; allowed: {allowed}") from error
    for value in values:
        if name in FILTERS:
            neutral: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
            check_filters(**{**neutral, name: value})
        else:
            Guidance(value)
    return tuple(values) if len(values) > 1 else values[0]
