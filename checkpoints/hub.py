"""Names of models: the embedded ones that ship with the package, and the official ones, fetched when asked for."""

import difflib
import importlib
import json
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
"""Names of repositories, owner/model."""


@dataclass(frozen=True)
class Official:
    """Released weights of another project.

    Attributes:
        source: project: the name of the file in this folder that the row stands in.
        repository: model repository on the Hugging Face hub.
        file: file of the generator in it.
        tokenizer_repository, tokenizer_file: the tokenizer it was trained with.
        grid: (rows, columns) of tokens where the file cannot say it; None where it can.
        defaults: sampling settings of the authors' best FID, as `ImagePipeline` takes them.
        note: what a user should know.
    """

    source: str
    repository: str
    file: str
    tokenizer_repository: str
    tokenizer_file: str
    grid: tuple[int, int] | None
    defaults: dict[str, Any]
    note: str


@cache
def projects() -> dict[str, ModuleType]:
    """Files of this folder that convert a project's weights, by name: those with ROWS (visar.checkpoints.rows)."""
    names = sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {name: importlib.import_module(f"visar.checkpoints.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "ROWS")}


def official() -> dict[str, Official]:
    """Released weights of all projects by the names that visar gives them."""
    return {name: entry for module in projects().values() for name, entry in module.OFFICIAL.items()}


def embedded_names() -> list[str]:
    """Names of the models that ship with the package, generators and tokenizers, sorted."""
    return sorted(facts.parent.name for facts in EMBEDDED_FOLDER.glob("*/about.json"))


def about(name: str) -> dict:
    """Facts of an embedded model: kind, summary, tokenizer (for generators), parameters, defaults, licence."""
    with open(EMBEDDED_FOLDER / name / "about.json", encoding="utf-8") as file:
        return json.load(file)


def unknown_model(name: str) -> ValueError:
    """The error for a name that is neither a folder nor a model, with the nearest names."""
    names = [*embedded_names(), *official()]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    return ValueError(f"unknown model {name!r}: neither a folder nor a name. {hint}all names: {', '.join(names)}")


def is_repository(name: str | Path) -> bool:
    """Whether a name can only be that of a repository on the Hugging Face hub.

    It has the form owner/model, and no folder here is called owner: else it is the path of something that is missing.
    """
    return isinstance(name, str) and bool(REPOSITORY.fullmatch(name)) and not Path(name).parent.is_dir()


def snapshot(
    repository: str,
    files: list[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Local copy of a repository's folder, fetched where it is not in the cache.

    Args:
        repository: owner/model.
        files: patterns of the names to fetch.
        revision, cache_dir, token, local_files_only: as huggingface_hub has them.

    Raises:
        ValueError: it cannot be had (no network, no such repository or revision, no right to it).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repository,
            allow_patterns=files,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise ValueError(
            f"{repository} is no folder here, and could not be fetched{at} from the Hugging Face hub "
            f"({type(error).__name__})"
        ) from error
    return Path(found)


def download(repository: str, file: str) -> Path:
    """Path of a hub file in the local cache, fetched if it is not there.

    Raises:
        ValueError: it cannot be had (no network, no such file, no right to it).
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{file} of {repository} could not be fetched ({type(error).__name__}). With the file at hand, "
            f"`visar convert` turns it into a folder that loads without a network."
        ) from error


def file_size(repository: str, file: str) -> tuple[int | None, bool]:
    """Bytes of a hub file, and whether it is in the local cache; None where the hub cannot be asked."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    held = try_to_load_from_cache(repository, file)
    if isinstance(held, str):
        return Path(held).stat().st_size, True
    try:
        return get_hf_file_metadata(hf_hub_url(repository, file), timeout=10).size, False
    except (HfHubHTTPError, OSError):
        return None, False
