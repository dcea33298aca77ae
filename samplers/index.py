"""The paper index of samplers: name, function, exact or lossy, source, and what it needs of a generator."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_origin

from visar.core.output import SampleOutput

COMMON = ("model", "condition", "noise", "guidance", "temperature", "top_k", "top_p", "callback", "runtime")


@dataclass(frozen=True)
class SamplerEntry:
    """One row of the index.

    Attributes:
        module, function: where it is.
        exact: True when the tokens follow the law of ancestral sampling, False for a lossy one.
        paper: what it is from.
        needs: methods of the generator beyond start and predict.
    """

    module: str
    function: str
    exact: bool
    paper: str
    needs: tuple[str, ...]

    def load(self) -> Callable[..., SampleOutput]:
        """The function."""
        return getattr(importlib.import_module(self.module), self.function)

    def settings(self) -> dict[str, inspect.Parameter]:
        """Its own settings, beyond those that every sampler has."""
        parameters = inspect.signature(self.load()).parameters
        return {name: parameter for name, parameter in parameters.items() if name not in COMMON}

    def missing(self, given: Mapping[str, Any]) -> list[str]:
        """Its own settings that have no default and are not given."""
        return [name for name, own in self.settings().items() if own.default is own.empty and name not in given]

    def fits(self, generator: Any) -> bool:
        """Whether a generator has what it needs."""
        return all(callable(getattr(generator, need, None)) for need in self.needs)

    def takes_one_a_scale(self, name: str) -> bool:
        """Whether temperature, top_k or top_p may be a list with one value a scale."""
        return get_origin(inspect.signature(self.load()).parameters[name].annotation) is not None


SAMPLERS: dict[str, SamplerEntry] = {
    "ancestral": SamplerEntry(
        "visar.samplers.ancestral", "sample_ancestral", True, "arXiv 2406.06525, 2404.02905", ("append",)
    ),
    "one_step": SamplerEntry(
        "visar.samplers.one_step", "sample_one_step", False, "arXiv 2412.17153", ("first_token",)
    ),
    "flow": SamplerEntry("visar.samplers.flow", "sample_flow", False, "arXiv 2412.17153", ("append",)),
    "jacobi": SamplerEntry(
        "visar.samplers.jacobi", "sample_jacobi", True, "arXiv 2410.01699, 2510.24211", ("verify", "commit")
    ),
    "speculative": SamplerEntry(
        "visar.samplers.speculative", "sample_speculative", True, "arXiv 2211.17192, 2302.01318", ("verify", "commit")
    ),
    "static_tree": SamplerEntry(
        "visar.samplers.tree_speculation",
        "sample_static_tree",
        True,
        "arXiv 2401.15077, 2402.14160",
        ("verify_tree", "commit_path"),
    ),
    "dynamic_tree": SamplerEntry(
        "visar.samplers.tree_speculation",
        "sample_dynamic_tree",
        True,
        "arXiv 2406.16858",
        ("verify_tree", "commit_path"),
    ),
    "k_seq": SamplerEntry(
        "visar.samplers.tree_speculation", "sample_k_seq", True, "arXiv 2310.15141", ("verify_tree", "commit_path")
    ),
    "grouped": SamplerEntry(
        "visar.samplers.grouped", "sample_grouped", False, "arXiv 2508.07747", ("verify", "commit")
    ),
    "lantern": SamplerEntry(
        "visar.samplers.relaxed",
        "sample_lantern",
        False,
        "arXiv 2410.03355, 2502.06352",
        ("verify_tree", "commit_path"),
    ),
    "next_scale": SamplerEntry(
        "visar.samplers.next_scale", "sample_next_scale", True, "arXiv 2404.02905", ("append", "commit_map")
    ),
    "masked_refinement": SamplerEntry(
        "visar.samplers.masked_refinement", "sample_masked_refinement", False, "arXiv 2506.04421", ("refine",)
    ),
    "collaborative": SamplerEntry(
        "visar.samplers.collaborative", "sample_collaborative", False, "arXiv 2411.17787", ("append", "commit_map")
    ),
    "edit": SamplerEntry("visar.samplers.editing", "sample_edit", False, "arXiv 2404.02905", ("commit_map",)),
}


def find_sampler(name: str) -> SamplerEntry:
    """The row of that name.

    Raises:
        ValueError: no sampler of that name; lists those there are.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
