"""Arrays in .npz files, without pickles: whatever is wrong with a file is an error that names it and the array."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from visar.io.files import shown


@contextlib.contextmanager
def _damage(path: Path, name: str) -> Iterator[None]:
    """Turns any error of reading into one that names the file and the array."""
    try:
        yield
    except Exception as error:  # of damaged files, zipfile, its decoders and numpy raise errors of any kind
        what = f"its array {name}: " if name else ""
        raise ValueError(
            f"{shown(path)} is damaged or not an .npz of arrays ({what}{error or type(error).__name__})"
        ) from error


def npz_arrays(path: str | Path) -> list[str]:
    """Names of an .npz file's arrays.

    Raises:
        ValueError: no such file, or not an .npz.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {shown(path)}")
    with _damage(path, ""), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_arrays(path: str | Path, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name.

    Args:
        path: the file.
        names: those wanted; None = all.

    Raises:
        ValueError: no such file, a damaged one, or an array that is missing, damaged or pickled.
    """
    path, found = Path(path), {}
    for name in npz_arrays(path) if names is None else names:
        with _damage(path, name), np.load(path, allow_pickle=False) as file:
            found[name] = file[name]
    return found


@contextlib.contextmanager
def open_array(path: str | Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
    """One array of an .npz as a stream behind its header, with its shape, Fortran order and dtype.

    Raises:
        ValueError: a damaged file, also where the reading inside the region finds it.
    """
    path = Path(path)
    with _damage(path, name), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        yield (file, *read(file))
