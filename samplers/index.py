"""The paper index of samplers: where they are, exact or lossy, their source, and what they need of a generator."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from visar.core.interface import (
    Categorical,
    Continuous,
    Masked,
    OneStep,
    Refining,
    Scales,
    Staged,
    Trees,
    Windowed,
    first_stage,
)
from visar.samplers.stages import stage_arguments

ARGUMENTS = ("model", "condition", "noise", "guidance", "callback", "runtime")
"""Arguments that the caller makes for every sampler; a sampler's other arguments are its settings."""
GENERAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""Settings that pipelines and commands name for all samplers, and their neutral values.

A sampler has those of them that its function takes.
"""


@dataclass(frozen=True)
class SamplerEntry:
    """One row of the index.

    Attributes:
        module, name: the sampler is `sample_NAME` of visar/samplers/MODULE.py; `check_NAME` there checks its
            arguments.
        exact: True when the tokens follow the distribution of ancestral sampling, False for a lossy sampler.
        paper: arXiv ids of the papers that it implements.
        needs: the protocol of visar/core/interface.py that its generator must have.
    """

    module: str
    name: str
    exact: bool
    paper: str
    needs: type

    def load(self, verb: str = "sample") -> Callable[..., Any]:
        """The sampler's function; with verb "check", the function that checks its arguments."""
        return getattr(importlib.import_module(f"visar.samplers.{self.module}"), f"{verb}_{self.name}")

    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters of the sampler's function that are settings."""
        parameters = inspect.signature(self.load()).parameters
        return {name: parameter for name, parameter in parameters.items() if name not in ARGUMENTS}

    def settings(self) -> dict[str, inspect.Parameter]:
        """The settings without those of GENERAL."""
        return {name: parameter for name, parameter in self.parameters().items() if name not in GENERAL}

    def fits(self, generator: Any) -> bool:
        """Whether a generator, or the first of its two stages, has the capabilities that the sampler needs."""
        return isinstance(first_stage(generator), self.needs)

    def check(self, generator: Any, arguments: Mapping[str, Any]) -> None:
        """Runs the sampler's checks alone.

        Args:
            generator: one that `fits`.
            arguments: guidance and settings, by name; those with a default may be missing.

        Raises:
            ValueError: as the sampler itself raises for these arguments.
        """
        check = self.load("check")
        if isinstance(generator, Staged):
            generator, arguments = first_stage(generator), stage_arguments(generator, arguments)
        given = {name: parameter.default for name, parameter in self.parameters().items()} | dict(arguments)
        _, *names = inspect.signature(check).parameters
        check(generator, **{name: given[name] for name in names})


_ROWS = (
    SamplerEntry("ancestral", "ancestral", True, "arXiv 2406.06525, 2404.02905", Categorical),
    SamplerEntry("jacobi", "jacobi", True, "arXiv 2410.01699, 2510.24211", Windowed),
    SamplerEntry("speculative", "speculative", True, "arXiv 2211.17192, 2302.01318", Windowed),
    SamplerEntry("tree_speculation", "static_tree", True, "arXiv 2401.15077, 2402.14160", Trees),
    SamplerEntry("tree_speculation", "dynamic_tree", True, "arXiv 2406.16858", Trees),
    SamplerEntry("tree_speculation", "k_seq", True, "arXiv 2310.15141", Trees),
    SamplerEntry("grouped", "grouped", False, "arXiv 2508.07747", Windowed),
    SamplerEntry("relaxed", "lantern", False, "arXiv 2410.03355, 2502.06352", Trees),
    SamplerEntry("next_scale", "next_scale", True, "arXiv 2404.02905", Scales),
    SamplerEntry("masked_refinement", "masked_refinement", False, "arXiv 2506.04421", Refining),
    SamplerEntry("collaborative", "collaborative", False, "arXiv 2411.17787", Scales),
    SamplerEntry("flow", "flow", False, "arXiv 2412.17153", Categorical),
    SamplerEntry("one_step", "one_step", False, "arXiv 2412.17153", OneStep),
    SamplerEntry("continuous", "continuous", True, "arXiv 2406.11838", Continuous),
    SamplerEntry("continuous_speculation", "continuous_speculation", True, "arXiv 2501.05370", Continuous),
    SamplerEntry("masked", "masked", False, "arXiv 2406.11838, 2505.20297", Masked),
    SamplerEntry("masked_speculation", "masked_speculation", False, "arXiv 2411.11925", Masked),
    SamplerEntry("masked_editing", "masked_edit", False, "arXiv 2406.11838", Masked),
    SamplerEntry("editing", "edit", False, "arXiv 2404.02905", Scales),
)
SAMPLERS = {row.name: row for row in _ROWS}


def find_sampler(name: str) -> SamplerEntry:
    """The row of that name.

    Raises:
        ValueError: no sampler has that name; the message lists all names.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


PLAIN = ("ancestral", "continuous", "masked")
"""Samplers that draft nothing, one for every kind of generator."""


def plain_sampler(generator: Any) -> SamplerEntry:
    """The row of the first of PLAIN that a generator fits.

    Raises:
        ValueError: it fits none of them.
    """
    for name in PLAIN:
        if SAMPLERS[name].fits(generator):
            return SAMPLERS[name]
    raise ValueError(f"{type(generator).__name__} fits no plain sampler: {', '.join(PLAIN)}")
