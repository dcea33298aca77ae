"""Clips as files: .mp4 and videos by PyAV (extra `video`), animated .gif and .webp by Pillow; contact sheets."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from visar.io.files import atomic_write, check_file_output, shown
from visar.io.pictures import grid

Frames = Sequence[PIL.Image.Image]

WRITTEN_AS = (".mp4", ".gif", ".webp")  # endings of names of clips that commands write
EXTENSIONS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".gif")  # of videos that are read
FASTEST = 120.0  # frames a second; GIF and WebP count in whole milliseconds


def _av(what: str) -> Any:
    """PyAV.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{what} needs PyAV: pip install 'torch-visar[video]'") from error
    return av


def check_video_output(path: str | Path, fps: float) -> None:
    """Finds before the work that a clip could not be written.

    Raises:
        ValueError: another ending than WRITTEN_AS, a place that cannot be written to, or fps outside of its range.
        ImportError: an .mp4, and PyAV is not installed.
    """
    check_fps(fps)
    check_file_output(path, WRITTEN_AS)
    if Path(path).suffix.lower() == ".mp4":
        _av(f"writing {shown(path)}")


def check_fps(fps: float) -> None:
    """Checks a number of frames a second.

    Raises:
        ValueError: it is not above 0, or too large.
    """
    if not 0.0 < fps <= FASTEST:
        raise ValueError(f"fps {fps}; allowed: above 0, at most {FASTEST:g}")


def write_video(path: str | Path, frames: Frames, fps: float = 8.0) -> None:
    """Writes a clip, whole or not at all.

    .mp4 is H.264, which loses a little; .webp loses nothing; .gif has 256 colours a frame. The latter two repeat for
    ever.

    Args:
        path: its ending says how.
        frames: images of one size.
        fps: frames a second.

    Raises:
        ValueError: no frame, frames of several sizes, odd sides in an .mp4, or see `check_video_output`.
        ImportError: an .mp4, and PyAV is not installed.
    """
    check_video_output(path, fps)
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"a clip needs frames of one size; got {sorted(sizes) or 'none'}")
    ending = Path(path).suffix.lower()
    with atomic_write(path) as temporary:
        if ending == ".mp4":
            _write_mp4(temporary, frames, fps, shown(path))
            return
        settings: dict[str, Any] = dict(save_all=True, append_images=list(frames[1:]), loop=0)
        settings |= dict(lossless=True) if ending == ".webp" else dict(disposal=1)
        duration = max(1, round(1000.0 / fps))
        frames[0].save(temporary, format=ending[1:].upper(), duration=duration, **settings)


def _write_mp4(path: Path, frames: Frames, fps: float, name: str) -> None:
    av = _av(f"writing {name}")
    width, height = frames[0].size
    if width % 2 or height % 2:
        raise ValueError(f"{name}: frames of {width} x {height}; an .mp4 needs even sides, .gif and .webp take any")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "15"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def read_video(path: str | Path) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3].

    Animated .gif and .webp are read by Pillow, transparent parts white; all else by PyAV.

    Raises:
        ValueError: it cannot be read; names it.
        ImportError: PyAV is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{shown(path)} is not a readable video (no such file)")
    by_pillow = path.suffix.lower() in (".gif", ".webp")
    av: Any = None if by_pillow else _av(f"reading {shown(path)}")
    try:
        frames = _pillow_frames(path) if by_pillow else _av_frames(av, path)
    except Exception as error:  # of damaged files, decoders raise errors of any kind
        raise ValueError(f"{shown(path)} is not a readable video ({error or type(error).__name__})") from error
    if not frames:
        raise ValueError(f"{shown(path)} is not a readable video (it has no frames)")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{shown(path)} has frames of several sizes")
    return np.stack(frames)


def _av_frames(av: Any, path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _pillow_frames(path: Path) -> list[np.ndarray]:
    frames = []
    with PIL.Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            canvas = PIL.Image.new("RGBA", image.size, "white")
            canvas.alpha_composite(image.convert("RGBA"))
            frames.append(np.asarray(canvas.convert("RGB")))
    return frames


def evenly(count: int, wanted: int) -> np.ndarray:
    """Numbers of `wanted` of `count` frames, spread evenly over all of them, int64.

    Raises:
        ValueError: fewer frames than are wanted.
    """
    if count < wanted:
        raise ValueError(f"{count} frames; at least {wanted} are needed")
    return np.round(np.linspace(0, count - 1, wanted)).astype(np.int64)


def contact_sheet(clips: Sequence[Frames], zoom: int = 1) -> PIL.Image.Image:
    """Clips of one length below each other, the frames of each in a row.

    Raises:
        ValueError: no clip, clips of several lengths, or frames of several sizes.
    """
    return grid([frame for clip in clips for frame in clip], columns=_length(clips), zoom=zoom)


def side_by_side(clips: Sequence[Frames]) -> list[PIL.Image.Image]:
    """One clip in which all clips run at the same time, in a grid; a single clip is left as it is.

    Raises:
        ValueError: see `contact_sheet`.
    """
    length = _length(clips)
    if len(clips) == 1:
        return list(clips[0])
    return [grid([clip[number] for clip in clips]) for number in range(length)]


def _length(clips: Sequence[Frames]) -> int:
    lengths = {len(clip) for clip in clips}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"clips of one length are needed; got {sorted(lengths) or 'none'}")
    return lengths.pop()
