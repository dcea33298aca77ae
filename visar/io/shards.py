"""Processes of a run and ranges that a killed run still owes."""

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

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


def remove_unfinished(folder: Path) -> None:
    """Deletes the temporary files that a killed process left in a run's folder."""
    for path in [*folder.glob("parts/.part-*"), *folder.glob("images/.*.png")]:
        path.unlink(missing_ok=True)
