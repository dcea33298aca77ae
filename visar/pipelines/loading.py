"""From a name or a folder to a pipeline."""

import json
from pathlib import Path

import torch
from diffusers import ModelMixin

from visar.checkpoints import hub
from visar.pipelines.image import ImagePipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> ImagePipeline:
    """A pipeline ready to sample.

    Args:
        name: an embedded or official name (`visar models`), or a folder made by `save_pretrained`. Official weights
            are fetched from the Hugging Face hub at the first use.
        device: None is a GPU if there is one, else the CPU.
        dtype: None is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: unknown name (with the nearest ones), unknown device or dtype, or files that are damaged or do
            not fit.
    """
    target, kind = _placement(device, dtype)
    folder = Path(name)
    if str(name) in hub.embedded_names():
        facts = hub.about(str(name))
        if facts["kind"] == "tokenizer":
            raise ValueError(f"{name} is a tokenizer: use visar.load_tokenizer({str(name)!r})")
        tokenizer = load_tokenizer(facts["tokenizer"], device=target, dtype=kind)
        pipeline = _from_folder(hub.EMBEDDED_FOLDER / str(name), kind, tokenizer=tokenizer)
    elif str(name) in hub.OFFICIAL:
        pipeline = _official(hub.OFFICIAL[str(name)], kind)
    elif folder.is_dir():
        pipeline = _from_folder(folder, kind)
    else:
        raise hub.unknown_model(str(name))
    pipeline.tokenizer.eval()
    pipeline.generator.eval()
    return pipeline.to(target)


def load_tokenizer(
    name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> ModelMixin:
    """A tokenizer by embedded name, or from a folder made by `save_pretrained`; arguments and errors as in `load`."""
    target, kind = _placement(device, dtype)
    folder = hub.EMBEDDED_FOLDER / str(name) if str(name) in hub.embedded_names() else Path(name)
    if not (folder / "config.json").is_file():
        raise hub.unknown_model(str(name))
    with open(folder / "config.json", encoding="utf-8") as file:
        class_name = json.load(file)["_class_name"]
    return _component(class_name, folder, kind).eval().to(target)


def _component(class_name: str, folder: Path, dtype: torch.dtype) -> ModelMixin:
    from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
    from visar.tokenizers.vq import VQTokenizer

    classes: dict[str, type[ModelMixin]] = {
        "MultiScaleVQTokenizer": MultiScaleVQTokenizer,
        "VQTokenizer": VQTokenizer,
    }
    if class_name not in classes:
        raise ValueError(f"{folder} holds a {class_name}; known tokenizers: {', '.join(classes)}")
    try:
        return classes[class_name].from_pretrained(folder, torch_dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged or incomplete: {error}") from error


def _placement(device: str | torch.device | None, dtype: str | torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; such as cpu, cuda or cuda:1") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this machine or this build of torch has no CUDA device; use cpu")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    return target, dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)


def _from_folder(folder: Path, dtype: torch.dtype, **components: ModelMixin) -> ImagePipeline:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json: it was not made by ImagePipeline.save_pretrained")
    try:
        return ImagePipeline.from_pretrained(folder, torch_dtype=dtype, **components)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged or incomplete: {error}") from error


def _official(entry: hub.Official, dtype: torch.dtype) -> ImagePipeline:
    from visar.checkpoints import llamagen

    generator = llamagen.load_gpt(hub.download(entry.repository, entry.file), grid=entry.grid)
    tokenizer = llamagen.load_vq(hub.download(entry.tokenizer_repository, entry.tokenizer_file))
    defaults = {"guidance_scale": entry.guidance_scale}
    return ImagePipeline(tokenizer.to(dtype), generator.to(dtype), defaults=defaults)
