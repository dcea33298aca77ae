"""Conditions left out at random in training, so that one model learns all their subsets (arXiv 2207.12598)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from visar.condition import Condition
from visar.generators.raster import NULL_WORD, PADDING_WORD


def drop_condition(
    condition: Condition,
    table_sizes: Sequence[int],
    *,
    together: float,
    label_rates: Sequence[float],
    word_rate: float,
    generator: torch.Generator,
) -> Condition:
    """Replaces labels and words by "not given": all of an image's together, and each column for itself besides.

    Args:
        condition: of B images.
        table_sizes: values of every label column; the null label of a column is its size.
        together: chance that an image loses everything, in [0, 1].
        label_rates: chance of every label column, besides.
        word_rate: chance of the words, besides.
        generator: on the condition's device.
    """
    columns = len(label_rates) + 1
    drawn_BA = torch.rand(condition.batch, columns + 1, generator=generator, device=generator.device)
    rates = torch.tensor([*label_rates, word_rate, together], device=drawn_BA.device)
    dropped_BA = drawn_BA < rates
    dropped_BA = dropped_BA[:, :-1] | dropped_BA[:, -1:]
    labels_BA, words_BT = condition.labels_BA, condition.words_BT
    if labels_BA is not None:
        null_A = torch.tensor(table_sizes, device=labels_BA.device)
        labels_BA = torch.where(dropped_BA[:, :-1], null_A, labels_BA)
    if words_BT is not None:
        words_BT = torch.where(dropped_BA[:, -1:], null_words(words_BT), words_BT)
    return Condition(labels_BA=labels_BA, words_BT=words_BT)


def null_words(words_BT: Tensor) -> Tensor:
    """Words that say "not given", in the same shape."""
    nothing_BT = torch.full_like(words_BT, PADDING_WORD)
    nothing_BT[:, 0] = NULL_WORD
    return nothing_BT
