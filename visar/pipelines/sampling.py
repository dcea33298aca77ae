"""Sampling settings of a pipeline: its defaults, and a sampler's own options as the sampler takes them."""

import dataclasses
from collections.abc import Hashable, Mapping
from numbers import Real
from typing import Any

import torch

from visar.core.guidance import Guidance
from visar.core.interface import Scales
from visar.core.runtime import Runtime, Session
from visar.samplers.drafters.interface import Drafter
from visar.samplers.index import SAMPLERS, SamplerEntry, find_sampler
from visar.samplers.settings import take_setting

NEUTRAL = {"sampler": "ancestral", "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def guidance_of_defaults(defaults: Mapping[str, Any]) -> Guidance:
    """The guidance that a pipeline's default settings say.

    Raises:
        ValueError: unknown settings, or both guidance and guidance_scale.
    """
    allowed = (*NEUTRAL, "guidance_scale", "guidance", "text_encoder")
    unknown = [name for name in defaults if name not in allowed]
    if unknown:
        raise ValueError(f"default setting {unknown[0]!r}; choose from {', '.join(allowed)}")
    if "guidance" not in defaults:
        return Guidance(float(defaults.get("guidance_scale", 1.0)))
    if "guidance_scale" in defaults:
        raise ValueError("default settings have guidance or guidance_scale, not both")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in defaults["guidance"].items()
    }
    try:
        return Guidance(**fields)
    except TypeError as error:
        names = ", ".join(field.name for field in dataclasses.fields(Guidance))
        raise ValueError(f"default guidance {', '.join(fields)}; its fields: {names}") from error


def chosen_settings(
    defaults: Mapping[str, Any], guidance_scale: float | Guidance | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """sampler, temperature, top_k, top_p and guidance: what is given, else a pipeline's default, else neutral.

    Args:
        defaults: of the pipeline.
        guidance_scale: strength, which leaves the rest of the default guidance as it is; or the whole guidance.
        given: by name; None where nothing is given.

    Raises:
        ValueError: a guidance_scale that is no number.
    """
    standard = {**NEUTRAL, **defaults}
    settings = {name: standard[name] if value is None else value for name, value in given.items()}
    guidance = guidance_scale
    if not isinstance(guidance, Guidance):
        own = guidance_of_defaults(defaults)
        if guidance is not None and not isinstance(guidance, Real):
            raise ValueError(f"guidance_scale {guidance!r}; give a number >= 0 (1.0 = off) or a Guidance")
        if guidance is None:
            guidance = own
        else:
            start = own.start if own.start is None or own.convention == "interpolate" else own.start + 1.0
            guidance = Guidance(float(guidance), schedule=own.schedule, start=start, interval=own.interval)
    return {**settings, "guidance": guidance}


class Helpers:
    """Drafters and further generators that options name: loaded once, and anew where the generator was moved or cast.

    Generators here are those that the helpers work for: they say device and dtype.
    """

    def __init__(self) -> None:
        self._drafters: dict[tuple, Drafter] = {}
        self._models: dict[tuple, Any] = {}

    def drafter(self, name: str, generator: Any) -> Drafter:
        """A drafter by name or folder."""
        from visar.pipelines.drafters import load_drafter

        key = (name, generator.device, generator.dtype)
        if key not in self._drafters:
            self._drafters[key] = load_drafter(name, generator)
        return self._drafters[key]

    def model(self, model: Any, generator: Any) -> Any:
        """A generator as it is, or that of a pipeline by name or folder."""
        from visar.pipelines.components import load_generator

        if not isinstance(model, str):
            return model
        key = (model, generator.device, generator.dtype)
        if key not in self._models:
            loaded = load_generator(model, device=generator.device, dtype=generator.dtype)
            if not isinstance(loaded, Scales):
                raise ValueError(f"{model} is a {type(loaded).__name__}; followers are generators over scales")
            self._models[key] = loaded
        return self._models[key]


def resolve_options(
    sampler: str, given: Mapping[str, Any], generator: Any, helpers: Helpers
) -> tuple[SamplerEntry, dict[str, Any]]:
    """A sampler by name and its options: texts read, drafters and followers loaded.

    Args:
        sampler: name.
        given: its options, as texts or values.
        generator: to sample from.
        helpers: what was loaded for it.

    Raises:
        ValueError: unknown sampler or option, a value that the option does not take, an option that it needs is not
            given, or a generator that lacks what the sampler needs.
    """
    entry = find_sampler(sampler)
    if not isinstance(given, Mapping):
        raise ValueError(f"sampler_options {given!r}; give a dictionary, such as {{'window': 16}}")
    options = dict(given)
    unknown = sorted(set(options) - set(entry.settings()))
    if unknown:
        allowed = ", ".join(entry.settings()) or "none"
        raise ValueError(f"sampler {sampler} has no option {unknown[0]!r}; its options: {allowed}")
    for name, value in options.items():
        options[name] = take_setting(sampler, name, value)
    if isinstance(options.get("drafter"), str):
        options["drafter"] = helpers.drafter(options["drafter"], generator)
    if "followers" in options:
        options["followers"] = [helpers.model(each, generator) for each in options["followers"]]
    if not entry.fits(generator):
        able = ", ".join(name for name, other in SAMPLERS.items() if other.fits(generator))
        raise ValueError(f"sampler {sampler} does not fit a {type(generator).__name__}; samplers that do: {able}")
    lacking = entry.missing(options)
    if lacking:
        raise ValueError(f"sampler {sampler} needs the options {' and '.join(lacking)}")
    return entry, options


def check_one_value(sampler: str, entry: SamplerEntry, **filters: Any) -> None:
    """Checks that temperature, top_k and top_p are lists only where the sampler takes one value a scale.

    Raises:
        ValueError: a list for another sampler, or a text.
    """
    for name, value in filters.items():
        if not isinstance(value, Real) and not entry.takes_one_a_scale(name):
            able = [other for other, each in SAMPLERS.items() if each.takes_one_a_scale(name)]
            raise ValueError(
                f"{name} {value!r}; sampler {sampler} takes one number, these take one a scale: {', '.join(able)}"
            )
        if isinstance(value, str):
            raise ValueError(f"{name} {value!r}; give a number, or a list with one a scale")


class Begun(Exception):
    """A sampler has found nothing wrong and would begin."""


class Check(Runtime):
    """Stops a sampler where it would begin: its own settings have been checked by then, and nothing was drawn."""

    def session(self, model: Any, device: torch.device, key: Hashable) -> Session:
        raise Begun
