"""Clips as files: what is written is read again, contact sheets, and what cannot be written or read."""

import builtins

import numpy as np
import PIL.Image
import pytest

from visar.io.video import check_video_output, contact_sheet, evenly, read_video, side_by_side, write_video


def frames(count: int = 5, width: int = 32, height: int = 24) -> list[PIL.Image.Image]:
    """A light bar that moves to the right over a dark ground."""
    pixels = np.full((count, height, width, 3), (30, 60, 90), np.uint8)
    for time in range(count):
        pixels[time, :, 4 * time : 4 * time + 8] = (220, 200, 40)
    return [PIL.Image.fromarray(each) for each in pixels]


def stacked(clip: list[PIL.Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in clip])


@pytest.mark.parametrize("ending, error", [(".webp", 0), (".gif", 8), (".mp4", 40)])
def test_what_is_written_is_read_again(ending, error, tmp_path):
    if ending == ".mp4":
        pytest.importorskip("av")
    path = tmp_path / f"clip{ending}"
    write_video(path, frames(), fps=10.0)
    found = read_video(path)
    assert found.shape == (5, 24, 32, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - stacked(frames())).mean() <= error / 4
    assert np.percentile(np.abs(found.astype(int) - stacked(frames())), 90) <= error
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_frames_a_second(tmp_path):
    av = pytest.importorskip("av")
    for ending in ("webp", "gif"):
        write_video(tmp_path / f"clip.{ending}", frames(), fps=5.0)
        with PIL.Image.open(tmp_path / f"clip.{ending}") as image:
            image.seek(1)
            image.load()
            assert image.info["duration"] == 200 and image.info["loop"] == 0
    write_video(tmp_path / "clip.mp4", frames(), fps=5.0)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 5 and container.streams.video[0].codec_context.name == "h264"


def test_sheets_and_clips_side_by_side():
    clips = [frames(), frames()[::-1]]
    sheet = contact_sheet(clips)
    assert sheet.size == (2 + 5 * 34, 2 + 2 * 26)
    assert sheet.crop((2, 2, 34, 26)).tobytes() == clips[0][0].tobytes()
    assert sheet.crop((2 + 4 * 34, 28, 2 + 4 * 34 + 32, 52)).tobytes() == clips[1][4].tobytes()
    together = side_by_side(clips)
    assert len(together) == 5 and together[3].crop((36, 2, 68, 26)).tobytes() == clips[1][3].tobytes()
    assert side_by_side(clips[:1]) == clips[0]
    for call in (contact_sheet, side_by_side):
        with pytest.raises(ValueError, match=r"clips of one length are needed; got \[3, 5\]"):
            call([frames(), frames(3)])


def test_frames_are_spread_evenly():
    assert evenly(31, 16).tolist() == list(range(0, 31, 2)) and evenly(16, 16).tolist() == list(range(16))
    with pytest.raises(ValueError, match="15 frames; at least 16 are needed"):
        evenly(15, 16)


@pytest.mark.parametrize(
    "name, clip, fps, message",
    [
        ("clip.avi", frames(), 8.0, "its name must end in .mp4 or .gif or .webp"),
        ("clip.gif", frames(), 0.0, "fps 0.0; allowed: above 0, at most 120"),
        ("clip.gif", frames(), 121.0, "fps 121.0"),
        ("clip.gif", [], 8.0, "frames of one size; got none"),
        ("clip.gif", [*frames(1), *frames(1, width=16)], 8.0, "frames of one size"),
        ("clip.mp4", frames(width=31), 8.0, "frames of 31 x 24; an .mp4 needs even sides, .gif and .webp take any"),
    ],
)
def test_what_is_not_written(name, clip, fps, message, tmp_path):
    if name.endswith("mp4"):
        pytest.importorskip("av")
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, clip, fps)
    assert not list(tmp_path.iterdir())


def test_odd_sides_are_written_otherwise(tmp_path):
    write_video(tmp_path / "clip.webp", frames(width=31))
    assert np.array_equal(read_video(tmp_path / "clip.webp"), stacked(frames(width=31)))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "missing.mp4"])
def test_unreadable_videos_are_named(name, tmp_path):
    pytest.importorskip("av")
    if name != "missing.mp4":
        (tmp_path / name).write_bytes(b"no video" * 20)
    with pytest.raises(ValueError, match=f"{name} is not a readable video"):
        read_video(tmp_path / name)


def test_without_pyav(monkeypatch, tmp_path):
    original = builtins.__import__

    def without(name, *rest):
        if name == "av":
            raise ImportError(name)
        return original(name, *rest)

    (tmp_path / "clip.mp4").touch()
    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: read_video(tmp_path / "clip.mp4"), lambda: check_video_output(tmp_path / "new.mp4", 8.0)):
        with pytest.raises(ImportError, match=r"needs PyAV: pip install 'torch-visar\[video\]'"):
            call()
    write_video(tmp_path / "clip.gif", frames())
    assert len(read_video(tmp_path / "clip.gif")) == 5
