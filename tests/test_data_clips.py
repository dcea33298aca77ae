"""Animated emoji: which frames are kept, and the file."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from visar.data.clips import clip_facts, draw_clip, pack_clip, read_clips
from visar.data.emoji_build import Emoji, plain_json, write_archive


def loop(places: list[int]) -> bytes:
    """An animation of 64 x 64: a dark square whose left side is at the places."""
    frames = []
    for i, place in enumerate(places):
        frame = np.full((64, 64, 3), 255, np.uint8)
        frame[20:44, place : place + 24] = (10, 20, 30)
        frame[0, 0] = i  # encoders merge equal frames
        frames.append(PIL.Image.fromarray(frame))
    blob = io.BytesIO()
    frames[0].save(blob, "WEBP", save_all=True, append_images=frames[1:], lossless=True, duration=40)
    return blob.getvalue()


def left_sides(clip: np.ndarray) -> list[int]:
    return [int((frame[32, :, 0] < 128).nonzero()[0][0]) for frame in clip]


def test_frames_are_spread_over_the_part_that_moves() -> None:
    clip = draw_clip(loop([0] * 10 + list(range(0, 31)) + [30] * 10))
    assert clip is not None and clip.shape == (16, 64, 64, 3) and clip.dtype == np.uint8
    assert left_sides(clip) == list(range(0, 31, 2))


def test_short_movements_are_shown_with_what_is_around_them() -> None:
    clip = draw_clip(loop([0] * 14 + [20] + [40] * 16))
    assert clip is not None and left_sides(clip) == [0] * 7 + [20] + [40] * 8


@pytest.mark.parametrize("places", [list(range(12)), [3] * 40, [0] * 39 + [1]])
def test_loops_that_are_short_or_hardly_move_are_left_out(places: list[int]) -> None:
    assert draw_clip(loop(places)) is None


def test_file_is_read_back_and_its_damage_is_seen(tmp_path: Path) -> None:
    clips = [draw_clip(loop(list(range(first, first + 20)))) for first in (0, 15)]
    strips = [pack_clip(clip) for clip in clips if clip is not None]
    emoji = [Emoji(f"1f60{i}", f"face {i}", 0, "smileys", "face", (), i) for i in range(2)]
    path = tmp_path / "clips.zip"
    files = {f"clip_{i:04d}.webp": strip for i, strip in enumerate(strips)}
    write_archive(path, {**files, "meta.json": plain_json(clip_facts(emoji, strips, still=3))})
    read, facts = read_clips(path)
    assert read.shape == (2, 16, 64, 64, 3)
    error = read.astype(float) - np.stack([clip for clip in clips if clip is not None])
    assert np.sqrt(np.square(error).mean()) < 6.0
    assert facts["labels"] == ["face 0", "face 1"] and facts["dropped"] == {"still": 3}
    assert len(facts["split"]) == facts["count"] == 2
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:200] + bytes(100) + whole[300:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or not a set of clips"):
            read_clips(path)
