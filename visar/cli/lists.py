"""`visar models` and `visar samplers`: what there is to choose from."""

import dataclasses
from collections.abc import Callable, Sequence

Report = Callable[[str], object]
Echo = Callable[[Sequence[tuple[str, ...]]], object]


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the models: those that ship with visar, and official ones that are fetched when asked for."""

    classes: str | None = None
    """Model whose classes and attributes are printed instead."""


def models(options: Models, report: Report, echo: Echo) -> None:
    """Runs `visar models`.

    Args:
        options: options of the command.
        report: prints a line.
        echo: prints a table: header and rows.

    Raises:
        ValueError: no such model, or its classes have no names.
    """
    from visar.checkpoints.hub import about, embedded_names, official

    if options.classes is not None:
        from visar import load

        vocabulary = None if options.classes in official() else load(options.classes, device="cpu").vocabulary
        if vocabulary is None:
            raise ValueError(f"the classes of {options.classes} have numbers only")
        for name, values in vocabulary.attributes.items():
            report(f"{name}: {', '.join(values)}")
        return
    rows = [("name", "kind", "parameters", "what it makes")]
    for name in embedded_names():
        facts = about(name)
        rows.append((name, facts["kind"], f"{facts['parameters'] / 1e6:.1f} M", facts["summary"]))
    rows += [(name, "official", "fetched", entry.note) for name, entry in official().items()]
    echo(rows)


@dataclasses.dataclass(frozen=True)
class Samplers:
    """Lists the samplers: exact or lossy, source, what they need of a generator, their settings and defaults."""


def samplers(options: Samplers, echo: Echo) -> None:
    """Runs `visar samplers`; echo prints a table: header and rows."""
    from torch import Tensor

    from visar.samplers.index import SAMPLERS

    rows = [("sampler", "distribution", "source", "needs", "settings (defaults)")]
    for name, entry in SAMPLERS.items():
        settings = ", ".join(
            f"{key} (needed)" if value.default is value.empty else f"{key}={value.default!r}"
            for key, value in entry.settings().items()
        )
        if any(value.annotation is Tensor for value in entry.settings().values()):
            settings = f"tensors, see visar edit: {settings}"
        rows.append((name, "exact" if entry.exact else "lossy", entry.paper, entry.needs.__name__, settings or "-"))
    echo(rows)
