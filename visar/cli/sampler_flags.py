"""A sampler and its settings as a command line gives them: --sampler NAME --sampler.SETTING VALUE."""

from typing import Any

from visar.cli.flags import take_value
from visar.samplers.settings import take_settings


def take_sampler_options(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes --sampler.SETTING VALUE pairs out of the arguments and reads them by the sampler's own annotations.

    Raises:
        ValueError: no such sampler, a setting that it does not have, or one that it needs is not given.
    """
    flags = dict.fromkeys(word.partition("=")[0] for word in arguments if word.startswith("--sampler."))
    sampler = take_value(arguments, "--sampler")[1]
    if sampler is None:
        if flags:
            raise ValueError(f"{next(iter(flags))} is a setting of a sampler: give --sampler NAME too")
        return arguments, {}
    given: dict[str, Any] = {}
    for flag in flags:
        arguments, given[flag.removeprefix("--sampler.").replace("-", "_")] = take_value(arguments, flag)
    return arguments, take_settings(sampler, given, flag="--sampler.")
