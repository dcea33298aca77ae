"""Image sets: images of one size with labels, captions and splits, from any of the usual places."""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from einops import rearrange

from visar.data.crops import center_crop
from visar.data.decoding import DecodedPictures, EncodedBytes, EncodedFiles, Pictures
from visar.data.emoji import FILE as EMOJI_FILE
from visar.data.emoji import captions as emoji_captions
from visar.data.emoji import read_emoji
from visar.data.emoji_splits import shipped_splits
from visar.data.fashion_mnist import is_fashion, read_fashion
from visar.data.folders import (
    OUTSIDE,
    SPLITS,
    below_data,
    find_pictures,
    hold_out,
    sort_names,
    split_folders,
)
from visar.data.parquet import parquet_files, read_tables
from visar.data.pictures import EXTENSIONS, read_picture
from visar.data.vocabulary import Vocabulary, build_vocabulary, split_words
from visar.io.arrays import read_arrays
from visar.io.files import shown

__all__ = ["ImageSet", "as_float", "load_image_set", "make_image_set", "read_picture"]

logger = logging.getLogger(__name__)

MOST_UNNAMED = 1_000_000  # classes of an .npz that have numbers only
# What carries writing, dials, boards, or a direction; a mirrored one would be another thing.
_NO_MIRROR_CLASSES = (
    "symbols/",
    "flags/",
    "objects/",
    "activities/event",
    "activities/game",
    "activities/other",
    "travel-places/time",
    "travel-places/place-map",
)
_NO_MIRROR_WORDS = frozenset({"left", "right", "clockwise", "counterclockwise", "clock", "map"})


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known about them.

    Attributes:
        name: what it is called in cards and logs.
        images: uint8 [N, H, W, 3]; those of folders and parquet files are decoded when they are asked for. Of a set of
            clips (visar/data/clip_sets.py) uint8 [N, T, H, W, 3].
        labels_NA: int64 [N, columns], as in `vocabulary.attributes`.
        words_NT: int64 [N, num_words] word ids of the captions, padded with 0; None without captions.
        captions: captions of all images, "" for one that has none; None without.
        split_N: int8 [N]: index in ("train", "val", "test").
        mirror_allowed_N: bool [N].
        vocabulary: names of labels and words.
    """

    name: str
    images: Pictures
    labels_NA: torch.Tensor
    words_NT: torch.Tensor | None
    captions: list[str] | None
    split_N: np.ndarray
    mirror_allowed_N: torch.Tensor
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.images.shape[-2]

    @property
    def num_frames(self) -> int:
        """Frames of a clip; 0 where they are still images."""
        return self.images.shape[1] if len(self.images.shape) == 5 else 0

    def indices(self, split: str) -> np.ndarray:
        """Numbers of the images of a split, ascending.

        Raises:
            ValueError: unknown split, or one without images.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        found = np.flatnonzero(self.split_N == SPLITS.index(split))
        if not len(found):
            raise ValueError(f"{self.name} has no images in its split {split}")
        return found

    def digest(self) -> str:
        """Hexadecimal sha256 over pixels, labels, splits and what may be mirrored."""
        value = hashlib.sha256(self.picture_digest().encode())
        for facts in (self.labels_NA.numpy(), self.split_N):
            value.update(facts.tobytes())
        return value.hexdigest()

    def picture_digest(self) -> str:
        """Hexadecimal sha256 over what token ids depend on: pixels and what may be mirrored."""
        value = self.images.hash() if isinstance(self.images, DecodedPictures) else hashlib.sha256()
        if isinstance(self.images, np.ndarray):
            for first in range(0, len(self), 4096):
                value.update(np.ascontiguousarray(self.images[first : first + 4096]).tobytes())
        value.update(self.mirror_allowed_N.numpy().tobytes())
        return value.hexdigest()


def as_float(images_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]; clips [B, T, H, W, 3] to [B, T, 3, H, W]."""
    return rearrange(images_NHWC, "... h w c -> ... c h w").float() / 127.5 - 1.0


def load_image_set(source: str | Path, image_size: int | None = None, skip_unreadable: bool = False) -> ImageSet:
    """Images from a place.

    Args:
        source: an emoji set (emoji64.zip, or the folder that holds it); Fashion-MNIST (fashion.zip); a folder with a
            subfolder a class, perhaps below train, val and test (or validation, ...), or in its folder data; a parquet
            file or a folder of them, with columns image, label, caption (or img, labels, text) and perhaps a split in
            the files' names; or an .npz with images (or arr_0) and perhaps labels.
        image_size: side in pixels: images are cropped to their centre square and resized; None keeps the size of
            sets that have one, and is an error for folders and parquet files.
        skip_unreadable: leave unreadable images of folders and parquet files out, with a warning that names them.

    Raises:
        ValueError: no such place, no image in it, unreadable images (each named), columns missing.
        ImportError: a parquet file, and pyarrow is missing.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"no image set at {shown(path)}: neither a file nor a folder (visar data emoji builds one)")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{shown(path)} is not an image set: neither a file nor a folder")
    if path.is_dir() and (path / EMOJI_FILE).is_file():
        path = path / EMOJI_FILE
    if path.suffix == ".zip":
        return _zip_set(path, image_size)
    if path.suffix == ".npz":
        return _npz_set(path, image_size)
    if parquet_files(path):
        return _parquet_set(path, _required(image_size, path), skip_unreadable)
    if path.is_dir():
        return _folder_set(path, _required(image_size, path), skip_unreadable)
    raise ValueError(
        f"{shown(path)} is not an image set: a .zip, .npz or .parquet file or a folder of images is needed"
    )


