"""The images of a run: those that fit stay on its device, those of folders and parquet files are decoded in time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from visar.data.augment import DRAWINGS, PHOTOGRAPHS, Augmentation, augment
from visar.data.decoding import DecodedPictures, Pictures
from visar.data.images import ImageSet, as_float

AUGMENTATIONS: dict[str, Augmentation | None] = {"none": None, "drawings": DRAWINGS, "photographs": PHOTOGRAPHS}


@dataclass(frozen=True)
class PictureSplit:
    """Images of one split with their conditions; all tensors on the run's device.

    Attributes:
        pictures: uint8 [M, H, W, 3] of the whole set, or clips [M, T, H, W, 3].
        labels_NA: int64; column 0 is the class.
        words_NT: int64 word ids; None = the images have none.
        mirror_allowed_N: bool.
        index_N: int64 numbers of the images in their image set.
        augmentation: augmentation of batches that are given a generator; None = there is none.
    """

    pictures: Pictures
    labels_NA: Tensor
    words_NT: Tensor | None
    mirror_allowed_N: Tensor
    index_N: Tensor
    augmentation: Augmentation | None

    def __len__(self) -> int:
        return self.index_N.shape[0]

    @cached_property
    def _images_NHWC(self) -> Tensor:
        """All images of the split on the device, made when the first of them is asked for."""
        return torch.from_numpy(np.asarray(self.pictures[self.index_N.cpu().numpy()])).to(self.index_N.device)

    def pixels(self, index_B: Tensor) -> Tensor:
        """Images uint8 [B, H, W, C] on the device."""
        if not isinstance(self.pictures, DecodedPictures):
            return self._images_NHWC[index_B]
        rows = self.index_N[index_B].cpu().numpy()
        return torch.from_numpy(self.pictures[rows]).to(self.index_N.device)

    def prepare(self, pixels_BHWC: Tensor, index_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images float32 [B, C, H, W] in [-1, 1] of pixels, channels last in memory, or clips
        [B, T, C, H, W]; augmented if a generator is given."""
        image_BCHW = as_float(pixels_BHWC)
        if generator is not None and self.augmentation is not None:
            image_BCHW = augment(image_BCHW, self.augmentation, generator, self.mirror_allowed_N[index_B])
        if image_BCHW.ndim == 5:
            return image_BCHW.contiguous()
        return image_BCHW.contiguous(memory_format=torch.channels_last)

    def batch(self, index_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images float32 [B, C, H, W] in [-1, 1], see `prepare`."""
        return self.prepare(self.pixels(index_B), index_B, generator)


class PixelsAhead:
    """Pixels of the steps of a run; while one step is computed, the images of the next are decoded.

    Args:
        split: the images.
        index_of: numbers of a step's images in the split: a function of the step alone.
    """

    def __init__(self, split: PictureSplit, index_of: Callable[[int], Tensor]) -> None:
        self._split, self._index_of = split, index_of
        self._thread = ThreadPoolExecutor(1)
        self._following: tuple[int, Future[Tensor]] | None = None

    def take(self, step: int) -> Tensor:
        """Pixels uint8 [B, H, W, C] of a step, on the device."""
        if not isinstance(self._split.pictures, DecodedPictures):
            return self._split.pixels(self._index_of(step))
        waiting = self._following
        if waiting is None or waiting[0] != step:
            waiting = step, self._begin(step)
        self._following = step + 1, self._begin(step + 1)
        return waiting[1].result()

    def _begin(self, step: int) -> Future[Tensor]:
        return self._thread.submit(self._split.pixels, self._index_of(step))


def take_split(images: ImageSet, split: str, augmentation: str, device: torch.device) -> PictureSplit:
    """A split of an image set. Images in memory go to the device as uint8 when first asked for (emoji64: 155 MB).

    Raises:
        ValueError: an unknown augmentation, or a split without images.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augment {augmentation!r}; choose {', '.join(AUGMENTATIONS)}")
    index_N = torch.from_numpy(images.indices(split))
    return PictureSplit(
        pictures=images.images,
        labels_NA=images.labels_NA[index_N].to(device),
        words_NT=None if images.words_NT is None else images.words_NT[index_N].to(device),
        mirror_allowed_N=images.mirror_allowed_N[index_N].to(device),
        index_N=index_N.to(device),
        augmentation=AUGMENTATIONS[augmentation],
    )


def select_conditions(images: ImageSet, attributes: tuple[str, ...] | None, words: bool) -> ImageSet:
    """The set with the class, some of its further label columns, and its words or none.

    Args:
        images: any image set.
        attributes: names of the columns to keep, in this order; None = all.
        words: keep the captions' words.

    Raises:
        ValueError: a column or words that the set does not have.
    """
    vocabulary = images.vocabulary
    names = list(vocabulary.attributes)
    wanted = names if attributes is None else ["class", *attributes]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(f"attribute {unknown[0]!r}; {images.name} has {', '.join(names[1:]) or 'none'}")
    if words and images.words_NT is None:
        raise ValueError(f"the images of {images.name} have no captions; choose words none")
    columns = [names.index(name) for name in wanted]
    return replace(
        images,
        labels_NA=images.labels_NA[:, columns],
        words_NT=images.words_NT if words else None,
        vocabulary=replace(
            vocabulary,
            attributes={name: vocabulary.attributes[name] for name in wanted},
            words=vocabulary.words if words else (),
            num_words=vocabulary.num_words if words else 0,
            rows=vocabulary.rows[:, [0, *(1 + column for column in columns)]],
        ),
    )
