"""Packages of drawings, fetched by name and version with the npm client and checked against their recorded sha256."""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from visar.io.files import sha256


@dataclass(frozen=True)
class Package:
    """One published version.

    Attributes:
        name, version: as published.
        sha256: of the tarball.
    """

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name that the client gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NAMES = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
"""Names, keywords and groups of the Unicode emoji."""

# Drawing styles, in the order of their numbers.
STYLE_PACKAGES: dict[str, Package] = {
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "fluent-flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "fluent-3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
    "noto-blob": Package(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
    ),
}

CLIP_PACKAGES: tuple[Package, ...] = tuple(
    Package(f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", digest)
    for part, digest in (
        (1, "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"),
        (2, "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0"),
        (3, "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"),
        (4, "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"),
    )
)


def fetch_package(package: Package, folder: Path) -> Path:
    """Path of a package's tarball in the folder; downloaded unless it is there already.

    A download that breaks off leaves nothing behind, so a second call resumes with the packages that are missing.

    Raises:
        ValueError: no npm client, a failed download, or a tarball that is not the recorded one.
    """
    folder = folder.resolve()  # npm runs in another folder
    path = folder / package.file_name
    if path.is_file():
        _check(path, package, f"remove {path} to download it again")
        return path
    client = shutil.which("npm")
    if client is None:
        raise ValueError(
            f"{package.name} {package.version} is needed and there is no npm to fetch it with: install Node.js "
            f"(Debian: apt install npm; macOS: brew install node), or put {package.file_name} into {folder} yourself"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        command = [client, "pack", f"{package.name}@{package.version}", "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        downloaded = Path(temporary) / package.file_name
        if done.returncode or not downloaded.is_file():
            reason = re.sub(r"\s+", " ", done.stderr).strip()[-300:] or f"exit status {done.returncode}"
            raise ValueError(f"npm could not fetch {package.name} {package.version}: {reason}; run the command again")
        _check(downloaded, package, "nothing was stored; check the registry that npm is set up with")
        downloaded.replace(path)
    return path


def _check(path: Path, package: Package, remedy: str) -> None:
    found = sha256(path)
    if found != package.sha256:
        raise ValueError(
            f"{path.name} has sha256 {found}, the recorded one of {package.name} {package.version} is "
            f"{package.sha256}: {remedy}"
        )


def read_members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Names (below the tarball's folder `package`) and contents of the files whose name a regular expression fits."""
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if member.isfile() and re.fullmatch(pattern, name):
                content = archive.extractfile(member)
                assert content is not None
                yield name, content.read()
