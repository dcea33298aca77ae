"""Which label image i of an evaluation gets: a function of i, never of batch, process or order."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from visar.core.noise import Noise, Use
from visar.data.vocabulary import match_name
from visar.evaluate.options import LabelPolicy

LABEL_POLICIES: tuple[LabelPolicy, ...] = ("balanced", "random", "histogram", "prompts", "none")
Label = tuple[int, ...] | str | None


@dataclass(frozen=True)
class LabelTable:
    """Distinct label rows of a set of images and how often each occurs.

    Attributes:
        rows: sorted; column 0 is the class, further columns attributes.
        counts: as many, each above 0.
        classes: names of the numbers in column 0, where they are known; no part of what a table is compared by.

    Raises:
        ValueError: rows that are not sorted, distinct and of one length, or counts that do not fit.
    """

    rows: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    classes: tuple[str, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.counts) or not self.rows or min(self.counts) < 1:
            raise ValueError(f"{len(self.rows)} label rows with {len(self.counts)} counts; one count above 0 a row")
        if list(self.rows) != sorted(set(self.rows)) or len({len(row) for row in self.rows}) != 1:
            raise ValueError("label rows must be sorted, distinct and of one length")

    @classmethod
    def of(cls, labels_NA: Sequence[Sequence[int]], classes: tuple[str, ...] | None = None) -> "LabelTable":
        """The table of the labels of N images."""
        found = sorted(Counter(tuple(int(value) for value in row) for row in labels_NA).items())
        return cls(tuple(row for row, _ in found), tuple(count for _, count in found), classes)

    def leading(self, columns: int) -> "LabelTable":
        """The table of the first columns only: what a model with fewer attributes reads.

        Raises:
            ValueError: there are not as many columns.
        """
        if not 1 <= columns <= len(self.rows[0]):
            raise ValueError(
                f"the model reads {columns} label columns, the reference's images have {len(self.rows[0])}"
            )
        return self._renamed(lambda row: row[:columns], self.classes)

    def in_classes(self, num_classes: int, names: Sequence[str] | None) -> "LabelTable":
        """The table in a model's class numbers.

        Classes are matched by name where both sides have names, whatever their Unicode form and, where that is
        unambiguous, their case. Names and a model that has numbers only must be as many. A table that has numbers
        only is taken to have the model's.

        Args:
            num_classes: number of classes of the model.
            names: names of its classes; None where they have numbers only.

        Raises:
            ValueError: the classes cannot be matched.
        """
        if self.classes is None or names is None:
            largest = max(row[0] for row in self.rows)
            fits = largest < num_classes if self.classes is None else len(self.classes) == num_classes
            if not fits:
                theirs = f"the class {largest}" if self.classes is None else f"{len(self.classes)} classes"
                raise ValueError(f"the reference has {theirs}, the model {num_classes} classes, and no names to match")
            return self
        number = {theirs: match_name(name, names) for theirs, name in enumerate(self.classes)}
        missing = sorted({row[0] for row in self.rows if number[row[0]] is None})
        if missing:
            unknown = ", ".join(self.classes[label] for label in missing[:4])
            raise ValueError(f"{len(missing)} classes of the reference are none of the model's: {unknown}")
        return self._renamed(lambda row: (number[row[0]] or 0, *row[1:]), tuple(names))

    def _renamed(
        self, new: Callable[[tuple[int, ...]], tuple[int, ...]], classes: tuple[str, ...] | None
    ) -> "LabelTable":
        merged: Counter[tuple[int, ...]] = Counter()
        for row, count in zip(self.rows, self.counts, strict=True):
            merged[new(row)] += count
        found = sorted(merged.items())
        return LabelTable(tuple(row for row, _ in found), tuple(count for _, count in found), classes)

    @property
    def total(self) -> int:
        """Images counted."""
        return sum(self.counts)


@dataclass(frozen=True)
class LabelPlan:
    """Labels of the images of an evaluation.

    "balanced": image i has class i mod num_classes (50 a class for 50,000 images of ImageNet's 1,000 classes).
    "random": uniform classes, drawn from the image's own seed. "histogram": the labels of the training images in one
    fixed shuffled order, again from the start after the last: every `table.total` images repeat the training histogram
    exactly, and fewer are a sample of it without replacement. "prompts": prompt i mod their number. "none": no label.

    Attributes:
        policy: one of `LABEL_POLICIES`.
        num_classes: for "balanced" and "random".
        table: for "histogram".
        prompts: for "prompts".
        pictures: whose labels the table holds, in words.

    Raises:
        ValueError: an unknown policy, or what it needs is missing.
    """

    policy: LabelPolicy
    num_classes: int | None = None
    table: LabelTable | None = None
    prompts: tuple[str, ...] = ()
    pictures: str = "training images"

    def __post_init__(self) -> None:
        if self.policy not in LABEL_POLICIES:
            raise ValueError(f"label policy {self.policy!r}; choose {', '.join(LABEL_POLICIES)}")
        if self.policy in ("balanced", "random") and (self.num_classes is None or self.num_classes < 1):
            raise ValueError(f"labels {self.policy!r} need the number of classes, got {self.num_classes}")
        if self.policy == "histogram" and self.table is None:
            raise ValueError(
                "labels 'histogram' need the training labels: a reference that holds them, or the data set"
            )
        if self.policy == "prompts" and not self.prompts:
            raise ValueError("labels 'prompts' need at least one prompt")

    def labels(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Label]:
        """Labels of the images of these indices; seeds are theirs, in the same order."""
        if self.policy == "balanced" and self.num_classes is not None:
            return [(index % self.num_classes,) for index in indices]
        if self.policy == "random" and self.num_classes is not None:
            uniform_B = Noise(list(seeds)).uniform(Use.CONDITION, 0) if len(seeds) else torch.zeros(0)
            return [(min(int(u * self.num_classes), self.num_classes - 1),) for u in uniform_B.tolist()]
        if self.table is not None and self.policy == "histogram":
            order = self._shuffled
            return [self.table.rows[order[index % self.table.total]] for index in indices]
        if self.policy == "prompts":
            return [self.prompts[index % len(self.prompts)] for index in indices]
        return [None] * len(indices)

    def digest(self) -> str:
        """sha256 of everything that labels depend on besides the seeds."""
        return hashlib.sha256(repr((self.policy, self.num_classes, self.table, self.prompts)).encode()).hexdigest()

    @cached_property
    def _shuffled(self) -> list[int]:
        """Row number of every training image, in the fixed shuffled order."""
        assert self.table is not None
        position = torch.arange(self.table.total)[None]
        order = Noise([0]).bits(Use.ORDER, position, (1,))[0, :, 0].argsort(stable=True)
        row_N = torch.repeat_interleave(torch.arange(len(self.table.rows)), torch.tensor(self.table.counts))
        return row_N[order].tolist()

    def describe(self, num_samples: int) -> str:
        """Words for a report."""
        if self.policy == "balanced" and self.num_classes is not None:
            low, rest = divmod(num_samples, self.num_classes)
            each = f"{low}" if rest == 0 else f"{low} or {low + 1}"
            return f"balanced: image i has class i mod {self.num_classes} ({each} a class)"
        if self.policy == "random":
            return f"random: uniform over {self.num_classes} classes, drawn from the image's seed"
        if self.table is not None and self.policy == "histogram":
            return (
                f"histogram: labels of the {self.table.total} {self.pictures} in a fixed shuffled order "
                f"({len(self.table.rows)} distinct label rows)"
            )
        if self.policy == "prompts":
            return f"prompts: prompt i mod {len(self.prompts)}"
        return "none given: the model's own choice, by the image's seed"
