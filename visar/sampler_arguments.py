"""Samplers and their settings as a command line gives them: --sampler.NAME VALUE, or NAME:setting=value."""

import re
from collections.abc import Iterator
from typing import Any

from visar.flags import take_value
from visar.guidance import Guidance
from visar.samplers.filtering import check_filters
from visar.samplers.index import find_sampler
from visar.samplers.settings import take_setting

FILTERS: dict[str, type[int] | type[float]] = {"temperature": float, "top_k": int, "top_p": float}
GENERAL = ("guidance_scale", "guidance_schedule", *FILTERS)
"""Settings that every sampler has, beside its own."""


def take_sampler_options(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes --sampler.NAME VALUE pairs out of the arguments and reads them by the sampler's own annotations.

    Raises:
        ValueError: no such sampler, a setting that it does not have, or one that it needs is not given.
    """
    own = [word.partition("=")[0] for word in arguments if word.startswith("--sampler.")]
    sampler = take_value(arguments, "--sampler")[1]
    if sampler is None:
        if own:
            raise ValueError(f"{own[0]} is a setting of a sampler: say --sampler NAME too")
        return arguments, {}
    values: dict[str, Any] = {}
    for flag in own:
        name = flag.removeprefix("--sampler.").replace("-", "_")
        arguments, value = take_value(arguments, flag)
        if value is not None:  # else given twice: taken already
            values[name] = take_setting(sampler, name, value)
    missing = find_sampler(sampler).missing(values)
    if missing:
        raise ValueError(f"sampler {sampler} needs {' and '.join(f'--sampler.{name}' for name in missing)}")
    return arguments, values


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


def split_run(text: str) -> tuple[str, str]:
    """MODEL/SAMPLER:setting=value to the model and the sampler with its settings.

    The first ":" ends MODEL/SAMPLER, and its last "/" ends the model: both a model's folder and settings may hold
    slashes.

    Raises:
        ValueError: no model.
    """
    pair, colon, settings = text.partition(":")
    model, _, sampler = pair.rpartition("/")
    if not model:
        raise ValueError(f"run {text!r}: write MODEL/SAMPLER or MODEL/SAMPLER:setting=value,setting=value")
    return model, sampler + colon + settings


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
