"""Settings of samplers: as text, on a command line or in a list of samplers to compare, and as values from Python.

A setting is an argument of the sampler's function, and takes the values that its annotation says.
"""

import ast
import contextlib
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from visar.core.guidance import Guidance
from visar.core.interface import Generator
from visar.samplers.drafters.interface import Drafter
from visar.samplers.filtering import check_filters
from visar.samplers.index import GENERAL, SAMPLERS, find_sampler

UNIONS, SEQUENCES = (Union, UnionType), (tuple, Sequence)
GUIDANCE = {"guidance_scale": float, "guidance_schedule": get_type_hints(Guidance)["schedule"]}
"""Settings of the guidance, which every sampler takes as a whole."""
WORDS = {
    NoneType: "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    Drafter: "ngram, eagle, heads, a drafter's folder, or a smaller model's name or folder",
}


def annotations(sampler: str, general: bool = False) -> dict[str, Any]:
    """The annotation of every setting of a sampler; with `general` also those of GUIDANCE and of its GENERAL settings.

    Raises:
        ValueError: no such sampler; the message lists all names.
    """
    entry = find_sampler(sampler)
    every = {name: parameter.annotation for name, parameter in entry.parameters().items()}
    return every | GUIDANCE if general else {name: every[name] for name in entry.settings()}


def take_setting(sampler: str, name: str, value: Any, general: bool = False) -> Any:
    """A sampler's setting, given as text or as a value, in the type of its annotation.

    Text: numbers and words as they are, true and false in any case, tuples as 4,2,1 (those of tuples as a Python
    literal, such as "((0,), (1,), (0, 0))"); drafters and models stay text: pipelines load them. Values: NumPy's
    numbers are numbers, any sequence is a tuple, and so is one value alone; a pipeline stands for its generator.

    Raises:
        ValueError: an unknown sampler or setting, or a value that it does not take; the message names the allowed
            ones.
    """
    known = annotations(sampler, general)
    if name not in known:
        raise ValueError(f"sampler {sampler} has no setting {name!r}; its settings: {', '.join(known) or 'none'}")
    try:
        taken = _take(known[name], value)
    except (ValueError, SyntaxError, TypeError) as error:
        several = _several(name) if name in GENERAL else []
        hint = f" (one per scale: {', '.join(several)})" if several and sampler not in several else ""
        raise ValueError(f"sampler {sampler}: {name} {value!r}; allowed: {describe(known[name])}{hint}") from error
    for each in taken if isinstance(taken, tuple) else (taken,):
        if name in GENERAL:
            check_filters(**{name: each})
        elif name == "guidance_scale":
            Guidance(each)
    return taken


def _several(name: str) -> list[str]:
    """Samplers that take several values of a setting of GENERAL."""
    kinds = {sampler: annotations(sampler, general=True).get(name) for sampler in SAMPLERS}
    return [sampler for sampler, annotation in kinds.items() if get_origin(annotation) is not None]


def take_settings(sampler: str, given: Mapping[str, Any], general: bool = False, flag: str = "") -> dict[str, Any]:
    """A sampler's settings by name, each taken by `take_setting`; flag: prefix of the names on a command line.

    Raises:
        ValueError: see `take_setting`; or a setting that the sampler needs is not given.
    """
    taken = {name: take_setting(sampler, name, value, general) for name, value in given.items()}
    own = find_sampler(sampler).settings()
    missing = [name for name in own if own[name].default is own[name].empty and name not in given]
    if missing:
        raise ValueError(f"sampler {sampler} needs {' and '.join(f'{flag}{name}' for name in missing)}")
    return taken


def parse_sampler(text: str, general: bool = False) -> tuple[str, dict[str, Any]]:
    """NAME:setting=value,setting=value to the name and its settings; values as on the command line, so that
    static_tree:branches=2,1,drafter=ngram has two settings; with `general` see `annotations`.

    Raises:
        ValueError: unknown names, a part that is not setting=value, a value that is none of the setting, or a setting
            that the sampler needs is not given.
    """
    name, _, settings = text.partition(":")
    pairs = [pair.partition("=") for pair in filter(None, re.split(r",(?=[A-Za-z_-]+=)", settings))]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"sampler {text!r}: write settings as NAME:setting=value,setting=value")
    return name, take_settings(name, {key.replace("-", "_"): value for key, _, value in pairs}, general)


def kind_of_model(annotation: Any) -> type | None:
    """The protocol of the models, or Drafter, in an annotation whose values may be given by name; None for others."""
    if annotation is Drafter or Generator in getattr(annotation, "__mro__", ()):
        return annotation
    return next((kind for each in get_args(annotation) if (kind := kind_of_model(each)) is not None), None)


def describe(annotation: Any) -> str:
    """What may be written for an annotation, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in UNIONS:
        words = [describe(argument) for argument in arguments]
        return " or ".join(word for word in words if f"{word}, or several as in 4,2,1" not in words)
    if origin in SEQUENCES:
        members = get_args(arguments[0]) if get_origin(arguments[0]) in UNIONS else arguments[:1]
        single = [describe(member) for member in members if get_origin(member) not in SEQUENCES]
        return f"{' or '.join(single)}, or several as in 4,2,1" if single else "tuples such as ((0,), (1,), (0, 0))"
    if kind_of_model(annotation) is not None:
        return "a model's name or folder"
    return f"a {annotation.__name__}, which cannot be given as text"


def _take(annotation: Any, value: Any) -> Any:
    """See `take_setting`; ValueError, SyntaxError or TypeError for a value that the annotation excludes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    text = value.strip() if isinstance(value, str) else None
    if origin in UNIONS:
        for argument in sorted(arguments, key=lambda each: each is not NoneType):  # "none" is None before it is a word
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                return _take(argument, value)
    elif origin in SEQUENCES:
        return tuple(_take(arguments[0], each) for each in _members(arguments[0], value))
    elif origin is Literal and (text or value) in arguments:
        return text or value
    elif annotation is NoneType and (value is None or (text is not None and text.lower() == "none")):
        return None
    elif annotation is bool and text is not None and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif annotation in (int, float):
        kind = Integral if annotation is int else Real
        if text is not None or (isinstance(value, kind) and not isinstance(value, bool)):
            return annotation(value)
    elif text and (annotation is str or kind_of_model(annotation) is not None):
        return text
    elif origin is None and isinstance(value, annotation):
        return value
    elif kind_of_model(annotation) is not None and isinstance(
        generator := getattr(value, "generator", None), annotation
    ):
        return generator
    raise ValueError


def _members(member: Any, value: Any) -> Sequence[Any]:
    """The elements of a sequence of `member`, given as text or as a value."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, str) and get_origin(member) in SEQUENCES:
        return [tuple(inner) for inner in ast.literal_eval(value)]
    if isinstance(value, str):
        return value.strip("()[] ").rstrip(",").split(",")
    return value if isinstance(value, Sequence) else (value,)
