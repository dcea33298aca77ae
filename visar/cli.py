"""The `visar` command: one dataclass of options a command, its flags made from the fields."""

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

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
    sampler: str | None = None
    """See `visar samplers`; its own settings are given as --sampler.NAME VALUE. The model's default when not given, as
    for the next four."""
    guidance_scale: float | None = None
    """1.0 = off."""
    temperature: float | None = None
    """> 0; 1.0 = off."""
    top_k: int | None = None
    """0 = off."""
    top_p: float | None = None
    """In (0, 1]; 1.0 = off."""
    previews: bool = False
    """Also write the pictures after every scale, one row an image, beside `out`; for models over scales."""
    batch_size: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("--batch",))] = 64
    """Most images at a time; auto finds how many fit into memory."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32 or bfloat16; float32 on a CPU, bfloat16 on a GPU."""
    offload: bool = False
    """Keep tokenizer and text encoder on the CPU except for their part: slower, and less memory of a GPU."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8 bits for every weight of the generator's blocks and head; needs torchao."""


def sample(options: Sample, sampler_options: dict[str, Any]) -> None:
    """Runs `visar sample`."""
    from visar import load
    from visar.files import atomic_write
    from visar.memory import OutOfMemory
    from visar.pictures import grid
    from visar.pipelines.editing import scale_previews
    from visar.pipelines.requests import named_values, number_or_name

    single = options.out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    attributes = named_values(options.attribute)
    _check_writable(options.out if single else options.out / "seeds.txt")
    placing: dict[str, Any] = dict(device=options.device, dtype=options.dtype, offload=options.offload)
    pipeline = load(options.model, **placing, quantize=options.quantize)
    pipeline.set_progress_bar_config(desc="sampling", unit="step")
    try:
        result = pipeline(
            class_labels=None if options.class_name is None else number_or_name(options.class_name),
            prompt=options.prompt,
            num_images=options.num_images,
            attributes=attributes,
            sampler=options.sampler,
            sampler_options=sampler_options,
            guidance_scale=options.guidance_scale,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            batch_size=options.batch_size,
        )
    except OutOfMemory as error:
        if error.done is not None:
            _write_images(error.done, options.out, single)
        raise
    _write_images(result, options.out, single)
    if options.previews:
        rows = scale_previews(pipeline, result.tokens)
        with atomic_write(options.out.with_name(f"{options.out.stem}-scales.png")) as path:
            grid([image for row in rows for image in row], columns=len(rows[0])).save(path, format="PNG")
    passes = sum(result.statistics.forward_passes.values())
    count = f"{len(result.images)} image{'s' if len(result.images) > 1 else ''}"
    print(f"{count} in {result.statistics.seconds:.1f} s of sampling, {passes} passes: {options.out}")


def _check_writable(path: Path) -> None:
    """Finds before the work that a file cannot be written; makes nothing.

    Raises:
        ValueError: a part of the path is not a folder that can be written to, or the path itself is a folder.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {folder} is not a folder that can be written to")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")


def _write_images(result: Any, out: Path, single: bool) -> None:
    """Writes a grid and prints what is on it, or a folder of files with a list of them."""
    from visar.files import atomic_write
    from visar.pictures import grid

    rows = list(zip(result.seeds, result.descriptions, strict=True))
    if single:
        with atomic_write(out) as path:
            grid(result.images).save(path)
        for seed, text in rows:
            print(f"seed {seed}: {text}")
        return
    for seed, image in zip(result.seeds, result.images, strict=True):
        with atomic_write(out / f"{seed:06d}.png") as path:
            image.save(path)
    with atomic_write(out / "seeds.txt") as path:
        path.write_text("".join(f"{seed}\t{text}\n" for seed, text in rows), encoding="utf-8")


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

        vocabulary = None if options.classes in OFFICIAL else load(options.classes, device="cpu").vocabulary
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
        settings = ", ".join(
            f"{key} (needed)" if value.default is value.empty else f"{key}={value.default!r}"
            for key, value in entry.settings().items()
        )
        rows.append((name, "exact" if entry.exact else "lossy", entry.paper, " ".join(entry.needs), settings or "-"))
    _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> None:
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


@dataclasses.dataclass(frozen=True)
class DataClips:
    """Builds the set of animated emoji from the packages it comes in; 730 MB of downloads."""

    out: Path
    """Folder to write emojiclips.zip and ATTRIBUTION.md to; downloads are kept in its folder `packages`."""


def data_clips(options: DataClips) -> None:
    """Runs `visar data clips`."""
    from visar.data.clips import build_clips

    print(build_clips(options.out))


@dataclasses.dataclass(frozen=True)
class DataFashion:
    """Builds the Fashion-MNIST image set: 70,000 grey pictures of 10 classes of clothes, 32 x 32."""

    source: Path
    """Folder with the four idx files (.gz or not) of Debian's dataset-fashion-mnist or torchvision, or a .deb file."""
    out: Path
    """File to write, fashion.zip."""


