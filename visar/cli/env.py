"""`visar env`: what a bug report needs to say of the machine; no names of people, hosts or folders."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

_PACKAGES = (
    "torch", "torchvision", "triton", "diffusers", "transformers", "accelerate", "peft", "huggingface-hub",
    "safetensors", "numpy", "pillow", "einops", "torch-fidelity", "timm", "torchao", "tyro",
)  # fmt: skip


@dataclass(frozen=True)
class Env:
    """Prints versions, devices and settings, to be pasted into a bug report."""


def facts() -> list[tuple[str, str]]:
    """Names and values, without those that say nothing; works where PyTorch does not."""
    from visar import __version__

    found = [
        ("visar", __version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("cpu cores", str(os.cpu_count())),
    ]
    found += [(name, version) for name in _PACKAGES if (version := _version(name))]
    found += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith(("VISAR_", "TRITON_I"))]
    try:
        return found + _devices()
    except (ImportError, OSError, RuntimeError) as error:
        return [*found, ("torch fails", f"{type(error).__name__}: {error}")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    import torch

    from visar.kernels import available

    found = [("torch's cuda", str(torch.version.cuda)), ("threads", str(torch.get_num_threads()))]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(number)
        found.append(
            (
                f"cuda:{number}",
                f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}",
            )
        )
    if torch.cuda.is_available():
        found.append(("fused kernels", "used" if available(torch.device("cuda")) else "not used"))
    else:
        found.append(("cuda", "no device, or a build of torch without it"))
    return found
