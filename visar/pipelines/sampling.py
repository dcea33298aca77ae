"""Sampling settings of a pipeline: its defaults, and a sampler's own options as the sampler takes them."""

import dataclasses
from collections.abc import Mapping
from numbers import Real
from typing import Any

from visar.core.guidance import Guidance
from visar.core.interface import first_stage
from visar.pipelines.components import load_generator
from visar.pipelines.drafters import load_drafter
from visar.samplers.drafters.interface import Drafter
from visar.samplers.index import GENERAL, SAMPLERS, SamplerEntry, find_sampler
from visar.samplers.settings import annotations, kind_of_model, take_setting, take_settings

NEUTRAL = {"sampler": "ancestral", **GENERAL}


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
    defaults: Mapping[str, Any],
    sampler: str | None,
    guidance_scale: float | Guidance | None,
    general: Mapping[str, Any],
) -> dict[str, Any]:
    """sampler, guidance, and those of temperature, top_k and top_p that the sampler has: what is given, else the
    pipeline's default, else the neutral value.

    Args:
        defaults: defaults of the pipeline.
        sampler: name; None is the default.
        guidance_scale: strength, which leaves the rest of the default guidance as it is; or the whole guidance.
        general: temperature, top_k and top_p; None where nothing is given.

    Raises:
        ValueError: an unknown sampler, a setting that it does not have or a value that it does not take, or a
            guidance_scale that is no number.
    """
    standard = {**NEUTRAL, **defaults}
    sampler = standard["sampler"] if sampler is None else sampler
    has = find_sampler(sampler).parameters()
    unknown = [name for name, value in general.items() if value is not None and name not in has]
    if unknown:
        raise ValueError(f"sampler {sampler} has no {unknown[0]}")
    settings: dict[str, Any] = {"sampler": sampler}
    for name in (name for name in general if name in has):
        value = standard[name] if general[name] is None else general[name]
        settings[name] = take_setting(sampler, name, value, general=True)
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
    """Drafters and generators that settings name: loaded once, and anew where the generator was moved or cast."""

    def __init__(self) -> None:
        self._loaded: dict[tuple, Any] = {}

    def load(self, kind: type, name: Any, generator: Any) -> Any:
        """A model, or a tuple of them, by name or folder; what is no text is given back.

        Args:
            kind: Drafter, or the protocol that the model must have.
            name: as of `load_drafter` or `load_generator`.
            generator: that it works for: it says device and dtype.

        Raises:
            ValueError: no such model, or one that does not fit.
        """
        if isinstance(name, tuple):
            return tuple(self.load(kind, each, generator) for each in name)
        if not isinstance(name, str):
            return name
        key = (kind, name, generator.device, generator.dtype)
        if key not in self._loaded:
            if kind is Drafter:
                found: Any = load_drafter(name, generator)
            else:
                found = load_generator(name, device=generator.device, dtype=generator.dtype)
            if not isinstance(found, kind):
                raise ValueError(f"{name} is a {type(found).__name__}; one that has {kind.__name__} is needed")
            self._loaded[key] = found
        return self._loaded[key]


def resolve_options(
    sampler: str, given: Mapping[str, Any] | None, generator: Any, helpers: Helpers
) -> tuple[SamplerEntry, dict[str, Any]]:
    """A sampler by name and its own settings: texts read, drafters and followers loaded.

    Args:
        sampler: name.
        given: its settings, as texts or values; None is none.
        generator: to sample from.
        helpers: what was loaded for it.

    Raises:
        ValueError: unknown sampler or setting, a value that it does not take, a setting that it needs is not given, or
            a generator that lacks what the sampler needs.
    """
    entry = find_sampler(sampler)
    if not isinstance(given, Mapping | None):
        raise ValueError(f"sampler_options {given!r}; give a dictionary, such as {{'window': 16}}")
    if not entry.fits(generator):
        able = ", ".join(name for name, other in SAMPLERS.items() if other.fits(generator))
        raise ValueError(f"sampler {sampler} does not fit a {type(generator).__name__}; samplers that do: {able}")
    options = take_settings(sampler, given or {})
    for name, annotation in annotations(sampler).items():
        kind = kind_of_model(annotation)
        if kind is not None and name in options:
            options[name] = helpers.load(kind, options[name], first_stage(generator))
    return entry, options
