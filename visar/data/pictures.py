"""One image of any format as RGB pixels: what training, evaluation, references and editing read images with.

Grey images of 16 and 32 bits are scaled to 8, the orientation that a camera noted is applied, transparent parts are
white, and of an animation the first frame is read.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from visar.data.crops import center_crop
from visar.io.files import shown

# Endings of the images that Pillow reads; others are left out of a folder.
EXTENSIONS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
    *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".qoi", ".sgi", ".rgb", ".ico", ".icns"),
)
WHITES = (255, 2**16 - 1, 2**32 - 1)  # white of whole numbers of 8, 16 and 32 bits


def rgb(image: PIL.Image.Image, upright: bool = True) -> PIL.Image.Image:
    """An image in mode RGB, transparent parts white.

    Args:
        image: image of any mode and bit depth that Pillow opens.
        upright: turn it as its EXIF orientation says.

    Raises:
        ValueError: grey levels that are negative, not finite, or of no known range.
    """
    stored, image = image, PIL.ImageOps.exif_transpose(image) if upright else image
    if image.mode == "F" or image.mode.startswith("I"):
        return PIL.Image.fromarray(_eight_bits(np.asarray(image).astype(np.float64), stored)).convert("RGB")
    if image.has_transparency_data:
        canvas = PIL.Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _eight_bits(levels: np.ndarray, stored: PIL.Image.Image) -> np.ndarray:
    """uint8 [H, W] of the levels of an image with one wide channel, as its file stores them.

    White is 65535 where the file has 16 bits. Of 32 bits files hold numbers of any range: white is then the smallest
    of 255, 65535 and 2^32 - 1 that no level exceeds, or 1.0 of fractions.
    """
    if stored.mode == "I" and stored.format == "TIFF" and stored.getexif().get(339, 1) in (1, (1,)):
        levels = levels % 2.0**32  # its numbers have no sign, and Pillow takes them for signed ones
    if not np.isfinite(levels).all() or levels.min() < 0 or levels.max() > WHITES[-1]:
        raise ValueError(f"grey levels of {levels.min():g} ... {levels.max():g}; 0 ... 2^32 - 1 are read")
    if stored.mode.startswith("I;16") or (stored.mode == "I" and stored.format == "PNG"):
        white = WHITES[1]
    elif stored.mode == "F" and levels.max() <= 1.0:
        white = 1
    else:
        white = next(white for white in WHITES if levels.max() <= white)
    clear = stored.info.get("transparency")
    if isinstance(clear, int):
        levels[levels == clear] = white
    return np.rint(levels * (255.0 / white)).astype(np.uint8)


def read_picture(
    source: Path | bytes,
    size: int | None,
    name: str,
    *,
    upright: bool = True,
    resize: Callable[[PIL.Image.Image, int], PIL.Image.Image] = center_crop,
) -> np.ndarray:
    """Pixels of one image, uint8 [H, W, 3].

    Args:
        source: a file, or its bytes.
        size: side of the square that it becomes; None leaves it as it is.
        name: what errors call it.
        upright: turn it as its EXIF orientation says.
        resize: how it becomes a square; by default its centre is cut out and resized.

    Raises:
        ValueError: it cannot be read; names it.
    """
    try:
        if isinstance(source, Path) and not source.is_file():
            raise ValueError("no such file" if not source.exists() else "neither a file nor a link to one")
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            pixels = rgb(image, upright)
        return np.asarray(pixels if size is None else resize(pixels, size))
    except PIL.UnidentifiedImageError as error:
        empty = not (source if isinstance(source, bytes) else source.stat().st_size)
        reason = "it is empty" if empty else "in no format that Pillow knows"
        raise ValueError(f"{shown(name)} is not a readable image ({reason})") from error
    except Exception as error:  # of damaged files, Pillow's decoders raise errors of any kind
        raise ValueError(f"{shown(name)} is not a readable image ({error or type(error).__name__})") from error
