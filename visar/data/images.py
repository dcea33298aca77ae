"""Image sets: pictures of one size with labels, captions and splits, from any of the usual places."""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from visar.data.crops import center_crop
from visar.data.emoji import FILE as EMOJI_FILE
from visar.data.emoji import captions as emoji_captions
from visar.data.emoji import read_emoji
from visar.data.emoji_splits import shipped_splits, unit_hash
from visar.vocabulary import Vocabulary, build_vocabulary

SPLITS = ("train", "val", "test")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NO_MIRROR_CLASSES = ("symbols/", "flags/", "objects/computer", "travel-places/time", "travel-places/place-map")
_NO_MIRROR_WORDS = {
    "left",
    "right",
    "leftwards",
    "rightwards",
    "clockwise",
    "anticlockwise",
    "clock",
    "map",
    "keyboard",
}


@dataclass(frozen=True)
class ImageSet:
    """Pictures with what is known about them.

    Attributes:
        name: what it is called in cards and logs.
        images: uint8 [N, H, W, 3].
        labels_NA: int64 [N, columns], as in `vocabulary.attributes`.
        words_NT: int64 [N, num_words] word ids of the captions, padded with 0; None without captions.
        captions: of all pictures; None without.
        split_N: int8 [N]: index in ("train", "val", "test").
        mirror_allowed_N: bool [N].
        vocabulary: names of labels and words.
    """

    name: str
    images: np.ndarray
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
        """Side of the pictures in pixels."""
        return self.images.shape[1]

    def indices(self, split: str) -> np.ndarray:
        """Numbers of the pictures of a split, ascending.

        Raises:
            ValueError: unknown split, or one without pictures.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        found = np.flatnonzero(self.split_N == SPLITS.index(split))
        if not len(found):
            raise ValueError(f"{self.name} has no pictures in its split {split}")
        return found

    def digest(self) -> str:
        """Hexadecimal sha256 over pixels, labels and splits."""
        value = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        value.update(self.labels_NA.numpy().tobytes() + self.split_N.tobytes())
        return value.hexdigest()


def as_float(images_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def load_image_set(source: str | Path, image_size: int | None = None) -> ImageSet:
    """Pictures from a place.

    Args:
        source: an emoji set (emoji64.zip, or the folder that holds it); a folder with a subfolder a class, below
            train, val and test if there are such folders; a parquet file or a folder of them, with columns image,
            label, caption; or an .npz with images (or arr_0) and perhaps labels.
        image_size: side in pixels: pictures are cropped to their centre square and resized; None keeps the size of
            sets that have one, and is an error for folders and parquet files.

    Raises:
        ValueError: no such place, no picture in it, an unreadable picture (named), columns missing.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"no image set at {path}: neither a file nor a folder (visar data emoji builds one)")
    if path.is_dir() and (path / EMOJI_FILE).is_file():
        path = path / EMOJI_FILE
    if path.suffix == ".zip":
        return _emoji_set(path, image_size)
    if path.suffix == ".npz":
        return _npz_set(path, image_size)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return _parquet_set(path, _required(image_size, path))
    if path.is_dir():
        return _folder_set(path, _required(image_size, path))
    raise ValueError(f"{path} is not an image set: a .zip, .npz or .parquet file or a folder of pictures is needed")


def _required(image_size: int | None, path: Path) -> int:
    if image_size is None or image_size < 1:
        raise ValueError(f"image_size {image_size}: the pictures of {path} may be of any size, so say image_size >= 1")
    return image_size


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


def make_image_set(
    name: str,
    images: np.ndarray,
    labels_NA: np.ndarray,
    attributes: dict[str, tuple[str, ...]],
    split_N: np.ndarray,
    captions: list[str] | None = None,
    mirror_allowed_N: np.ndarray | None = None,
) -> ImageSet:
    """An image set from arrays; the vocabulary is made from the training split's captions and labels.

    Raises:
        ValueError: arrays of different lengths, or no training picture.
    """
    lengths = {len(images), len(labels_NA), len(split_N), len(captions) if captions is not None else len(images)}
    if len(lengths) != 1 or not len(images):
        raise ValueError(f"{name}: {len(images)} pictures, {len(labels_NA)} labels, {len(split_N)} splits")
    train = np.flatnonzero(split_N == 0)
    if not len(train):
        raise ValueError(f"{name} has no training pictures")
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


