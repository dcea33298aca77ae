"""From a name or a folder to a pipeline."""

from pathlib import Path

import torch
from diffusers import ModelMixin

from visar.checkpoints import hub
from visar.kernels import available
from visar.kernels.invariance import check_deterministic
from visar.layers.quantize import check_quantization, quantize_
from visar.pipelines.components import (
    _place,
    _tokenizer,
    find_folder,
    placement,
    read_json,
    read_official,
    read_pipeline,
)
from visar.pipelines.fitting import check_copy
from visar.pipelines.image import ImagePipeline
from visar.pipelines.video import VideoPipeline

# Folders name the class of their pipeline. These are the only ones that loading a folder makes.
PIPELINES: dict[str, type[ImagePipeline]] = {each.__name__: each for each in (ImagePipeline, VideoPipeline)}


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    quantize: str = "none",
    deterministic: str = "auto",
    variant: str | None = None,
    revision: str | None = None,
) -> ImagePipeline:
    """A pipeline ready to sample: an `ImagePipeline`, or a `VideoPipeline` where the folder is of one.

    Args:
        name: an embedded or official name (`visar models`), a folder made by `save_pretrained` or by a training run,
            or owner/model, a repository on the Hugging Face hub that `push_to_hub` made. Weights that are there are
            fetched at the first use.
        device: None is a GPU if there is one, else the CPU.
        dtype: None is bfloat16 on a GPU and float32 on a CPU.
        offload: keep tokenizer and text encoder on the CPU except for their part; see `enable_offload`.
        quantize: "int8" or "fp8" halves the generator's weights once more (visar/layers/quantize.py); "none" = off.
        deterministic: "batch": an image is the same bits whatever batch it is made in, on a GPU too (by Triton);
            "auto": in float32 only; "off": never. docs/seeds.md says what it costs.
        variant: which weights of a folder or repository to read, such as "fp16" for those that
            `save_pretrained(..., variant="fp16")` wrote; None is those without.
        revision: branch, tag or commit of a repository; None is the main branch.

    Raises:
        ValueError: unknown name (with the nearest ones), unknown device, dtype, quantize, deterministic, variant or
            revision, a pair of them that excludes each other, or files that are damaged or do not fit.
        ImportError: quantize without torchao.
    """
    target, kind = placement(device, dtype)
    check_quantization(quantize)
    check_deterministic(deterministic)
    if deterministic == "batch" and quantize != "none":
        raise ValueError(f"deterministic 'batch' is for weights that are not quantised; quantize is {quantize!r}")
    if deterministic == "batch" and target.type != "cpu" and not available(target):
        raise ValueError(f"deterministic 'batch' on {target} needs Triton, which does not run here; use auto or off")
    folder = find_folder(name, variant, revision=revision)
    if str(name) in hub.embedded_names():
        facts = hub.about(str(name))
        if facts["kind"] == "tokenizer":
            raise ValueError(f"{name} is a tokenizer: use visar.load_tokenizer({str(name)!r})")
        if facts["kind"] == "drafter":
            raise ValueError(f"{name} is a drafter: give it to a speculative sampler of its generator")
        tokenizer = _tokenizer(hub.EMBEDDED_FOLDER / facts["tokenizer"], variant)
        pipeline = _from_folder(hub.EMBEDDED_FOLDER / str(name), variant, tokenizer=tokenizer)
    elif str(name) in hub.official():
        if variant is not None:
            raise ValueError(f"variant {variant!r}: official weights have none; say dtype= instead")
        pipeline = _official(hub.official()[str(name)])
    elif folder.is_dir():
        pipeline = _from_folder(folder, variant)
    else:
        raise hub.unknown_model(str(name))
    pipeline.deterministic = deterministic
    if offload:
        pipeline.enable_offload()
    _place(pipeline.tokenizer, torch.device("cpu") if offload else target, kind)
    quantize_(_place(pipeline.generator, target, kind), quantize)
    return pipeline


def _from_folder(folder: Path, variant: str | None, **given: ModelMixin) -> ImagePipeline:
    """A pipeline from its folder; `given` are used instead of what the folder has."""
    pipeline = _pipeline_class(folder)
    parts = read_pipeline(folder, pipeline, variant=variant, **given)
    try:
        check_copy(parts["tokenizer"], parts["generator"])
        return pipeline(**parts)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _pipeline_class(folder: Path) -> type[ImagePipeline]:
    """The class that a folder's model_index.json names, from the table; where it names another, that of images."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    match index.get("_class_name"):
        case str(name) | [_, str(name)]:
            return PIPELINES.get(name, ImagePipeline)
        case _:
            return ImagePipeline


def _official(entry: hub.Official) -> ImagePipeline:
    models = read_official(entry)
    assert models.tokenizer is not None and models.generator is not None
    return ImagePipeline(models.tokenizer, models.generator, defaults=entry.defaults)
