"""Every command that writes, on a full disk and killed while it writes: one line, nothing lost, nothing in the way."""

import errno
import hashlib
import os
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from visar.bench.seeds import SAMPLERS
from visar.cli.main import COMMANDS, main
from visar.data import clips
from visar.data.emoji_build import write_archive
from visar.data.folders import find_pictures
from visar.data.packages import Package
from visar.evaluate import reproduce
from visar.evaluate.extractors import EXTRACTORS
from visar.pipelines.loading import load

ROOT = Path(__file__).parent.parent
FAULTS, TRAINING, EVALUATION = (
    runpy.run_path(str(ROOT / "tests" / "fixtures" / f"{name}.py")) for name in ("faults", "training", "evaluation")
)
EMOJI, CLIPS, FASHION = (
    runpy.run_path(str(ROOT / "tests" / f"test_data_{name}.py")) for name in ("emoji", "clips", "fashion")
)
LINES = FAULTS["commands_that_write"](Path("MODELS"))
# Commands that write one file alone die while they write it, the others at their second file.
SINGLE = ("grid.png", "edited.png", "stats.npz", "rows.json", "coded/metrics.json", "fashion.zip")
LOCKED = (
    "folder",
    "edited",
    "scores",
    "given",
    "compared",
    "reproduced",
    "coded",
    "accepted",
    "run",
    "made",
    "drafter",
    "clips",
)


class Killed(BaseException):
    """The end of a process at once."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    folder = FAULTS["write_place"](tmp_path_factory.mktemp("models"))
    FASHION["write"](folder / "fashion", FASHION["files"](12, 3))
    EMOJI["names_tarball"](folder / "names-1.tgz")
    EMOJI["write_tarball"](folder / "clips-1.tgz", {"assets/1f600.webp": CLIPS["loop"](list(range(20)))})
    return folder


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with pictures and packages in it; features are cheap ones."""
    monkeypatch.chdir(tmp_path)
    TRAINING["write_images"](tmp_path / "images.npz")
    monkeypatch.setitem(EXTRACTORS, "tiny", EVALUATION["TINY"])
    monkeypatch.setitem(SAMPLERS, str(models / "tiny"), ("ancestral",))
    # No authors' files are here.
    monkeypatch.setattr(reproduce, "load", lambda name, **settings: load(models / "tiny", **settings))
    for name, constant in (("names", "NAMES"), ("clips", "CLIP_PACKAGES")):
        (tmp_path / "clips" / "packages").mkdir(parents=True, exist_ok=True)
        file = shutil.copy(models / f"{name}-1.tgz", tmp_path / "clips" / "packages")
        package = Package(name, "1", hashlib.sha256(Path(file).read_bytes()).hexdigest())
        monkeypatch.setattr(clips, constant, package if name == "names" else (package,))
    monkeypatch.setattr(clips, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1))
    return tmp_path


def words(output: str, models: Path) -> list[str]:
    return [
        word.replace("MODELS", str(models)).replace("TOKENIZER", FAULTS["TOKENIZER"]) for word in LINES[output].split()
    ]


def files_below(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_every_command_that_writes_is_here() -> None:
    tried = {name for name in COMMANDS for line in LINES.values() if line.startswith(f"{name} ")}
    # Clips are drawn into shards: tests/test_data_clip_sets.py.
    others = {"data emoji", "data doom", "data moving-emoji"}
    assert set(COMMANDS) - tried == {"models", "samplers", "env", "completion", "demo", *others}


@pytest.mark.parametrize("output", list(LINES))
def test_full_disks_and_kills_lose_nothing(
    output: str, place: Path, models: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, single = words(output, models), output in SINGLE
    if single:
        (place / output).parent.mkdir(exist_ok=True)
        (place / output).write_bytes(b'{"what": "was there"}\n')
    before = files_below(place)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(command) == 1
    error = capsys.readouterr().err
    assert "cannot write" in error and "No space left" in error and "Traceback" not in error
    assert ".part" not in error and files_below(place) == before

    flushed = 0

    def killed(handle: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed > (not single):
            raise Killed

    with monkeypatch.context() as patch:  # nobody cleans up behind a process that was killed
        patch.setattr(os, "fsync", killed)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
        with pytest.raises(Killed):
            main(command)
    assert not single or (place / output).read_bytes() == before[output]
    left = files_below(place).keys() - before.keys()
    assert main(command) == 0 and (place / output).stat().st_size > 5
    there = files_below(place)
    temporary = {name for name in left if any(part.startswith(".") for part in Path(name).parts)}
    assert temporary and left - temporary <= there.keys()
    if output.partition("/")[0] in LOCKED:
        assert not temporary & there.keys()
    assert not temporary & {*find_pictures(place).names}


def test_archives_of_emoji_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "set.zip", {"a": b"whole"})
    before = files_below(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*set\.zip: No space left"):
        write_archive(tmp_path / "set.zip", {"a": b"other"})
    assert files_below(tmp_path) == before
