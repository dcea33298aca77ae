"""What training and the benchmark need to know of a family of generators: constructor arguments and the loss.

B images, L positions, V codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.interface import TokenLayout
from visar.data.vocabulary import Vocabulary

Arguments = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- loss
def token_loss(logits_BLV: Tensor, target: Tensor, weight_L: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of ids, or cross-entropy to distributions; nats per token, float32.

    Args:
        logits_BLV: conditionals.
        target: ids int64 [B, L], or distributions float32 [B, L, V].
        weight_L: relative weights of the positions; None = all alike.
    """
    loss_M = functional.cross_entropy(logits_BLV.float().flatten(0, 1), target.flatten(0, 1), reduction="none")
    loss_L = loss_M.unflatten(0, logits_BLV.shape[:2]).mean(0)
    return loss_L.mean() if weight_L is None else (loss_L * weight_L).sum() / weight_L.sum()


def position_weights(sizes: Sequence[int], weights: Sequence[float]) -> Tensor | None:
    """Weight of every position, float32 [L], from one per map, which its tokens share; None where none is given.

    Args:
        sizes: tokens of every map, coarse to fine.
        weights: one a map, or empty.

    Raises:
        ValueError: another number of weights than maps, or one that is negative.
    """
    if not weights:
        return None
    if len(weights) != len(sizes) or min(weights) < 0 or max(weights) <= 0:
        raise ValueError(f"scale_weights {tuple(weights)}; needed: {len(sizes)} numbers >= 0, not all 0")
    return torch.cat([torch.full((size,), weight) for size, weight in zip(sizes, weights, strict=True)])


class Objective:
    """What a run minimises: cross-entropy of every token given the condition and what the model reads of the others.

    Families with another loss, or that train in several phases, derive their own from it.

    Args:
        model: that is trained; its parameters are frozen or not, as the phase needs.
        layout: of its tokens.
        options: of `visar train generator`; scale_weights and compile are read.
        device: of the run.

    Attributes:
        takes_distributions: whether targets may be a teacher's distributions.

    Raises:
        ValueError: weights that do not fit the layout.
    """

    takes_distributions = True

    def __init__(self, model: Any, layout: TokenLayout, options: Any, device: torch.device) -> None:
        weight_L = position_weights(layout.sizes, options.scale_weights)
        self.weight_L = None if weight_L is None else weight_L.to(device)
        self._token_loss = torch.compile(token_loss) if options.compile else token_loss

    def loss(
        self,
        call: Callable[..., Tensor],
        tokens_BL: Tensor,
        target: Tensor,
        condition: Condition,
        random: torch.Generator,
    ) -> Tensor:
        """Loss of a batch, to descend.

        Args:
            call: the model as it is to be called, such as behind gradient averaging over processes.
            tokens_BL: int64 ids that the model reads.
            target: int64 ids [B, L] that it is to predict, which may differ; or distributions float32 [B, L, V].
            condition: of the B images.
            random: on the device; draws for this batch come from it.
        """
        return self._token_loss(call(tokens_BL, condition), target, self.weight_L)

    def measure(
        self, model: Any, tokens_BL: Tensor, conditions: Sequence[Condition], random: torch.Generator
    ) -> list[Tensor]:
        """Mean loss of a batch under each of several conditions, all positions alike; draws are common to them."""
        return [token_loss(model(tokens_BL, condition), tokens_BL) for condition in conditions]

    def finish(self, model: Any) -> None:
        """Changes weights that are about to be saved where the phase asks for it."""


class HeadObjective(Objective):
    """What a run minimises: the head's loss of tokens that are vectors. Models return it."""

    takes_distributions = False

    def loss(
        self, call: Any, tokens_BL: Tensor, target: Tensor, condition: Condition, random: torch.Generator
    ) -> Tensor:
        return call(tokens_BL, condition, random).mean()

    def measure(
        self, model: Any, tokens_BL: Tensor, conditions: Sequence[Condition], random: torch.Generator
    ) -> list[Tensor]:
        state, losses = random.get_state(), []
        for condition in conditions:
            random.set_state(state)
            losses.append(model(tokens_BL, condition, random).mean())
        return losses


# -------------------------------------------------------------------------------------------------------- families
def shared_arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any) -> Arguments:
    """The constructor arguments that all families of transformers over ids have; see `GeneratorFamily.arguments`."""
    num_classes, *attributes = vocabulary.null_labels
    return dict(
        vocab_size=tokenizer.layout.vocab_size,
        codebook_width=tokenizer.layout.channels,
        width=options.width,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_classes=num_classes if options.class_condition else 0,
        attributes=tuple(attributes),
        word_vocab_size=0 if options.words == "none" else len(vocabulary.words),
    )


@dataclass(frozen=True)
class GeneratorFamily:
    """A family of generators; stands beside its class as FAMILY.

    Attributes:
        model: the class.
        presets: constructor arguments of released sizes.
        tokenizer: preset of the released tokenizer whose ids they predict.
        tiny: constructor arguments of a model that tests and machines without a GPU build in a moment.
        fits: whether the family can learn tokens of a layout.
        arguments: (tokenizer, vocabulary, options, width of captions) -> the constructor's arguments for a
            tokenizer's tokens. The vocabulary is that of the conditions; the options are those of `visar train
            generator`; the width is that of a text encoder whose features are read instead of labels and words, 0 =
            none. Raises ValueError for conditions that the family cannot read.
        connect: gives a new model what it needs of its tokenizer.
        phases: objectives of the phases that training consists of, by the name of --phase, in their order; the second
            and later ones start from a model of the one before.
        sampler: draws the images of a run's sheets, and those of the saved model by default.
    """

    model: type[nn.Module]
    presets: Mapping[str, Arguments]
    tokenizer: str
    tiny: Arguments
    fits: Callable[[TokenLayout], bool]
    arguments: Callable[[Any, Vocabulary, Any, int], Arguments]
    connect: Callable[[Any, Any], None]
    phases: Mapping[str, type[Objective]] = field(default_factory=lambda: {"next_scale": Objective})
    sampler: str = "ancestral"
