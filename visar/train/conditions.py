"""Conditions left out at random in training, so that one model learns all their subsets (arXiv 2207.12598)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from visar.core.condition import NULL_WORD, PADDING_WORD, Condition


class ConditionDropout:
    """Replaces labels, words and text features by "not given": all of an image's together, and each label column and
    the words for themselves besides.

    Args:
        table_sizes: values of every label column; the null label of a column is its size.
        together: chance that an image loses everything, in [0, 1].
        label_rates: chance of every label column, besides.
        word_rate: chance of the words, besides.
        omit_rate: chance of every single word, so that shorter prompts than the data's captions are known.
        null_text_TC: features of a text encoder that mean "not given"; the mask stays (LlamaGen). None: no such.
        device: device of the conditions. Rates are stored there: making them in every step would wait for it.

    Raises:
        ValueError: a chance outside [0, 1].
    """

    def __init__(
        self,
        table_sizes: Sequence[int],
        *,
        together: float,
        label_rates: Sequence[float],
        word_rate: float,
        omit_rate: float = 0.0,
        null_text_TC: Tensor | None = None,
        device: torch.device,
    ) -> None:
        rates = [*label_rates, word_rate, together]
        wrong = [rate for rate in (*rates, omit_rate) if not 0.0 <= rate <= 1.0]
        if wrong:
            raise ValueError(f"chance {wrong[0]} of losing a condition; allowed: 0 ... 1")
        self._omit_rate = omit_rate
        self._null_A = torch.tensor(table_sizes, dtype=torch.int64, device=device)
        self._rates = torch.tensor(rates, device=device)
        self._null_text_TC = None if null_text_TC is None else null_text_TC.to(device)

    def __call__(self, condition: Condition, generator: torch.Generator) -> Condition:
        """The condition with losses drawn from a generator on the device."""
        size = (condition.batch, len(self._rates))
        drawn = torch.rand(size, generator=generator, device=self._rates.device) < self._rates
        labels_lost_BA, words_lost_B1 = drawn[:, :-2] | drawn[:, -1:], drawn[:, -2:-1] | drawn[:, -1:]
        labels_BA, words_BT = condition.labels_BA, condition.words_BT
        if labels_BA is not None:
            labels_BA = torch.where(labels_lost_BA, self._null_A, labels_BA)
        if words_BT is not None:
            if self._omit_rate:
                words_BT = omit_words(words_BT, self._omit_rate, generator)
            words_BT = torch.where(words_lost_B1, null_words(words_BT), words_BT)
        text_BTC = condition.text_BTC
        if text_BTC is not None:
            assert self._null_text_TC is not None
            text_BTC = torch.where(drawn[:, -1:, None], self._null_text_TC.to(text_BTC), text_BTC)
        return Condition(labels_BA, words_BT, text_BTC, condition.text_mask_BT)


def omit_words(words_BT: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Leaves out every word with a chance, closes the gaps, and leaves a caption that would be empty as it is."""
    given_BT = words_BT != PADDING_WORD
    kept_BT = given_BT & (torch.rand(words_BT.shape, generator=generator, device=words_BT.device) >= rate)
    kept_BT = torch.where(kept_BT.any(1, keepdim=True), kept_BT, given_BT)
    order_BT = (~kept_BT).int().argsort(dim=1, stable=True)
    return words_BT.masked_fill(~kept_BT, PADDING_WORD).gather(1, order_BT)


def null_words(words_BT: Tensor) -> Tensor:
    """Words that say "not given", in the same shape."""
    nothing_BT = torch.full_like(words_BT, PADDING_WORD)
    nothing_BT[:, 0] = NULL_WORD
    return nothing_BT
