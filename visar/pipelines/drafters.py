"""From a text to a drafter: the one a command line or `sampler_options` names."""

from pathlib import Path
from typing import Any

from torch import nn

from visar.checkpoints import hub
from visar.core.interface import Features, first_stage
from visar.pipelines.components import DRAFTERS, find_folder, load_component, load_generator, read_json
from visar.samplers.drafters.interface import Drafter, check_features, check_fit, target_digest
from visar.samplers.drafters.model import ModelDrafter
from visar.samplers.drafters.ngram import NgramDrafter

CLASSES = {"eagle": "FeatureDrafter", "heads": "SpatialHeads"}
"""Kinds of trained drafters, and their classes in visar/samplers/drafters/eagle.py."""


def load_drafter(name: str | Path, target: Any) -> Drafter:
    """A drafter for a generator, on its device and in its dtype.

    Args:
        name: "ngram"; "eagle" or "heads", the embedded drafter of that kind for this generator; the name of an
            embedded drafter; the folder of one (model/ of `visar train drafter`); or the name or folder of a smaller
            model of the same tokens.
        target: the generator that it shall draft for.

    Raises:
        ValueError: no such drafter, one that was trained for another generator, or a damaged folder.
    """
    text, folder = str(name), find_folder(name)
    if text == "ngram":
        return NgramDrafter()
    if text in CLASSES:
        folder = _embedded(text, target)
    elif text in hub.embedded_names() and hub.about(text)["kind"] == "drafter":
        folder = hub.EMBEDDED_FOLDER / text
    elif text in hub.embedded_names() or (folder / "model_index.json").is_file():
        generator = first_stage(load_generator(name, device=target.device, dtype=target.dtype))
        check_fit(generator, target)
        return ModelDrafter(generator)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"unknown drafter {text!r}; allowed: ngram, eagle, heads, the folder of a drafter (or of a run of visar "
            "train drafter), or the name or folder of a smaller model of the same tokens"
        )
    drafter: Any = load_component(DRAFTERS, read_json(folder / "config.json").get("_class_name"), folder)
    nn.Module.to(drafter, device=target.device, dtype=target.dtype)
    check_features(drafter, target)
    return drafter.eval().requires_grad_(False)


def _embedded(kind: str, target: Any) -> Path:
    """Folder of the embedded drafter of a kind for a generator.

    Raises:
        ValueError: there is none.
    """
    names = [name for name in hub.embedded_names() if hub.about(name)["kind"] == "drafter"]
    known = {name: read_json(hub.EMBEDDED_FOLDER / name / "config.json") for name in names}
    digest = target_digest(target) if isinstance(target, Features) else None
    for name, config in known.items():
        if config["_class_name"] == CLASSES[kind] and config["target_digest"] == digest:
            return hub.EMBEDDED_FOLDER / name
    there = ", ".join(f"{name} for {config['target']}" for name, config in known.items()) or "none"
    raise ValueError(
        f"no embedded {kind} drafter for this generator (there are: {there}); train one with visar train drafter and "
        "give its folder"
    )
