"""Clocks, the machine's ceilings, and what it is."""

import contextlib
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one thing, in seconds.

    Attributes:
        times: times of every run.
    """

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the runs."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.times) - min(self.times)) / self.median

    def row(self, name: str) -> dict[str, float]:
        """Median in ms and spread, as columns `name_ms` and `name_spread`."""
        return {f"{name}_ms": self.median * 1e3, f"{name}_spread": self.spread}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, device work included: by CUDA events on a GPU, by the wall clock on a CPU."""
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def timed(call: Callable[[], object], device: torch.device, runs: int) -> Timing:
    """Times of `runs` calls; the caller has warmed up."""
    return Timing(tuple(seconds_of(call, device) for _ in range(runs)))


def ceilings(device: torch.device) -> dict[str, float]:
    """What a GPU can do: copy GB/s, bf16 matmul TFLOP/s, us of a tiny kernel, eager and captured."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    tiny = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    tiny.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(1000):
            tiny.add_(1)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(seconds_of(call, device) for _ in range(5))

    def many() -> None:
        for _ in range(1000):
            tiny.add_(1)

    return {
        "copy_gb_s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
        "matmul_tflop_s": 2 * 8192**3 / best(lambda: matrix @ matrix) / 1e12,
        "eager_kernel_us": best(many) * 1e3,
        "captured_kernel_us": best(graph.replay) * 1e3,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return lines[0] if lines else "unknown"
    return "unknown"


def machine_facts(device: torch.device) -> dict[str, str | bool]:
    """Names and versions that a figure depends on."""
    facts: dict[str, str | bool] = {"device": "cpu", "torch": torch.__version__}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "driver": _driver()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        facts["triton"] = triton.__version__
    return facts | {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
    }
