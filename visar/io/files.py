"""Reading and writing files so that nothing is lost and nothing unsafe is executed."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import pickletools
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from visar.io.packed import unpack

# What file systems that keep no modes or cannot flush (network mounts, FUSE) answer; the data is written all the same.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENAMETOOLONG}
# How safetensors and torch.save, which do not raise OSError, say that a write failed.
_FAILED_WRITE = re.compile("I/O error|IoError|os error|PytorchStreamWriter|unexpected pos")
_LONGEST_NAME = 255
# Names of `atomic_write`: the output's, eight characters, its ending again.
_TEMPORARY = re.compile(r"\..+(\.\w+)\.[a-z0-9_]{8}\1")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Region in which failed writes become one error that names the output.

    Raises:
        ValueError: no space, a limit on sizes, a mount that is gone or read-only.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ValueError(f"cannot write {path}: {error.strerror} (what was there is unchanged)") from error
    except (safetensors.SafetensorError, RuntimeError) as error:
        if not _FAILED_WRITE.search(str(error)):
            raise
        reason = "no space left, or a limit on the size of files (what was there is unchanged)"
        raise ValueError(f"cannot write {path}: {reason}") from error


def _flush(path: Path) -> None:
    """Has a file written to its disk, where its file system can."""
    with open(path, "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise


def _set_mode(path: Path, mode: int) -> None:
    """The mode that a file or folder made without a temporary name would have, where there are modes."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):
        path.chmod(mode & ~umask)


def _temporary_prefix(path: Path) -> str:
    """Begins the names of temporaries of an output; short enough for a file system, whatever the output's name."""
    return f".{path.name}." if len(os.fsencode(path.name)) <= _LONGEST_NAME - 32 else f".{path.name[:32]}."


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
        names = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot write {str(path)!r}: the name cannot be encoded as {error.encoding}") from error
    if any(len(name) > _LONGEST_NAME for name in names):
        raise ValueError(f"cannot write {path}: a name is longer than {_LONGEST_NAME} bytes")
    if "\0" in str(path):
        raise ValueError(f"cannot write {str(path)!r}: a name holds a null character")


def _check_place(path: Path) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {folder} is not a folder that can be written to")


def check_file_output(path: str | Path, endings: Collection[str] = ()) -> None:
    """Finds before the work that a file cannot be written; makes nothing.

    Args:
        path: path of the file.
        endings: allowed ones, with their dot; none = all.

    Raises:
        ValueError: another ending, a folder or a device, a name that cannot be, or a place that cannot be written to.
    """
    path = Path(path)
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(endings)}")
    _check_name(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    _check_place(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: it is not a regular file")


def check_folder_output(path: str | Path) -> None:
    """Finds before the work that nothing can be written into a folder; makes nothing.

    Raises:
        ValueError: a file or a dead link, a name that cannot be, or a place that cannot be written to.
    """
    path = Path(path)
    _check_name(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"cannot write into {path}: it is a link to {os.readlink(path)}, which does not exist")
    _check_place(path / "file")


def _remove_temporaries(folder: Path) -> None:
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made if need be, for one run; the system frees it however the process ends.

    Temporaries that killed runs left in it are removed, and so are folders made for it if nothing was written. File
    systems without locks are used without.

    Raises:
        ValueError: another run holds the folder, or it cannot be made.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror} (choose another out)") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_temporaries(folder)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use by another run: wait for its end, or choose another out") from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED | {errno.ENOLCK, errno.EBADF}:
                raise
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, flushed and renamed to `path` on success, removed on failure.

    A reader therefore sees the old file or the new one, never half of one. A link stays, and what it points to is
    replaced.

    Raises:
        ValueError: the folder does not exist and cannot be made, or is not writable; no space; `path` is a folder or a
            device.
    """
    path = Path(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"cannot write {path}: it is not a regular file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_temporary_prefix(path), suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error} (choose another output path)") from error
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(path):
            yield temporary
            _flush(temporary)
        _set_mode(temporary, 0o666)
        temporary.replace(path)
    except IsADirectoryError as error:
        raise ValueError(f"cannot write {path}: it is a folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def shown(path: str | Path) -> str:
    """A path as text that can be printed and stored: bytes of its name that are no UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: it is none: damaged, nested too deep, or another value.
    """
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where a JSON object is needed")
    return content


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it cannot be read, is no UTF-8, or is no file at all (a pipe would be waited for).
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in blocks of 1 MiB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# How files begin that are given or fetched in place of weights, and what to do about them.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the weights: run git lfs pull where it came from"),
    (b"<", "a web page or XML, not the weights: fetch the file itself"),
    (b"{", "JSON, not the weights"),
    (b"[", "JSON, not the weights"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"(\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file; PyTorch or safetensors files are needed"),
    (b"GGUF", "a GGUF file; PyTorch or safetensors files are needed"),
    (b"\x93NUMPY", "a NumPy array; PyTorch or safetensors files are needed"),
)
_FORMATS = {"safetensors": "safetensors", "pytorch": "PyTorch"}
_ENDINGS = {"safetensors": ".safetensors", "pytorch": ".pt"}
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed|unsupported GLOBAL (\S+) whose|but got <class '(\S+)'>")


def _looks_like(path: Path) -> str:
    """What a file is by its first bytes: "safetensors", "pytorch" (a zip archive or a pickle), a whole sentence about
    what it is instead, or "" where they do not tell."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "empty"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "pytorch"
    for beginning, what in _BEGINNINGS:
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            return what
    return ""


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(512)
    return all(byte in b"\t\n\r\f" or byte >= 32 for byte in start)


