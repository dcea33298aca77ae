"""Triton kernels of a decode step: where they run, and how to switch them off.

Every kernel has a plain PyTorch counterpart that defines what it computes; callers ask `usable` and take the plain
path where the answer is no. Triton comes with torch on Linux; nothing here is needed to run a model.

With VISAR_TRITON=0 in the environment the plain paths run everywhere. With TRITON_INTERPRET=1 (Triton's own switch,
set before the first kernel is used) the kernels also run on CPU tensors, slowly: that is for tests.
"""

import contextlib
import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REACHED = 1.0 - 1e-6
"""Share of top-p at which probabilities count as having reached it: float32 sums are no more exact."""
MAX_CODES = 65536
"""Largest vocabulary of which a program holds a whole distribution."""
MAX_CHANNELS = 64
"""Largest code width of which a thread holds a whole vector."""


def usable(tensor: Tensor) -> bool:
    """Whether kernels run on this tensor: its dtype, and where it is."""
    return tensor.dtype in DTYPES and available(tensor.device)


def available(device: torch.device) -> bool:
    """Whether kernels run on this device: a GPU (or the interpreter), and a Triton that can compile."""
    if os.environ.get("VISAR_TRITON", "1") == "0":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return (device.type == "cuda" or (interpreted and device.type == "cpu")) and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a small kernel compiles and starts; asked once per device, because Triton also needs a C compiler."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed: decoding takes the slower plain path")
        return False
    from visar.kernels.elementwise import silu_multiply

    try:
        with on(device):
            silu_multiply(torch.ones(1, 32, device=device))
    except Exception as error:  # whatever the compiler, the driver or the launcher raise
        logger.warning("Triton does not work here, decoding takes the slower plain path: %r", error)
        return False
    return True


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes the device the current one: Triton launches there, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
