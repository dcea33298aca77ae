"""The `visar` command: which commands there are, how a line is read, what is printed, and the exit status.

A command is a dataclass of options, its flags made from the fields, and what runs them; both are imported when asked
for, the options from modules that import no framework: usage and --help wait for nothing else. Only this file prints.
"""

import contextlib
import difflib
import inspect
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Command = tuple[type, Callable[..., object]]


# ------------------------------------------------------------------------------------------------------------ output
def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


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


def _print_trained(result: Any) -> int:
    if _first_process():
        state = "finished" if result.finished else "stopped"
        best = "" if result.best is None else f", best validation {result.best:.4g}"
        print(f"{state} after {result.steps} steps{best}: {result.out / 'model'}")
    return 0 if result.stopped_by is None else 128 + result.stopped_by


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Region in which missing streams swallow what is printed, and no character is refused by an encoding."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (stream or nowhere for stream in before)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _drop_output() -> None:
    """Sends what standard output still holds nowhere, so that Python does not fail to write it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Region in which SIGTERM ends the command through its clean-up, unless somebody else handles it."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------------- the commands
def _sample() -> Command:
    from visar.cli.sample import Sample, sample

    return Sample, lambda options, sampler_options: sample(options, sampler_options, print)


def _edit() -> Command:
    from visar.cli.edit import Edit

    def run(options: Edit) -> None:
        from visar.cli.edit import edit

        print(edit(options))

    return Edit, run


def _demo() -> Command:
    from visar.cli.demo import Demo, demo

    return Demo, lambda options: demo(options, print)


def _models() -> Command:
    from visar.cli.lists import Models, models

    return Models, lambda options: models(options, print, _table)


def _samplers() -> Command:
    from visar.cli.lists import Samplers, samplers

    return Samplers, lambda options: samplers(options, _table)


def _convert() -> Command:
    from visar.checkpoints.options import Convert

    def run(options: Convert) -> None:
        from visar.cli.convert import convert

        print(convert(options))

    return Convert, run


def _eval() -> Command:
    from visar.evaluate.options import Eval

    def run(options: Eval, sampler_options: dict[str, Any]) -> None:
        from visar.cli.evaluate import evaluate

        evaluate(options, sampler_options, _table, _progress())

    return Eval, run


def _eval_tokenizer() -> Command:
    from visar.evaluate.options import EvalTokenizer

    def run(options: EvalTokenizer) -> None:
        from visar.cli.evaluate import evaluate_tokenizer

        evaluate_tokenizer(options, _table, _progress())

    return EvalTokenizer, run


def _compare() -> Command:
    from visar.evaluate.options import Compare

    def run(options: Compare) -> None:
        from visar.cli.compare import compare

        compare(options, _table, _progress())

    return Compare, run


def _acceptance() -> Command:
    from visar.bench.options import Acceptance

    def run(options: Acceptance) -> None:
        from visar.bench.acceptance import acceptance

        acceptance(options, _table, _progress())

    return Acceptance, run


def _reproduce() -> Command:
    from visar.evaluate.options import Reproduce

    def run(options: Reproduce) -> None:
        from visar.cli.reproduce import run_reproduce

        run_reproduce(options, print, _table, _progress())

    return Reproduce, run


def _stats() -> Command:
    from visar.evaluate.options import Stats

    def run(options: Stats) -> None:
        from visar.cli.evaluate import stats

        stats(options, _table, _progress())

    return Stats, run


def _bench() -> Command:
    from visar.bench.options import Bench

    def run(options: Bench, sampler_options: dict[str, Any]) -> None:
        from visar.bench.run import bench

        bench(options, sampler_options, lambda line: print(line, flush=True))

    return Bench, run


def _seeds() -> Command:
    from visar.bench.options import Seeds

    def run(options: Seeds) -> None:
        from visar.bench.seeds import seeds_matrix

        seeds_matrix(options, lambda line: print(line, flush=True))

    return Seeds, run


def _train_tokenizer() -> Command:
    from visar.train.options import TrainTokenizer

    def run(options: TrainTokenizer) -> int:
        from visar.train.tokenizer import train_tokenizer

        return _print_trained(train_tokenizer(options))

    return TrainTokenizer, run


def _train_generator() -> Command:
    from visar.train.options import TrainGenerator

    def run(options: TrainGenerator) -> int:
        from visar.train.generator import train_generator

        return _print_trained(train_generator(options))

    return TrainGenerator, run


def _train_drafter() -> Command:
    from visar.train.options import TrainDrafter

    def run(options: TrainDrafter) -> int:
        from visar.train.drafter import train_drafter

        return _print_trained(train_drafter(options))

    return TrainDrafter, run


def _distill_dd1() -> Command:
    from visar.distill.options import DistillDD1

    def run(options: DistillDD1) -> int:
        from visar.distill.dd1 import distill_dd1

        return _print_trained(distill_dd1(options))

    return DistillDD1, run


def _distill_dd2() -> Command:
    from visar.distill.options import DistillDD2

    def run(options: DistillDD2) -> int:
        from visar.distill.csd import distill_dd2

        return _print_trained(distill_dd2(options))

    return DistillDD2, run


def _distill_pairs() -> Command:
    from visar.distill.options import DistillPairs

    def run(options: DistillPairs) -> None:
        from visar.distill.dd1 import make_pairs

        print(make_pairs(options))

    return DistillPairs, run


def _distill_independent() -> Command:
    from visar.distill.options import DistillIndependent

    def run(options: DistillIndependent) -> None:
        from visar.distill.independent import distill_independent

        print(distill_independent(options))

    return DistillIndependent, run


def _data_emoji() -> Command:
    from visar.cli.data import DataEmoji, data_emoji

    return DataEmoji, lambda options: print(data_emoji(options))


def _data_clips() -> Command:
    from visar.cli.data import DataClips, data_clips

    return DataClips, lambda options: print(data_clips(options))


def _data_moving_emoji() -> Command:
    from visar.cli.data import DataMovingEmoji, data_moving_emoji

    return DataMovingEmoji, lambda options: print(data_moving_emoji(options))


def _data_doom() -> Command:
    from visar.cli.data import DataDoom, data_doom

    return DataDoom, lambda options: print(data_doom(options))


def _data_fashion() -> Command:
    from visar.cli.data import DataFashion, data_fashion

    return DataFashion, lambda options: print(data_fashion(options))


def _env() -> Command:
    from visar.cli.env import Env, facts

    return Env, lambda options: _table(facts())


def _completion() -> Command:
    from visar.cli.completion import Completion, completion

    return Completion, lambda options: print(completion(options.shell, COMMANDS), end="")


# Names of one word, of two, or of a word and a flag that may stand anywhere behind it.
COMMANDS: dict[str, tuple[str, Callable[[], Command]]] = {
    "sample": ("make images with a model", _sample),
    "edit": ("redraw a part of an image with a model over scales, or a masked one", _edit),
    "demo": ("serve a web page to sample, edit and compare", _demo),
    "models": ("list models, their classes and attributes", _models),
    "samplers": ("list samplers, exact and lossy, and their settings", _samplers),
    "eval": ("score a model's images, or images made elsewhere", _eval),
    "eval --compare": ("the same seeds through several samplers or models, or finished evaluations", _compare),
    "eval --tokenizer": ("score a tokenizer's reconstructions", _eval_tokenizer),
    "reproduce": ("a paper's figure from its authors' files (--dry-run: what that takes)", _reproduce),
    "acceptance": ("what speculative samplers accept, and how much faster than ancestral sampling", _acceptance),
    "stats": ("write a statistics file of real images, to evaluate against", _stats),
    "convert": ("convert another project's weights to a folder that loads without a network", _convert),
    "bench": ("time decoding on this machine, or against another program", _bench),
    "seeds": ("whether a seed gives the same image in every batch, order and process", _seeds),
    "train tokenizer": ("train a tokenizer on images (--recipe NAME: as an embedded model)", _train_tokenizer),
    "train generator": (
        "train a generator on a tokenizer's ids (--recipe NAME: as an embedded model)",
        _train_generator,
    ),
    "train drafter": ("train a drafter for speculative sampling with a raster model", _train_drafter),
    "distill dd1": ("distil a one-step generator by Distilled Decoding", _distill_dd1),
    "distill dd2": ("distil one by score distillation, or improve a student of dd1 by it", _distill_dd2),
    "distill pairs": ("make its pairs of noise and tokens, beside it or before it", _distill_pairs),
    "distill independent": ("make the baseline: tokens drawn by their frequencies alone", _distill_independent),
    "data emoji": ("build the emoji image set", _data_emoji),
    "data clips": ("build the set of animated emoji", _data_clips),
    "env": ("what a bug report needs to say of this machine", _env),
    "completion": ("a script that completes commands and flags in a shell", _completion),
    "data moving-emoji": ("draw clips of moving emoji", _data_moving_emoji),
    "data doom": ("draw clips of Doom levels, with the player's actions", _data_doom),
    "data fashion-mnist": ("build the Fashion-MNIST image set", _data_fashion),
}


# ------------------------------------------------------------------------------------------------------- command lines
def _usage(group: str = "") -> str:
    """All commands, or those of a group such as train."""
    names = [name for name in COMMANDS if not group or name.startswith(f"{group} ")]
    width = max(len(name) for name in names)
    rows = "\n".join(f"  visar {name.ljust(width)}  {COMMANDS[name][0]}" for name in names)
    end = "" if group else "\n\n  visar --version"
    return f"usage: visar {group or 'COMMAND'} {'COMMAND ' if group else ''}[--help] ...\n\n{rows}{end}"


def _members(group: str) -> list[str]:
    """Second words of the commands that begin with a word."""
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{group} ")]


def _find(arguments: list[str]) -> tuple[str, list[str]]:
    """Splits off the command.

    Raises:
        ValueError: no such command.
    """
    first, rest = arguments[0], arguments[1:]
    second = _members(first)
    for word in rest:
        if word in second and (word.startswith("--") or word is rest[0]):
            rest.remove(word)
            return f"{first} {word}", rest
    if first in COMMANDS:
        return first, rest
    if second:
        raise ValueError(f"choose one of {', '.join(f'visar {first} {word}' for word in second)}")
    nearest = difflib.get_close_matches(first, {name.partition(" ")[0] for name in COMMANDS}, n=1)
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    raise ValueError(f"unknown command {first!r}{hint}\n{_usage()}")


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
    import tyro

    from visar.cli.flags import take_value

    name, rest = _find(arguments)
    options_class, run = COMMANDS[name][1]()
    settings: dict[str, Any] = {"prog": f"visar {name}", "description": inspect.getdoc(options_class)}
    extra: tuple = ()
    if name in ("sample", "eval", "bench") and not {"-h", "--help"} & set(rest):
        from visar.cli.sampler_flags import take_sampler_options

        rest, sampler_options = take_sampler_options(rest)
        extra = (sampler_options,)
    if name.startswith("train "):
        settings["description"] += " --recipe NAME replaces the defaults by those of an embedded model."
        rest, recipe = take_value(rest, "--recipe")
        settings |= {} if recipe is None else {"default": _recipe(name, options_class, recipe)}
    if take_value(rest, "--out")[1] == "":
        raise ValueError("--out is empty; name a file or a folder")
    options = tyro.cli(options_class, args=rest, **settings)
    return lambda: _carry_out(name, run, options, extra)


# Outputs that are checked before anything is loaded, and folders that one command at a time may write into; training
# locks its folder itself, and commands that make pairs share one.
_FILES: dict[str, tuple[str, ...]] = {"stats": (".npz",), "bench": (), "seeds": (), "data fashion-mnist": ()}
_DRAWN = ("data emoji", "data clips", "data moving-emoji", "data doom")
_FOLDERS = ("eval", "eval --compare", "eval --tokenizer", "acceptance", *_DRAWN)


def _carry_out(name: str, run: Callable[..., object], options: Any, extra: tuple) -> object:
    """Runs a command after the checks that all commands share.

    Raises:
        ValueError: a number out of range, an output that cannot be written, too little memory, or as the command.
    """
    from visar.cli.flags import RANGES, as_flags, short_of_memory, sizes_of
    from visar.core.checks import check_ranges

    check_ranges(options, RANGES)
    try:
        with contextlib.ExitStack() as stack:
            if name in _FILES and options.out is not None:
                from visar.io.files import check_file_output

                check_file_output(options.out, _FILES[name])
            elif name in _FOLDERS or name.startswith(("train ", "distill ")):
                from visar.io.files import check_folder_output, locked

                folder: Any = options.out
                check_folder_output(folder)
                if name in _FOLDERS and _first_process():
                    stack.enter_context(locked(folder))
            return run(options, *extra)
    except (MemoryError, RuntimeError) as error:
        if not short_of_memory(error):
            raise
        raise ValueError(f"not enough memory: give less than {sizes_of(options)} ({error})") from error
    except ValueError as error:
        message = as_flags(str(error), options)
        if message == str(error):
            raise
        raise ValueError(message) from error


def _silence_imports() -> None:
    """Keeps off the screen what torch and diffusers log where torchao is installed, about classes unused here."""
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _show_readers() -> None:
    """Shows what the readers of data say through logging: how many images there are, and what was left out."""
    if _first_process():
        logging.getLogger("visar.data").setLevel(logging.INFO)
        if logging.lastResort is not None:
            logging.lastResort.setLevel(logging.INFO)


def _main(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "help"
    if first in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if first in ("-V", "--version"):
        from visar import __version__

        print(f"visar {__version__}")
        return 0
    if first not in COMMANDS and _members(first) and arguments[1:] in (["-h"], ["--help"]):
        print(_usage(first))
        return 0
    _silence_imports()
    _show_readers()
    status = 2
    try:
        run = parse(arguments)
        status = 1
        ended = run()
        return ended if isinstance(ended, int) else 0
    except BrokenPipeError:
        raise
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM:
            print("visar: terminated", file=sys.stderr)
        return int(stop.code or 0)
    except (ValueError, ImportError, OSError) as error:
        print(f"visar: {error}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("visar: interrupted", file=sys.stderr)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 an error that the message explains, 2 wrong usage.

    A command ended by a signal returns 128 + its number; 141 is an output that is closed, 130 Ctrl-C.
    """
    with _output(), _terminated_cleanly():
        try:
            status = _main(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads the output, such as `head`, has enough
            _drop_output()
            return 141
        except OSError as error:
            _drop_output()
            with contextlib.suppress(OSError):
                print(f"visar: cannot print: {error.strerror}", file=sys.stderr)
            return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
