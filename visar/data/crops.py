"""Crops that ImageNet models are trained on: the centre crop and the ten crops that ids are extracted from.

Source: guided diffusion's centre crop (arXiv 2105.05233) and LlamaGen's extraction of ids (arXiv 2406.06525,
FoundationVision/LlamaGen@ce98ec4).
"""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Square crop of the middle: halved by box filter while twice too large, bicubic to the short side, cut.

    Args:
        image: any mode that Pillow resizes.
        size: side of the result in pixels.

    Raises:
        ValueError: size below 1.
    """
    if size < 1:
        raise ValueError(f"crop size {size}; allowed: 1 and above")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_tensor(image: Image.Image) -> Tensor:
    """Float [3, H, W] in [-1, 1] of an image (converted to RGB)."""
    pixels_HWC = torch.from_numpy(np.array(image.convert("RGB")))
    return rearrange(pixels_HWC, "h w c -> c h w").float() / 127.5 - 1.0


def ten_crop(image: Image.Image, size: int, crop_range: float = 1.1) -> Tensor:
    """Ten views of an image: four corners and the middle of its centre crop, then the same of its mirror image.

    Args:
        image: an image.
        size: side of the views in pixels.
        crop_range: side of the centre crop over `size`, cut to whole pixels; LlamaGen uses 1.1 and 1.05.

    Returns: float [10, 3, size, size] in [-1, 1]; corners in the order top left, top right, bottom left, bottom right.

    Raises:
        ValueError: size below 1, or crop_range below 1.
    """
    if crop_range < 1.0:
        raise ValueError(f"crop_range {crop_range}; allowed: 1.0 (ten equal crops up to mirroring) and above")
    side = int(size * crop_range)
    whole = image_tensor(center_crop(image, side))
    far, middle = side - size, round((side - size) / 2)
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    return torch.stack(
        [view[:, top : top + size, left : left + size] for view in (whole, whole.flip(2)) for top, left in corners]
    )
