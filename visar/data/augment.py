"""Augmentation of batches on any device: shifts, rescaling, mirroring. All draws come from the generator passed in."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image; the defaults do nothing.

    Attributes:
        max_shift: most pixels that an image is moved by in each direction; whole pixels, so it stays exact.
        rescale_share: share of the images that are rescaled (and then shifted); the others keep their pixels.
        min_scale, max_scale: range of the scale; 1.0 = as it is.
        mirror: probability of mirroring where it is allowed.
        crop_min: images are cropped to a random square of crop_min ... 1 of the side and resized back (photographs:
            0.8, LlamaGen's tokenizer training); 1.0 = off.
        fill: level in [-1, 1] of what comes into view: 1.0 is white.

    Raises:
        ValueError: a number outside its range.
    """

    max_shift: int = 0
    rescale_share: float = 0.0
    min_scale: float = 1.0
    max_scale: float = 1.0
    mirror: float = 0.0
    crop_min: float = 1.0
    fill: float = 1.0

    def __post_init__(self) -> None:
        if self.max_shift < 0:
            raise ValueError(f"max_shift {self.max_shift}; it must be >= 0")
        for name in ("rescale_share", "mirror"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)}; it must be in [0, 1]")
        if not 0.0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"min_scale {self.min_scale}, max_scale {self.max_scale}; 0 < min_scale <= max_scale is needed"
            )
        if not 0.0 < self.crop_min <= 1.0:
            raise ValueError(f"crop_min {self.crop_min}; it must be in (0, 1]")


DRAWINGS = Augmentation(max_shift=4, rescale_share=1 / 3, min_scale=0.85, max_scale=1.0, mirror=0.5)
"""For drawings on white: research on the emoji set found reconstruction and likelihood to hold under it."""

PHOTOGRAPHS = Augmentation(mirror=0.5, crop_min=0.8)
"""LlamaGen's tokenizer training: a random crop of 0.8 ... 1 of the side, and a mirror image half of the time."""


def augment(
    image_BCHW: Tensor,
    augmentation: Augmentation,
    generator: torch.Generator,
    mirror_allowed_B: Tensor | None = None,
) -> Tensor:
    """Augmented images of the same shape and dtype.

    Args:
        image_BCHW: float in [-1, 1]; or clips [B, T, C, H, W], all frames of which are changed alike.
        augmentation: what to do.
        generator: on the images' device; the same state gives the same images.
        mirror_allowed_B: bool; None allows it for all.
    """
    if image_BCHW.ndim == 5:
        frames = image_BCHW.shape[1:3]
        return augment(image_BCHW.flatten(1, 2), augmentation, generator, mirror_allowed_B).unflatten(1, frames)
    batch = image_BCHW.shape[0]
    draws = torch.rand(6, batch, generator=generator, device=image_BCHW.device)
    if augmentation.mirror:
        chosen_B = draws[0] < augmentation.mirror
        if mirror_allowed_B is not None:
            chosen_B = chosen_B & mirror_allowed_B
        image_BCHW = torch.where(chosen_B[:, None, None, None], image_BCHW.flip(-1), image_BCHW)
    if augmentation.crop_min < 1.0:
        size_B, row_B, column_B = torch.rand(3, batch, generator=generator, device=image_BCHW.device)
        image_BCHW = _crop(image_BCHW, augmentation.crop_min, size_B, row_B, column_B)
    if augmentation.rescale_share and (augmentation.min_scale, augmentation.max_scale) != (1.0, 1.0):
        ratio = augmentation.max_scale / augmentation.min_scale
        scale_B = augmentation.min_scale * ratio ** draws[1]
        rescaled = _rescale(image_BCHW, scale_B, augmentation.fill)
        chosen_B = draws[2] < augmentation.rescale_share
        image_BCHW = torch.where(chosen_B[:, None, None, None], rescaled, image_BCHW)
    if augmentation.max_shift:
        steps = 2 * augmentation.max_shift + 1
        shift_2B = (draws[4:6] * steps).long().clamp(max=steps - 1)
        image_BCHW = _shift(image_BCHW, shift_2B, augmentation.max_shift, augmentation.fill)
    return image_BCHW


def _shift(image_BCHW: Tensor, offset_2B: Tensor, most: int, fill: float) -> Tensor:
    """Moves each image by whole pixels: offset 0 ... 2 * most, `most` is no move."""
    batch, _, height, width = image_BCHW.shape
    padded = functional.pad(image_BCHW, (most,) * 4, value=fill)
    rows_BH = offset_2B[0][:, None] + torch.arange(height, device=image_BCHW.device)
    columns_BW = offset_2B[1][:, None] + torch.arange(width, device=image_BCHW.device)
    index_B = torch.arange(batch, device=image_BCHW.device)
    moved = rearrange(padded, "b c h w -> b h w c")[
        index_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]
    ]
    return rearrange(moved, "b h w c -> b c h w")


def _sample(image_BCHW: Tensor, theta_B23: Tensor, outside: str) -> Tensor:
    """Bicubic sampling on an affine grid; outside: "zeros", or "border" to go on with the pixels of the border."""
    grid = functional.affine_grid(theta_B23, list(image_BCHW.shape), align_corners=False).to(image_BCHW.dtype)
    return functional.grid_sample(image_BCHW, grid, mode="bicubic", padding_mode=outside, align_corners=False)


def _rescale(image_BCHW: Tensor, scale_B: Tensor, fill: float) -> Tensor:
    """Scales each image about its centre on the fill level. Scales near 1 need no antialiasing."""
    theta = torch.zeros(len(scale_B), 2, 3, device=image_BCHW.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1.0 / scale_B
    return (_sample(image_BCHW - fill, theta, "zeros") + fill).clamp(-1.0, 1.0)


def _crop(image_BCHW: Tensor, least: float, size_B: Tensor, row_B: Tensor, column_B: Tensor) -> Tensor:
    """A random square of least ... 1 of the side, resized back."""
    side_B = least + (1.0 - least) * size_B
    theta = torch.zeros(len(side_B), 2, 3, device=image_BCHW.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side_B
    theta[:, 0, 2] = (2.0 * column_B - 1.0) * (1.0 - side_B)
    theta[:, 1, 2] = (2.0 * row_B - 1.0) * (1.0 - side_B)
    return _sample(image_BCHW, theta, "border").clamp(-1.0, 1.0)


def random_background(image_BCHW: Tensor, generator: torch.Generator, threshold: float = 0.98) -> Tensor:
    """Gives the white that is connected to the border a random plain colour, one per image.

    Half of an emoji's pixels are white, which flatters likelihoods and speculative samplers; this takes that away. The
    connected white is found by growing it from the border, a pixel a step.

    Args:
        image_BCHW: float in [-1, 1], drawings on white.
        generator: on the images' device.
        threshold: least level of white.
    """
    white = (image_BCHW > threshold).all(1, keepdim=True).float()
    border = torch.zeros_like(white)
    border[..., 0, :] = border[..., -1, :] = border[..., :, 0] = border[..., :, -1] = 1.0
    region = white * border
    for _ in range(math.prod(image_BCHW.shape[-2:])):
        grown = functional.max_pool2d(region, 3, stride=1, padding=1) * white
        if torch.equal(grown, region):
            break
        region = grown
    colour = torch.rand(image_BCHW.shape[0], 3, 1, 1, generator=generator, device=image_BCHW.device) * 2.0 - 1.0
    return torch.where(region > 0, colour.to(image_BCHW.dtype), image_BCHW)
