"""Programmatic dependent launch (PDL): a kernel starts while the one before it still runs, and waits inside.

What a kernel reads before it waits must not be written by a kernel that may still run. Every kernel of a chain waits
before it ends, so that the end of one means the end of all before it; a kernel launched the usual way starts when
all before it have ended. Needs a GPU of compute capability 9 or later; VISAR_PDL=0 in the environment switches it off.
"""

import functools
import os

import torch


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device are launched before their predecessors have ended."""
    return device.type == "cuda" and os.environ.get("VISAR_PDL", "1") != "0" and _capable(device)


@functools.cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(overlap: bool) -> dict[str, bool]:
    """Launch options of a kernel that waits inside when `overlap` is on: PDL is its constexpr switch."""
    return {"PDL": True, "launch_pdl": True} if overlap else {"PDL": False}
