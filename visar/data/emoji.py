"""The emoji image set: 64 x 64 drawings of Unicode emoji in seven styles, with classes and captions; how it is read.

How it is made: visar/data/emoji_build.py. Licences and attributions: visar/data/ATTRIBUTION.md.
"""

import hashlib
import io
import json
import lzma
import zipfile
import zlib
from pathlib import Path

import numpy as np

FILE = "emoji64.zip"
PIXELS_SHA256 = "ef3b30f4d67e2fc9cb02c679a127e73afa40580e78ac3c8e572d49b1316b28bd"


def pack_pixels(images_NHWC: np.ndarray) -> bytes:
    """uint8 images without loss: (R - G, G, B - G, 0) modulo 256, four bytes a pixel for LZMA's position bits;
    xz."""
    four = np.zeros((*images_NHWC.shape[:3], 4), np.uint8)
    four[..., :3] = images_NHWC
    four[..., 0] -= images_NHWC[..., 1]
    four[..., 2] -= images_NHWC[..., 1]
    array = io.BytesIO()
    np.save(array, four, allow_pickle=False)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 2, "pb": 2}]
    return lzma.compress(array.getvalue(), format=lzma.FORMAT_XZ, filters=filters)


def unpack_pixels(blob: bytes) -> np.ndarray:
    """The inverse of `pack_pixels`."""
    four = np.load(io.BytesIO(lzma.decompress(blob)), allow_pickle=False)
    images = np.ascontiguousarray(four[..., :3])
    images[..., 0] += four[..., 1]
    images[..., 2] += four[..., 1]
    return images


def read_emoji(path: str | Path) -> tuple[np.ndarray, dict]:
    """Images uint8 [N, 64, 64, 3] and the facts about them.

    Raises:
        ValueError: the file is damaged, or its pixels are not the recorded ones.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            meta = json.loads(archive.read("meta.json"))
            images = unpack_pixels(archive.read("pixels.npy.xz"))
    except (zipfile.BadZipFile, zlib.error, KeyError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not an emoji set ({error}); build it with: visar data emoji"
        ) from error
    if hashlib.sha256(images.tobytes()).hexdigest() != meta["pixels_sha256"]:
        raise ValueError(f"{path}: the pixels differ from their recorded sha256; build the file again")
    return images, meta


def captions(meta: dict) -> list[str]:
    """Captions of all images: the Unicode name and the style, such as "teapot, noto style"."""
    styles = [meta["style_words"][style] for style in meta["styles"]]
    return [
        f"{meta['labels'][label]}, {styles[int(style)]} style"
        for label, style in zip(meta["label"], meta["style"], strict=True)
    ]
