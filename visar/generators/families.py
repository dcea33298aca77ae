"""All families of generators, one row each: the name of --family, the module, and the class that model folders name.

What training and the benchmark need to know of a family stands beside its class, as FAMILY (a `GeneratorFamily`).
Importing this file imports none of the modules.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visar.core.interface import TokenLayout
    from visar.generators.training import GeneratorFamily

# Where no family is named, a tokenizer's ids are learnt by the first one that fits.
FAMILIES: dict[str, tuple[str, str]] = {
    "raster": ("visar.generators.raster", "RasterGPT"),
    "next_scale": ("visar.generators.next_scale", "NextScaleTransformer"),
    "hmar": ("visar.generators.hierarchical_masked", "HierarchicalMaskedTransformer"),
    "masked": ("visar.generators.masked", "MaskedGenerator"),
    "coarse_to_fine": ("visar.generators.coarse_to_fine", "CoarseToFine"),
    "causal_continuous": ("visar.generators.causal_continuous", "CausalContinuous"),
    "next_neighbor": ("visar.generators.next_neighbor", "NextNeighborTransformer"),
    "region_parallel": ("visar.generators.region_parallel", "RegionParallelTransformer"),
}

MODULES = {
    **{class_name: module for module, class_name in FAMILIES.values()},
    "OneStepGenerator": "visar.generators.one_step",  # distilled from one of the others (visar/distill)
    "ReleasedStudent": "visar.generators.released_student",  # such a student of the paper's authors
    "IndependentGenerator": "visar.generators.independent",  # the baseline of those students
    "TabularGenerator": "visar.generators.tabular",  # a table to test samplers with; it is not trained
}
"""Modules of the classes that a model's folder may name."""


def load_family(name: str) -> "GeneratorFamily":
    """What is known of a family by its name in FAMILIES."""
    return importlib.import_module(FAMILIES[name][0]).FAMILY


def find_family(name: str, layout: "TokenLayout") -> "GeneratorFamily":
    """The family of that name, for a tokenizer's tokens.

    Args:
        name: in FAMILIES, or "auto": the first that fits.
        layout: of the tokens.

    Raises:
        ValueError: no such family, or one that does not fit the tokens; lists those that do.
    """
    if name != "auto" and name not in FAMILIES:
        raise ValueError(f"family {name!r}; choose auto, {', '.join(FAMILIES)}")
    fitting = [each for each in FAMILIES if load_family(each).fits(layout)]
    if not fitting or name not in ("auto", *fitting):
        tokens = f"{layout.vocab_size} codes" if layout.vocab_size else "vectors"
        raise ValueError(
            f"family {name} does not fit tokens that are {tokens} in arrangement {layout.arrangement}; families that "
            f"do: {', '.join(fitting) or 'none'}"
        )
    return load_family(fitting[0] if name == "auto" else name)
