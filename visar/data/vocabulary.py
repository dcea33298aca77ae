"""Names of labels and words, and the distribution of conditions of a training set.

A model's conditions are label columns (the class first, then attributes such as a drawing style) and, for some, the
words of a caption. What a user leaves open is drawn from the training set's own rows, given what is set: p(style,
name | class).
"""

import difflib
import itertools
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visar.core.condition import Condition

PADDING, NULL = "", "<null>"
# Rows of a training set: more would not fit into memory, and come from a damaged file.
_MOST_NUMBERS = 10**8
IGNORED_WORDS = frozenset({"style", "a", "an", "the", "of", "with", "and", "in"})


def split_words(text: str) -> list[str]:
    """Words of a caption: lower case, split at everything but letters, digits and apostrophes, small words left
    out."""
    composed = unicodedata.normalize("NFC", text.lower())
    return [word for word in re.findall(r"[^\W_]+(?:['’][^\W_]+)*", composed) if word not in IGNORED_WORDS]


def plain_spelling(word: str) -> str:
    """A word as a keyboard has it: straight apostrophes, no accents."""
    letters = unicodedata.normalize("NFKD", word.replace("’", "'"))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def pack_numbers(numbers: Sequence[int]) -> str:
    """Integers as text: differences from one to the next, repeats as "difference x count": 5 5 5 6 is 5 0x2 1."""
    differences = [b - a for a, b in zip([0, *numbers], numbers, strict=False)]
    runs = [(value, sum(1 for _ in run)) for value, run in itertools.groupby(differences)]
    return " ".join(str(value) if count == 1 else f"{value}x{count}" for value, count in runs)


def unpack_numbers(text: str) -> np.ndarray:
    """The inverse of `pack_numbers`: int64 [count].

    Raises:
        ValueError: the text is not of that form.
    """
    runs = [part.partition("x") for part in text.split()]
    try:
        values = np.array([int(value) for value, _, _ in runs], np.int64)
        counts = [int(count or 1) for _, _, count in runs]
        if sum(counts) > _MOST_NUMBERS:
            raise ValueError(f"{sum(counts)} numbers; at most {_MOST_NUMBERS}")
        return np.repeat(values, counts).cumsum()
    except (OverflowError, ValueError) as error:
        raise ValueError(f"not packed numbers: {text[:40]!r} ({error})") from error


def _pack_texts(texts: Sequence[str]) -> dict[str, Any]:
    """Texts cut behind their last comma; each of the two parts is written once."""
    cuts = [text.rfind(",") + 1 for text in texts]
    parts = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
    heads, tails = (sorted({part[side] for part in parts}) for side in (0, 1))
    head_id, tail_id = ({part: i for i, part in enumerate(side)} for side in (heads, tails))
    return {
        "heads": heads,
        "tails": tails,
        "head": pack_numbers([head_id[head] for head, _ in parts]),
        "tail": pack_numbers([tail_id[tail] for _, tail in parts]),
    }


def _unpack_texts(packed: dict[str, Any]) -> tuple[str, ...]:
    heads, tails = packed["heads"], packed["tails"]
    pairs = zip(unpack_numbers(packed["head"]), unpack_numbers(packed["tail"]), strict=True)
    return tuple(heads[head] + tails[tail] for head, tail in pairs)


def _nearest(name: str, names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or [other for other in names if name in other][:4]
    return f"; nearest: {', '.join(near)}" if near else ""


def match_names(name: str, names: Sequence[str]) -> list[int]:
    """Numbers of the names that a text means: exactly, else in another Unicode form, else in another case."""
    forms: tuple[Callable[[str], str], ...] = (
        str,
        lambda text: unicodedata.normalize("NFC", text),
        lambda text: unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()),
    )
    for form in forms:
        wanted = form(name)
        found = [i for i, value in enumerate(names) if form(value) == wanted]
        if found:
            return found
    return []