def read_picture(source: str | Path | bytes, size: int, name: str = "") -> np.ndarray:
    """One picture, cropped to its centre square and resized: uint8 [size, size, 3].

    Raises:
        ValueError: it cannot be read; names it.
    """
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _square(image, size)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name or source} is not a readable picture ({error})") from error


def _split_by_name(names: Sequence[str]) -> np.ndarray:
    """A twentieth for validation, by a hash of the name, and at least one picture if there are two."""
    share = np.array([unit_hash(name) for name in names])
    split = (share < 0.05).astype(np.int8)
    if len(names) > 1 and not split.any():
        split[share.argmin()] = 1
    return split


def _folder_set(path: Path, size: int) -> ImageSet:
    parts = [split for split in SPLITS if (path / split).is_dir()]
    if "train" not in parts:
        parts = []
    files: list[Path] = []
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in EXTENSIONS and (not parts or file.relative_to(path).parts[0] in parts):
            files.append(file)
    if not files:
        raise ValueError(f"{path} has no pictures ({', '.join(EXTENSIONS)})")
    depth = 1 if parts else 0
    classes_of = []
    for file in files:
        inner = file.relative_to(path).parts[depth:]
        classes_of.append(inner[0] if len(inner) > 1 else "all")
    classes = tuple(sorted(set(classes_of)))
    names = [str(file.relative_to(path)) for file in files]
    split = np.array([SPLITS.index(name.split("/")[0]) for name in names]) if parts else _split_by_name(names)
    labels = np.array([[classes.index(name)] for name in classes_of])
    images = np.stack([read_picture(file, size) for file in files])
    return make_image_set(path.name, images, labels, {"class": classes}, split)


def _parquet_set(path: Path, size: int) -> ImageSet:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'torch-visar[train]'") from error
    table = parquet.read_table(path)
    if "image" not in table.column_names:
        raise ValueError(f"{path} has columns {', '.join(table.column_names)}; a column image is needed")
    cells = table.column("image").to_pylist()
    blobs = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    if not blobs:
        raise ValueError(f"{path} has no rows")
    images = np.stack([read_picture(blob, size, f"{path} row {row}") for row, blob in enumerate(blobs)])
    raw = table.column("label").to_pylist() if "label" in table.column_names else ["all"] * len(images)
    classes = sorted(set(raw))
    labels = np.array([[classes.index(label)] for label in raw])
    captions = table.column("caption").to_pylist() if "caption" in table.column_names else None
    split = _split_by_name([f"{path.name}/{row}" for row in range(len(images))])
    attributes = {"class": tuple(str(name) for name in classes)}
    return make_image_set(path.name, images, labels, attributes, split, captions)


def _npz_set(path: Path, image_size: int | None) -> ImageSet:
    with np.load(path, allow_pickle=False) as arrays:
        key = next((name for name in ("images", "arr_0") if name in arrays), None)
        if key is None:
            raise ValueError(f"{path} has arrays {', '.join(arrays)}; images or arr_0 is needed")
        images = arrays[key]
        label_key = next((name for name in ("labels", "class_id", "arr_1") if name in arrays), None)
        labels = arrays[label_key] if label_key else np.zeros(len(images), np.int64)
        names = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
        captions = [str(text) for text in arrays["captions"]] if "captions" in arrays else None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}; uint8 [N, H, W, 3] is needed")
    if image_size not in (None, images.shape[1]) or images.shape[1] != images.shape[2]:
        images = np.stack([_square(PIL.Image.fromarray(image), image_size or images.shape[1]) for image in images])
    classes = tuple(names or (str(i) for i in range(int(labels.max()) + 1)))
    split = _split_by_name([f"{path.name}/{row}" for row in range(len(images))])
    return make_image_set(path.name, images, labels[:, None], {"class": classes}, split, captions)
