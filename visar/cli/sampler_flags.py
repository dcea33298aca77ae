"""Samplers and their settings as a command line gives them: --sampler.NAME VALUE, or NAME:setting=value."""

from typing import Any

from visar.cli.flags import take_value
from visar.samplers.index import find_sampler
from visar.samplers.settings import take_setting


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
