"""Animated emoji: 729 clips of 16 frames, 64 x 64, from the animated Fluent set; how they are read and built.

Licences and attributions: visar/data/ATTRIBUTION.md. Clips are stored as lossy WebP strips. They are split by concept
key alone, unlike the still images.
"""

import hashlib
import io
import json
import multiprocessing
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import PIL.Image
from diffusers.utils.logging import tqdm

from visar.data.emoji_build import (
    SIZE,
    Emoji,
    key_split,
    normal_code,
    on_white,
    plain_json,
    read_emoji_names,
    write_archive,
)
from visar.data.emoji_splits import SPLITS
from visar.data.packages import CLIP_PACKAGES, NAMES, fetch_package, read_members
from visar.io.files import atomic_write

FILE = "emojiclips.zip"
FRAMES = 16
_STILL = 0.15  # levels of 0 ... 255: a loop whose largest mean change from frame to frame is less does not move
_MOVING_SHARE = 0.02  # of the largest change: frames before and after the first and last larger one are cut off
_LEAST_CHANGE = 1.0  # mean change between the frames kept, in levels
_ATTRIBUTION = "Fluent Emoji (animated), Copyright Microsoft Corporation; WebP packaging Copyright LobeHub"


def read_clips(path: str | Path) -> tuple[np.ndarray, dict]:
    """Clips uint8 [N, 16, 64, 64, 3] and the facts about them.

    The archive's own checksums guard the files. The recorded sha256 of the decoded frames is for information: decoders
    of lossy files may round differently.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            facts = json.loads(archive.read("meta.json"))
            shape = (facts["frames"], facts["size"], facts["size"], 3)
            strips = (archive.read(f"clip_{i:04d}.webp") for i in range(facts["count"]))
            clips = np.stack([_strip(blob).reshape(shape) for blob in strips])
    except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a set of clips ({error})") from error
    return clips, facts


def _strip(blob: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(blob)) as image:
        return np.asarray(image.convert("RGB"))


def draw_clip(blob: bytes) -> np.ndarray | None:
    """16 frames spread evenly over the part of a loop that moves, uint8 [16, 64, 64, 3]; None where nothing does."""
    with PIL.Image.open(io.BytesIO(blob)) as image:
        count = getattr(image, "n_frames", 1)
        if count < FRAMES:
            return None
        drawn = []
        for number in range(count):
            image.seek(number)
            drawn.append(on_white(image))
    frames = np.stack(drawn)
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
    if change.max() < _STILL:
        return None
    moving = np.flatnonzero(change > _MOVING_SHARE * change.max())
    first, last = int(moving[0]), int(moving[-1]) + 1
    if last - first < FRAMES:
        first, last = 0, count - 1
    clip = frames[np.round(np.linspace(first, last, FRAMES)).astype(int)]
    kept = np.abs(np.diff(clip.astype(np.int16), axis=0)).mean()
    return clip if kept >= _LEAST_CHANGE else None


def pack_clip(clip: np.ndarray) -> bytes:
    """A clip as one WebP image, frames below each other (quality 90)."""
    blob = io.BytesIO()
    PIL.Image.fromarray(clip.reshape(-1, clip.shape[2], 3)).save(blob, "WEBP", quality=90, method=6)
    return blob.getvalue()


def clip_facts(emoji: Sequence[Emoji], strips: Sequence[bytes], still: int) -> dict:
    """The content of meta.json.

    Args:
        emoji: emoji of every clip, in file order.
        strips: its encoded frames.
        still: number of images left out because they do not move.
    """
    classes = sorted({each.group for each in emoji})
    pixels = hashlib.sha256()
    for strip in strips:
        pixels.update(_strip(strip).tobytes())
    return {
        "format": 1,
        "size": SIZE,
        "frames": FRAMES,
        "count": len(emoji),
        "splits": list(SPLITS),
        "classes": classes,
        "labels": [each.name for each in emoji],
        "hex": [each.code for each in emoji],
        "class": [classes.index(each.group) for each in emoji],
        "sub": [each.subgroup for each in emoji],
        "tone": [each.tone for each in emoji],
        "split": "".join(str(key_split("fluent-3d", each.code)) for each in emoji),
        "licences": {"fluent-anim": {"spdx": "MIT", "attribution": _ATTRIBUTION}},
        "pixels_sha256": pixels.hexdigest(),
        "dropped": {"still": still},
    }


def build_clips(out: str | Path, processes: int | None = None) -> Path:
    """Builds emojiclips.zip and, beside it, ATTRIBUTION.md; 730 MB of downloads, kept in the folder `packages`.

    A finished file is left as it is.

    Args:
        out: folder.
        processes: that decode; None = one a core.

    Returns: path of emojiclips.zip.

    Raises:
        ValueError: no npm client, a failed download, or a package with another sha256 than recorded.
    """
    out = Path(out)
    if (out / FILE).is_file():
        return out / FILE
    tarballs = [fetch_package(package, out / "packages") for package in CLIP_PACKAGES]
    names = read_emoji_names(fetch_package(NAMES, out / "packages"))
    found = []
    for tarball in tarballs:
        for name, blob in read_members(tarball, r".*\.webp"):
            emoji = names.get(normal_code(Path(name).stem))
            if emoji is not None and emoji.tone == 0:
                found.append((emoji, blob))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count() or 1, mp_context=context) as pool:
        clips = pool.map(draw_clip, [blob for _, blob in found], chunksize=4)
        drawn = list(tqdm(clips, desc="draw clips", total=len(found)))
    moving = [(emoji, clip) for (emoji, _), clip in zip(found, drawn, strict=True) if clip is not None]
    moving.sort(key=lambda each: (key_split("fluent-3d", each[0].code), each[0].order, each[0].code))
    strips = [pack_clip(clip) for _, clip in moving]
    facts = clip_facts([emoji for emoji, _ in moving], strips, len(found) - len(moving))
    attribution = resources.files("visar.data").joinpath("ATTRIBUTION.md").read_bytes()
    with atomic_write(out / "ATTRIBUTION.md") as temporary:
        temporary.write_bytes(attribution)
    files = {f"clip_{i:04d}.webp": strip for i, strip in enumerate(strips)}
    write_archive(out / FILE, {**files, "meta.json": plain_json(facts)})
    return out / FILE
