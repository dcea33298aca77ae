"""Image sets: pictures of one size with labels, captions and splits, from any of the usual places."""

import contextlib
import hashlib
import io
import itertools
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from visar.data.fashion_mnist import is_fashion, read_fashion
from visar.data.vocabulary import Vocabulary, build_vocabulary, split_words
from visar.io.files import atomic_write

SPLITS = ("train", "val", "test")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
    """Pictures with what is known about them.

    Attributes:
        name: what it is called in cards and logs.
        images: uint8 [N, H, W, 3].
        labels_NA: int64 [N, columns], as in `vocabulary.attributes`.
        words_NT: int64 [N, num_words] word ids of the captions, padded with 0; None without captions.
        captions: of all pictures, "" for one that has none; None without.
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
        """Hexadecimal sha256 over pixels, labels, splits and what may be mirrored."""
        value = hashlib.sha256(self.picture_digest().encode())
        for facts in (self.labels_NA.numpy(), self.split_N):
            value.update(facts.tobytes())
        return value.hexdigest()

    def picture_digest(self) -> str:
        """Hexadecimal sha256 over what token ids depend on: pixels and what may be mirrored."""
        value = hashlib.sha256()
        for first in range(0, len(self), 4096):
            value.update(np.ascontiguousarray(self.images[first : first + 4096]).tobytes())
        value.update(self.mirror_allowed_N.numpy().tobytes())
        return value.hexdigest()


def as_float(images_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def load_image_set(source: str | Path, image_size: int | None = None, cache: str | Path | None = None) -> ImageSet:
    """Pictures from a place.

    Args:
        source: an emoji set (emoji64.zip, or the folder that holds it); Fashion-MNIST (fashion.zip); a folder with a
            subfolder a class, below train, val and test if there are such folders; a parquet file or a folder of them,
            with columns image, label, caption; or an .npz with images (or arr_0) and perhaps labels.
        image_size: side in pixels: pictures are cropped to their centre square and resized; None keeps the size of
            sets that have one, and is an error for folders and parquet files.
        cache: folder to keep the decoded pictures of folders and parquet files in, as one .npy file a set and size;
            they are then mapped into memory rather than held there. None decodes them again every time.

    Raises:
        ValueError: no such place, no picture in it, an unreadable picture (named), columns missing.
        ImportError: a parquet file, and pyarrow is missing.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"no image set at {path}: neither a file nor a folder (visar data emoji builds one)")
    if path.is_dir() and (path / EMOJI_FILE).is_file():
        path = path / EMOJI_FILE
    if path.suffix == ".zip":
        return _fashion_set(path, image_size) if is_fashion(path) else _emoji_set(path, image_size)
    if path.suffix == ".npz":
        return _npz_set(path, image_size)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return _parquet_set(path, _required(image_size, path), cache)
    if path.is_dir():
        return _folder_set(path, _required(image_size, path), cache)
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


def _fashion_set(path: Path, image_size: int | None) -> ImageSet:
    images, meta = read_fashion(path)
    if image_size not in (None, images.shape[1]):
        images = np.stack([_square(PIL.Image.fromarray(image), image_size) for image in images])
    labels, split = (np.array([int(digit) for digit in meta[name]]) for name in ("class", "split"))
    return make_image_set(path.name, images, labels[:, None], {"class": tuple(meta["classes"])}, split)


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
        counts = f"{len(images)} pictures, {len(labels_NA)} labels, {len(split_N)} splits"
        raise ValueError(f"{name}: {counts}" + (f", {len(captions)} captions" if captions is not None else ""))
    train = np.flatnonzero(split_N == 0)
    if not len(train):
        raise ValueError(f"{name} has no training pictures")
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


def read_picture(source: Path | bytes, size: int, name: str) -> np.ndarray:
    """One picture, cropped to its centre square and resized: uint8 [size, size, 3].

    Raises:
        ValueError: it cannot be read; names it.
    """
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _square(image, size)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not a readable picture ({error})") from error


def _split_by_name(names: Sequence[str]) -> np.ndarray:
    """A twentieth for validation, by a hash of the name, and at least one picture if there are two."""
    share = np.array([unit_hash(name) for name in names])
    split = (share < 0.05).astype(np.int8)
    if len(names) > 1 and not split.any():
        split[share.argmin()] = 1
    return split


def _decode(
    pictures: Iterable[tuple[str, Path | bytes]], count: int, size: int, cache: str | Path | None, facts: Iterable[str]
) -> np.ndarray:
    """uint8 [count, size, size, 3] of named pictures, a few at a time; from the cache if they are there already.

    `facts` is what the pictures depend on besides the size; it names the cached file.
    """
    kept = None
    if cache is not None:
        digest = hashlib.sha256("\n".join([str(size), *facts]).encode()).hexdigest()
        kept = Path(cache) / f"images-{size}-{digest[:16]}.npy"
        if kept.is_file():
            return np.load(kept, mmap_mode="r", allow_pickle=False)
    shape = (count, size, size, 3)
    with contextlib.ExitStack() as stack:
        if kept is None:
            images = np.empty(shape, np.uint8)
        else:
            temporary = stack.enter_context(atomic_write(kept))
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        pool = stack.enter_context(ThreadPoolExecutor(min(16, os.cpu_count() or 1)))
        rest = iter(pictures)
        for first in range(0, count, 256):
            part = list(itertools.islice(rest, 256))
            decoded = pool.map(lambda named: read_picture(named[1], size, named[0]), part)
            for row, image in enumerate(decoded):
                images[first + row] = image
        if isinstance(images, np.memmap):
            images.flush()
    return images if kept is None else np.load(kept, mmap_mode="r", allow_pickle=False)


