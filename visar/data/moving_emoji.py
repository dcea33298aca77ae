"""Clips of one to three emoji that bounce, turn and change their size on a plain ground: any number of them.

The idea is Moving MNIST's (arXiv 1502.04681, section 4.1), with drawings of the emoji set as sprites.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from visar.core.noise import Noise, Use
from visar.data.clip_archives import FRAMES, SIZE, DrawnClip, build_shards
from visar.data.emoji import FILE, read_emoji
from visar.data.emoji_splits import shipped_splits

DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
COUNTS = ("one", "two", "three")
COLUMNS = {"class": list(COUNTS), "direction": list(DIRECTIONS)}

_WHITE = 250  # levels from which on the ground of a drawing is transparent
_SIDES = (24, 36)  # of sprites, in pixels
_SPEEDS = (1.0, 3.5)  # pixels a frame
_TURN = 12.0  # degrees a frame
_GROWTH = 1.025  # a frame
_DRAWS = 8  # numbers for a sprite


def cut_out(pixels_HWC: np.ndarray) -> PIL.Image.Image:
    """A drawing as RGBA: what is white and connected to the border is transparent, and the rest is cut to its box."""
    white = (pixels_HWC >= _WHITE).all(-1)
    # A copy, because an image of an array may not be written to.
    ground = PIL.Image.fromarray(np.pad(np.where(white, 255, 0).astype(np.uint8), 1, constant_values=255)).copy()
    PIL.ImageDraw.floodfill(ground, (0, 0), 128)
    alpha = PIL.Image.fromarray(np.where(np.asarray(ground)[1:-1, 1:-1] == 128, 0, 255).astype(np.uint8))
    sprite = PIL.Image.fromarray(pixels_HWC).convert("RGBA")
    sprite.putalpha(alpha)
    return sprite.crop(alpha.getbbox() or (0, 0, *sprite.size))


def _bounced(start: float, speed: float, low: float, high: float, time: int) -> float:
    """Where something is that starts between two walls and is thrown back by them."""
    span = high - low
    way = (start - low + speed * time) % (2.0 * span)
    return low + (way if way <= span else 2.0 * span - way)


def _paste(canvas: PIL.Image.Image, sprite: PIL.Image.Image, x: float, y: float, angle: float, scale: float) -> None:
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    centre_x, centre_y = sprite.width / 2, sprite.height / 2
    inverse = (cos, sin, centre_x - cos * x - sin * y, -sin, cos, centre_y + sin * x - cos * y)
    drawn = sprite.transform(canvas.size, PIL.Image.Transform.AFFINE, inverse, PIL.Image.Resampling.BICUBIC)
    canvas.alpha_composite(drawn)


@cache
def _sprites(path: Path) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Pixels, names and splits of the emoji set."""
    images, meta = read_emoji(path)
    return (
        images,
        tuple(meta["labels"][label] for label in meta["label"]),
        shipped_splits(meta["pixels_sha256"], len(images)),
    )


def _draw_clip(images: np.ndarray, names: Sequence[str], split_N: np.ndarray, seed: int, number: int) -> DrawnClip:
    drawn = Noise([seed]).uniform(Use.CLIP, number, (5 + len(COUNTS) * _DRAWS,))[0].tolist()
    split = 0 if drawn[0] < 0.9 else 1 if drawn[0] < 0.95 else 2
    own = np.flatnonzero(split_N == split)
    count = int(drawn[1] * len(COUNTS)) + 1
    ground = tuple(int(200 + 56 * value) for value in drawn[2:5])
    frames = [PIL.Image.new("RGBA", (SIZE, SIZE), (*ground, 255)) for _ in range(FRAMES)]
    parts, first_direction = [], 0
    for which in range(count):
        image, side, direction, speed, x, y, turn, growth = drawn[5 + which * _DRAWS : 5 + (which + 1) * _DRAWS]
        row = int(own[int(image * len(own))])
        sprite, side = cut_out(images[row]), _SIDES[0] + side * (_SIDES[1] - _SIDES[0])
        shrink = side / max(sprite.size)
        sprite = sprite.resize(
            [max(1, round(length * shrink)) for length in sprite.size], PIL.Image.Resampling.LANCZOS
        )
        octant = int(direction * len(DIRECTIONS))
        first_direction = first_direction if which else octant
        pace = _SPEEDS[0] + speed * (_SPEEDS[1] - _SPEEDS[0])
        step_x, step_y = (pace * part(octant * math.pi / 4) for part in (math.cos, math.sin))
        low, high = side / 2, SIZE - side / 2
        start_x, start_y = low + x * (high - low), low + y * (high - low)
        turns, grows = int(turn * 3) - 1, int(growth * 3) - 1
        for time, frame in enumerate(frames):
            now_x, now_y = _bounced(start_x, step_x, low, high, time), _bounced(start_y, step_y, low, high, time)
            # Around the middle of the clip all have the size that was drawn.
            _paste(frame, sprite, now_x, now_y, turns * _TURN * time, _GROWTH ** (grows * (time - FRAMES // 2)))
        turning = ("turning left, ", "", "turning right, ")[turns + 1]
        growing = ("shrinking, ", "", "growing, ")[grows + 1]
        parts.append(f"{names[row]} {turning}{growing}moving {DIRECTIONS[octant]}")
    pixels = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    return DrawnClip(pixels, (count - 1, first_direction), " and ".join(parts), split)


def draw_moving_emoji(seed: int, numbers: Sequence[int], emoji: Path) -> list[DrawnClip]:
    """Clips of a set, each a function of the set's seed and of its number.

    Args:
        seed: of the set.
        numbers: of the clips.
        emoji: the emoji set, emoji64.zip.

    Raises:
        ValueError: the emoji set is damaged.
    """
    sprites = _sprites(emoji)
    return [_draw_clip(*sprites, seed, number) for number in numbers]


def build_moving_emoji(emoji: Path, out: Path, count: int, seed: int = 0, processes: int = 1) -> list[Path]:
    """Makes a folder of clips of moving emoji, or completes it; see `build_shards`.

    Args:
        emoji: the emoji set, emoji64.zip, or the folder that holds it.
        out: the folder.
        count: clips of the set.
        seed: of the set.
        processes: that draw.

    Raises:
        ValueError: no such emoji set, or see `build_shards`.
    """
    emoji = emoji / FILE if emoji.is_dir() else emoji
    if not emoji.is_file():
        raise ValueError(f"no emoji set at {emoji}: visar data emoji builds one")
    draw = partial(draw_moving_emoji, emoji=emoji.resolve())
    return build_shards(
        out, count=count, seed=seed, kind="moving-emoji", columns=COLUMNS, draw=draw, processes=processes
    )
