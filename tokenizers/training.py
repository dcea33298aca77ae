"""What training and the benchmark need to know of a family of tokenizers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from visar.tokenizers.quantizer import CodebookTrainer

Arguments = dict[str, Any]


@dataclass(frozen=True)
class TokenizerFamily:
    """A family of tokenizers; stands beside its class as FAMILY.

    Attributes:
        model: the class.
        presets: constructor arguments of named architectures.
        default: the preset that is trained when none is named.
        tiny: constructor arguments of a model that tests and machines without a GPU build in a moment; its codes and
            maps are those of the tiny generators that it decodes for.
        quantizer: name of the submodule that holds the codebook.
        codebook_trainer: moves the codebook in training.
        arguments: (a preset's arguments, the user's, side of the images in pixels) -> the constructor's; raises
            ValueError for a side that does not fit.
    """

    model: type[nn.Module]
    presets: Mapping[str, Arguments]
    default: str
    tiny: Arguments
    quantizer: str
    codebook_trainer: type[CodebookTrainer]
    arguments: Callable[[Arguments, Arguments, int], Arguments]
