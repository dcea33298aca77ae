"""What an image is generated from: labels, words or a text encoder's features, for a whole batch."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

PADDING_WORD, NULL_WORD = 0, 1
"""First ids of every word table: padding, and "not given"."""


def _is_field(value: object) -> bool:
    return value is None or (isinstance(value, Tensor) and value.ndim > 0)


@dataclass(frozen=True)
class Condition:
    """Conditions of B images; a field that the model does not use is None.

    Attributes:
        labels_BA: int64; column 0 is the class, further columns are attributes (drawing style, ...). A table with n
            values has the extra null row n, which means "not given".
        words_BT: int64 ids of a model's own word table, left-aligned; 0 is padding, 1 means "not given".
        text_BTC: float features of a text encoder, right-aligned (valid vectors at the end).
        text_mask_BT: bool, True where text_BTC is valid.
        first_BK: int64 ids of the first K tokens, which the images begin with; for raster models.
    """

    labels_BA: Tensor | None = None
    words_BT: Tensor | None = None
    text_BTC: Tensor | None = None
    text_mask_BT: Tensor | None = None
    first_BK: Tensor | None = None

    def __post_init__(self) -> None:
        wrong = [f.name for f in fields(self) if not _is_field(getattr(self, f.name))]
        if wrong:
            value = getattr(self, wrong[0])
            raise ValueError(f"{wrong[0]} {value!r:.80}; a tensor with a row for every image is needed, or None")
        batches = {f.name: getattr(self, f.name).shape[0] for f in fields(self) if getattr(self, f.name) is not None}
        if len(set(batches.values())) != 1:
            raise ValueError(f"a condition needs at least one field, all of one batch size; got {batches}")

    def _map(self, change) -> "Condition":  # noqa: ANN001 - a tensor to tensor function
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{name: None if value is None else change(value) for name, value in values.items()})

    @property
    def batch(self) -> int:
        """Number of images."""
        return next(value.shape[0] for f in fields(self) if (value := getattr(self, f.name)) is not None)

    def to(self, device: torch.device | str) -> "Condition":
        """The same condition on another device; dtypes stay."""
        return self._map(lambda value: value.to(device))

    def without_first(self) -> "Condition":
        """The same condition of images whose first tokens are not given."""
        return replace(self, first_BK=None)

    def check_without_first(self) -> None:
        """Checks that no first tokens are given, for models that cannot take them.

        Raises:
            ValueError: some are.
        """
        if self.first_BK is not None:
            raise ValueError("this model takes no first tokens: they are for raster models (RasterGPT)")

    def rows(self, index: Tensor | slice) -> "Condition":
        """The conditions of some of the images."""
        return self._map(lambda value: value[index])

    def followed_by(self, other: "Condition") -> "Condition":
        """The images of this condition, then those of `other` (which has the same fields)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        differing = [name for name, (a, b) in pairs.items() if (a is None) != (b is None)]
        if differing:
            raise ValueError(f"conditions differ in what they give: {', '.join(differing)}")
        return Condition(**{name: None if a is None else torch.cat([a, b]) for name, (a, b) in pairs.items()})
