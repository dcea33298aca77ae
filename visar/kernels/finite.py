"""Whether the logits of a call were finite: a flag per session, set on the device and read once, at the end.

Steps may be captured, so what draws from logits cannot wait to look at them. It sets the flag of the session that runs
in this thread instead (`visar.core.runtime.Session.run`), and `Session.check_finite` reads it where the host waits
anyway.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class _Running(threading.local):
    flag: Tensor | None = None


_running = _Running()


def flag() -> Tensor | None:
    """Int32 [1] of the session that runs in this thread, 1 = logits were not finite; None outside of sessions."""
    return _running.flag


@contextlib.contextmanager
def watched(flag_1: Tensor | None) -> Iterator[None]:
    """Region in which logits that are not finite set this flag."""
    before = _running.flag
    _running.flag = flag_1
    try:
        yield
    finally:
        _running.flag = before


def note(logits: Tensor) -> None:
    """Sets the flag where a row of logits [..., V] holds NaN or +inf, or nothing but -inf."""
    if _running.flag is not None and logits.numel():
        _running.flag.bitwise_or_((~torch.isfinite(logits.amax(-1))).any().int())