def _folder_set(path: Path, size: int, cache: str | Path | None) -> ImageSet:
    parts = [split for split in SPLITS if (path / split).is_dir()]
    if "train" not in parts:
        parts = []
    found = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in EXTENSIONS)
    inner = [(file, file.relative_to(path).parts) for file in found if not file.name.startswith(".")]
    inner = [(file, names) for file, names in inner if not parts or names[0] in parts]
    if not inner:
        raise ValueError(f"{path} has no pictures ({', '.join(EXTENSIONS)})")
    depth = 1 if parts else 0
    class_of = [names[depth] if len(names) > depth + 1 else "all" for _, names in inner]
    classes = tuple(sorted(set(class_of)))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([[number[name]] for name in class_of])
    names_of = ["/".join(names) for _, names in inner]
    split = np.array([SPLITS.index(names[0]) for _, names in inner]) if parts else _split_by_name(names_of)
    stats = (file.stat() for file, _ in inner)
    facts = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(names_of, stats, strict=True)]
    pictures = ((str(file), file) for file, _ in inner)
    images = _decode(pictures, len(inner), size, cache, [str(path.resolve()), *facts])
    return make_image_set(path.name, images, labels, {"class": classes}, split)


def _parquet_set(path: Path, size: int, cache: str | Path | None) -> ImageSet:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'torch-visar[train]'") from error
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    try:
        tables = [parquet.ParquetFile(file) for file in files]
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged or not parquet ({error})") from error
    columns = set.intersection(*(set(table.schema_arrow.names) for table in tables))
    if "image" not in columns:
        raise ValueError(f"{path} has columns {', '.join(sorted(columns))}; a column image is needed")
    count = sum(table.metadata.num_rows for table in tables)
    if not count:
        raise ValueError(f"{path} has no rows")

    def column(name: str) -> list:
        return [value for table in tables for value in table.read([name]).column(name).to_pylist()]

    def pictures() -> Iterator[tuple[str, bytes]]:
        for file, table in zip(files, tables, strict=True):
            row = 0
            for batch in table.iter_batches(256, columns=["image"]):
                for cell in batch.column(0).to_pylist():
                    blob = cell["bytes"] if isinstance(cell, dict) else cell
                    if not isinstance(blob, bytes):
                        raise ValueError(
                            f"{file} row {row}: the image is {type(blob).__name__}; encoded bytes are needed"
                        )
                    yield f"{file} row {row}", blob
                    row += 1

    labels, captions = np.zeros((count, 1), np.int64), None
    classes: tuple[str, ...] = ("all",)
    if "label" in columns:
        values = column("label")
        if None in values:
            raise ValueError(f"{path}: row {values.index(None)} has no label")
        distinct = sorted(set(values))
        number = {value: i for i, value in enumerate(distinct)}
        labels = np.array([[number[value]] for value in values])
        classes = tuple(str(value) for value in distinct)
    if "caption" in columns:
        captions = [str(text or "") for text in column("caption")]
    facts = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    images = _decode(pictures(), count, size, cache, facts)
    split = _split_by_name([f"{path.name}/{row}" for row in range(count)])
    return make_image_set(path.name, images, labels, {"class": classes}, split, captions)


def _npz_set(path: Path, image_size: int | None) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
    except (zipfile.BadZipFile, OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not an .npz of arrays ({error})") from error
    key = next((name for name in ("images", "arr_0") if name in arrays), None)
    if key is None:
        raise ValueError(f"{path} has arrays {', '.join(arrays)}; images or arr_0 is needed")
    images = arrays[key]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}; uint8 [N, H, W, 3] is needed, N >= 1")
    label_key = next((name for name in ("labels", "class_id", "arr_1") if name in arrays), None)
    labels = arrays[label_key] if label_key else np.zeros(len(images), np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise ValueError(f"{path}: {label_key} is {labels.dtype} {labels.shape}; whole numbers [N] >= 0 are needed")
    names = arrays.get("classes", np.arange(labels.max() + 1))
    if labels.max() >= len(names):
        raise ValueError(f"{path}: label {labels.max()} with {len(names)} classes")
    captions = [str(text) for text in arrays["captions"]] if "captions" in arrays else None
    if image_size not in (None, images.shape[1]) or images.shape[1] != images.shape[2]:
        side = image_size or min(images.shape[1:3])
        images = np.stack([_square(PIL.Image.fromarray(image), side) for image in images])
    split = _split_by_name([f"{path.name}/{row}" for row in range(len(images))])
    classes = tuple(str(name) for name in names)
    return make_image_set(path.name, images, labels[:, None], {"class": classes}, split, captions)
