"""Where the time of a step goes, by operation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Operation:
    """One kernel (on a CPU: one operator).

    Attributes:
        name: its name.
        calls: a step.
        us: a step, without what it calls.
    """

    name: str
    calls: float
    us: float


def operations(call: Callable[[], object], steps: int, device: torch.device) -> list[Operation]:
    """Operations of a call of `steps` steps, those that take longest first; the caller has warmed up."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = []
    for event in profiler.key_averages():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            found.append(Operation(event.key, event.count / steps, event.self_device_time_total / steps))
        elif not on_gpu:
            found.append(Operation(event.key, event.count / steps, event.self_cpu_time_total / steps))
    return sorted(found, key=lambda operation: -operation.us)


def table(found: list[Operation], most: int = 20) -> list[str]:
    """Lines of a table: share, us and calls per step, name; the last line is the rest."""
    total = sum(operation.us for operation in found) or 1.0
    rows = [(operation.us, operation.calls, operation.name[:90]) for operation in found[:most]]
    if rest := found[most:]:
        rows.append((sum(each.us for each in rest), sum(each.calls for each in rest), f"{len(rest)} others"))
    lines = [f"busy {total:.1f} us a step", "  share     us/step  calls/step  operation"]
    return lines + [f"{us / total:7.1%} {us:11.2f} {calls:11.1f}  {name}" for us, calls, name in rows]
