"""Sets of images to be scored: a folder, an .npz of images, an array; read batch by batch as uint8 [B, 3, H, W]."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from visar.data.crops import center_crop
from visar.data.decoding import DecodedPictures, in_batches
from visar.data.folders import SPLITS, find_pictures
from visar.data.images import ImageSet, load_image_set
from visar.data.pictures import EXTENSIONS, read_picture
from visar.evaluate.labels import LabelTable
from visar.evaluate.options import ResizeChain
from visar.io.arrays import npz_arrays, open_array
from visar.io.files import sha256, shown
from visar.io.pictures import to_uint8

IMAGE_ARRAYS = ("arr_0", "images")


def _truncate(image_BCHW: Tensor) -> Tensor:
    return (image_BCHW.float() * 255.0).clamp(0.0, 255.0).to(torch.uint8)


UINT8_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    # [0, 1] to uint8. "round" is this project's rule, and what LlamaGen (127.5 x + 128, truncated) and MAR do.
    "round": lambda image_BCHW: to_uint8(image_BCHW * 2.0 - 1.0),
    # 255 x with the fraction cut off: what VAR's sampling example does; darkens by half a level on average.
    "truncate": _truncate,
}


class ImageSource(Protocol):
    """Images that can be read in order, more than once.

    Attributes:
        name: what reports call it.
        size: (height, width).
    """

    name: str
    size: tuple[int, int]

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """sha256 that tells this set from another."""
        ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W], in order; video sets give [B, T, 3, H, W]."""
        ...


class ArrayImages:
    """Images in memory.

    Args:
        images_NHWC: uint8 [N, H, W, 3], or clips [N, T, H, W, 3]; numpy or torch.
        name: what reports call it.
        labels: labels of the images, if known.

    Raises:
        ValueError: another dtype or shape, or no image.
    """

    def __init__(
        self, images_NHWC: np.ndarray | Tensor, name: str = "array", labels: LabelTable | None = None
    ) -> None:
        try:
            images: Tensor = torch.as_tensor(images_NHWC)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: a {type(images_NHWC).__name__} is no array of images ({error})") from error
        if images.dtype != torch.uint8 or images.dim() not in (4, 5) or images.shape[-1] != 3 or not len(images):
            raise ValueError(
                f"{name}: images are {images.dtype} of shape {tuple(images.shape)}; "
                "uint8 [N, H, W, 3] (clips [N, T, H, W, 3]) with N > 0 is needed"
            )
        self.images = images
        self.name = name
        self.labels = labels
        self.size = (images.shape[-3], images.shape[-2])

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """sha256 of the pixels in the order stored."""
        return hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), batch_size):
            yield self.images[start : start + batch_size].movedim(-1, -3).contiguous()