def data_fashion(options: DataFashion) -> None:
    """Runs `visar data fashion-mnist`."""
    from visar.data.fashion_mnist import build_fashion

    print(build_fashion(options.source, options.out))


# ------------------------------------------------------------------------------- commands whose options are elsewhere
Command = tuple[type, Callable[..., object]]


def _convert() -> Command:
    from visar.checkpoints.convert import Convert, convert

    return Convert, lambda options: print(convert(options))


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _progress() -> Callable[[str, int, int], None]:
    """Shows (stage, done, total) as one bar after the other."""
    from tqdm import tqdm

    stage, bar = "", tqdm(disable=True)

    def progress(what: str, done: int, total: int) -> None:
        nonlocal stage, bar
        if what != stage or done < bar.n:
            bar.close()
            stage, bar = what, tqdm(desc=what, total=total or None, unit="image", disable=not _first_process())
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return progress


def _edit() -> Command:
    from visar.pipelines.editing import Edit, edit

    return Edit, lambda options: print(edit(options))


def _eval() -> Command:
    from visar.evaluate.commands import Eval, evaluate

    return Eval, lambda options, sampler_options: evaluate(options, sampler_options, _table, _progress())


def _eval_tokenizer() -> Command:
    from visar.evaluate.commands import EvalTokenizer, evaluate_tokenizer

    return EvalTokenizer, lambda options: evaluate_tokenizer(options, _table, _progress())


def _compare() -> Command:
    from visar.evaluate.compare import Compare, compare

    return Compare, lambda options: compare(options, _table, _progress())


def _acceptance() -> Command:
    from visar.evaluate.acceptance import Acceptance, acceptance

    return Acceptance, lambda options: acceptance(options, _table, _progress())


def _stats() -> Command:
    from visar.evaluate.commands import Stats, stats

    return Stats, lambda options: stats(options, _table, _progress())


def _bench() -> Command:
    from visar.bench.options import Bench

    def run(options: Bench, sampler_options: dict[str, Any]) -> None:
        from visar.bench.run import bench

        bench(options, sampler_options, lambda line: print(line, flush=True))

    return Bench, run


def _train_tokenizer() -> Command:
    from visar.train.tokenizer import TrainTokenizer, train_tokenizer

    return TrainTokenizer, lambda options: _print_trained(train_tokenizer(options))


def _train_generator() -> Command:
    from visar.train.generator import TrainGenerator, train_generator

    return TrainGenerator, lambda options: _print_trained(train_generator(options))


def _train_drafter() -> Command:
    from visar.train.drafter import TrainDrafter, train_drafter

    return TrainDrafter, lambda options: _print_trained(train_drafter(options))


def _print_trained(result: Any) -> None:
    if _first_process():
        state = "finished" if result.finished else "stopped"
        best = "" if result.best is None else f", best validation {result.best:.4g}"
        print(f"{state} after {result.steps} steps{best}: {result.out / 'model'}")


