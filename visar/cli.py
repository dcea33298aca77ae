"""The `visar` command: one dataclass of options a command, its flags made from the fields."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True)
class Sample:
    """Makes images with a model: a grid in one file, or a folder of files."""

    model: tyro.conf.Positional[str]
    """An embedded or official name (`visar models`), or a folder made by save_pretrained."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Class by name or number; without it every image draws one from the training set's law."""
    prompt: str | None = None
    """Words, for models conditioned on words."""
    attribute: tuple[str, ...] = ()
    """Further labels as name=value, such as style=noto."""
    num_images: int = 1
    """How many images."""
    seed: int = 0
    """Image i has seed + i, and depends on nothing else of the call."""
    out: Path = Path("samples.png")
    """A .png file for a grid, or a folder for one file an image."""
    sampler: str = "ancestral"
    """See `visar samplers`; its own settings are given as --sampler.NAME VALUE."""
    guidance_scale: float | None = None
    """1.0 = off; the model's own default when not given, as for the next three."""
    temperature: float | None = None
    """> 0; 1.0 = off."""
    top_k: int | None = None
    """0 = off."""
    top_p: float | None = None
    """In (0, 1]; 1.0 = off."""
    batch_size: int = 64
    """Most images at a time."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32 or bfloat16; float32 on a CPU, bfloat16 on a GPU."""


def sample(options: Sample, sampler_options: dict[str, Any]) -> None:
    """Runs `visar sample`."""
    from visar import load
    from visar.files import atomic_write
    from visar.pictures import grid

    single = options.out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    attributes = {}
    for pair in options.attribute:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"attribute {pair!r}; write it as name=value, such as style=noto")
        attributes[name] = value
    with atomic_write(options.out if single else options.out / "seeds.txt") as path:
        path.touch()  # an output that cannot be written is found now, not after the work
        pipeline = load(options.model, device=options.device, dtype=options.dtype)
        result = pipeline(
            class_labels=None if options.class_name is None else _number_or_name(options.class_name),
            prompt=options.prompt,
            num_images=options.num_images,
            attributes=attributes or None,
            sampler=options.sampler,
            sampler_options=sampler_options,
            guidance_scale=options.guidance_scale,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            batch_size=options.batch_size,
        )
        if single:
            grid(result.images).save(path)
        else:
            lines = [f"{seed}\t{text}\n" for seed, text in zip(result.seeds, result.descriptions, strict=True)]
            path.write_text("".join(lines), encoding="utf-8")
            for seed, image in zip(result.seeds, result.images, strict=True):
                with atomic_write(options.out / f"{seed:06d}.png") as file:
                    image.save(file)
    for seed, text in zip(result.seeds, result.descriptions, strict=True):
        print(f"seed {seed}: {text}")
    passes = sum(result.statistics.forward_passes.values())
    print(
        f"{len(result.images)} images in {result.statistics.seconds:.1f} s of sampling, {passes} passes: {options.out}"
    )


