"""All families of tokenizers, one row each: the name of --kind, the module, and the class that model folders name.

What training and the benchmark need to know of a family stands beside its class, as FAMILY (a `TokenizerFamily`).
Importing this file imports none of the modules.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visar.tokenizers.training import TokenizerFamily

FAMILIES: dict[str, tuple[str, str]] = {
    "vq": ("visar.tokenizers.vq", "VQTokenizer"),
    "multiscale": ("visar.tokenizers.multiscale_vq", "MultiScaleVQTokenizer"),
    "kl": ("visar.tokenizers.kl", "KLTokenizer"),
    "diffusion": ("visar.tokenizers.diffusion", "DiffusionTokenizer"),
    "video": ("visar.tokenizers.video_vq", "VideoVQTokenizer"),
    "larp": ("visar.tokenizers.larp", "LARPTokenizer"),
}

MODULES = {class_name: module for module, class_name in FAMILIES.values()}
"""Modules of the classes that a model's folder may name."""


def load_family(kind: str) -> "TokenizerFamily":
    """What is known of a family by its name in FAMILIES."""
    return importlib.import_module(FAMILIES[kind][0]).FAMILY


def find_family(kind: str | None, preset: str | None) -> "tuple[TokenizerFamily, str]":
    """The family of tokenizers and its preset.

    Args:
        kind: name of the family; None = the preset's, or without one the first of all.
        preset: name of an architecture; None = the family's smallest.

    Raises:
        ValueError: no such family, no such preset, or none of that family.
    """
    if kind is not None and kind not in FAMILIES:
        raise ValueError(f"kind {kind!r}; choose {', '.join(FAMILIES)}")
    if preset is None:
        family = load_family(kind or next(iter(FAMILIES)))
        return family, family.default
    of_kind = [load_family(name) for name in FAMILIES if kind in (None, name)]
    for family in of_kind:
        if preset in family.presets:
            return family, preset
    raise ValueError(f"preset {preset!r}; choose {', '.join(name for family in of_kind for name in family.presets)}")
