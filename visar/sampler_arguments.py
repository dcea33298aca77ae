"""Samplers and their settings as a command line gives them: --sampler.NAME VALUE, or NAME:setting=value."""

import re
from typing import Any

from visar.samplers.index import find_sampler
from visar.samplers.settings import read_setting


def take_value(arguments: list[str], flag: str) -> tuple[list[str], str | None]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments; the last value counts, None is no such flag."""
    rest, value, words = [], None, iter(arguments)
    for word in words:
        name, equals, behind = word.partition("=")
        if name == flag:
            value = behind if equals else next(words, "")
        else:
            rest.append(word)
    return rest, value


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
    settings = find_sampler(sampler).settings()
    values = {}
    for flag in own:
        name = flag.removeprefix("--sampler.").replace("-", "_")
        arguments, value = take_value(arguments, flag)
        if value is not None:  # else given twice: taken already
            values[name] = read_setting(sampler, name, value)
    missing = [name for name, value in settings.items() if value.default is value.empty and name not in values]
    if missing:
        raise ValueError(f"sampler {sampler} needs {' and '.join(f'--sampler.{name}' for name in missing)}")
    return arguments, values


def parse_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:setting=value,setting=value to the name and its settings; values as on the command line, so that
    static_tree:branches=2,1,drafter=ngram has two settings.

    Raises:
        ValueError: unknown names, a part that is not setting=value, or a value that is none of the setting.
    """
    name, _, rest = text.partition(":")
    find_sampler(name)
    settings: dict[str, Any] = {}
    for pair in filter(None, re.split(r",(?=[A-Za-z_-]+=)", rest)):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"sampler {text!r}: write settings as NAME:setting=value,setting=value")
        key = key.replace("-", "_")
        settings[key] = read_setting(name, key, value)
    return name, settings
