"""A copy of the package for the API pages: their reader follows no links and wants an `__init__.py` everywhere."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority


@event_priority(100)  # before the plugin that makes the pages
def on_config(config: Any) -> Any:
    """Called by mkdocs: copies visar/ without weights, and has the API pages read the copy."""
    package = Path(config.config_file_path).parent / "visar"
    copy = Path(tempfile.mkdtemp(prefix="visar-docs-")) / "visar"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("embedded", "__pycache__", "*.npz", "*.json"))
    for folder in {file.parent for file in copy.rglob("*.py")}:
        (folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(copy.parent)]
    config.extra["copy"] = str(copy.parent)
    return config


def on_post_build(config: Any) -> None:
    shutil.rmtree(config.extra["copy"])
