"""Token ids of an image set with conditions, as batches: what generators and drafters are trained on.

Only ids, labels, words and features of captions are on the run's device; images stay where they are.

N images, K variants, L tokens, B images of a batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.data.images import ImageSet
from visar.train.captions import CaptionTable
from visar.train.conditions import ConditionDropout
from visar.train.images import AUGMENTATIONS
from visar.train.options import TrainDrafter, TrainGenerator
from visar.train.randomness import Draw, IndexDraws, balanced_weights
from visar.train.run import Run
from visar.train.token_cache import TokenCache, build_token_cache


def load_tokens(run: Run, options: TrainGenerator | TrainDrafter, images: ImageSet, tokenizer: Any) -> TokenCache:
    """Ids of an image set by a run's options: tokens, variants, augment, seed; errors as of `build_token_cache`."""
    with run.accelerator.main_process_first(), run.autocast():
        return build_token_cache(
            images,
            tokenizer,
            options.tokens,
            variants=options.variants,
            augmentation=AUGMENTATIONS[options.augment] if options.variants > 1 else None,
            seed=options.seed,
            device=run.device,
        )


@dataclass(frozen=True)
class TokenSplit:
    """Ids and conditions of the images of one split; all tensors on the run's device.

    Attributes:
        tokens_NKL: see `TokenCache`; variant 0 is the image itself.
        labels_NA: int64 label columns that the model reads; there may be none.
        words_NT: int64 word ids; None = the images have none.
        index_N: int64 numbers of the images in their image set.
        captions: captions of the image set, read instead of labels and words; None = no text encoder.
    """

    tokens_NKL: Tensor
    labels_NA: Tensor
    words_NT: Tensor | None
    index_N: Tensor
    captions: CaptionTable | None

    def __len__(self) -> int:
        return self.index_N.shape[0]

    def tokens(self, index_B: Tensor, variant_B: Tensor | int = 0, random: torch.Generator | None = None) -> Tensor:
        """Ids int64 [B, L], or continuous tokens float32 [B, L, C], drawn by `random`; their means without one."""
        tokens = self.tokens_NKL[index_B, variant_B]
        if not tokens.is_floating_point():
            return tokens.long()
        mean_BLC, deviation_BLC = tokens.float().chunk(2, dim=-1)
        if random is None:
            return mean_BLC
        return mean_BLC + deviation_BLC * torch.randn(mean_BLC.shape, generator=random, device=mean_BLC.device)

    def condition(self, index_B: Tensor) -> Condition:
        """What the model reads of the conditions of images."""
        if self.captions is not None:
            return self.captions.condition(self.index_N[index_B])
        labels_BA = self.labels_NA[index_B] if self.labels_NA.shape[1] else None
        return Condition(labels_BA=labels_BA, words_BT=None if self.words_NT is None else self.words_NT[index_B])


class TokenBatches:
    """Batches of the training split, the same draws in all processes, and the two splits to measure on.

    Args:
        run: this process.
        images: conditions and splits; the images themselves are not read.
        cache: ids of all images.
        with_class: whether the model reads the first label column.
        captions: features that it reads instead of labels and words; None = none.
        null_text_TC: features that mean "not given".
        class_balance: images are drawn with weight n^-power, n the size of their class.
        label_dropout: chance that an image loses all its conditions.
        class_dropout: chance of the first label column besides.
        attribute_dropout: chance of every other label column besides.
        word_dropout, word_omission: chance of the words, and of every single word, besides.
        token_means: continuous tokens are the means of their distributions, not draws.

    Raises:
        ValueError: a chance or a power outside its range, or a split without images.
    """

    def __init__(
        self,
        run: Run,
        images: ImageSet,
        cache: TokenCache,
        *,
        with_class: bool,
        captions: CaptionTable | None = None,
        null_text_TC: Tensor | None = None,
        class_balance: float = 0.0,
        label_dropout: float,
        class_dropout: float = 0.0,
        attribute_dropout: float = 0.0,
        word_dropout: float = 0.0,
        word_omission: float = 0.0,
        token_means: bool = False,
    ) -> None:
        self.run, self.token_means = run, token_means
        first = 0 if with_class else 1
        index_N = torch.from_numpy(images.indices("train"))

        def split(index_N: Tensor, num_variants: int) -> TokenSplit:
            return TokenSplit(
                tokens_NKL=cache.tokens_NKL[index_N, :num_variants].to(run.device),
                labels_NA=images.labels_NA[index_N, first:].to(run.device),
                words_NT=None if images.words_NT is None else images.words_NT[index_N].to(run.device),
                index_N=index_N.to(run.device),
                captions=captions,
            )

        self.train = split(index_N, cache.num_variants)
        self.validation = split(torch.from_numpy(images.indices("val")), 1)
        self._draws = IndexDraws(
            len(index_N), balanced_weights(images.labels_NA[index_N, 0], class_balance), run.device
        )
        sizes = images.vocabulary.null_labels
        self._dropout = ConditionDropout(
            sizes[first:],
            together=label_dropout,
            label_rates=[class_dropout, *[attribute_dropout] * (len(sizes) - 1)][first:],
            word_rate=word_dropout,
            omit_rate=word_omission,
            null_text_TC=null_text_TC,
            device=run.device,
        )

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Numbers of a step's images in the training split and of their variants, int64 [batch size] each."""
        generator = self.run.random.generator(step, Draw.DATA, shared=True)
        index_B = self._draws.draw(self.run.options.batch_size, generator)
        variants = self.train.tokens_NKL.shape[1]
        return index_B, torch.randint(variants, index_B.shape, generator=generator, device=self.run.device)

    def part(self, drawn: tuple[Tensor, Tensor], step: int, part: int) -> tuple[Tensor, Condition]:
        """Tokens, see `TokenSplit.tokens`, and conditions, some of them lost, of this process's share of a
        micro-batch."""
        index_B, variant_B = (self.run.share(values, part) for values in drawn)
        generator = self.run.random.generator(step, Draw.CONDITION, part=part)
        drawn_by = self.run.random.generator(step, Draw.LATENT, part=part)
        tokens = self.train.tokens(index_B, variant_B, None if self.token_means else drawn_by)
        return tokens, self._dropout(self.train.condition(index_B), generator)
