"""Sets of clips that are drawn by number: how they are stored, and how a folder of them is completed.

A folder holds clips-00000.zip, clips-00001.zip, ... of SHARD clips each (the last perhaps of fewer), every clip a WebP
strip of its frames. A clip is a function of the set's seed and of its number, so a later call adds to what is there.
"""

import hashlib
import io
import json
import multiprocessing
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from diffusers.utils.logging import tqdm

from visar.data.clips import pack_clip
from visar.data.emoji_build import plain_json, write_archive
from visar.io.files import atomic_write, shown

SHARD = 500
PATTERN = "clips-*.zip"
FRAMES, SIZE = 16, 64


@dataclass(frozen=True)
class DrawnClip:
    """A clip and what is known about it.

    Attributes:
        frames: uint8 [16, 64, 64, 3].
        labels: one number per column of the set.
        caption: what it shows, in words; "" where the set has none.
        split: 0 train, 1 val, 2 test.
    """

    frames: np.ndarray
    labels: tuple[int, ...]
    caption: str
    split: int


Draw = Callable[[int, Sequence[int]], list[DrawnClip]]
"""(seed, numbers) -> the clips of these numbers; importable, so that other processes can call it."""


def read_shard(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Clips uint8 [N, T, H, W, 3] of a file and the facts about them.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            facts = _facts(archive)
            clips = np.empty((facts["count"], facts["frames"], facts["size"], facts["size"], 3), np.uint8)
            for row in range(facts["count"]):
                with PIL.Image.open(io.BytesIO(archive.read(f"clip_{row:04d}.webp"))) as image:
                    clips[row] = np.asarray(image.convert("RGB")).reshape(clips.shape[1:])
    except Exception as error:  # of foreign or damaged archives, facts and images may have any form
        raise ValueError(
            f"{shown(path)} is damaged or not a set of clips ({type(error).__name__}: {error})"
        ) from error
    return clips, facts


def _facts(archive: zipfile.ZipFile) -> dict[str, Any]:
    facts = json.loads(archive.read("meta.json"))
    if facts["format"] != 1:
        raise ValueError(f"format {facts['format']}")
    return facts


def pack_shard(first: int, seed: int, kind: str, columns: dict[str, list[str]], clips: Sequence[DrawnClip]) -> dict:
    """Members of a shard's file, by name."""
    pixels = hashlib.sha256()
    for clip in clips:
        pixels.update(clip.frames.tobytes())
    facts = {
        "format": 1,
        "kind": kind,
        "seed": seed,
        "first": first,
        "count": len(clips),
        "frames": FRAMES,
        "size": SIZE,
        "columns": columns,
        "labels": [list(clip.labels) for clip in clips],
        "captions": [clip.caption for clip in clips],
        "split": "".join(str(clip.split) for clip in clips),
        "drawn_sha256": pixels.hexdigest(),
    }
    return {f"clip_{row:04d}.webp": pack_clip(clip.frames) for row, clip in enumerate(clips)} | {
        "meta.json": plain_json(facts)
    }


def _make_shard(first: int, *, out: Path, count: int, seed: int, kind: str, columns: dict, draw: Draw) -> None:
    numbers = range(first, min(first + SHARD, count))
    write_archive(_place(out, first), pack_shard(first, seed, kind, columns, draw(seed, numbers)))


def _place(out: Path, first: int) -> Path:
    return out / f"clips-{first // SHARD:05d}.zip"


def build_shards(
    out: Path, *, count: int, seed: int, kind: str, columns: dict[str, list[str]], draw: Draw, processes: int = 1
) -> list[Path]:
    """Completes a folder of clips; files that are whole stay as they are.

    Args:
        out: the folder.
        count: clips of the set.
        seed: of the set.
        kind: name of the set.
        columns: names of the labels, by column.
        draw: draws clips.
        processes: that draw.

    Returns: the files, in order.

    Raises:
        ValueError: no clip wanted, or the folder holds clips of another kind or seed, or damaged ones.
    """
    if count < 1:
        raise ValueError(f"clips {count}; at least 1 is needed")
    out.mkdir(parents=True, exist_ok=True)
    firsts = list(range(0, count, SHARD))
    missing = [first for first in firsts if not _is_whole(_place(out, first), first, count, seed, kind)]
    make = partial(_make_shard, out=out, count=count, seed=seed, kind=kind, columns=columns, draw=draw)
    attribution = resources.files("visar.data").joinpath("ATTRIBUTION.md").read_bytes()
    with atomic_write(out / "ATTRIBUTION.md") as temporary:
        temporary.write_bytes(attribution)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context) if processes > 1 and len(missing) > 1 else None
    with pool or nullcontext():
        made = (pool.map if pool else map)(make, missing)
        for _ in tqdm(made, desc=f"{SHARD} clips each", total=len(missing), disable=None):
            pass
    return [_place(out, first) for first in firsts]


def _is_whole(path: Path, first: int, count: int, seed: int, kind: str) -> bool:
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            facts = _facts(archive)
        found = facts["kind"], facts["seed"], facts["first"]
    except (zipfile.BadZipFile, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{shown(path)} is damaged or not a set of clips ({error}); remove it") from error
    if found != (kind, seed, first):
        raise ValueError(f"{shown(path)} holds clips {found[0]} of seed {found[1]}; choose another folder")
    return facts["count"] >= min(SHARD, count - first)