def _required(image_size: int | None, path: Path) -> int:
    if image_size is None or image_size < 1:
        raise ValueError(
            f"image_size {image_size}: the images of {path} may be of any size; give their side (--image-size), >= 1"
        )
    return image_size


def _zip_set(path: Path, image_size: int | None) -> ImageSet:
    try:
        return _fashion_set(path, image_size) if is_fashion(path) else _emoji_set(path, image_size)
    except Exception as error:  # facts of a foreign or damaged archive may have any form
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{shown(path)} is damaged or not an image set ({type(error).__name__}: {error})") from error


def _emoji_set(path: Path, image_size: int | None) -> ImageSet:
    images, meta = read_emoji(path)
    if image_size not in (None, meta["size"]):
        images = np.stack([_square(PIL.Image.fromarray(image), image_size) for image in images])
    digits = {
        column: np.array([int(digit) for digit in meta[column]], np.int64) for column in ("style", "group", "tone")
    }
    tones = [int(tone) for tone in meta["tones"]]
    names = {0: "none", 1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
    attributes = {
        "class": tuple(meta["classes"]),
        "group": tuple(meta["groups"]),
        "style": tuple(meta["styles"]),
        "tone": tuple(names[tone] for tone in tones),
    }
    tone_index = np.array([tones.index(tone) for tone in digits["tone"]])
    labels = np.stack([np.array(meta["class"]), digits["group"], digits["style"], tone_index], axis=1)
    captions = emoji_captions(meta)
    split = shipped_splits(meta["pixels_sha256"], len(images))
    mirror = [
        not meta["classes"][label].startswith(_NO_MIRROR_CLASSES)
        and not _NO_MIRROR_WORDS & set(re.findall(r"[a-z0-9]+", caption))
        for label, caption in zip(meta["class"], captions, strict=True)
    ]
    return make_image_set(path.name, images, labels, attributes, split, captions, np.array(mirror))


def _fashion_set(path: Path, image_size: int | None) -> ImageSet:
    images, meta = read_fashion(path)
    if image_size not in (None, images.shape[1]):
        images = np.stack([_square(PIL.Image.fromarray(image), image_size) for image in images])
    labels, split = (np.array([int(digit) for digit in meta[name]]) for name in ("class", "split"))
    return make_image_set(path.name, images, labels[:, None], {"class": tuple(meta["classes"])}, split)


def make_image_set(
    name: str,
    images: Pictures,
    labels_NA: np.ndarray,
    attributes: dict[str, tuple[str, ...]],
    split_N: np.ndarray,
    captions: list[str] | None = None,
    mirror_allowed_N: np.ndarray | None = None,
) -> ImageSet:
    """An image set from arrays; the vocabulary is made from the training split's captions and labels.

    Raises:
        ValueError: arrays of different lengths, or no training image.
    """
    lengths = {len(images), len(labels_NA), len(split_N), len(captions) if captions is not None else len(images)}
    if len(lengths) != 1 or not len(images):
        counts = f"{len(images)} images, {len(labels_NA)} labels, {len(split_N)} splits"
        raise ValueError(f"{name}: {counts}" + (f", {len(captions)} captions" if captions is not None else ""))
    train = np.flatnonzero(split_N == 0)
    if not len(train):
        raise ValueError(f"{name} has no training images")
    if captions is not None:
        captions = [caption if split_words(caption) else "" for caption in captions]
    vocabulary = build_vocabulary(attributes, labels_NA, captions, train)
    mirror = np.ones(len(images), bool) if mirror_allowed_N is None else mirror_allowed_N
    return ImageSet(
        name=name,
        images=images,
        labels_NA=torch.from_numpy(labels_NA.astype(np.int64)),
        words_NT=vocabulary.encode_texts(captions) if captions is not None else None,
        captions=captions,
        split_N=split_N.astype(np.int8),
        mirror_allowed_N=torch.from_numpy(mirror),
        vocabulary=vocabulary,
    )


def _square(image: PIL.Image.Image, size: int) -> np.ndarray:
    return np.asarray(center_crop(image.convert("RGB"), size))


def _decoded(encoded: EncodedFiles | EncodedBytes, size: int, skip_unreadable: bool) -> DecodedPictures:
    """The images, with a warning for each that is left out."""
    images = DecodedPictures(encoded, size, skip_unreadable)
    for line in images.unreadable:
        logger.warning("left out: %s", line)
    return images


def _folder_set(path: Path, size: int, skip_unreadable: bool) -> ImageSet:
    found = below_data(find_pictures(path))
    if skip_unreadable:
        for name in found.broken:
            logger.warning("left out: %s is a link to nothing, or a pipe", shown(found.root / name))
    else:
        found.refuse_broken()
    parts = split_folders(found.names)
    names = [name for name in found.names if not parts or ("/" in name and name.partition("/")[0] in parts)]
    if not names:
        raise ValueError(f"{shown(path)} has no images ({', '.join(EXTENSIONS)})")
    if len(names) < len(found.names):
        found.left_out[OUTSIDE] = sorted({*found.names} - {*names})
    images = _decoded(EncodedFiles(found.root, names), size, skip_unreadable)
    names = [names[row] for row in images.rows]
    depth = 1 if parts else 0
    inner = [name.split("/") for name in names]
    class_of = [shown(each[depth]) if len(each) > depth + 1 else "all" for each in inner]
    classes = sort_names(class_of)
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([[number[name]] for name in class_of])
    known = np.array([SPLITS.index(parts[each[0]]) for each in inner]) if parts else None
    made = make_image_set(shown(path.name), images, labels, {"class": classes}, hold_out(names, known))
    found.log(_facts(made))
    return made


def _facts(images: ImageSet) -> str:
    """How many images, classes and images of each split there are."""
    counts = np.bincount(images.split_N, minlength=len(SPLITS)).tolist()
    classes = len(images.vocabulary.attributes["class"])
    return f"{len(images)} images of {images.image_size} pixels, {classes} classes; {counts[1]} for validation" + (
        f", {counts[2]} for tests" if counts[2] else ""
    )


def _parquet_set(path: Path, size: int, skip_unreadable: bool) -> ImageSet:
    files = parquet_files(path)
    tables = read_tables(path, files)
    images = _decoded(tables.encoded, size, skip_unreadable)
    rows = images.rows
    split = hold_out([f"{path.name}/{row}" for row in rows], None if tables.split_N is None else tables.split_N[rows])
    captions = None if tables.captions is None else [tables.captions[row] for row in rows]
    attributes = {"class": tables.classes}
    made = make_image_set(shown(path.name), images, tables.labels_N[rows, None], attributes, split, captions)
    columns = f"; columns not read: {', '.join(tables.left_out)}" if tables.left_out else ""
    logger.info("%s: %s%s", shown(path), _facts(made), columns)
    return made


def _npz_set(path: Path, image_size: int | None) -> ImageSet:
    arrays = read_arrays(path)
    key = next((name for name in ("images", "arr_0") if name in arrays), None)
    if key is None:
        raise ValueError(f"{shown(path)} has arrays {', '.join(arrays)}; images or arr_0 is needed")
    images = arrays[key]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(
            f"{shown(path)}: {key} are {images.dtype} {images.shape}; uint8 [N, H, W, 3] is needed, N >= 1"
        )
    label_key = next((name for name in ("labels", "class_id", "arr_1") if name in arrays), None)
    labels = arrays[label_key] if label_key else np.zeros(len(images), np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise ValueError(
            f"{shown(path)}: {label_key} is {labels.dtype} {labels.shape}; whole numbers [N] >= 0 are needed"
        )
    if len(labels) != len(images):
        raise ValueError(f"{shown(path)}: {label_key} has {len(labels)} labels for {len(images)} images")
    if "classes" in arrays:
        names = _texts(path, "classes", arrays["classes"])
    elif labels.max() < MOST_UNNAMED:
        names = [str(number) for number in range(labels.max() + 1)]
    else:
        raise ValueError(f"{shown(path)}: {label_key} has the label {labels.max()}; allowed: below {MOST_UNNAMED}")
    if len(set(names)) < len(names):
        raise ValueError(f"{shown(path)}: classes has the same name twice")
    if labels.max() >= len(names):
        raise ValueError(f"{shown(path)}: label {labels.max()} with {len(names)} classes")
    captions = _texts(path, "captions", arrays["captions"]) if "captions" in arrays else None
    if image_size not in (None, images.shape[1]) or images.shape[1] != images.shape[2]:
        side = image_size or min(images.shape[1:3])
        images = np.stack([_square(PIL.Image.fromarray(image), side) for image in images])
    split = hold_out([f"{path.name}/{row}" for row in range(len(images))])
    return make_image_set(shown(path.name), images, labels[:, None], {"class": tuple(names)}, split, captions)


def _texts(path: Path, key: str, array: np.ndarray) -> list[str]:
    """The texts of a member of an .npz; whole numbers may name classes.

    Raises:
        ValueError: it holds something else.
    """
    if array.ndim != 1 or array.dtype.kind not in ("USiu" if key == "classes" else "US"):
        raise ValueError(f"{shown(path)}: {key} is {array.dtype} {array.shape}; texts [N] are needed")
    return [
        text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else str(text) for text in array.tolist()
    ]
