"""Image sets in parquet files, in the form that the Hugging Face hub has them: encoded images, labels, captions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visar.data.decoding import EncodedBytes
from visar.data.folders import SPLITS, sort_names, split_of_file, split_of_folder
from visar.io.files import shown

# Names of the columns, in the order in which they are looked for.
IMAGE, LABEL, CAPTION = ("image", "img"), ("label", "labels"), ("caption", "text")


@dataclass(frozen=True)
class Tables:
    """The rows of some parquet files.

    Attributes:
        encoded: the images.
        labels_N: int64 class numbers.
        classes: their names.
        captions: "" where there is none; None without a column of them.
        split_N: int8 number of the split that a file's name says; None where none says one.
        left_out: names of columns that are not read.
    """

    encoded: EncodedBytes
    labels_N: np.ndarray
    classes: tuple[str, ...]
    captions: list[str] | None
    split_N: np.ndarray | None
    left_out: tuple[str, ...]


def parquet_files(path: Path) -> dict[Path, str | None]:
    """The parquet files of a place by their split: a file; or those in a folder, in its folder data, or in folders
    that are named as splits. Empty where there are none."""
    if path.is_file():
        return {path: None} if path.suffix == ".parquet" else {}
    for folder in (path, path / "data"):
        if not folder.is_dir():
            continue
        files = {file: split_of_file(file.stem) for file in _files(folder)}
        for inner in sorted(folder.iterdir()) if not files else []:
            if inner.is_dir() and (split := split_of_folder(inner.name)) is not None:
                files |= dict.fromkeys(_files(inner), split)
        if files:
            return files
    return {}


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))


def read_tables(path: Path, files: dict[Path, str | None]) -> Tables:
    """Reads files of the same columns.

    Args:
        path: what the whole is called.
        files: with their splits.

    Raises:
        ValueError: a damaged file, a missing column, or a cell of another kind (file, column and row named).
        ImportError: pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'torch-visar[train]'") from error
    try:
        tables = {file: parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) for file in files}
        columns = set.intersection(*(set(table.schema_arrow.names) for table in tables.values()))
        image, label, caption = (
            next((name for name in names if name in columns), None) for names in (IMAGE, LABEL, CAPTION)
        )
        if image is None:
            raise ValueError(
                f"{shown(path)} has columns {', '.join(sorted(columns))}; a column {' or '.join(IMAGE)} is needed"
            )
        counts = [table.metadata.num_rows for table in tables.values()]
        if not sum(counts):
            raise ValueError(f"{shown(path)} has no rows")
        labels_N = np.zeros(sum(counts), np.int64)
        classes: tuple[str, ...] = ("all",)
        if label is not None:
            labels_N, classes = _labels(tables, label)
        captions = None if caption is None else list(_cells(tables, caption, "text"))
        encoded = EncodedBytes()
        for file, table in tables.items():
            encoded.begin_table(shown(file))
            for batch in table.iter_batches(64, columns=[image]):
                for cell in batch.column(0).to_pylist():
                    encoded.append(_blob(cell, f"{encoded.name(len(encoded))}: the {image}"))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{shown(path)} is damaged or not parquet ({error})") from error
    split_N = None
    if any(files.values()):
        split_N = np.repeat([SPLITS.index(split or "train") for split in files.values()], counts).astype(np.int8)
    left_out = tuple(sorted(columns - {image, label, caption}))
    return Tables(encoded, labels_N, classes, captions, split_N, left_out)


def _blob(cell: Any, where: str) -> bytes:
    """Encoded bytes of a cell: they themselves, or what the hub's struct of bytes and path holds."""
    blob = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(blob, bytes):
        kind = f"a struct of {', '.join(cell)} without bytes" if isinstance(cell, dict) else type(cell).__name__
        raise ValueError(f"{where} is {kind}; encoded bytes are needed")
    return blob


def _cells(tables: dict[Path, Any], column: str, kind: str) -> Iterator[Any]:
    """Cells of a column of whole numbers ("number"), of texts ("text"), or either; an empty text for a missing one.

    Raises:
        ValueError: a file's column is of another kind.
    """
    from pyarrow import types

    for file, table in tables.items():
        cells = table.read([column]).column(column)
        of = cells.type.value_type if types.is_dictionary(cells.type) else cells.type
        texts = types.is_string(of) or types.is_large_string(of) or types.is_null(of)
        if not texts and not (kind != "text" and types.is_integer(of)):
            needed = "texts are needed" if kind == "text" else "whole numbers or texts are needed"
            raise ValueError(f"{shown(file)}: the column {column} is {of}; {needed}, one per row")
        for row, cell in enumerate(cells.to_pylist()):
            if cell is None and kind != "text":
                raise ValueError(f"{shown(file)}: row {row} has no {column}")
            yield "" if cell is None else cell


def _labels(tables: dict[Path, Any], column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers int64 [N] and names of the classes; the names are the hub's, where the files say them."""
    cells = list(_cells(tables, column, "either"))
    hub = {_class_names(table.schema_arrow.metadata, column) for table in tables.values()} - {None}
    whole = {isinstance(cell, int) for cell in cells}
    if len(hub) > 1 or len(whole) > 1:
        files = ", ".join(shown(file) for file in tables)
        raise ValueError(f"the column {column} has other classes or cells of another kind in each of {files}")
    if hub and True in whole:
        names = hub.pop()
        assert names is not None
        wrong = next((row for row, cell in enumerate(cells) if not 0 <= cell < len(names)), None)
        if wrong is not None:
            raise ValueError(
                f"{shown(next(iter(tables)))}: the {column} of row {wrong} is {cells[wrong]}; the {len(names)} named "
                f"classes are 0 ... {len(names) - 1}"
            )
        return np.array(cells, np.int64), names
    distinct = tuple(sorted(set(cells))) if True in whole else sort_names(cells)
    number = {value: i for i, value in enumerate(distinct)}
    return np.array([number[cell] for cell in cells], np.int64), tuple(str(value) for value in distinct)


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Names of a column's classes as the hub writes them into a file; None where it does not."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"]
    except (KeyError, RecursionError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None
