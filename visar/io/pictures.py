"""Sheets of images, drawn with Pillow."""

import math
from collections.abc import Sequence

import PIL.Image
import torch
from einops import rearrange
from torch import Tensor

WRITTEN_AS = (".png", ".jpg", ".jpeg", ".webp")  # endings of names of images that commands write


def check_decoded(image_BCHW: Tensor) -> None:
    """Checks that images that a model made are numbers; waits for the device.

    Raises:
        ValueError: some are not.
    """
    if image_BCHW.isnan().any():
        raise ValueError(
            "decoded images are not finite: the tokenizer has weights that are not, or computes in float16 and leaves "
            "its range (load with dtype bfloat16 or float32)"
        )


def to_pictures(image_BCHW: Tensor) -> list[PIL.Image.Image]:
    """Images of images in [-1, 1].

    Raises:
        ValueError: see `check_decoded`.
    """
    check_decoded(image_BCHW)
    pixels_BHWC = rearrange(to_uint8(image_BCHW), "b c h w -> b h w c").cpu().numpy()
    return [PIL.Image.fromarray(each) for each in pixels_BHWC]


def grid(
    images: Sequence[PIL.Image.Image], columns: int | None = None, gap: int = 2, zoom: int = 1
) -> PIL.Image.Image:
    """Images of one size side by side on white, row by row.

    Args:
        columns: images per row; None makes the sheet about square.
        gap: pixels between images and around them.
        zoom: whole number by which every image is enlarged, pixel by pixel.

    Raises:
        ValueError: no image, or images of several sizes.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs images of one size; got {sorted(sizes) or 'none'}")
    width, height = (side * zoom for side in sizes.pop())
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = PIL.Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + gap)), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        enlarged = image.resize((width, height), PIL.Image.Resampling.NEAREST) if zoom > 1 else image
        sheet.paste(enlarged, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def to_uint8(image_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 [B, C, H, W]: clamped, then rounded to the nearest level; the only such rule here."""
    return ((image_BCHW.float() + 1.0) * 127.5).clamp(0.0, 255.0).round().to(torch.uint8)
