"""The images of a run, on its device."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from visar.condition import Condition


@dataclass(frozen=True)
class PictureSet:
    """Images of one split with their conditions.

    Attributes:
        images_NCHW: uint8.
        labels_NA: int64; column 0 is the class.
        words_NT: int64 word ids; None = the images have none.
        table_sizes: values of every label column.
        num_words: size of the word table.
        augment: random change of images [B, C, H, W] in [-1, 1] with the indices of the images; None = there is none.
    """

    images_NCHW: Tensor
    labels_NA: Tensor
    words_NT: Tensor | None
    table_sizes: tuple[int, ...]
    num_words: int
    augment: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None

    def __len__(self) -> int:
        return self.images_NCHW.shape[0]

    def batch(self, index_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], augmented if a generator is given."""
        image_BCHW = self.images_NCHW[index_B].float() / 127.5 - 1.0
        if generator is not None and self.augment is not None:
            image_BCHW = self.augment(image_BCHW, index_B, generator)
        return image_BCHW

    def condition(self, index_B: Tensor) -> Condition:
        """Conditions of images."""
        return Condition(
            labels_BA=self.labels_NA[index_B], words_BT=None if self.words_NT is None else self.words_NT[index_B]
        )
