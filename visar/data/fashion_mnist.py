"""Fashion-MNIST as an image set: 70,000 grey images of clothes in 10 classes, 28 x 28 on black, padded to 32 x 32.

Source: Xiao, Rasul and Vollgraf, arXiv 1708.07747 (MIT licence, Zalando SE); zalandoresearch/fashion-mnist. The files
are the idx files that Debian's package dataset-fashion-mnist and torchvision.datasets.FashionMNIST bring.
"""

import gzip
import hashlib
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from visar.io.files import atomic_write

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
SIZE, PADDING = 32, 2
VALIDATION = 2000
KIND = "fashion-mnist"
# Images and labels of the 60,000 training and the 10,000 test images; the prefix is t10k for the latter.
FILES = tuple(f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def read_idx(blob: bytes, name: str) -> np.ndarray:
    """The array of an idx file, gzipped or not: uint8, its shape from the header.

    Raises:
        ValueError: the file is damaged, or holds something else than bytes.
    """
    try:
        content = gzip.decompress(blob) if blob[:2] == b"\x1f\x8b" else blob
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is damaged ({error})") from error
    axes = content[3] if len(content) >= 4 else 0
    if content[:3] != b"\x00\x00\x08" or not 1 <= axes <= 4 or len(content) < 4 + 4 * axes:
        raise ValueError(f"{name} is no idx file of bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", axes, offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{name} is damaged: {values.size} values, {' x '.join(map(str, shape))} expected")
    return values.reshape(shape)


def _source_files(source: Path) -> dict[str, bytes]:
    """The four files' contents, from a folder (or its folder raw) or a .deb package.

    Raises:
        ValueError: one is missing, or the package is damaged.
    """
    found: dict[str, bytes] = {}
    if source.is_file() and source.suffix == ".deb":
        found = _package_files(source)
    else:
        for name in FILES:
            places = [path / f"{name}{end}" for path in (source, source / "raw") for end in (".gz", "")]
            there = next((place for place in places if place.is_file()), None)
            if there is not None:
                found[name] = there.read_bytes()
    missing = [name for name in FILES if name not in found]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(missing)} (or .gz): the folder of Fashion-MNIST's idx files is needed, or the "
            "package dataset-fashion-mnist.deb"
        )
    return found


def _package_files(path: Path) -> dict[str, bytes]:
    """Fashion-MNIST's files in a Debian package: an ar archive with data.tar.xz (or .gz) inside."""
    blob, found, position = path.read_bytes(), {}, 8
    try:
        while position < len(blob):
            name = blob[position : position + 16].decode().strip(" /")
            size = int(blob[position + 48 : position + 58])
            if name.startswith("data.tar"):
                inner = io.BytesIO(blob[position + 60 : position + 60 + size])
                with tarfile.open(fileobj=inner) as archive:
                    for member in archive:
                        base = member.name.rsplit("/", 1)[-1].removesuffix(".gz")
                        file = archive.extractfile(member) if base in FILES and member.isfile() else None
                        if file is not None:
                            found[base] = file.read()
            position += 60 + size + size % 2
    except (ValueError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no Debian package ({error})") from error
    return found


def build_fashion(source: str | Path, out: str | Path) -> Path:
    """Writes fashion.zip, 27 MB: the images as they are, labels, and splits (the last 2,000 training images are
    for validation).

    Args:
        source: folder with the four idx files, gzipped or not, or Debian's package with them.
        out: file to write.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the others.
    """
    blobs, path = _source_files(Path(source)), Path(out)
    arrays = {name: read_idx(blob, f"{source}: {name}") for name, blob in blobs.items()}
    pictures, labels = ([arrays[FILES[i + k]] for i in (0, 2)] for k in (0, 1))
    for picture, label, part in zip(pictures, labels, ("train", "t10k"), strict=True):
        if picture.ndim != 3 or picture.shape[1:] != (28, 28) or label.shape != picture.shape[:1]:
            raise ValueError(f"{source}: {part} has images {picture.shape} and labels {label.shape}")
        if label.size and label.max() >= len(CLASSES):
            raise ValueError(f"{source}: {part} has the label {label.max()}; allowed: 0 ... {len(CLASSES) - 1}")
    train, test = (len(part) for part in pictures)
    held_out = min(VALIDATION, train // 10)
    grey = np.concatenate(pictures)
    meta = {
        "kind": KIND,
        "classes": CLASSES,
        "count": len(grey),
        "pixels_sha256": hashlib.sha256(grey.tobytes()).hexdigest(),
        "licence": "MIT, Copyright 2017 Zalando SE",
        "class": "".join(str(label) for label in np.concatenate(labels)),
        "split": "0" * (train - held_out) + "1" * held_out + "2" * test,
    }
    array = io.BytesIO()
    np.save(array, grey, allow_pickle=False)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, blob in (
            ("meta.json", json.dumps(meta).encode()),
            ("pixels.npy.xz", lzma.compress(array.getvalue(), format=lzma.FORMAT_XZ, filters=filters)),
        ):
            archive.writestr(zipfile.ZipInfo(name), blob)  # ZipInfo has a fixed date: the same bytes every time
    return path


def read_fashion(path: str | Path) -> tuple[np.ndarray, dict]:
    """Images uint8 [N, 32, 32, 3] and the facts about them.

    Raises:
        ValueError: the file is damaged, or its pixels are not the recorded ones.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            meta = json.loads(archive.read("meta.json"))
            grey = np.load(io.BytesIO(lzma.decompress(archive.read("pixels.npy.xz"))), allow_pickle=False)
    except (zipfile.BadZipFile, zlib.error, KeyError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not Fashion-MNIST ({error}); build it with: visar data fashion-mnist"
        ) from error
    if hashlib.sha256(grey.tobytes()).hexdigest() != meta["pixels_sha256"]:
        raise ValueError(f"{path}: the pixels differ from their recorded sha256; build the file again")
    images = np.zeros((len(grey), SIZE, SIZE, 3), np.uint8)
    images[:, PADDING:-PADDING, PADDING:-PADDING] = grey[..., None]
    return images, meta


def is_fashion(path: str | Path) -> bool:
    """Whether a zip says that it is Fashion-MNIST; False for other and for damaged files."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("meta.json")).get("kind") == KIND
    except Exception:  # of damaged archives, zipfile and its decoders raise errors of any kind
        return False
