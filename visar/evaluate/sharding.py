"""The processes of a run (one, or several under torchrun / accelerate launch) and the files that make it resumable.

A run's images are cut into parts; a finished part is one file, `part-<first>-<stop>.npz`, written under another name
and renamed. Nothing else is state: a restart lists the files and makes what is missing, with any number of processes.
"""

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from visar.files import atomic_write
from visar.output import SampleStatistics

_PART = re.compile(r"part-(\d{8})-(\d{8})\.npz")
_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: 0 ... size - 1.
        size: number of processes.
        device: the device of this process.
    """

    rank: int
    size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def from_first(self, value: object) -> object:
        """The value that process 0 has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


def join_world(device: torch.device | str) -> World:
    """Joins the processes that torchrun or accelerate launch started; one process without them.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL; each process takes the GPU of its LOCAL_RANK).

    Raises:
        ValueError: more processes than GPUs on this host.
    """
    target = torch.device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, target)
    if target.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this host has no GPU: there are {torch.cuda.device_count()}")
        target = torch.device("cuda", local)
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), target)


def leave_world(world: World) -> None:
    """Closes what `join_world` opened."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Part:
    """One finished range of images.

    Attributes:
        first: index of its first image.
        features: float32 [B, D] by layer.
        digests_B32: uint8 [B, 32], sha256 of every image's uint8 bytes in [C, H, W] order.
        thumbnails_BD: float32 [B, 768], or None.
        images: uint8 [B, H, W, 3] (clips [B, T, H, W, 3]), or None.
        statistics: of the sampler's call.
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
    """sha256 of every picture's bytes, uint8 [B, 32]."""
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
        ValueError: the file is broken (delete it to make its images again).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name not in ("meta", "images")}
            images = torch.from_numpy(file["images"]) if with_images and "images" in file.files else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is broken ({error}); delete it and its images are made again") from error
    statistics = meta["statistics"]
    statistics["tokens_per_pass"] = {int(key): value for key, value in statistics["tokens_per_pass"].items()}
    return Part(
        first=meta["first"],
        features={
            name.removeprefix("features_"): value for name, value in arrays.items() if name.startswith("features_")
        },
        digests_B32=arrays["digests"],
        thumbnails_BD=arrays.get("thumbnails"),
        images=images,
        statistics=SampleStatistics(**statistics),
        seconds=meta["seconds"],
        warm=meta["warm"],
    )


def finished(folder: Path) -> list[tuple[int, int, Path]]:
    """(first, stop, file) of the finished parts, in order."""
    found = []
    for path in folder.glob("part-*.npz"):
        match = _PART.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def missing_ranges(done: list[tuple[int, int, Path]], num_samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Ranges of at most batch_size images that cover what the finished parts leave of 0 ... num_samples - 1."""
    ranges, at = [], 0
    for first, stop in [*((first, stop) for first, stop, _ in done), (num_samples, num_samples)]:
        for start in range(at, min(first, num_samples), batch_size):
            ranges.append((start, min(start + batch_size, first, num_samples)))
        at = max(at, stop)
    return ranges


def parts_in_order(folder: Path, num_samples: int, with_images: bool = False) -> Iterator[Part]:
    """The parts that make up images 0 ... num_samples - 1, cut where a part reaches beyond.

    Raises:
        ValueError: images are missing.
    """
    at = 0
    for first, stop, path in finished(folder):
        if at >= num_samples or stop <= at:
            continue
        if first > at:
            break
        yield _cut(load_part(path, with_images), at, min(stop, num_samples))
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


def remove_unfinished(folder: Path) -> None:
    """Deletes the temporary files that a killed process left in a run's folder."""
    for path in [*folder.glob("parts/.part-*"), *folder.glob("images/.*.png")]:
        path.unlink(missing_ok=True)
