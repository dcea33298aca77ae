"""The images in a folder: which files are taken, which are left out and why, their classes and their splits."""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from visar.data.emoji_splits import unit_hash
from visar.data.pictures import EXTENSIONS
from visar.io.files import shown

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_BEHIND_SPLIT = re.compile(r"[-_ ]?(set|split|images|data|(19|20)\d\d)$")
HIDDEN, OTHER, LOOP, OUTSIDE = "hidden", "not named as an image", "links to a folder above", "outside of the splits"


@dataclass(frozen=True)
class FoundPictures:
    """What a folder and the folders below it hold.

    Attributes:
        root: the folder.
        names: names of the images, relative to it with slashes; ordered folder by folder.
        broken: names of links to nothing, and of pipes and devices that are named as images.
        left_out: names of other files and folders, by the reason.
    """

    root: Path
    names: list[str]
    broken: list[str]
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def log(self, facts: str) -> None:
        """Logs a line about the folder: facts, and how many files were left out and why."""
        parts = [facts]
        for reason, names in self.left_out.items():
            some = ", ".join(shown(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} left out, {reason} ({some})")
        logger.info("%s: %s", shown(self.root), "; ".join(parts))

    def refuse_broken(self) -> None:
        """Checks that nothing is broken.

        Raises:
            ValueError: something is; names all of it.
        """
        if self.broken:
            names = ", ".join(shown(name) for name in self.broken)
            raise ValueError(f"{shown(self.root)} has links to nothing, or pipes: {names}; repair or remove them")


def find_pictures(path: Path) -> FoundPictures:
    """Images of a folder and of the folders below it, those behind links included.

    Left out are hidden files and folders (".": half-written files, notebooks' checkpoints and the like), __MACOSX,
    files whose ending is not in EXTENSIONS, and links that lead back to a folder above them.

    Raises:
        ValueError: a folder that cannot be read.
    """
    found = FoundPictures(path, [], [])
    _walk(path, "", (), found)
    return found


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], found: FoundPictures) -> None:
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"cannot read the folder {shown(folder)}: {error.strerror}") from error
    above = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        name = prefix + entry.name
        reason = None
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            reason = HIDDEN
        elif entry.is_dir():
            inner = os.stat(entry.path)
            if (inner.st_dev, inner.st_ino) in above:
                reason = LOOP
            else:
                _walk(folder / entry.name, f"{name}/", above, found)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            found.broken.append(name)
        elif not entry.name.lower().endswith(EXTENSIONS):
            reason = OTHER
        elif not entry.is_file():
            found.broken.append(name)
        else:
            found.names.append(name)
        if reason is not None:
            found.left_out.setdefault(reason, []).append(name)


def below_data(found: FoundPictures) -> FoundPictures:
    """The same images seen from the folder data in it, if all of them are in that."""
    tops = {name.partition("/")[0] for name in found.names if "/" in name}
    if len(tops) != 1 or not all("/" in name for name in found.names) or (top := tops.pop()).lower() != "data":
        return found
    return replace(found, root=found.root / top, names=[name.partition("/")[2] for name in found.names])


def split_of_folder(name: str) -> str | None:
    """The split that a folder is named as, such as Train, val2017 or test_images; None where it is no split's name."""
    return SPLIT_OF.get(_BEHIND_SPLIT.sub("", name.lower()))


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Splits by the name of their folder, where the topmost folders are splits; empty where they are classes.

    They are splits if one is named as the training split, and another as a further one or there is no other. A single
    folder "train" among others is a split too if its images are in folders below it, else a class like them.
    """
    inner = [name.split("/") for name in names if "/" in name]
    tops = {parts[0] for parts in inner}
    found = {top: split for top in tops if (split := split_of_folder(top)) is not None}
    if "train" not in found.values():
        return {}
    directly = any(len(parts) == 2 and found.get(parts[0]) == "train" for parts in inner)
    return {} if len(set(found.values())) == 1 and tops - found.keys() and directly else found


def split_of_file(name: str) -> str | None:
    """The split that a file's name says, such as train-00000-of-00002; None where it says none or several."""
    found = {SPLIT_OF[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def hold_out(names: Sequence[str], split_N: np.ndarray | None = None) -> np.ndarray:
    """Splits, int8 [N], with images for validation: a twentieth, by a hash of the name, and at least one of two.

    Args:
        names: names of the images.
        split_N: splits that are known; they stay as they are where one is for validation.
    """
    split = np.zeros(len(names), np.int8) if split_N is None else split_N.astype(np.int8)
    train = np.flatnonzero(split == 0)
    if len(train) < 2 or (split == 1).any():
        return split
    share = np.array([unit_hash(names[row]) for row in train.tolist()])
    split[train[share < 0.05]] = 1
    if not (split == 1).any():
        split[train[share.argmin()]] = 1
    return split


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names in order: as numbers if all are whole numbers, else by their letters."""
    distinct = sorted(set(names))
    return tuple(sorted(distinct, key=int) if all(name.isdecimal() for name in distinct) else distinct)
