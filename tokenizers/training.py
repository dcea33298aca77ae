"""What training and the benchmark need to know of a family of tokenizers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]


class Meter(Protocol):
    """Measures what a bottleneck does with a set of images, batch after batch."""

    def update(self, output: Any) -> None:
        """Takes in the output of a forward pass."""

    def values(self) -> dict[str, float]:
        """What was measured, by name."""


class Bottleneck(ABC):
    """What training does about a tokenizer's bottleneck: its part of the loss, and what comes after steps and at the
    end.

    Args:
        model: that is trained, on its device.
        options: of `visar train tokenizer`.
    """

    def __init__(self, model: Any, options: Any) -> None:
        self.model, self.options = model, options

    def start(self, config: Mapping[str, Any]) -> None:
        """Takes over what the configuration of the model that training starts from says besides sizes."""
        return None

    @abstractmethod
    def loss(self, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of a forward pass, and scalars to be logged."""

    def after_step(
        self, outputs: Sequence[Any], step: int, random: Callable[[], torch.Generator]
    ) -> dict[str, Tensor]:
        """Moves what the optimiser does not; returns scalars to be logged.

        Args:
            outputs: of the step's micro-batches.
            step: number of the step that was made.
            random: makes the generator of what is random in it.
        """
        return {}

    @abstractmethod
    def meter(self) -> Meter:
        """A new meter."""

    def finish(self, model: Any, images: Iterable[Tensor]) -> None:
        """Changes a model that is about to be saved; images: batches of the training split, float32 in [-1, 1]."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """State beyond weights and optimisers."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the state back."""
        assert not state


def sized_arguments(preset: Arguments, given: Mapping[str, Any], image_size: int) -> Arguments:
    """A preset with what is given instead, for images of that side; see `TokenizerFamily.arguments`."""
    return {**preset, **given, "image_size": image_size}


@dataclass(frozen=True)
class TokenizerFamily:
    """A family of tokenizers; stands beside its class as FAMILY.

    Attributes:
        model: the class.
        presets: constructor arguments of named architectures.
        default: the preset that is trained when none is named.
        tiny: constructor arguments of a model that tests and machines without a GPU build in a moment; its codes and
            maps are those of the tiny generators that it decodes for.
        frozen: submodules that stay as they are where only the decoder is trained.
        bottleneck: what training does about the bottleneck.
        arguments: (a preset's arguments, the user's, side of the images in pixels) -> the constructor's; raises
            ValueError for a side that does not fit.
        clips: whether it reads clips [B, T, C, H, W]; its outputs hold their frames as images.
    """

    model: type[nn.Module]
    presets: Mapping[str, Arguments]
    default: str
    tiny: Arguments
    frozen: tuple[str, ...]
    bottleneck: type[Bottleneck]
    arguments: Callable[[Arguments, Arguments, int], Arguments]
    clips: bool = False