def _globals(path: Path) -> list[str]:
    """Names of the functions and classes that a pickle outside of an archive asks for; nothing is called."""
    names: list[str] = []
    strings: list[str] = []
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # damaged, or none: the names so far
        pass
    return [name for name in names if not name.startswith(("torch.", "collections.OrderedDict"))]


def load_weights(path: str | Path) -> dict[str, object]:
    """Contents of a weights file on the CPU: `.safetensors`, or a PyTorch pickle of tensors and plain data.

    Returns: the file's mapping; PyTorch files may nest their tensors (converters unwrap them).

    Raises:
        ValueError: the file is missing, unreadable, truncated or corrupt, something else than weights (the message
            says what), or its pickle asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights file at {path}{' (it is a folder)' if path.is_dir() else ''}")
    try:
        kind = _looks_like(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    wanted = "safetensors" if path.suffix == ".safetensors" else "pytorch"
    if kind == "empty":
        raise ValueError(f"{path} is truncated: it is empty")
    if kind in ("safetensors", "pytorch") and kind != wanted:
        right = path.with_suffix(_ENDINGS[kind]).name
        raise ValueError(f"{path} is not a {_FORMATS[wanted]} file but a {_FORMATS[kind]} one: rename it to {right}")
    if kind and kind != wanted:
        raise ValueError(f"{path} is not a {_FORMATS[wanted]} file: it is {kind}")
    content = _load_safetensors(path) if wanted == "safetensors" else _load_pytorch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a mapping of names to tensors is needed")
    return content


def _load_safetensors(path: Path) -> dict[str, object]:
    try:
        state = load_file(path, device="cpu")
    except Exception as error:  # a damaged header comes out as errors of many kinds
        if _is_text(path):
            raise ValueError(f"{path} is not a safetensors file: it is plain text") from error
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error
    return dict(unpack(state, path))


def _load_pytorch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # what a damaged pickle does to the machine that reads it has no end of kinds
        refused = [name for match in _REFUSED.finditer(str(error)) for name in match.groups() if name] or _globals(
            path
        )
        if refused and isinstance(error, pickle.UnpicklingError):
            names = ascii(", ".join(refused[:3]))[1:-1]
            raise ValueError(
                f"{path} is refused: its pickle holds more than tensors and plain data ({names:.200}), and loading it "
                "could run code. Convert it to safetensors where you trust it."
            ) from error
        if _is_text(path):
            raise ValueError(f"{path} is not a PyTorch file: it is plain text") from error
        # PyTorch's own text advises to switch the check off.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
        raise ValueError(f"{path} is truncated, damaged or not a PyTorch file{reason}; fetch it again") from error


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[0])[:200].rstrip(". ")


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
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(out), dir=out.parent))
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error} (choose another out)") from error
    try:
        with writing(out):
            yield temporary
            finish_folder(temporary)
        _set_mode(temporary, 0o777)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish_folder(folder: Path) -> None:
    """Flushes the files of a folder, and gives them the modes of files that were just opened."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)
            _set_mode(path, 0o666)  # safetensors makes files that nobody else can read


@contextlib.contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """Yields the path of a new folder, put in the place of `final` on success, removed on failure.

    Raises:
        ValueError: no space.
    """
    temporary = final.with_name(f".{final.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(final):
            temporary.mkdir(parents=True)
            yield temporary
            finish_folder(temporary)
        restore_folder(final)
        if final.exists():
            final.rename(_set_aside(final))
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(_set_aside(final), ignore_errors=True)


def _set_aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def restore_folder(final: Path) -> None:
    """Puts back, or removes, the old folder that a process killed inside of `replaced_folder` had set aside."""
    old = _set_aside(final)
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