class NpzImages:
    """Images of an .npz as ADM's evaluator takes them (`arr_0`, or `images`), streamed: never all in memory.

    Raises:
        ValueError: no such file, not an .npz, no array of images in it, or one of another dtype or shape.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        key = next((key for key in IMAGE_ARRAYS if key in npz_arrays(self.path)), None)
        if key is None:
            raise ValueError(
                f"{path} holds {', '.join(npz_arrays(self.path)) or 'nothing'}; "
                f"an array of images named {' or '.join(IMAGE_ARRAYS)} is needed"
            )
        self.key = key
        with open_array(self.path, key) as (_, shape, fortran, dtype):
            pass
        if dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"{path}: {self.key} is {dtype} {shape}; uint8 [N, H, W, 3] with N > 0 is needed")
        if fortran:
            raise ValueError(f"{path}: {self.key} is in Fortran order; save it with numpy.ascontiguousarray")
        self.shape = shape
        self.size = (shape[-3], shape[-2])

    def __len__(self) -> int:
        return self.shape[0]

    def digest(self) -> str:
        """sha256 of the file."""
        return sha256(self.path)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        item = int(np.prod(self.shape[1:]))
        with open_array(self.path, self.key) as (file, *_):
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                block = file.read(count * item)
                if len(block) != count * item:
                    raise EOFError(f"truncated: it ends in image {start} of {len(self)}")
                images = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(count, *self.shape[1:])
                yield images.movedim(-1, -3).contiguous()
            if file.read(1):
                raise EOFError(f"longer than {len(self)} images")


class SplitImages:
    """A split of an image set whose images are decoded when they are asked for, in the set's order.

    Args:
        images: the whole set.
        split: train, val or test.
    """

    def __init__(self, images: ImageSet, split: str) -> None:
        self.images, self.index = images.images, images.indices(split)
        self.name = f"{images.name}@{split}"
        self.labels = named_labels(images, self.index)
        self.size = (images.image_size, images.image_size)

    def __len__(self) -> int:
        return len(self.index)

    def digest(self) -> str:
        """sha256 of the pixels in order."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for images in in_batches(self.images, 256, self.index):
            digest.update(images.tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for images in in_batches(self.images, batch_size, self.index):
            yield torch.from_numpy(images).movedim(-1, -3).contiguous()


class FolderImages:
    """Images of a folder and the folders below it, in the order of their relative names.

    Args:
        path: the folder.
        resize: how an image becomes `image_size` pixels square. "none": all must have one size already; "adm": box
            halvings, bicubic, centre crop (openai/guided-diffusion, image_datasets.py center_crop_arr: the chain
            behind ImageNet statistics, which takes images as they are stored); "torchvision": its Resize (bilinear,
            antialiased) and CenterCrop. Other chains than "adm" turn images as their EXIF orientation says.
            Transparent parts are white.
        image_size: side in pixels; None for "none".

    Raises:
        ValueError: no folder, no image, an unreadable image or sizes that differ (each named).
    """

    def __init__(self, path: str | Path, resize: ResizeChain = "none", image_size: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{shown(path)} is not a folder")
        if (resize == "none") != (image_size is None):
            raise ValueError(
                f"resize={resize!r} with image_size={image_size}: none takes no size, the others need one"
            )
        if resize not in ("none", "adm", "torchvision"):
            raise ValueError(f"resize={resize!r}; choose none, adm or torchvision")
        self.name = shown(self.path.name)
        self.resize, self.image_size = resize, image_size
        found = find_pictures(self.path)
        found.refuse_broken()
        if not found.names:
            raise ValueError(f"no image ({', '.join(EXTENSIONS)}) in {shown(path)} or below it")
        found.log(f"{len(found.names)} images")
        self.files = [self.path / name for name in sorted(found.names)]
        try:
            first = self.read(self.files[0])
        except ValueError as error:
            raise self._unreadable(0) from error
        self.size = (first.shape[0], first.shape[1])

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """sha256 over every file's relative name and bytes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(f"{file.relative_to(self.path).as_posix()} {sha256(file)}\n"))
        return digest.hexdigest()

    def read(self, file: Path) -> Tensor:
        """One image, uint8 [H, W, 3]."""
        pixels = read_picture(
            file,
            self.image_size,
            str(file),
            upright=self.resize != "adm",
            resize=lambda image, size: resized(image, self.resize, size),
        )
        return torch.from_numpy(np.array(pixels))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            following = self._read_part(0, batch_size, pool)
            for start in range(0, len(self), batch_size):
                waiting, following = following, self._read_part(start + batch_size, batch_size, pool)
                try:
                    images = [each.result() for each in waiting]
                except ValueError as error:
                    raise self._unreadable(start) from error
                for file, image in zip(self.files[start:], images, strict=False):
                    if tuple(image.shape[:2]) != self.size:
                        raise ValueError(
                            f"{shown(file)} has {image.shape[1]}x{image.shape[0]} pixels, the images before it "
                            f"{self.size[1]}x{self.size[0]}; choose resize='adm' or resize='torchvision'"
                        )
                yield torch.stack(images).movedim(-1, -3).contiguous()

    def _unreadable(self, start: int) -> ValueError:
        """The error of the first unreadable image from a number on, which says how many others there are."""

        def attempt(file: Path) -> str | None:
            try:
                self.read(file)
            except ValueError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            errors = [error for error in pool.map(attempt, self.files[start:]) if error is not None]
        others = f"; {len(errors) - 1} more of {len(self)} images cannot be read" if len(errors) > 1 else ""
        return ValueError(errors[0] + others)

    def _read_part(self, start: int, count: int, pool: ThreadPoolExecutor) -> list[Future[Tensor]]:
        """Begins to read some images."""
        return [pool.submit(self.read, file) for file in self.files[start : start + count]]


def open_images(
    source: str | Path | np.ndarray | Tensor | ImageSource, resize: ResizeChain = "none", image_size: int | None = None
) -> ImageSource:
    """A set of images.

    Args:
        source: a folder; an .npz of images; PLACE@SPLIT, a split (train, val, test) of an image set as training reads
            them (emoji64.zip, parquet, folders of classes), with its labels; a .zip or .parquet without a split means
            its training images; an array uint8 [N, H, W, 3]; or an open set, which is returned.
        resize, image_size: for folders, see FolderImages; image sets take the size only (their crop is "adm").

    Raises:
        ValueError: none of these.
    """
    if isinstance(source, np.ndarray) or isinstance(source, Tensor):
        return ArrayImages(source)
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    place, at, split = str(source).rpartition("@")
    if at and split in SPLITS:
        return _split_images(place, split, image_size)
    if path.suffix in (".zip", ".parquet"):
        return _split_images(path, "train", image_size)
    if path.is_dir():
        return FolderImages(path, resize, image_size)
    if path.suffix == ".npz":
        return NpzImages(path)
    raise ValueError(f"no images at {path}: a folder, an .npz of images or an image set (PLACE@train) is needed")


def image_set(place: str | Path, image_size: int | None = None) -> ImageSet:
    """`load_image_set`, which reads a file once for all that an evaluation takes from it, one after the other."""
    path = Path(place)
    if not path.is_file():
        return load_image_set(place, image_size)
    state = path.stat()
    return _read_file(path, image_size, (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=1)
def _read_file(path: Path, image_size: int | None, state: tuple[int, int]) -> ImageSet:
    """The set of a file; `state` tells a changed file from the one that was read."""
    return load_image_set(path, image_size)


def _split_images(place: str | Path, split: str, image_size: int | None) -> ImageSource:
    whole = image_set(place, image_size)
    if isinstance(whole.images, DecodedPictures):
        return SplitImages(whole, split)
    index = whole.indices(split)
    return ArrayImages(whole.images[index], f"{whole.name}@{split}", named_labels(whole, index))


def named_labels(images: ImageSet, index: np.ndarray) -> LabelTable:
    """Labels of some images of a set, with the names of their classes."""
    labels = images.labels_NA[torch.from_numpy(index)].tolist()
    return LabelTable.of(labels, images.vocabulary.attributes["class"])


def resized(image: Image.Image, chain: str, size: int) -> Image.Image:
    """One image through a resize chain of `FolderImages` to size x size."""
    if chain == "adm":
        return center_crop(image, size)
    functions: Any = transforms  # typed for tensors only
    return functions.center_crop(functions.resize(image, [size]), [size, size])
