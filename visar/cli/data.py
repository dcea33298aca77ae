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
