"""Images decoded when they are asked for, so that a set may be larger than memory."""

import hashlib
import os
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visar.data.pictures import read_picture

KEPT_BYTES = 2**30  # of decoded images that a set keeps in memory
MOST_NAMED = 100  # unreadable images in an error
BLOCK = 256  # images decoded at a time where all are gone through


class Encoded(Protocol):
    """Images as files or bytes, by number."""

    def __len__(self) -> int: ...

    def source(self, row: int) -> Path | bytes:
        """The file, or its bytes."""
        ...

    def name(self, row: int) -> str:
        """What errors call it."""
        ...


class EncodedFiles:
    """Files below a folder.

    Args:
        root: the folder.
        names: names of the files, relative to it.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def source(self, row: int) -> Path:
        return self.root / self.names[row]

    def name(self, row: int) -> str:
        return str(self.root / self.names[row])


class EncodedBytes:
    """Encoded images that are taken out of tables, in a temporary file of their whole size (in TMPDIR).

    Tables are compressed in blocks of many rows: reading one row in random order would unpack a block every time.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._lock = threading.Lock()
        self._ends = [0]
        self._tables: list[tuple[int, str]] = []

    def begin_table(self, name: str) -> None:
        """Says which table the following images come from."""
        self._tables.append((len(self), name))

    def append(self, blob: bytes) -> None:
        """Takes the next image.

        Raises:
            ValueError: there is no space for it.
        """
        try:
            self._file.write(blob)
        except OSError as error:
            raise ValueError(
                f"no temporary file for the images in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a "
                "folder with more space"
            ) from error
        self._ends.append(self._ends[-1] + len(blob))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def source(self, row: int) -> bytes:
        with self._lock:
            self._file.seek(self._ends[row])
            return self._file.read(self._ends[row + 1] - self._ends[row])

    def name(self, row: int) -> str:
        first, table = self._tables[bisect_right(self._tables, row, key=lambda each: each[0]) - 1]
        return f"{table} row {row - first}"


class DecodedPictures:
    """Images of one size that are decoded when they are asked for; is indexed like an array uint8 [N, S, S, 3].

    What was decoded stays in memory up to KEPT_BYTES; several are decoded at a time.

    Args:
        encoded: the images.
        size: S, see `read_picture`.
        skip_unreadable: leave unreadable ones out.

    Raises:
        ValueError: unreadable images, up to MOST_NAMED of them named; or none that can be read.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, encoded: Encoded, size: int, skip_unreadable: bool = False) -> None:
        self._encoded, self._size = encoded, size
        self._most_kept = KEPT_BYTES // (3 * size * size)
        self._kept: dict[int, np.ndarray] = {}
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self._hash = hashlib.sha256()
        self.rows, self.unreadable = self._go_through()
        if self.unreadable and not (skip_unreadable and len(self.rows)):
            remedy = "repair or remove them (training leaves them out with --skip-unreadable)"
            named = self.unreadable[:MOST_NAMED]
            if len(named) < len(self.unreadable):
                named.append(f"and {len(self.unreadable) - len(named)} more")
            raise ValueError(f"{len(self.unreadable)} unreadable: {remedy}\n" + "\n".join(named))

    def _go_through(self) -> tuple[np.ndarray, list[str]]:
        """Numbers of the readable images among the encoded ones, and the errors of the others."""
        readable, errors = [], []
        for first in range(0, len(self._encoded), BLOCK):
            rows = range(first, min(first + BLOCK, len(self._encoded)))
            for row, found in zip(rows, self._pool.map(self._attempt, rows), strict=True):
                if isinstance(found, str):
                    errors.append(found)
                else:
                    readable.append(row)
                    self._hash.update(found.tobytes())
        return np.array(readable, np.int64), errors

    def _attempt(self, row: int) -> np.ndarray | str:
        try:
            return self._read(row)
        except ValueError as error:
            return str(error)

    def _read(self, row: int) -> np.ndarray:
        picture = self._kept.get(row)
        if picture is None:
            picture = read_picture(self._encoded.source(row), self._size, self._encoded.name(row))
            if len(self._kept) < self._most_kept:
                self._kept[row] = picture
        return picture

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, S, S, 3)."""
        return (len(self), self._size, self._size, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> np.ndarray:
        wanted, *inner = key if isinstance(key, tuple) else (key,)
        rows = self.rows[wanted]
        if not np.ndim(rows):
            return self._read(int(rows))[tuple(inner)]
        block = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, picture in enumerate(self._pool.map(self._read, rows.tolist())):
            block[place] = picture
        return block[(slice(None), *inner)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def hash(self) -> Any:
        """sha256 over all pixels in order, to be updated further."""
        return self._hash.copy()


Pictures = np.ndarray | DecodedPictures
"""Images uint8 [N, H, W, 3], in memory or decoded when asked for."""


def in_batches(images: Pictures, batch_size: int, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Images uint8 [B, H, W, 3] in order; while one batch is used the next is decoded.

    Args:
        images: all of them.
        batch_size: B, but for the last.
        rows: numbers of those wanted; None = all.
    """
    count = len(images) if rows is None else len(rows)
    parts = [slice(first, first + batch_size) for first in range(0, count, batch_size)]
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for part in parts:
            following = thread.submit(images.__getitem__, part if rows is None else rows[part])
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
