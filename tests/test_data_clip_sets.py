"""Sets of clips: clips drawn by number, folders that are completed, videos, stored sets, and what is refused."""

import hashlib
import importlib.util
import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from visar.cli.main import main
from visar.data import clip_archives, doom, moving_emoji
from visar.data.clip_archives import DrawnClip, build_shards, read_shard
from visar.data.clip_sets import load_clip_set
from visar.data.doom import MAPS, SCENARIOS, draw_doom, split_of_map
from visar.data.emoji import pack_pixels
from visar.data.images import load_image_set
from visar.io.video import write_video


def drawn(seed: int, number: int) -> DrawnClip:
    """A grey level a frame that says which clip it is."""
    levels = (np.arange(16) + 10 * number + seed) % 256
    frames = np.broadcast_to(levels[:, None, None, None], (16, 64, 64, 3)).astype(np.uint8)
    return DrawnClip(frames, (number % 2, number % 3), f"clip {number}", 1 if number % 5 == 4 else 0)


def draw(seed: int, numbers, made: list[int]) -> list[DrawnClip]:
    made += list(numbers)
    return [drawn(seed, number) for number in numbers]


COLUMNS = {"class": ["a", "b"], "other": ["x", "y", "z"]}


def build(out: Path, count: int, seed: int = 0, kind: str = "toy") -> list[int]:
    made: list[int] = []
    build_shards(out, count=count, seed=seed, kind=kind, columns=COLUMNS, draw=partial(draw, made=made))
    return made


def test_a_folder_is_completed_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_archives, "SHARD", 4)
    assert build(tmp_path, 6) == list(range(6))
    assert build(tmp_path, 6) == []
    before = (tmp_path / "clips-00000.zip").read_bytes()
    assert build(tmp_path, 10) == [4, 5, 6, 7, 8, 9]  # the second file was not full
    assert (tmp_path / "clips-00000.zip").read_bytes() == before
    images = load_clip_set(tmp_path, 16)
    assert images.images.shape == (10, 16, 64, 64, 3) and images.num_frames == 16 and images.image_size == 64
    for number in range(10):
        expected = drawn(0, number)
        assert np.abs(images.images[number].astype(int) - expected.frames).max() <= 3
        assert images.labels_NA[number].tolist() == list(expected.labels)
        assert images.captions is not None and images.captions[number] == expected.caption
    assert images.split_N.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert images.vocabulary.attributes == {name: tuple(values) for name, values in COLUMNS.items()}
    assert load_clip_set(tmp_path, 5, 32).images.shape == (10, 5, 32, 32, 3)
    assert (tmp_path / "ATTRIBUTION.md").is_file()


def test_folders_of_other_sets_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_archives, "SHARD", 4)
    build(tmp_path, 6)
    for change in (dict(seed=1), dict(kind="other")):
        with pytest.raises(ValueError, match="clips-00000.zip holds clips toy of seed 0; choose another folder"):
            build(tmp_path, 6, **change)
    with pytest.raises(ValueError, match="clips 0; at least 1 is needed"):
        build(tmp_path, 0)
    build(tmp_path / "others", 5, seed=1)
    (tmp_path / "others" / "clips-00001.zip").replace(tmp_path / "clips-00001.zip")
    with pytest.raises(ValueError, match="clips-00001.zip and .*clips-00000.zip are of two sets: they differ in seed"):
        load_clip_set(tmp_path, 16)
    (tmp_path / "clips-00001.zip").write_bytes(b"cut off")
    for call in (lambda: load_clip_set(tmp_path, 16), lambda: build(tmp_path, 6)):
        with pytest.raises(ValueError, match="clips-00001.zip is damaged or not a set of clips"):
            call()


# ---------------------------------------------------------------------------------------------------------- the sets
def emoji_set(path: Path) -> Path:
    """Three drawings on white: a disc with a white hole, a square, a bar."""
    rows, columns = np.mgrid[:64, :64]
    distance = np.hypot(rows - 32, columns - 32)
    images = np.full((3, 64, 64, 3), 255, np.uint8)
    images[0][(distance < 28) & (distance > 10)] = (200, 30, 30)
    images[1, 8:56, 8:56] = (30, 160, 60)
    images[2, 28:36, 4:60] = (20, 40, 200)
    meta = dict(labels=["disc", "square", "bar"], label=[0, 1, 2])
    meta["pixels_sha256"] = hashlib.sha256(images.tobytes()).hexdigest()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", json.dumps(meta))
        archive.writestr("pixels.npy.xz", pack_pixels(images))
    return path


