"""Reading and writing files so that nothing is lost and nothing unsafe is executed."""

import contextlib
import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, flushed and renamed to `path` on success, removed on failure.

    A reader therefore sees the old file or the new one, never half of one.

    Raises:
        ValueError: the folder does not exist and cannot be made, or is not writable.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error} (choose another output path)") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except IsADirectoryError as error:
        raise ValueError(f"cannot write {path}: it is a folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def shown(path: str | Path) -> str:
    """A path as text that can be printed and stored: bytes of its name that are no UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in blocks of 1 MiB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(path: str | Path) -> dict[str, object]:
    """Contents of a weights file on the CPU: `.safetensors`, or a PyTorch pickle of tensors and plain data.

    Returns: the file's mapping; PyTorch files may nest their tensors (converters unwrap them).

    Raises:
        ValueError: the file is missing, truncated or corrupt, or its pickle asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path, device="cpu"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: its pickle holds more than tensors and plain data, and loading it could run code. "
            f"Convert it to safetensors where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a PyTorch file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a mapping of names to tensors is needed")
    return content


def tensors_only(content: dict[str, object], path: str | Path) -> dict[str, Tensor]:
    """The mapping with a check that every value is a tensor.

    Raises:
        ValueError: a value is something else (the file nests its weights, or holds other data).
    """
    strange = [f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{path}: expected tensors, found {', '.join(strange[:8])}")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, flushed and renamed to it on success, removed on failure.

    Raises:
        ValueError: `out` is a file or holds something, or cannot be written.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error} (choose another out)") from error
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Puts a finished folder in the place of `final`, which may exist."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
