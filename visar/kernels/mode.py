"""Whether the calling thread decodes by kernels that do not depend on the batch; see visar/kernels/invariance.py."""

import threading


class Mode(threading.local):
    """Of one thread."""

    invariant = False


MODE = Mode()


def active() -> bool:
    """Whether the calling thread is inside `batch_invariant`."""
    return MODE.invariant
