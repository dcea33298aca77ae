"""Parts of a model by name or folder; knows no pipeline."""

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from visar.checkpoints import hub
from visar.checkpoints.common import State, empty, load_strict
from visar.checkpoints.convert import read_models
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Models
from visar.core.interface import TokenizerModel
from visar.generators import families as generators
from visar.io.files import load_weights, tensors_only
from visar.io.formats import MODEL_CLASS, MODEL_MODULE, PIPELINE_MODULE, check_format
from visar.tokenizers import families as tokenizers

_MODEL_FILES = ("model_index.json", "config.json")
# Files of weights that have a variant.
_VARIANT = re.compile(r"diffusion_pytorch_model\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors")
# Levels of a model's JSON files: a vocabulary has 4.
_DEEPEST = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Folders name the classes of their models. These are the only ones that loading a folder makes, and where they are.
TOKENIZERS, GENERATORS = tokenizers.MODULES, generators.MODULES
DRAFTERS = {"FeatureDrafter": "visar.samplers.drafters.eagle", "SpatialHeads": "visar.samplers.drafters.heads"}


def load_generator(
    name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Any:
    """The generator of a pipeline by any name that `visar.load` takes; arguments and errors as there."""
    target, kind = placement(device, dtype)
    folder = hub.EMBEDDED_FOLDER / str(name) if str(name) in hub.embedded_names() else find_folder(name)
    if str(name) in hub.official():
        generator: Any = read_official(hub.official()[str(name)]).generator
    elif (folder / "model_index.json").is_file():
        generator = load_part(GENERATORS, read_json(folder / "model_index.json"), "generator", folder)
    else:
        raise hub.unknown_model(str(name))
    return _place(generator, target, kind)


def read_official(entry: hub.Official) -> Models:
    """An official model's two parts, fetched where they are not there."""
    tokenizer = hub.download(entry.tokenizer_repository, entry.tokenizer_file)
    generator = hub.download(entry.repository, entry.file)
    return read_models(Convert(file=generator, out=Path(), tokenizer=tokenizer, source=entry.source, grid=entry.grid))


def load_tokenizer(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> TokenizerModel:
    """A tokenizer by embedded name, or from a folder made by `save_pretrained`, its own or a pipeline's, here or on
    the hub.

    The name of a generator gives the tokenizer that it was trained with. Arguments and errors as in `load`.
    """
    target, kind = placement(device, dtype)
    folder = find_folder(name, variant, revision=revision)
    if str(name) in hub.embedded_names():
        facts = hub.about(str(name))
        folder = hub.EMBEDDED_FOLDER / (str(name) if facts["kind"] == "tokenizer" else facts["tokenizer"])
    elif (folder / "model_index.json").is_file():
        folder = folder / "tokenizer"
    if not (folder / "config.json").is_file():
        raise hub.unknown_model(str(name))
    return _place(_tokenizer(folder, variant), target, kind)


def _place(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    # ModelMixin.to logs a warning about modules kept in float32, which keep themselves there.
    nn.Module.to(model, device=device, dtype=dtype)
    return model.eval()


def model_folder(name: str | Path) -> Path:
    """The folder of a model: as given, or model/ in the folder of a training run."""
    folder = Path(name)
    inner = folder / "model"
    if any((folder / file).exists() for file in _MODEL_FILES) or not any((inner / f).is_file() for f in _MODEL_FILES):
        return folder
    return inner


def find_folder(name: str | Path, variant: str | None = None, **options: Any) -> Path:
    """The folder of a model: as `model_folder` has it, or a copy of the hub's repository owner/model.

    Args:
        name: folder, or repository where there is no such folder.
        variant: which weights to fetch, see `load`.
        options: arguments of `hub.snapshot`; those that are None say nothing.

    Raises:
        ValueError: a repository that cannot be fetched, a revision of something that is none, or see `weights_names`.
    """
    weights, index = weights_names(variant)
    folder = model_folder(name)
    if not folder.exists() and hub.is_repository(name):
        parts = weights.replace(".safetensors", "-*-of-*.safetensors")
        names = ("config.json", weights, parts, index)
        files = ["model_index.json", *(f"{inside}{each}" for each in names for inside in ("", "*/"))]
        return hub.snapshot(str(name), files, **options)
    if options.get("revision") is not None:
        raise ValueError(f"revision {options['revision']!r}: {name} is no repository owner/model of the hub")
    return folder


def weights_names(variant: str | None) -> tuple[str, str]:
    """Names of the file with the weights, and of the index where they are in several files, as diffusers has them.

    Raises:
        ValueError: a variant that is no word.
    """
    if variant is None:
        return SAFETENSORS_WEIGHTS_NAME, f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
    if not isinstance(variant, str) or not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant {variant!r}; give a word, such as 'fp16', or None")
    name = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f".{variant}.safetensors")
    return name, f"{SAFETENSORS_WEIGHTS_NAME}.index.{variant}.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} is damaged or incomplete: there is no file {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path.parent} is damaged or incomplete: {path.name}: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path.parent} is damaged or incomplete: {path.name} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.parent} is damaged or incomplete: {path.name} holds a {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in level if isinstance(each, dict | list)]
    if level:
        raise ValueError(f"{path.parent} is damaged: {path.name} is nested more than {_DEEPEST} deep")
    return content


def read_pipeline(
    folder: Path, pipeline: type, *, variant: str | None = None, **given: ModelMixin | None
) -> dict[str, Any]:
    """Arguments of a pipeline from the folder that its `save_pretrained` wrote; see `load_component`.

    Args:
        folder: with model_index.json and a folder for every part.
        pipeline: its class.
        variant: of the weights; see `load`.
        given: tokenizer or generator to be used instead of the folder's; None is the folder's.

    Raises:
        ValueError: no such folder, one of another class, or one that is damaged.
    """
    if not (folder / "model_index.json").is_file():
        alone = (
            " It holds one model: use visar.load_tokenizer, or from_pretrained of the generator's class."
            * (folder / "config.json").is_file()
        )
        raise ValueError(f"{folder} has no model_index.json: it was not made by ImagePipeline.save_pretrained.{alone}")
    index, parts = read_json(folder / "model_index.json"), {}
    if index.get("_class_name") not in (pipeline.__name__, [PIPELINE_MODULE, pipeline.__name__]):
        raise ValueError(f"{folder} holds a {index.get('_class_name')!s:.80}; an {pipeline.__name__} is needed")
    check_format(index, folder)
    for name, allowed in (("tokenizer", TOKENIZERS), ("generator", GENERATORS)):
        parts[name] = given.get(name)
        if parts[name] is None:
            parts[name] = load_part(allowed, index, name, folder, variant)
    return {**parts, **{name: index.get(name) for name in ("vocabulary", "defaults", "codes")}}


def _tokenizer(folder: Path, variant: str | None = None) -> ModelMixin:
    name = read_json(folder / "config.json").get("_class_name")
    return load_component(TOKENIZERS, name, folder, variant=variant)


def model_class(allowed: Mapping[str, str], name: object, module: object = None) -> type[ModelMixin]:
    """The class of a model that a file names, from a table; nothing that is not in the table is imported or called.

    Args:
        allowed: names of classes and the modules that define them, such as GENERATORS.
        name: what the file says; anything that JSON can hold.
        module: where the file says that the class is; None where it does not say.

    Raises:
        ValueError: another class, or one said to be in another module.
    """
    if not isinstance(name, str) or name not in allowed or module not in (None, allowed[name]):
        # A stranger's text is quoted only where it is the name of a class.
        quoted = name if isinstance(name, str) and name.isidentifier() and name[0].isupper() else "what it names"
        raise ValueError(f"{quoted} is no class that may be loaded here; allowed: {', '.join(allowed)}")
    found = getattr(importlib.import_module(allowed[name]), name)
    assert issubclass(found, ModelMixin) and found.__module__ == allowed[name]
    return found


def load_part(
    allowed: Mapping[str, str], index: Mapping[str, Any], name: str, folder: Path, variant: str | None = None
) -> ModelMixin:
    """A part of a pipeline as its model_index.json names it.

    Args:
        allowed: see `model_class`.
        index: content of model_index.json.
        name: name of the part.
        folder: folder of the pipeline.
        variant: of the weights; see `load`.

    Raises:
        ValueError: the index does not name it as it should, or see `load_component`.
    """
    match index.get(name):
        case [module, class_name] if [module, class_name] == [MODEL_MODULE, MODEL_CLASS]:
            # Its config.json says which class it is.
            class_name = read_json(folder / name / "config.json").get("_class_name")
            return load_component(allowed, class_name, folder / name, None, variant)
        case [str(module), str(class_name)]:
            return load_component(allowed, class_name, folder / name, module, variant)
        case other:
            raise ValueError(f"{folder} is damaged or incomplete: model_index.json has {name} {other!r:.200}")


def load_component(
    allowed: Mapping[str, str], name: object, folder: Path, module: object = None, variant: str | None = None
) -> ModelMixin:
    """A model on the CPU, in the dtype that its file is stored in.

    Not by `from_pretrained`: what that does about dtypes differs between versions of diffusers, it needs accelerate
    for models with parts kept in float32, and it only warns of weights that are missing.

    Args:
        allowed, name, module: see `model_class`.
        folder: with config.json and the weights.
        variant: of the weights; see `load`.

    Raises:
        ValueError: a class that is not one of the allowed ones, settings that it does not have, or weights that are
            damaged, missing or too many.
    """
    try:
        found = model_class(allowed, name, module)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    content = read_json(folder / "config.json")
    check_format(content, folder)
    config = {key: value for key, value in content.items() if not key.startswith("_") and key != "auto_map"}
    try:
        model = empty(found, config)
    except TypeError as error:
        raise ValueError(f"{folder} was made by another version of visar, or is damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: config.json: {error}") from error
    return load_strict(model, _weights(folder, variant), str(folder))


def _weights(folder: Path, variant: str | None) -> State:
    """Weights that `save_pretrained` wrote: one file, or several with an index."""
    weights, of_several = weights_names(variant)
    index, names = folder / of_several, {weights}
    found = sorted(path.name for path in folder.glob(f"{weights.split('.')[0]}*.safetensors"))
    variants = sorted({match[1] for match in map(_VARIANT.fullmatch, found) if match})
    if not index.is_file() and weights not in found and (variant is not None or variants):
        there = [*(["None"] if SAFETENSORS_WEIGHTS_NAME in found else []), *map(repr, variants)]
        raise ValueError(f"{folder} has no weights of variant {variant!r}; it has {', '.join(there) or 'none'}")
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{folder} is damaged or incomplete: {index.name} has no weight_map of file names")
        names = {Path(name).name for name in files.values()}
    state: State = {}
    for name in sorted(names):
        try:
            state |= tensors_only(load_weights(folder / name), folder / name)
        except ValueError as error:
            raise ValueError(f"{folder} is damaged or incomplete: {error}") from error
    return state


def _is_there(device: torch.device) -> bool:
    if device.type == "meta":
        return False  # it holds no data
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
    return True


def placement(
    device: str | torch.device | None, dtype: str | torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; None as of `load`.

    Raises:
        ValueError: unknown ones, or a device that this machine does not have.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; such as cpu, cuda or cuda:1") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this machine or this build of torch has no CUDA device; use cpu")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: the machine's CUDA devices are 0 ... {torch.cuda.device_count() - 1}")
    if target.type not in ("cpu", "cuda") and not _is_there(target):
        raise ValueError(f"device {device!r}: this machine or this build of torch has none; use cpu or cuda")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    return target, dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
