"""Ranges of numbers that users give, and one message for those outside of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers from `low` to `high`; an open end is not one of them. NaN is in no range."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if not self.open_low and not self.open_high:
            return f"{self.low} ... {self.high}"
        low = f"above {self.low}" if self.open_low else f"{self.low} and above"
        return f"{low}, {'below' if self.open_high else 'at most'} {self.high}"


SEED = Range(0, 2**63 - 1)
IMAGES = Range(1, 100_000)  # of one call, which holds them all
BATCH = Range(1, 65_536)
WINDOW = Range(1, 4096)  # tokens of one pass; masks grow with its square
CODES = Range(1, 2**20)  # of a codebook
COUNT = Range(1, 10**9)
COUNT_OR_OFF = Range(0, 10**9)
WEIGHT = Range(0, 10**6)
SHARE = Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Checks a number, or every number of a sequence.

    Raises:
        ValueError: one is outside of its range; names the value and the range.
    """
    several = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if any(each not in allowed for each in several):
        raise ValueError(f"{name} {value}; allowed: {allowed}")


def check_ranges(options: object, ranges: Mapping[str, Range]) -> None:
    """Checks the fields of options that are numbers, or sequences of them, and have a range by their name.

    Raises:
        ValueError: one is outside of its range.
    """
    for name, allowed in ranges.items():
        value = getattr(options, name, None)
        numbers = value if isinstance(value, tuple) else (value,)
        if all(isinstance(each, int | float) for each in numbers):
            check_range(name, value, allowed)