def _number_or_name(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the models: those that ship with visar, and official ones that are fetched when asked for."""

    classes: str | None = None
    """Print the classes and attributes of this model instead."""


def models(options: Models) -> None:
    """Runs `visar models`."""
    from visar.checkpoints.hub import OFFICIAL, about, embedded_names

    if options.classes is not None:
        from visar import load

        vocabulary = load(options.classes, device="cpu").vocabulary
        if vocabulary is None:
            raise ValueError(f"the classes of {options.classes} have numbers only")
        for name, values in vocabulary.attributes.items():
            print(f"{name}: {', '.join(values)}")
        return
    rows = [("name", "kind", "parameters", "what it makes")]
    for name in embedded_names():
        facts = about(name)
        rows.append((name, facts["kind"], f"{facts['parameters'] / 1e6:.1f} M", facts["summary"]))
    rows += [(name, "official", "fetched", entry.note) for name, entry in OFFICIAL.items()]
    _table(rows)


@dataclasses.dataclass(frozen=True)
class Samplers:
    """Lists the samplers: exact or lossy, source, what they need of a generator, their settings and defaults."""


def samplers(options: Samplers) -> None:
    """Runs `visar samplers`."""
    from visar.samplers.index import SAMPLERS

    rows = [("sampler", "law", "source", "needs", "settings (defaults)")]
    for name, entry in SAMPLERS.items():
        settings = ", ".join(f"{key}={value.default!r}" for key, value in entry.settings().items())
        rows.append((name, "exact" if entry.exact else "lossy", entry.paper, " ".join(entry.needs), settings or "-"))
    _table(rows)


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@dataclasses.dataclass(frozen=True)
class DataEmoji:
    """Builds the emoji image set from the packages it is drawn in, and checks it by hash."""

    out: Path
    """Folder to write emoji64.zip and ATTRIBUTION.md to; downloads are kept in its folder `packages`."""


def data_emoji(options: DataEmoji) -> None:
    """Runs `visar data emoji`."""
    from visar.data.emoji_build import build_emoji

    print(build_emoji(options.out))


def _bench() -> tuple[type, Callable]:
    from visar.benchmark import Bench, bench

    return Bench, lambda options: bench(options, print)


def _train_tokenizer() -> tuple[type, Callable]:
    from visar.train.tokenizer import TrainTokenizer, train_tokenizer

    return TrainTokenizer, train_tokenizer


def _train_generator() -> tuple[type, Callable]:
    from visar.train.generator import TrainGenerator, train_generator

    return TrainGenerator, train_generator


COMMANDS: dict[str, tuple[str, Callable[[], tuple[type, Callable]]]] = {
    "sample": ("make images with a model", lambda: (Sample, sample)),
    "models": ("list models, their classes and attributes", lambda: (Models, models)),
    "samplers": ("list samplers, exact and lossy, and their settings", lambda: (Samplers, samplers)),
    "data emoji": ("build the emoji image set", lambda: (DataEmoji, data_emoji)),
    "bench": ("time decoding on this machine", _bench),
    "train tokenizer": ("train a tokenizer on images (--recipe NAME: start from an embedded model's)", _train_tokenizer),
    "train generator": ("train a generator on a tokenizer's ids (--recipe NAME: the same)", _train_generator),
}


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = "\n".join(f"  visar {name.ljust(width)}  {what}" for name, (what, _) in COMMANDS.items())
    return f"usage: visar COMMAND [--help] ...\n\n{rows}"


def _find(arguments: list[str]) -> tuple[str, list[str]]:
    """Splits off the command, of one word or two.

    Raises:
        ValueError: no such command.
    """
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            return name, arguments[length:]
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if group:
        raise ValueError(f"say which: {', '.join(f'visar {name}' for name in group)}")
    raise ValueError(f"unknown command {arguments[0]!r}\n{_usage()}")


def _sampler_options(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes --sampler.NAME VALUE pairs out of the arguments and reads them by the sampler's own annotations.

    Raises:
        ValueError: a setting that the sampler does not have, or a value of another type.
    """
    from visar.samplers.index import find_sampler

    own, rest, words = [], [], iter(arguments)
    for word in words:
        if word.startswith("--sampler."):
            name, equals, value = word.removeprefix("--sampler.").partition("=")
            own.append((name.replace("-", "_"), value if equals else next(words, "")))
        else:
            rest.append(word)
    if not own:
        return rest, {}
    chosen = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == "--sampler"]
    chosen += [word.partition("=")[2] for word in rest if word.startswith("--sampler=")]
    sampler = chosen[-1] if chosen else "ancestral"
    settings = find_sampler(sampler).settings()
    values = {}
    for name, value in own:
        if name not in settings:
            allowed = ", ".join(settings) or "none"
            raise ValueError(f"sampler {sampler} has no setting {name!r}; its settings: {allowed}")
        holder = dataclasses.make_dataclass("Setting", [(name, settings[name].annotation)])
        values[name] = getattr(
            tyro.cli(holder, args=[f"--{name.replace('_', '-')}", value], prog="visar sample"), name
        )
    return rest, values


def _recipe(command: str, arguments: list[str]) -> tuple[list[str], Any]:
    """Takes --recipe NAME out of a training command's arguments; the recipe's options replace the defaults.

    Raises:
        ValueError: no recipe of that name for this command.
    """
    if "--recipe" not in arguments:
        return arguments, None
    from visar.train.recipes import RECIPES

    place = arguments.index("--recipe")
    name = arguments[place + 1] if place + 1 < len(arguments) else ""
    fitting = [key for key, recipe in RECIPES.items() if isinstance(recipe, COMMANDS[command][1]()[0])]
    if name not in fitting:
        raise ValueError(f"unknown recipe {name!r} for visar {command}; choose one of {', '.join(fitting)}")
    return arguments[:place] + arguments[place + 2 :], RECIPES[name]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 an error that the message explains, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("torch-visar"))
        return 0
    try:
        name, rest = _find(arguments)
        extra: tuple = ()
        if name == "sample" and not {"-h", "--help"} & set(rest):
            rest, sampler_options = _sampler_options(rest)
            extra = (sampler_options,)
        options_class, run = COMMANDS[name][1]()
        settings: dict[str, Any] = {"prog": f"visar {name}", "description": options_class.__doc__}
        if name.startswith("train "):
            rest, default = _recipe(name, rest)
            settings |= {} if default is None else {"default": default}
        options = tyro.cli(options_class, args=rest, **settings)
        run(options, *extra)
    except (ValueError, ImportError) as error:
        print(f"visar: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("visar: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
