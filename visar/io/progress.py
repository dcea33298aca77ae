"""Progress of a command: a function that is told (stage, done, total)."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def counted(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    """The progress of one stage, told the number done only."""
    return None if progress is None else lambda done: progress(what, done, total)
