"""From a name or a folder to a pipeline."""

from pathlib import Path

import torch
from diffusers import ModelMixin

from visar.checkpoints import hub
from visar.kernels import available
from visar.kernels.invariance import check_deterministic
from visar.layers.quantize import check_quantization, quantize_
from visar.pipelines.components import _place, _tokenizer, model_folder, placement, read_official, read_pipeline
from visar.pipelines.image import ImagePipeline


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    quantize: str = "none",
    deterministic: str = "auto",
) -> ImagePipeline:
    """A pipeline ready to sample.

    Args:
        name: an embedded or official name (`visar models`), or a folder made by `save_pretrained` or by a training
            run. Official weights are fetched from the Hugging Face hub at the first use.
        device: None is a GPU if there is one, else the CPU.
        dtype: None is bfloat16 on a GPU and float32 on a CPU.
        offload: keep tokenizer and text encoder on the CPU except for their part; see `enable_offload`.
        quantize: "int8" or "fp8" halves the generator's weights once more (visar/layers/quantize.py); "none" = off.
        deterministic: "batch": an image is the same bits whatever batch it is made in, on a GPU too (by Triton);
            "auto": in float32 only; "off": never. docs/seeds.md says what it costs.

    Raises:
        ValueError: unknown name (with the nearest ones), unknown device, dtype, quantize or deterministic, a pair of
            them that excludes each other, or files that are damaged or do not fit.
        ImportError: quantize without torchao.
    """
    target, kind = placement(device, dtype)
    check_quantization(quantize)
    check_deterministic(deterministic)
    if deterministic == "batch" and quantize != "none":
        raise ValueError(f"deterministic 'batch' is for weights that are not quantised; quantize is {quantize!r}")
    if deterministic == "batch" and target.type != "cpu" and not available(target):
        raise ValueError(f"deterministic 'batch' on {target} needs Triton, which does not run here; use auto or off")
    folder = model_folder(name)
    if str(name) in hub.embedded_names():
        facts = hub.about(str(name))
        if facts["kind"] == "tokenizer":
            raise ValueError(f"{name} is a tokenizer: use visar.load_tokenizer({str(name)!r})")
        if facts["kind"] == "drafter":
            raise ValueError(f"{name} is a drafter: give it to a speculative sampler of its generator")
        tokenizer = _tokenizer(hub.EMBEDDED_FOLDER / facts["tokenizer"])
        pipeline = _from_folder(hub.EMBEDDED_FOLDER / str(name), tokenizer=tokenizer)
    elif str(name) in hub.official():
        pipeline = _official(hub.official()[str(name)])
    elif folder.is_dir():
        pipeline = _from_folder(folder)
    else:
        raise hub.unknown_model(str(name))
    pipeline.deterministic = deterministic
    if offload:
        pipeline.enable_offload()
    _place(pipeline.tokenizer, torch.device("cpu") if offload else target, kind)
    quantize_(_place(pipeline.generator, target, kind), quantize)
    return pipeline


def _from_folder(folder: Path, **given: ModelMixin) -> ImagePipeline:
    """A pipeline from its folder; `given` are used instead of what the folder has."""
    parts = read_pipeline(folder, ImagePipeline, **given)
    try:
        return ImagePipeline(**parts)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _official(entry: hub.Official) -> ImagePipeline:
    models = read_official(entry)
    assert models.tokenizer is not None and models.generator is not None
    return ImagePipeline(models.tokenizer, models.generator, defaults=entry.defaults)
