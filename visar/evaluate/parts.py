"""The processes of a run (one, or several under torchrun / accelerate launch) and the files that make it resumable.

A run's images are cut into parts; a finished part is one file, `part-<first>-<stop>.npz`, written under another name
and renamed. Nothing else is state: a restart lists the files and makes what is missing, with any number of processes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visar.core.output import SampleStatistics
from visar.io.arrays import npz_arrays, read_arrays
from visar.io.files import atomic_write, json_object
from visar.io.shards import finished


@dataclass(frozen=True)
class Part:
    """One finished range of images.

    Attributes:
        first: index of its first image.
        features: float32 [B, D] by layer.
        digests_B32: uint8 [B, 32], sha256 of every image's uint8 bytes in [C, H, W] order.
        thumbnails_BD: float32 [B, 768], or None.
        images: uint8 [B, H, W, 3] (clips [B, T, H, W, 3]), or None.
        statistics: statistics of the sampler's call.
        seconds: wall clock of the call, decoding included.
        warm: whether the process had made a part before (the first one pays for compilation and captures).
    """

    first: int
    features: dict[str, Tensor]
    digests_B32: Tensor
    thumbnails_BD: Tensor | None
    images: Tensor | None
    statistics: SampleStatistics
    seconds: float
    warm: bool

    @property
    def stop(self) -> int:
        """Index after its last image."""
        return self.first + len(self.digests_B32)


def image_digests(images: Tensor) -> Tensor:
    """sha256 of every image's bytes, uint8 [B, 32]."""
    digests = [hashlib.sha256(image.contiguous().cpu().numpy().tobytes()).digest() for image in images]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(images), 32)


def save_part(folder: Path, part: Part) -> None:
    """Writes a part; it exists whole or not at all."""
    meta = {
        "statistics": asdict(part.statistics),
        "seconds": part.seconds,
        "warm": part.warm,
        "first": part.first,
        "stop": part.stop,
    }
    arrays = {"meta": np.array(json.dumps(meta)), "digests": part.digests_B32.numpy()}
    arrays |= {f"features_{layer}": value.numpy() for layer, value in part.features.items()}
    if part.thumbnails_BD is not None:
        arrays["thumbnails"] = part.thumbnails_BD.numpy()
    if part.images is not None:
        arrays["images"] = part.images.numpy()
    with atomic_write(folder / f"part-{part.first:08d}-{part.stop:08d}.npz") as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def load_part(path: Path, with_images: bool = False) -> Part:
    """Reads a part.

    Raises:
        ValueError: the file is broken, or lacks rows or features (delete it to make its images again).
    """
    try:
        stored = read_arrays(path, [name for name in npz_arrays(path) if with_images or name != "images"])
        meta = json_object(str(stored.pop("meta")))
        arrays = {name: torch.from_numpy(value) for name, value in stored.items()}
        statistics = meta["statistics"]
        statistics["tokens_per_pass"] = {int(key): value for key, value in statistics["tokens_per_pass"].items()}
        part = Part(
            first=meta["first"],
            features={
                name.removeprefix("features_"): value for name, value in arrays.items() if name.startswith("features_")
            },
            digests_B32=arrays["digests"],
            thumbnails_BD=arrays.get("thumbnails"),
            images=arrays.get("images"),
            statistics=SampleStatistics(**statistics),
            seconds=float(meta["seconds"]),
            warm=bool(meta["warm"]),
        )
        _check_rows(part, meta["stop"], arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken ({error}); delete it and its images are made again") from error
    return part


def _check_rows(part: Part, stop: int, arrays: dict[str, Tensor]) -> None:
    if not part.features or part.stop != stop or part.digests_B32.shape[1:] != (32,):
        raise ValueError(f"features of {len(part.features)} layers, images {part.first} ... {part.stop} of {stop}")
    for name, value in arrays.items():
        if len(value) != len(part.digests_B32) or (name.startswith("features_") and not value.isfinite().all()):
            raise ValueError(f"{name} has {len(value)} rows for {len(part.digests_B32)} images, or is not finite")


def parts_in_order(folder: Path, num_samples: int, with_images: bool = False) -> Iterator[Part]:
    """The parts that make up images 0 ... num_samples - 1, cut where a part reaches beyond.

    Raises:
        ValueError: images are missing, or a part holds other features than those before it.
    """
    at, expected = 0, None
    for first, stop, path in finished(folder):
        if at >= num_samples or stop <= at:
            continue
        if first > at:
            break
        part = load_part(path, with_images)
        kept = {layer: value.shape[1:] for layer, value in part.features.items()}, part.thumbnails_BD is None
        if (part.first, part.stop) != (first, stop) or expected not in (None, kept):
            raise ValueError(f"{path} holds other images or features than its name and the parts before it; delete it")
        expected = kept
        yield _cut(part, at, min(stop, num_samples))
        at = min(stop, num_samples)
    if at < num_samples:
        raise ValueError(f"{folder} has images up to {at} of {num_samples}: the run is not finished")


def _cut(part: Part, first: int, stop: int) -> Part:
    if first == part.first and stop == part.stop:
        return part
    rows = slice(first - part.first, stop - part.first)
    return Part(
        first=first,
        features={layer: value[rows] for layer, value in part.features.items()},
        digests_B32=part.digests_B32[rows],
        thumbnails_BD=None if part.thumbnails_BD is None else part.thumbnails_BD[rows],
        images=None if part.images is None else part.images[rows],
        statistics=part.statistics,
        seconds=part.seconds,
        warm=part.warm,
    )
