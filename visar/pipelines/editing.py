"""Images edited by a pipeline over scales or by a masked one, and previews of scales."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from visar.core.checks import Range, check_range
from visar.data.crops import center_crop
from visar.data.images import as_float
from visar.data.pictures import rgb
from visar.io.pictures import to_pictures
from visar.pipelines.image import ImageOutput, ImagePipeline
from visar.pipelines.previews import Previews, check_previews
from visar.samplers.editing import Strategy, box_mask, grid_mask
from visar.samplers.index import SAMPLERS
from visar.tokenizers.decoding import image_sides

EDITORS = ("edit", "masked_edit")
"""Samplers that keep a part of an image."""


def find_editor(pipeline: ImagePipeline, strategy: Strategy | None) -> str:
    """Name of the sampler that edits by a pipeline's generator: the first of EDITORS that it fits.

    Raises:
        ValueError: it fits none; or a strategy, and that sampler has none.
    """
    name = next((each for each in EDITORS if SAMPLERS[each].fits(pipeline.generator)), None)
    if name is None:
        raise ValueError(
            "to edit, a model over scales (VAR, HMAR) or a masked one (MAR) is needed; this one is a "
            f"{type(pipeline.generator).__name__} and its tokens are a {pipeline.tokenizer.layout.arrangement}"
        )
    if strategy is not None and "strategy" not in SAMPLERS[name].settings():
        raise ValueError(f"editing strategy {strategy!r} is of models over scales; this one is masked: leave it out")
    return name


def to_images(pictures: Sequence[PIL.Image.Image], side: int) -> Tensor:
    """Images as float [B, 3, side, side] in [-1, 1]: read as for training, their centre squares."""
    return as_float(torch.from_numpy(np.stack([np.asarray(center_crop(rgb(each), side)) for each in pictures])))


@torch.no_grad()
def first_tokens_of(pipeline: ImagePipeline, picture: PIL.Image.Image, count: int) -> Tensor:
    """The first tokens of an image, int64 [K], for `first_tokens` of the pipeline: of a diffusion tokenizer they say
    how the image is laid out, of a grid its upper rows.

    Args:
        pipeline: of a raster model.
        picture: of any size; its centre square is resized to the model's size, as in training.
        count: K, 1 ... the number of tokens of an image.

    Raises:
        ValueError: another number, or a model that does not draw ids one by one.
    """
    layout = pipeline.tokenizer.layout
    if layout.arrangement not in ("grid", "sequence") or not layout.vocab_size:
        raise ValueError(f"first tokens are for raster models; the tokens of this one are in {layout.arrangement}")
    check_range("num_first_tokens", count, Range(1, layout.num_tokens))
    height, width = image_sides(pipeline.tokenizer)
    if height != width:
        raise ValueError(f"a model of images of {height} x {width}; first tokens are taken of square images")
    with pipeline._fetched(pipeline.tokenizer):
        return pipeline.tokenizer.encode(to_images([picture], height).to(pipeline.device))[0, :count]


def paste_back(made_BCHW: Tensor, given_BCHW: Tensor, keep_BHW: Tensor) -> Tensor:
    """What was made, with the pixels of the given images where keep (bool [B or 1, H, W]) is True."""
    return torch.where(keep_BHW[:, None], given_BCHW.to(made_BCHW.dtype), made_BCHW)


@torch.no_grad()
def edit_images(
    pipeline: ImagePipeline,
    pictures: Sequence[PIL.Image.Image],
    *,
    box: tuple[float, float, float, float] | None = None,
    mask: Tensor | None = None,
    keep: Literal["outside", "inside"] = "outside",
    strategy: Strategy | None = None,
    class_labels: Sequence[int | str] | None = None,
    attributes: dict[str, str] | None = None,
    unconditional: bool = False,
    paste: bool = True,
    seed: int = 0,
    **settings: Any,
) -> ImageOutput[list[PIL.Image.Image]]:
    """Redraws a part of images: inpainting, outpainting or a class edit. Lossy: see `sample_edit`, and for masked
    models `sample_masked_edit`.

    Args:
        pipeline: over scales, or masked.
        pictures: images of any size; their centre squares are resized to the model's size, as in training.
        box: top, left, bottom, right as fractions of that square, in 0 ... 1.
        mask: bool [B or 1, H, W] in the model's pixels, True where the image stays; instead of box.
        keep: what of the box stays: its outside to inpaint or edit it, its inside to outpaint.
        strategy: of models over scales: "codes", "map", or "refine" for a hierarchical masked model, see
            `sample_edit`; None = "codes".
        class_labels: one per image, by name or number, to edit towards; None draws it from the training distribution.
        attributes: further labels by name.
        unconditional: give the model nothing instead, so that the rest of the image alone decides.
        paste: put the given pixels back where the image stays; else they too have gone through the tokenizer.
        seed: image i has seed + i.
        settings: arguments of `ImagePipeline.sampling_settings` (guidance_scale, temperature, and over scales top_k
            and top_p), and sampler_options.

    Returns: as of the pipeline.

    Raises:
        ValueError: a model that cannot edit, both or neither of box and mask, or bad values.
    """
    sampler = find_editor(pipeline, strategy)
    if (box is None) == (mask is None):
        raise ValueError("give a box or a mask, one of them")
    if unconditional and (class_labels is not None or attributes):
        raise ValueError("unconditional excludes class_labels and attributes")
    tokenizer, device = pipeline.tokenizer, pipeline.device
    seeds = pipeline.prepare_seeds(len(pictures), seed)
    height, width = tokenizer.layout.shapes[-1]
    finest = (height, width)
    images = to_images(pictures, finest[0] * tokenizer.downsampling).to(device)
    kept_pixels = (
        box_mask((images.shape[-2], images.shape[-1]), box, keep=keep) if box is not None else torch.as_tensor(mask)
    )
    kept = box_mask(finest, box, keep=keep) if box is not None else grid_mask(kept_pixels, finest)
    condition, descriptions = pipeline.prepare_condition(seeds, class_labels, None, attributes)
    if unconditional:
        condition, descriptions = pipeline.generator.null_condition(condition), [""] * len(pictures)
    with pipeline._fetched(tokenizer):
        given = tokenizer.encode(images)
    options = {
        **settings.pop("sampler_options", {}),
        "given_tokens": given,
        "keep": kept.to(device),
    }
    if strategy is not None:
        options["strategy"] = strategy
    chosen = {**pipeline.sampling_settings(**settings, sampler=sampler), "sampler_options": options}
    out = pipeline.sample_tokens(condition, seeds, **chosen)
    made_BCHW = pipeline.decode(out.latent if out.latent is not None else out.tokens, seeds)
    if paste:
        made_BCHW = paste_back(made_BCHW, images, kept_pixels.to(device))
    made = to_pictures(made_BCHW)
    return ImageOutput(
        images=made, statistics=out.statistics, tokens=out.tokens, seeds=seeds, descriptions=descriptions
    )


@torch.no_grad()
def scale_previews(
    pipeline: ImagePipeline, tokens_BN: Tensor, seeds: Sequence[int] | None = None
) -> list[list[PIL.Image.Image]]:
    """Images after every scale, or every group of tokens of a diffusion tokenizer: one list per row of ids
    int64 [B, N], coarse to fine.

    Args:
        pipeline: whose first tokens make images of their own.
        tokens_BN: ids of the images, or of their first scales or groups.
        seeds: of the images; needed where the tokenizer's decoder draws.

    Raises:
        ValueError: a model whose first tokens make no images, ids that are no whole number of scales or groups, or no
            seeds where they are needed.
    """
    check_previews(pipeline)
    previews, num_tokens = pipeline.tokenizer.layout.previews, tokens_BN.shape[1]
    if num_tokens not in previews:
        parts = "scales" if pipeline.tokenizer.layout.arrangement == "scales" else "groups"
        raise ValueError(f"{num_tokens} tokens are not a whole number of {parts}; allowed: {list(previews)}")
    shown = Previews(pipeline, seeds)
    ends = previews[: previews.index(num_tokens) + 1]
    found = [shown.update(end, tokens_BN.to(pipeline.device)) for end in ends]
    columns = [to_pictures(each[1]) for each in found if each is not None]
    return [list(row) for row in zip(*columns, strict=True)]
