"""What a file of this folder exports so that `visar convert` knows its project: ROWS, one row a kind of file.

A file with ROWS is a source project, by the file's name; official names stand beside them as OFFICIAL
(visar.checkpoints.hub). Nothing else names a project: a new file is found by listing this folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from visar.checkpoints import hub
from visar.checkpoints.common import State, Weights, holds, kinds_of_weights, require
from visar.checkpoints.options import Convert

Content = Mapping[str, object]


@dataclass(frozen=True)
class Models:
    """What files hold, in evaluation mode on the CPU, float32; None for what they do not.

    Attributes:
        tokenizer, generator: a pipeline's two parts.
        second: a further generator, of a project whose models are pairs.
        folders: names of the pipeline's folder and of the second generator's, where there is one.
        defaults: sampling settings of the pipeline: those of the project, where no official name says more.
        notes: what a user should know of the files, half a sentence each.
        options: command-line words for sampling with both generators, with {second} for the second one's folder.
        source: project that they are from; `read_models` fills it in.
    """

    tokenizer: Any = None
    generator: Any = None
    second: Any = None
    folders: tuple[str, str] = ("", "")
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    options: str = ""
    source: str = ""


@dataclass(frozen=True)
class Row:
    """A kind of file.

    Attributes:
        source: project that has such files: the name of the file that this row stands in.
        role: which part of a pipeline it is.
        marks: keys that files of this kind have, side by side.
        read: makes the models of the options, the file's content and that of the second file (None without one);
            raises ValueError where they do not fit. `options.weights` says which of two kinds of weights to take.
        takes: names of the options that it reads: tokenizer, grid, scales ...
        second: keys of the second file, for kinds of files that come in twos.
        weights: those that the project's own sampling takes from a file with averaged (ema) and plain ones.
        only_if_named: its files have the keys of another project's, so that only their user can tell: it is taken
            where the project is named.
    """

    source: str
    role: Literal["tokenizer", "generator"]
    marks: tuple[str, ...]
    read: Callable[[Convert, Content, Content | None], Models]
    takes: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    weights: Weights = "plain"
    only_if_named: bool = False

    def sniff(self, content: Content) -> bool:
        """Whether a file is of this kind, by its marks."""
        return holds(content, self.marks)


def all_rows() -> dict[str, tuple[Row, ...]]:
    """The rows of every project by its name. A row that stands in several files is one that they share."""
    return {name: module.ROWS for name, module in hub.projects().items()}


def sources_of(row: Row) -> str:
    """The projects that have files of a kind, such as "hmar/var"."""
    return "/".join(name for name, rows in all_rows().items() if any(row is each for each in rows))


def expect(content: Content, row: Row, file: str | Path) -> None:
    """Checks that a further file is of the kind that goes with the first.

    Raises:
        ValueError: it is not; says what it is instead.
    """
    if row.sniff(content):
        return
    others = [each for rows in all_rows().values() for each in rows if not each.only_if_named]
    is_instead = next((each for each in others if each.sniff(content)), None)
    what = "of no known kind" if is_instead is None else f"a {is_instead.role} of {sources_of(is_instead)}"
    raise ValueError(f"{file} is {what}; a {row.role} of {sources_of(row)} is needed")


def choose_weights(content: Content, marks: tuple[str, ...], asked: Weights | None, own: Weights) -> Weights:
    """Which weights to take of a file: those asked for where the file has both kinds, else those it has."""
    kinds = kinds_of_weights(content, marks)
    if len(kinds) == 2:
        return asked or own
    return next(iter(kinds), own)


def check_codes(state: State, key: str, file: str | Path, codes: int, tokenizer: str | Path) -> None:
    """Checks that a generator predicts as many codes as a tokenizer has.

    Args:
        state: of the generator.
        key: of the weight [codes, width] that says how many it predicts.
        file, tokenizer: what error messages call the two.
        codes: of the tokenizer.

    Raises:
        ValueError: the key is missing, or they differ.
    """
    require(state, {key: 2}, str(file), "generator")
    count = state[key].shape[0]
    if count != codes:
        raise ValueError(f"{file} predicts {count} codes, {tokenizer} has {codes}: they were not trained together")
