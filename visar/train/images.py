"""The images of a run, on its device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visar.data.augment import DRAWINGS, PHOTOGRAPHS, Augmentation, augment
from visar.data.images import ImageSet, as_float

AUGMENTATIONS: dict[str, Augmentation | None] = {"none": None, "drawings": DRAWINGS, "photographs": PHOTOGRAPHS}


@dataclass(frozen=True)
class PictureSplit:
    """Images of one split with their conditions; all tensors on the run's device.

    Attributes:
        images_NHWC: uint8.
        labels_NA: int64; column 0 is the class.
        words_NT: int64 word ids; None = the images have none.
        mirror_allowed_N: bool.
        index_N: int64 numbers of the images in their image set.
        augmentation: of batches that are given a generator; None = there is none.
    """

    images_NHWC: Tensor
    labels_NA: Tensor
    words_NT: Tensor | None
    mirror_allowed_N: Tensor
    index_N: Tensor
    augmentation: Augmentation | None

    def __len__(self) -> int:
        return self.images_NHWC.shape[0]

    def batch(self, index_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images float32 [B, C, H, W] in [-1, 1], channels last in memory; augmented if a generator is given."""
        image_BCHW = as_float(self.images_NHWC[index_B])
        if generator is not None and self.augmentation is not None:
            image_BCHW = augment(image_BCHW, self.augmentation, generator, self.mirror_allowed_N[index_B])
        return image_BCHW.contiguous(memory_format=torch.channels_last)


def take_split(images: ImageSet, split: str, augmentation: str, device: torch.device) -> PictureSplit:
    """A split of an image set on a device; the whole of it as uint8 (emoji64: 155 MB).

    Raises:
        ValueError: an unknown augmentation, or a split without images.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augment {augmentation!r}; choose {', '.join(AUGMENTATIONS)}")
    index_N = torch.from_numpy(images.indices(split))
    return PictureSplit(
        images_NHWC=torch.from_numpy(images.images[index_N.numpy()]).to(device),
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
