"""`visar data ...`: image sets built from where they are published."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class DataEmoji:
    """Builds the emoji image set from the packages it is drawn in, and checks it by hash."""

    out: Path
    """Folder to write emoji64.zip and ATTRIBUTION.md to; downloads are kept in its folder `packages`."""


def data_emoji(options: DataEmoji) -> Path:
    """Runs `visar data emoji`; returns the file that it wrote."""
    from visar.data.emoji_build import build_emoji

    return build_emoji(options.out)


@dataclasses.dataclass(frozen=True)
class DataClips:
    """Builds the set of animated emoji from the packages it comes in; 730 MB of downloads."""

    out: Path
    """Folder to write emojiclips.zip and ATTRIBUTION.md to; downloads are kept in its folder `packages`."""


def data_clips(options: DataClips) -> Path:
    """Runs `visar data clips`; returns the file that it wrote."""
    from visar.data.clips import build_clips

    return build_clips(options.out)


@dataclasses.dataclass(frozen=True)
class DataMovingEmoji:
    """Draws clips of emoji that bounce, turn and change their size, with captions; any number of them."""

    emoji: Path
    """The emoji set, emoji64.zip (`visar data emoji`), or the folder that holds it."""
    out: Path
    """Folder to write clips to; a later call with more --clips adds to what is there."""
    clips: int = 10_000
    """Number of clips, 16 frames of 64 x 64 each."""
    seed: int = 0
    """Seed of the set; clip i is a function of it and of i."""
    workers: int = 1
    """Number of processes that draw."""


def data_moving_emoji(options: DataMovingEmoji) -> Path:
    """Runs `visar data moving-emoji`; returns the folder that it completed."""
    from visar.data.moving_emoji import build_moving_emoji

    build_moving_emoji(options.emoji, options.out, options.clips, options.seed, options.workers)
    return options.out


@dataclasses.dataclass(frozen=True)
class DataDoom:
    """Draws clips of a player walking through Doom levels, with the actions taken; needs ViZDoom (extra doom)."""

    out: Path
    """Folder to write clips to; a later call with more --clips adds to what is there."""
    clips: int = 10_000
    """Number of clips, 16 frames of 64 x 64 each."""
    seed: int = 0
    """Seed of the set; clip i is a function of it and of i."""
    workers: int = 1
    """Number of processes that draw."""


def data_doom(options: DataDoom) -> Path:
    """Runs `visar data doom`; returns the folder that it completed."""
    from visar.data.doom import build_doom

    build_doom(options.out, options.clips, options.seed, options.workers)
    return options.out


@dataclasses.dataclass(frozen=True)
class DataFashion:
    """Builds the Fashion-MNIST image set: 70,000 grey images of 10 classes of clothes, 32 x 32."""

    source: Path
    """Folder with the four idx files (.gz or not) of Debian's dataset-fashion-mnist or torchvision, or a .deb file."""
    out: Path
    """File to write, fashion.zip."""


def data_fashion(options: DataFashion) -> Path:
    """Runs `visar data fashion-mnist`; returns the file that it wrote."""
    from visar.data.fashion_mnist import build_fashion

    return build_fashion(options.source, options.out)
