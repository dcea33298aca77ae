"""The reader of pictures against odd files: what each is shown as, or the error that names it."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from visar.data.pictures import read_picture

WHITE, RED, ODD = (255, 255, 255), (250, 10, 20), (10, 20, 30)
RAMP = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
GREY = np.rint(RAMP / 257).astype(np.uint8)[..., None].repeat(3, -1)
HALVES = np.zeros((8, 16, 3), np.uint8)  # red above, white below
HALVES[:4], HALVES[4:] = RED, WHITE


def encoded(image: PIL.Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    blob = io.BytesIO()
    image.save(blob, kind, **options)
    return blob.getvalue()


def plain(colour: tuple[int, ...], mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.new(mode, (16, 8), colour)


def without_signs(tiff: bytes) -> bytes:
    """A TIFF of whole numbers that says that they have no sign (tag 339); Pillow only writes the other kind."""
    signed, unsigned = (struct.pack("<HHII", 339, 3, 1, kind) for kind in (2, 1))
    assert signed in tiff
    return tiff.replace(signed, unsigned)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, rows: bytes, depth: int = 8, kind: int = 0, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + data


def turned(orientation: int) -> bytes:
    """The halves, stored so that a viewer that heeds the orientation shows them upright."""
    stored = {
        **dict.fromkeys((1, 2), HALVES),
        **dict.fromkeys((3, 4), HALVES[::-1]),
        **dict.fromkeys((5, 8), np.rot90(HALVES, -1) if orientation == 8 else HALVES.transpose(1, 0, 2)),
        **dict.fromkeys((6, 7), np.rot90(HALVES) if orientation == 6 else HALVES[::-1].transpose(1, 0, 2)),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(np.ascontiguousarray(stored), "PNG", exif=exif)


def two_frames(kind: str) -> bytes:
    return encoded(plain(RED), kind, save_all=True, append_images=[plain(ODD)], lossless=True)


SHOWN: dict[str, tuple[Callable[[], bytes], object]] = {
    "grey of 16 bits": (lambda: encoded(RAMP), GREY),
    "grey of 16 bits in a TIFF": (lambda: encoded(RAMP, "TIFF"), GREY),
    "grey of 16 bits, high bytes first": (lambda: encoded(RAMP.astype(">u2"), "TIFF"), GREY),
    "grey of 16 bits in a PGM": (lambda: encoded(RAMP, "PPM"), GREY),
    "grey of 16 bits with a transparent level": (
        lambda: png(8, (b"\0" + struct.pack(">H", 1000) * 8) * 8, 16, extra=chunk(b"tRNS", struct.pack(">H", 1000))),
        WHITE,
    ),
    "16 bits in 32": (lambda: encoded(RAMP.astype(np.int32), "TIFF"), GREY),
    "8 bits in 32": (lambda: encoded(GREY[..., 0].astype(np.int32), "TIFF"), GREY),
    "32 bits": (lambda: without_signs(encoded((RAMP.astype(np.uint32) * 65537).view(np.int32), "TIFF")), GREY),
    "fractions": (lambda: encoded((RAMP / np.float32(65535)).astype(np.float32), "TIFF"), GREY),
    "levels as floats": (lambda: encoded(GREY[..., 0].astype(np.float32), "TIFF"), GREY),
    "colours of 16 bits": (lambda: png(8, (b"\0" + struct.pack(">HHH", 2560, 5120, 7680) * 8) * 8, 16, 2), ODD),
    "one bit": (lambda: encoded(plain((1,), "1")), WHITE),
    "palette": (lambda: encoded(plain(RED).quantize(4)), RED),
    "palette with transparency": (lambda: encoded(plain(RED).quantize(4), transparency=0), WHITE),
    "palette of part transparency": (
        lambda: encoded(plain((0, 0, 0)).quantize(2), transparency=bytes([127, 127])),
        (128, 128, 128),
    ),
    "transparent colour": (lambda: encoded(plain(ODD), transparency=ODD), WHITE),
    "transparent grey": (lambda: encoded(plain((7,), "L"), transparency=7), WHITE),
    "hidden colours": (lambda: encoded(plain((*ODD, 0), "RGBA")), WHITE),
    "half transparent": (lambda: encoded(plain((0, 0, 0, 51), "RGBA")), (204, 204, 204)),
    "grey with alpha": (lambda: encoded(plain((7, 0), "LA")), WHITE),
    "transparent GIF": (lambda: encoded(plain(RED).quantize(2), "GIF", transparency=0), WHITE),
    "transparent WebP": (lambda: encoded(plain((*ODD, 0), "RGBA"), "WEBP", lossless=True), WHITE),
    "inks": (lambda: encoded(plain((0, 255, 255, 0), "CMYK"), "TIFF"), (255, 0, 0)),
    "inks in a JPEG": (lambda: encoded(plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=100), (255, 0, 0)),
    "animated GIF": (lambda: two_frames("GIF"), RED),
    "animated PNG": (lambda: two_frames("PNG"), RED),
    "animated WebP": (lambda: two_frames("WEBP"), RED),
    "pages": (lambda: two_frames("TIFF"), RED),
    "bitmap": (lambda: encoded(plain(RED), "BMP"), RED),
    "Targa": (lambda: encoded(plain(RED), "TGA"), RED),
    "wrong text as EXIF": (lambda: encoded(plain(RED), "JPEG", exif=b"Exif\0\0what is this?", quality=100), RED),
    **{f"orientation {number}": (lambda number=number: turned(number), HALVES) for number in range(1, 9)},
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_odd_pictures_are_shown_as(name: str) -> None:
    make, expected = SHOWN[name]
    pixels = read_picture(make(), None, name)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    if isinstance(expected, np.ndarray):
        assert pixels.shape == expected.shape
    tolerance = 2 if "JPEG" in name or "EXIF" in name else 1 if "bits" in name else 0
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= tolerance


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "in no format that Pillow knows"),
    "truncated": (
        lambda: encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:3000],
        "truncated",
    ),
    "damaged": (lambda: png(8, b"")[:-20] + b"\0" * 20, ""),
    "bomb": (lambda: png(14000, b"\0" * (14000 * 1751), 1), "could be decompression bomb"),
    "huge text": (
        lambda: png(8, b"\0" * 72, extra=chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * (3 << 20)))),
        "Decompressed data too large",
    ),
    "not a number": (lambda: encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), "grey levels of nan"),
    "negative": (lambda: encoded(np.full((4, 4), -1.0, np.float32), "TIFF"), "grey levels of -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    make, reason = REFUSED[name]
    file = tmp_path / "odd.png"
    file.write_bytes(make())
    for source in (file, file.read_bytes()):
        with pytest.raises(ValueError, match=rf"^odd one is not a readable image \(.*{reason}"):
            read_picture(source, 32, "odd one")


def test_pipes_folders_and_missing_files_are_named_and_do_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to("nowhere")
    for name, reason in (
        ("pipe.png", "neither a file nor a link to one"),
        (".", "neither a file nor a link to one"),
        ("dead.png", "no such file"),
    ):
        with pytest.raises(ValueError, match=f"is not a readable image .{reason}"):
            read_picture(tmp_path / name, None, name)


def test_names_in_any_bytes_are_shown_in_errors(tmp_path: Path) -> None:
    file = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png"))
    file.write_bytes(b"no picture")
    code = f"from visar.data.pictures import Path, read_picture; read_picture(Path({str(file)!r}), 8, {str(file)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in done.stderr and "caf\\xe9.png is not a readable image" in done.stderr


def test_stored_as_it_is_for_chains_that_ignore_the_orientation() -> None:
    assert read_picture(turned(6), None, "x", upright=False).shape == (16, 8, 3)
    assert read_picture(turned(6), 4, "x").shape == (4, 4, 3)