def test_what_is_cut_out_is_what_the_ground_surrounds(tmp_path):
    emoji_set(tmp_path / "emoji64.zip")
    images, _ = moving_emoji.read_emoji(tmp_path / "emoji64.zip")
    disc = np.asarray(moving_emoji.cut_out(images[0]))
    assert disc.shape[:2] == (55, 55) and disc[0, 0, 3] == 0
    assert disc[27, 27].tolist() == [255, 255, 255, 255] and disc[27, 3].tolist() == [200, 30, 30, 255]
    assert np.asarray(moving_emoji.cut_out(images[2]))[..., 3].all()


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    """The set, one drawing a split; discs are for training."""
    monkeypatch.setattr(moving_emoji, "shipped_splits", lambda digest, count: np.array([0, 1, 2]))
    moving_emoji._sprites.cache_clear()
    yield emoji_set(tmp_path / "emoji64.zip")
    moving_emoji._sprites.cache_clear()


def test_moving_emoji_are_functions_of_seed_and_number(emoji):
    numbers = [*range(31), 84]  # one for validation, and some for the test, among them
    clips = moving_emoji.draw_moving_emoji(0, numbers, emoji)
    again = moving_emoji.draw_moving_emoji(0, [30, 2], emoji)
    for one, other in zip(again, (clips[30], clips[2]), strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert (one.labels, one.caption, one.split) == (other.labels, other.caption, other.split)
    other_seed = moving_emoji.draw_moving_emoji(1, [2], emoji)[0]
    assert not np.array_equal(other_seed.frames, clips[2].frames)
    assert {clip.split for clip in clips} == {0, 1, 2} and {clip.labels[0] for clip in clips} == {0, 1, 2}
    names = ("disc", "square", "bar")
    for clip in clips:
        assert clip.caption.count(" and ") == clip.labels[0] and clip.caption.startswith(names[clip.split])
        assert clip.caption.split(" and ")[0].endswith(f"moving {moving_emoji.DIRECTIONS[clip.labels[1]]}")
        assert np.abs(np.diff(clip.frames.astype(int), axis=0)).mean() > 0.3


def test_a_sprite_moves_where_its_caption_says(emoji):
    alone = [clip for clip in moving_emoji.draw_moving_emoji(0, range(60), emoji) if clip.labels[0] + clip.split == 0]
    agree = 0
    for clip in alone:
        ground = np.median(clip.frames[0].reshape(-1, 3), axis=0)
        places = [np.argwhere(np.abs(frame - ground).max(-1) > 40).mean(0) for frame in clip.frames[:3].astype(int)]
        row, column = places[2] - places[0]
        word = moving_emoji.DIRECTIONS[clip.labels[1]]
        found = [("down", row > 0.7), ("up", row < -0.7), ("right", column > 0.7), ("left", column < -0.7)]
        agree += all((name in word) == moves for name, moves in found)
    # The others are thrown back by a wall at once.
    assert len(alone) >= 12 and agree >= 0.7 * len(alone), (agree, len(alone))


def test_maps_of_doom_are_split():
    splits = [split_of_map(place, level) for place, levels in MAPS.items() for level in levels]
    assert len(splits) == 68 and min(splits.count(1), splits.count(2)) >= 3 and splits.count(0) >= 50
    assert not any(split_of_map(place, "map01") for place in SCENARIOS)


@pytest.mark.skipif(importlib.util.find_spec("vizdoom") is None, reason="ViZDoom is not installed (extra doom)")
def test_clips_of_doom_are_functions_of_seed_and_number(monkeypatch):
    # Of two places only: an engine takes a second to start.
    monkeypatch.setattr(doom, "MAPS", {"freedoom2": ("MAP01", "MAP13")})
    monkeypatch.setattr(doom, "SCENARIOS", ("my_way_home",))
    clips = draw_doom(0, range(6))
    again = draw_doom(0, [5, 1])

    def digest(clip: DrawnClip) -> str:
        return hashlib.sha256(clip.frames.tobytes() + repr((clip.labels, clip.split)).encode()).hexdigest()

    assert [digest(clip) for clip in again] == [digest(clips[5]), digest(clips[1])]
    assert digest(draw_doom(1, [1])[0]) != digest(clips[1])
    assert len({digest(clip) for clip in clips}) == 6
    for clip in clips:
        assert clip.frames.shape == (16, 64, 64, 3) and len(clip.labels) == 16
        assert all(0 <= action < len(doom.ACTIONS) for action in clip.labels[1:])
    assert np.mean([np.abs(np.diff(clip.frames.astype(int), axis=0)).mean() for clip in clips]) > 2.0


def test_doom_without_its_engine(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "vizdoom", None)
    assert main(["data", "doom", "--out", str(tmp_path), "--clips", "1"]) == 1
    assert "pip install 'torch-visar[doom]'" in capsys.readouterr().err


def test_moving_emoji_by_command(emoji, tmp_path, capsys):
    arguments = ["data", "moving-emoji", "--emoji", str(tmp_path), "--out", str(tmp_path / "set"), "--clips", "3"]
    assert main(arguments) == 0
    clips, facts = read_shard(tmp_path / "set" / "clips-00000.zip")
    assert clips.shape == (3, 16, 64, 64, 3) and facts["seed"] == 0 and facts["columns"] == moving_emoji.COLUMNS
    assert main([*arguments[:2], "--emoji", str(tmp_path / "none"), "--out", str(tmp_path / "set")]) == 1
    assert "no emoji set at" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- videos and arrays
def write_videos(folder: Path, ending: str = "gif", count: int = 6, frames: int = 5) -> None:
    for number in range(count):
        images = [PIL.Image.new("RGB", (20, 12), (40 * number, 30 * time, 90)) for time in range(frames)]
        name = folder / ("cats" if number % 2 else "dogs") / f"{number}.{ending}"
        name.parent.mkdir(parents=True, exist_ok=True)
        write_video(name, images)


def test_a_folder_of_videos(tmp_path, caplog):
    write_videos(tmp_path)
    images = load_clip_set(tmp_path, 3, 8)
    assert images.images.shape == (6, 3, 8, 8, 3) and images.vocabulary.attributes == {"class": ("cats", "dogs")}
    assert images.labels_NA[:, 0].tolist() == [0, 0, 0, 1, 1, 1]  # by name: cats/1, cats/3, ..., dogs/4
    greens = images.images[0, :, 4, 4, 1].astype(int)
    assert np.abs(greens - (0, 60, 120)).max() <= 12  # frames 0, 2, 4 of 5
    assert (images.split_N == 1).sum() >= 1
    with pytest.raises(ValueError, match="image_size None: videos may be of any size"):
        load_clip_set(tmp_path, 3)
    with pytest.raises(ValueError, match=r"6 unreadable.*\n.*1.gif is too short: 5 frames; at least 6 are needed"):
        load_clip_set(tmp_path, 6, 8)
    (tmp_path / "cats" / "9.gif").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 unreadable.*\n.*cats/9.gif is not a readable video"):
        load_clip_set(tmp_path, 3, 8)
    assert len(load_clip_set(tmp_path, 3, 8, skip_unreadable=True)) == 6 and "9.gif" in caplog.text


def test_videos_by_pyav(tmp_path):
    pytest.importorskip("av")
    write_videos(tmp_path, "mp4", 2)
    assert load_clip_set(tmp_path, 5, 8).images.shape == (2, 5, 8, 8, 3)


def test_arrays_of_clips_and_what_is_none(tmp_path):
    path = tmp_path / "clips.npz"
    clips = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8, 3), np.uint8)
    np.savez(path, clips=clips, labels=np.arange(8) % 3)
    images = load_clip_set(path, 3)
    assert np.array_equal(images.images, clips) and images.vocabulary.attributes == {"class": ("0", "1", "2")}
    with pytest.raises(ValueError, match="clips.npz: clips of 3 frames; the tokenizer's have 16"):
        load_clip_set(path, 16)
    with pytest.raises(ValueError, match="images or arr_0 is needed"):
        load_image_set(path)
    np.savez(path, images=clips[:, 0])
    with pytest.raises(ValueError, match=r"has images uint8 \(8, 8, 8, 3\); clips, uint8 .N, T, H, W, 3., are needed"):
        load_clip_set(path, 3)
    np.savez(path, clips=clips, labels=np.arange(7))
    with pytest.raises(ValueError, match=r"labels are int64 \(7,\); 8 whole numbers >= 0"):
        load_clip_set(path, 3)
    for place, message in ((tmp_path / "none", "no set of clips at"), (tmp_path, "has no videos")):
        with pytest.raises(ValueError, match=message):
            load_clip_set(place, 3, 8)
    (tmp_path / "text.txt").touch()
    with pytest.raises(ValueError, match="text.txt is not a set of clips"):
        load_clip_set(tmp_path / "text.txt", 3)