def match_name(name: str, names: Sequence[str]) -> int | None:
    """Number of the one name that a text means, see `match_names`; None where it means none or several."""
    found = match_names(name, names)
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Vocabulary:
    """Names behind the numbers of a `Condition`, and the rows of the training set.

    Attributes:
        attributes: names of the values of every label column by column name; the first column is "class". The null row
            of a column has the number of its values.
        words: the word table; 0 is padding and 1 means "not given". Empty for models without words.
        num_words: most words of a caption.
        texts: distinct captions of the training set.
        rows: int [M, 1 + columns] training images: number of its caption (-1 = none), then its labels. Without rows
            (M = 0) a class that is not given is drawn among all alike, and other columns are left open.

    Raises:
        ValueError: the parts do not fit each other.
    """

    attributes: dict[str, tuple[str, ...]]
    words: tuple[str, ...] = ()
    num_words: int = 0
    texts: tuple[str, ...] = ()
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.int32), repr=False)

    def __post_init__(self) -> None:
        if next(iter(self.attributes), "class") != "class":
            raise ValueError(f"the first label column is {next(iter(self.attributes))!r}; it must be class")
        if self.words and self.words[:2] != (PADDING, NULL):
            raise ValueError(f"a word table begins with {PADDING!r} and {NULL!r}")
        if self.rows.ndim != 2 or self.rows.shape[1] not in (1, 1 + len(self.attributes)):
            raise ValueError(f"rows of shape {self.rows.shape} for {len(self.attributes)} label columns")

    # ------------------------------------------------------------------------------------------------------ file form
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; texts and the columns of the rows are packed (12 k rows: 0.2 MB, 0.7 MB as lists)."""
        return {
            "attributes": {name: list(values) for name, values in self.attributes.items()},
            "words": list(self.words),
            "num_words": self.num_words,
            "texts": _pack_texts(self.texts),
            "columns": [pack_numbers(column.tolist()) for column in self.rows.T],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Vocabulary":
        """The inverse of `to_dict`; texts and columns may also be given as plain lists."""
        texts = values["texts"]
        columns = [unpack_numbers(column) if isinstance(column, str) else column for column in values["columns"]]
        return cls(
            attributes={name: tuple(names) for name, names in values["attributes"].items()},
            words=tuple(values["words"]),
            num_words=int(values["num_words"]),
            texts=_unpack_texts(texts) if isinstance(texts, dict) else tuple(texts),
            rows=np.asarray(columns, np.int32).T.reshape(-1, max(len(columns), 1)),
        )

    # ---------------------------------------------------------------------------------------------------------- names
    @cached_property
    def _word_ids(self) -> dict[str, int]:
        """Numbers of words, and of plain spellings that are no word themselves."""
        exact = {word: i for i, word in enumerate(self.words) if i > 1}
        return {plain_spelling(word): i for word, i in exact.items()} | exact

    @property
    def null_labels(self) -> tuple[int, ...]:
        """Null row of every column."""
        return tuple(len(values) for values in self.attributes.values())

    def label_id(self, column: str, name: int | str) -> int:
        """Number of a label given by name (see `match_names`), by what follows the slash of its name, or by number.

        Raises:
            ValueError: unknown column or name (with the nearest names), a name that fits several, a number out of
                range.
        """
        if column not in self.attributes:
            raise ValueError(f"unknown attribute {column!r}; this model has {', '.join(self.attributes) or 'none'}")
        values = self.attributes[column]
        if not isinstance(name, str):
            try:
                name = operator.index(name)
            except TypeError as error:
                raise ValueError(f"{column} {name!r}; give a name or a whole number") from error
            if not 0 <= name < len(values):
                raise ValueError(f"{column} {name}; the numbers are 0 ... {len(values) - 1}")
            return name
        wanted = name.strip()
        found = match_names(wanted, values) or match_names(wanted, [value.rpartition("/")[2] for value in values])
        if len(found) > 1:
            raise ValueError(f"{column} {name!r} fits several: {', '.join(values[i] for i in found)}")
        if not found:
            short = [value.rpartition("/")[2] for value in values]
            near = _nearest(wanted.lower(), [*values, *short])
            raise ValueError(f"unknown {column} {name!r}{near} ({len(values)} in all: visar models --classes MODEL)")
        return found[0]

    def encode_text(self, text: str) -> list[int]:
        """Word ids of a text, not padded; those of the empty text say "not given".

        Apostrophes may be straight or curly, and accents left out or added.

        Raises:
            ValueError: a text without any word, unknown words (with the nearest known ones), or too many.
        """
        words = split_words(text)
        found = [self._word_ids.get(word, self._word_ids.get(plain_spelling(word))) for word in words]
        unknown = [word for word, number in zip(words, found, strict=True) if number is None]
        if unknown:
            hints = "; ".join(f"{word!r}{_nearest(word, self.words[2:])}" for word in unknown)
            raise ValueError(f"prompt {text!r} has words that this model does not know: {hints}")
        if not text:
            return [self.words.index(NULL)]
        if not words:
            raise ValueError(f"prompt {text!r} has no word")
        if len(words) > self.num_words:
            raise ValueError(f"prompt {text!r} has {len(words)} words; this model reads up to {self.num_words}")
        return [number for number in found if number is not None]

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Word ids int64 [B, num_words], padded with 0."""
        ids = torch.zeros(len(texts), self.num_words, dtype=torch.int64)
        for row, text in enumerate(texts):
            encoded = self.encode_text(text)
            ids[row, : len(encoded)] = torch.tensor(encoded)
        return ids

    # ----------------------------------------------------------------------------------------------- open conditions
    def _candidates(self, wanted: dict[str, int]) -> np.ndarray:
        """Rows with the wanted labels.

        Raises:
            ValueError: the training set has no such image; says which values go with the first wanted one.
        """
        columns = list(self.attributes)
        fits = np.ones(len(self.rows), bool)
        for column, label in wanted.items():
            before, fits = fits, fits & (self.rows[:, 1 + columns.index(column)] == label)
            if not fits.any():
                seen = sorted(set(self.rows[before, 1 + columns.index(column)].tolist()))
                names = ", ".join(self.attributes[column][i] for i in seen)
                raise ValueError(
                    f"no training image has {column} {self.attributes[column][label]!r} with the other conditions; "
                    f"they occur with: {names}"
                )
        return np.flatnonzero(fits)

    def _row(self, wanted: dict[str, int], uniform: float) -> np.ndarray:
        """A training row with the wanted labels, picked by a number in (0, 1)."""
        if len(self.rows):
            found = self._candidates(wanted)
            return self.rows[found[min(int(uniform * len(found)), len(found) - 1)]]
        drawn = {"class": min(int(uniform * len(self.attributes["class"])), len(self.attributes["class"]) - 1)}
        labels = dict(zip(self.attributes, self.null_labels, strict=True)) | drawn | wanted
        return np.array([-1, *labels.values()], np.int32)

    def draw_texts(self, uniform_B: Tensor) -> list[str]:
        """Captions of training rows, each picked by a number in (0, 1).

        Raises:
            ValueError: the training set has no captions.
        """
        captions = self.rows[self.rows[:, 0] >= 0, 0]
        if not len(captions):
            raise ValueError("this model knows no training captions to draw from: give a prompt")
        last = len(captions) - 1
        return [self.texts[captions[min(int(uniform * len(captions)), last)]] for uniform in uniform_B.tolist()]

    def complete(
        self,
        uniform_B: Tensor,
        *,
        class_labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        attributes: dict[str, str] | None = None,
        with_labels: bool = True,
        with_words: bool = True,
    ) -> tuple[Condition, list[str]]:
        """Conditions of B images: what is given, and the rest from a training row drawn among those that fit it.

        Args:
            uniform_B: float in (0, 1), one per image: picks the row.
            class_labels: names or numbers, one per image.
            prompts: texts, one per image; nothing is drawn then.
            attributes: names by column, for all images.
            with_labels, with_words: what the model reads.

        Returns: the condition, and each image's in words.

        Raises:
            ValueError: see `label_id` and `encode_text`; attributes beside prompts; more or fewer class labels than
                images.
        """
        if prompts is not None:
            if attributes:
                raise ValueError("a prompt says everything: put attributes into its words")
            return Condition(words_BT=self.encode_texts(prompts)), list(prompts)
        common = {column: self.label_id(column, name) for column, name in (attributes or {}).items()}
        draws = uniform_B.tolist()
        if class_labels is not None and len(class_labels) != len(draws):
            raise ValueError(f"{len(class_labels)} class labels for {len(draws)} images")
        wanted = [common] * len(draws)
        if class_labels is not None:
            wanted = [{"class": self.label_id("class", label)} | common for label in class_labels]
        rows = np.stack([self._row(labels, uniform) for labels, uniform in zip(wanted, draws, strict=True)])
        texts = [self.texts[row[0]] if row[0] >= 0 else "" for row in rows]
        labels = torch.from_numpy(rows[:, 1:].astype(np.int64)) if with_labels else None
        words = self.encode_texts(texts) if with_words and self.words else None
        descriptions = [
            ", ".join(filter(None, [self.attributes["class"][row[1]] if len(row) > 1 else "", text]))
            for row, text in zip(rows, texts, strict=True)
        ]
        return Condition(labels_BA=labels, words_BT=words), descriptions


def build_vocabulary(
    attributes: dict[str, tuple[str, ...]], labels_NA: np.ndarray, captions: Sequence[str] | None, train: np.ndarray
) -> Vocabulary:
    """Vocabulary of a data set: words of all captions, rows of the training split.

    Args:
        attributes: names by column.
        labels_NA: int labels of all images.
        captions: captions of all images, or None.
        train: indices of the training split.
    """
    words: tuple[str, ...] = ()
    texts: list[str] = []
    text_ids = np.full(len(labels_NA), -1, np.int32)
    num_words = 0
    if captions is not None:
        split = [split_words(caption) for caption in captions]
        words = (PADDING, NULL, *sorted({word for caption in split for word in caption}))
        num_words = max(1, *(len(caption) for caption in split))
        chosen = [captions[int(i)] for i in train]
        texts = sorted(set(chosen))
        number = {text: i for i, text in enumerate(texts)}
        text_ids[train] = [number[text] for text in chosen]
    rows = np.concatenate([text_ids[train, None], labels_NA[train].astype(np.int32)], axis=1)
    rows = rows[np.lexsort(rows.T[::-1])]
    return Vocabulary(dict(attributes), words, num_words, tuple(texts), rows)
