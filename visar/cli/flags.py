"""What commands share about flags: some are taken out before options are read, numbers have ranges, and names."""

import dataclasses
import re
from pathlib import Path

from visar.core.checks import BATCH, COUNT_OR_OFF, IMAGES, SEED, WEIGHT, WINDOW, Range


def names_image(out: Path) -> bool:
    """Whether an output is an image's name, else a folder's; finds before the work that it cannot be written.

    Raises:
        ValueError: it cannot, or its ending is neither an image's nor that of a folder that exists.
    """
    from visar.io.files import check_file_output, check_folder_output
    from visar.io.pictures import WRITTEN_AS

    ending = out.suffix.lower()
    if ending in WRITTEN_AS:
        check_file_output(out)
        return True
    if any(letter.isalpha() for letter in ending) and not out.is_dir():
        raise ValueError(
            f"cannot write {out}: an image's name ends in {', '.join(WRITTEN_AS)}; a folder with a dot in its name "
            "must exist already"
        )
    check_folder_output(out)
    return False


def names_clip(out: Path, fps: float) -> bool:
    """Whether an output is the name of an animation; finds before the work that it cannot be written.

    Raises:
        ValueError: it cannot, or fps is out of range.
        ImportError: an .mp4, and PyAV is not installed.
    """
    from visar.io.video import WRITTEN_AS, check_fps, check_video_output

    check_fps(fps)
    if out.suffix.lower() not in WRITTEN_AS or out.is_dir():
        return False
    check_video_output(out, fps)
    return True


def take_value(arguments: list[str], flag: str) -> tuple[list[str], str | None]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments; the last value counts, None is no such flag."""
    rest, value, words = [], None, iter(arguments)
    for word in words:
        name, equals, behind = word.partition("=")
        if name == flag:
            value = behind if equals else next(words, "")
        else:
            rest.append(word)
    return rest, value


RANGES = {
    "num_images": IMAGES,
    "num_samples": Range(1, 10_000_000),
    "batch_size": BATCH,
    "batch_sizes": BATCH,
    "batch": BATCH,
    "speed_batches": BATCH,
    "other_batches": BATCH,
    "pair_batch": BATCH,
    "images": IMAGES,
    "slow_images": IMAGES,
    "processes": Range(1, 2),
    "workers": Range(1, 1024),
    "clips": Range(1, 10_000_000),
    "fps": Range(0, 120, open_low=True),
    "num_pairs": Range(2, 10**9),
    "first_pairs": Range(1, 10**9),
    "flow_steps": Range(2, 10_000),
    "vector_weight": WEIGHT,
    "starts": COUNT_OR_OFF,
    "window": WINDOW,
    "grid": Range(1, 4096),
    "calls": Range(1, 100_000),
    "runs": Range(1, 100_000),
    "eager_steps": Range(1, 1_000_000),
    "image_size": Range(1, 16_384),
    "seed": SEED,
}
"""Of numbers that mean the same in every command; training commands have further ones (visar/train/options.py)."""


# Options that decide how much memory is needed.
_SIZES = (
    "num_images num_samples batch_size batch batch_sizes speed_batches gradient_accumulation image_size codebook_size "
    "width hidden_width num_layers variants window"
).split()


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate", "size calculation overflow", "integer multipl")


def sizes_of(options: object) -> str:
    """The flags, with their values, that a command may be given with less when memory is short."""
    values = {name: getattr(options, name, None) for name in _SIZES}
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)


def short_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or PyTorch says that memory, or a size in bytes, did not suffice."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def as_flags(message: str, options: object) -> str:
    """A message in which settings are written as on a command line: `--resize adm` for `resize='adm'`."""
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        written = rf"(?<!\S){field.name}=('?)([\w.@+-]+)\1"
        message = re.sub(written, rf"--{field.name.replace('_', '-')} \2", message)
    return message
