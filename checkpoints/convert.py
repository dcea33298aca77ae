"""From another project's files to models: finds the row that knows a file, whatever project it is of."""

import dataclasses
from collections.abc import Mapping

from visar.checkpoints.common import holds, kinds_of_weights, mappings, read, tensor_names
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Models, Row, all_rows, choose_weights, sources_of

# Options that only some kinds of files take: the others are about every conversion.
_GENERAL = ("file", "out", "source", "weights", "second", "like", "dtype", "storage")


def find_rows(content: Mapping[str, object], source: str | None, file: object) -> list[Row]:
    """Kinds of weights in a file: one or several; projects may share a kind, or have one each of the same keys.

    Args:
        content: of the file.
        source: project; None is every project.
        file: for error messages.

    Raises:
        ValueError: no such project, or no such weights; says what every converter missed.
    """
    known = all_rows()
    if source is not None and source not in known:
        raise ValueError(f"source {source!r}; choose one of {', '.join(known)}")
    rows: list[Row] = []
    for name, those in known.items():
        rows += [row for row in those if source in (None, name) and not any(row is other for other in rows)]
    found = [row for row in rows if row.sniff(content) and (source is not None or not row.only_if_named)]
    if found:
        return found
    missed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        missed.setdefault((row.role, " with ".join(row.marks)), []).append(sources_of(row))
    refusals = [f"{'/'.join(sources)} {role}: no {marks}" for (role, marks), sources in missed.items()]
    names = sorted(set().union(*(tensor_names(node) for _, node in mappings(content))))
    asked = "" if source is None else f" of {source}"
    raise ValueError(
        f"{file} holds no weights that a converter{asked} knows. {'; '.join(refusals)}. "
        f"Its tensors: {', '.join(names[:8]) or 'none'}{' ...' if len(names) > 8 else ''}. "
        f"Sources: {', '.join(known)}"
    )


def _choose(rows: list[Row], second: Mapping[str, object] | None, options: Convert) -> Row:
    """The row that reads the files: a generator before a tokenizer, and one that goes with the second file.

    Raises:
        ValueError: a second file that goes with none, or rows of several projects that fit alike.
    """
    pool = [row for row in rows if row.role == "generator"] or rows
    if second is None:
        # Kinds that come in twos only where nothing else fits: reading then says which file is missing.
        pool = [row for row in pool if not row.second] or pool
    else:
        pairs = [row for row in pool if row.second]
        if not pairs:
            able = sorted({row.source for each in all_rows().values() for row in each if row.second})
            raise ValueError(
                f"{options.second}: {options.file} needs no second file; a second file goes with one generator of "
                f"{', '.join(able)}"
            )
        pool = [row for row in pairs if holds(second, row.second)] or pairs[:1]

    def keys(row: Row) -> int:
        return len(row.marks) + len(row.second)

    best = [row for row in pool if keys(row) == max(map(keys, pool))]
    if len(best) > 1:
        raise ValueError(
            f"{options.file} fits {len(best)} projects: say source, {' or '.join(r.source for r in best)}"
        )
    return best[0]


def _check_options(options: Convert, row: Row, source: str) -> None:
    """Checks that only options were given that the kind of file has.

    Raises:
        ValueError: another one; says which kinds take it.
    """
    if row.role == "tokenizer" and options.tokenizer is not None:
        raise ValueError(f"{options.file} is a tokenizer itself; give the generator's file first, or this one alone")
    for field in dataclasses.fields(Convert):
        value = getattr(options, field.name)
        if field.name in _GENERAL or field.name in row.takes or value == field.default:
            continue
        able = sorted({each.source for rows in all_rows().values() for each in rows if field.name in each.takes})
        raise ValueError(f"{field.name} {value} is for {', '.join(able)}; a {row.role} of {source} does not take it")


def read_models(options: Convert) -> Models:
    """Reads the files of a model; `options.out`, `like`, `dtype` and `storage` are not looked at.

    Raises:
        ValueError: damaged or unsafe files, files of another kind, or options that do not go with them.
    """
    content = read(options.file)
    second = None if options.second is None else read(options.second)
    row = _choose(find_rows(content, options.source, options.file), second, options)
    source = options.source or row.source
    _check_options(options, row, source)
    weights = choose_weights(content, row.marks, options.weights, row.weights)
    if options.weights not in (None, weights):
        raise ValueError(f"weights {options.weights}: {options.file} has {weights} weights only")
    models = row.read(dataclasses.replace(options, weights=options.weights or weights), content, second)
    notes = models.notes
    if len(kinds_of_weights(content, row.marks)) == 2:
        other = "plain" if weights == "ema" else "ema"
        notes = (
            f"{weights} weights of {options.file.name}, which has both (--weights {other} takes the others)",
            *notes,
        )
    return dataclasses.replace(models, source=source, notes=notes)