# Names of one word, of two, or of a word and a flag that may stand anywhere behind it.
COMMANDS: dict[str, tuple[str, Callable[[], Command]]] = {
    "sample": ("make images with a model", lambda: (Sample, sample)),
    "edit": ("draw a part of a picture anew with a model over scales", _edit),
    "models": ("list models, their classes and attributes", lambda: (Models, models)),
    "samplers": ("list samplers, exact and lossy, and their settings", lambda: (Samplers, samplers)),
    "eval": ("score a model's images, or pictures made elsewhere", _eval),
    "eval --compare": ("the same seeds through several samplers or models, or finished evaluations", _compare),
    "eval --tokenizer": ("score a tokenizer's reconstructions", _eval_tokenizer),
    "acceptance": ("what speculative samplers accept, and how much faster than ancestral sampling", _acceptance),
    "stats": ("write a statistics file of real pictures, to evaluate against", _stats),
    "convert": ("make a folder that loads without a network from another project's weights", _convert),
    "bench": ("time decoding on this machine, or against another program", _bench),
    "train tokenizer": ("train a tokenizer on images (--recipe NAME: as an embedded model)", _train_tokenizer),
    "train generator": (
        "train a generator on a tokenizer's ids (--recipe NAME: as an embedded model)",
        _train_generator,
    ),
    "train drafter": ("train a drafter for speculative sampling with a raster model", _train_drafter),
    "data emoji": ("build the emoji image set", lambda: (DataEmoji, data_emoji)),
    "data clips": ("build the set of animated emoji", lambda: (DataClips, data_clips)),
    "data fashion-mnist": ("build the Fashion-MNIST image set", lambda: (DataFashion, data_fashion)),
}


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = "\n".join(f"  visar {name.ljust(width)}  {what}" for name, (what, _) in COMMANDS.items())
    return f"usage: visar COMMAND [--help] ...\n\n{rows}"


def _find(arguments: list[str]) -> tuple[str, list[str]]:
    """Splits off the command.

    Raises:
        ValueError: no such command.
    """
    first, rest = arguments[0], arguments[1:]
    second = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
    for word in rest:
        if word in second and (word.startswith("--") or word is rest[0]):
            rest.remove(word)
            return f"{first} {word}", rest
    if first in COMMANDS:
        return first, rest
    if second:
        raise ValueError(f"say which: {', '.join(f'visar {first} {word}' for word in second)}")
    raise ValueError(f"unknown command {first!r}\n{_usage()}")


def _recipe(command: str, options_class: type, name: str) -> Any:
    """The options of a recipe, which replace a training command's defaults.

    Raises:
        ValueError: no recipe of that name for this command.
    """
    from visar.train.recipes import RECIPES

    fitting = [key for key, recipe in RECIPES.items() if isinstance(recipe, options_class)]
    if name not in fitting:
        raise ValueError(f"unknown recipe {name!r} for visar {command}; choose one of {', '.join(fitting)}")
    return RECIPES[name]


def parse(arguments: list[str]) -> Callable[[], object]:
    """What a command line asks for, ready to run.

    Raises:
        ValueError: no such command, sampler, setting or recipe.
        SystemExit: --help, or options that do not fit, with their status (0, 2) and the message printed.
    """
    name, rest = _find(arguments)
    options_class, run = COMMANDS[name][1]()
    settings: dict[str, Any] = {"prog": f"visar {name}", "description": inspect.getdoc(options_class)}
    extra: tuple = ()
    if name in ("sample", "eval", "bench") and not {"-h", "--help"} & set(rest):
        from visar.sampler_arguments import take_sampler_options

        rest, sampler_options = take_sampler_options(rest)
        extra = (sampler_options,)
    if name.startswith("train "):
        from visar.sampler_arguments import take_value

        settings["description"] += " --recipe NAME replaces the defaults by those of an embedded model."
        rest, recipe = take_value(rest, "--recipe")
        settings |= {} if recipe is None else {"default": _recipe(name, options_class, recipe)}
    options = tyro.cli(options_class, args=rest, **settings)
    return lambda: run(options, *extra)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 an error that the message explains, 2 wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("torch-visar"))
        return 0
    status = 2
    try:
        run = parse(arguments)
        status = 1
        run()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:
        return int(stop.code or 0)
    except (ValueError, ImportError, OSError) as error:
        print(f"visar: {error}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("visar: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
