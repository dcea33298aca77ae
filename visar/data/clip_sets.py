"""Sets of clips of one size and length with labels, captions and splits, from any of the usual places."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from visar.data.clip_archives import PATTERN, read_shard
from visar.data.clips import FILE as EMOJI_CLIPS
from visar.data.clips import read_clips
from visar.data.crops import center_crop
from visar.data.folders import SPLITS, hold_out, sort_names, split_folders
from visar.data.images import ImageSet, make_image_set
from visar.io.arrays import read_arrays
from visar.io.files import shown
from visar.io.video import EXTENSIONS, evenly, read_video

logger = logging.getLogger(__name__)


def load_clip_set(
    source: str | Path, num_frames: int, image_size: int | None = None, skip_unreadable: bool = False
) -> ImageSet:
    """Clips from a place; `images` of the set are uint8 [N, T, H, W, 3].

    Args:
        source: emojiclips.zip, or the folder that holds it; a folder that `visar data doom` or `visar data
            moving-emoji` made; an .npz with clips (uint8 [N, T, H, W, 3]) and perhaps labels; or a folder of videos
            with a subfolder a class, perhaps below train and val.
        num_frames: T; of stored clips the first T frames are taken, of videos T that are spread evenly over them.
        image_size: side in pixels: frames are cropped to their centre square and resized; None keeps the size of sets
            that have one, and is an error for videos.
        skip_unreadable: leave out videos that cannot be read or are too short, with a warning that names them.

    Raises:
        ValueError: no such place, no clip in it, clips of too few frames, unreadable videos (each named).
        ImportError: videos, and PyAV is not installed.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"no set of clips at {shown(path)}: neither a file nor a folder (visar data moving-emoji)")
    if path.is_dir() and (path / EMOJI_CLIPS).is_file():
        path = path / EMOJI_CLIPS
    if path.suffix == ".zip":
        made = _emoji_clips(path)
    elif path.suffix == ".npz":
        made = _npz_clips(path)
    elif path.is_dir() and any(path.glob(PATTERN)):
        made = _shards(path)
    elif path.is_dir():
        return _videos(path, num_frames, image_size, skip_unreadable)
    else:
        raise ValueError(f"{shown(path)} is not a set of clips: a .zip, an .npz or a folder is needed")
    clips, labels, attributes, split, captions = made
    if clips.shape[1] < num_frames:
        raise ValueError(f"{shown(path)}: clips of {clips.shape[1]} frames; the tokenizer's have {num_frames}")
    clips = clips[:, :num_frames]
    if image_size not in (None, clips.shape[2]) or clips.shape[2] != clips.shape[3]:
        side = image_size or min(clips.shape[2:4])
        clips = np.stack([_resized(clip, side) for clip in clips])
    return make_image_set(shown(path.name), clips, labels, attributes, split, captions)


Parts = tuple[np.ndarray, np.ndarray, dict[str, tuple[str, ...]], np.ndarray, list[str] | None]


def _resized(clip_THWC: np.ndarray, side: int) -> np.ndarray:
    return np.stack([np.asarray(center_crop(PIL.Image.fromarray(frame), side)) for frame in clip_THWC])


def _emoji_clips(path: Path) -> Parts:
    clips, facts = read_clips(path)
    try:
        labels = np.array(facts["class"], np.int64)[:, None]
        split = np.array([int(digit) for digit in facts["split"]])
        return clips, labels, {"class": tuple(facts["classes"])}, split, list(facts["labels"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{shown(path)} is damaged or not a set of clips ({error})") from error


def _shards(path: Path) -> Parts:
    files = sorted(path.glob(PATTERN))
    read = [read_shard(file) for file in files]
    facts: list[dict[str, Any]] = [each for _, each in read]
    for file, each in zip(files, facts, strict=True):
        for name in ("kind", "seed", "columns", "frames", "size"):
            if each[name] != facts[0][name]:
                raise ValueError(f"{shown(file)} and {shown(files[0])} are of two sets: they differ in {name}")
    captions = [caption for each in facts for caption in each["captions"]]
    return (
        np.concatenate([clips for clips, _ in read]),
        np.array([row for each in facts for row in each["labels"]], np.int64),
        {name: tuple(values) for name, values in facts[0]["columns"].items()},
        np.array([int(digit) for each in facts for digit in each["split"]]),
        captions if any(captions) else None,
    )


def _npz_clips(path: Path) -> Parts:
    arrays = read_arrays(path)
    clips = arrays.get("clips")
    if clips is None or clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[4] != 3 or not clips.size:
        found = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in arrays.items())
        raise ValueError(f"{shown(path)} has {found}; clips, uint8 [N, T, H, W, 3], are needed, N >= 1")
    labels = arrays.get("labels", np.zeros(len(clips), np.int64))
    if labels.shape != (len(clips),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"{shown(path)}: labels are {labels.dtype} {labels.shape}; {len(clips)} whole numbers >= 0")
    classes = tuple(str(number) for number in range(int(labels.max()) + 1))
    split = hold_out([f"{path.name}/{row}" for row in range(len(clips))])
    captions = [str(text) for text in arrays["captions"]] if "captions" in arrays else None
    return clips, labels.astype(np.int64)[:, None], {"class": classes}, split, captions


def _videos(path: Path, num_frames: int, image_size: int | None, skip_unreadable: bool) -> ImageSet:
    if image_size is None or image_size < 1:
        raise ValueError(f"image_size {image_size}: videos may be of any size; give the side (--image-size), >= 1")
    names = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    parts = split_folders(names)
    names = [name for name in names if not parts or name.partition("/")[0] in parts]
    clips, kept, errors = [], [], []
    for name in names:
        try:
            frames = read_video(path / name)
            clips.append(_resized(frames[_spread(frames, num_frames, path / name)], image_size))
            kept.append(name)
        except ValueError as error:
            errors.append(str(error))
    if errors and not (skip_unreadable and kept):
        remedy = "repair or remove them (training leaves them out with --skip-unreadable)"
        raise ValueError(f"{len(errors)} unreadable: {remedy}\n" + "\n".join(errors))
    for line in errors:
        logger.warning("left out: %s", line)
    if not kept:
        raise ValueError(f"{shown(path)} has no videos ({', '.join(EXTENSIONS)}) and no clips ({PATTERN})")
    depth = 1 if parts else 0
    inner = [name.split("/") for name in kept]
    class_of = [shown(each[depth]) if len(each) > depth + 1 else "all" for each in inner]
    classes = sort_names(class_of)
    labels = np.array([[classes.index(name)] for name in class_of])
    known = np.array([SPLITS.index(parts[each[0]]) for each in inner]) if parts else None
    return make_image_set(shown(path.name), np.stack(clips), labels, {"class": classes}, hold_out(kept, known))


def _spread(frames: np.ndarray, num_frames: int, path: Path) -> np.ndarray:
    try:
        return evenly(len(frames), num_frames)
    except ValueError as error:
        raise ValueError(f"{shown(path)} is too short: {error}") from error
