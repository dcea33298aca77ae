"""Heads by name."""

from typing import Any

from visar.layers.heads.chain import Head
from visar.layers.heads.diffusion import GaussianDiffusionHead
from visar.layers.heads.energy import EnergyHead
from visar.layers.heads.flow import FlowHead
from visar.layers.heads.mixture import MixtureHead

HEADS: dict[str, type[Head]] = {
    "diffusion": GaussianDiffusionHead,
    "flow": FlowHead,
    "mixture": MixtureHead,
    "energy": EnergyHead,
}


def build_head(name: str, channels: int, hidden_size: int, arguments: dict[str, Any] | None) -> Head:
    """A head with fresh weights.

    Args:
        name: in HEADS.
        channels, hidden_size: of every head.
        arguments: of the head's class, besides.

    Raises:
        ValueError: no such head, or arguments that it does not take.
    """
    if name not in HEADS:
        raise ValueError(f"head {name!r}; choose one of {', '.join(HEADS)}")
    try:
        return HEADS[name](channels, hidden_size, **(arguments or {}))
    except TypeError as error:
        raise ValueError(f"head {name} does not take these head_arguments: {error}") from error
