"""What every tokenizer checks of images and ids before it computes."""

import math
import warnings

import torch
from torch import Tensor

# Resizing overshoots and decoders are not clamped; images in 0 ... 255 or standardised ones are far beyond.
_MARGIN = 0.5


def _check_dense(tensor: Tensor, what: str) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {str(tensor.layout).removeprefix('torch.')}"
        raise ValueError(f"{what} {kind}; needed: a dense tensor that holds data")


def check_image(image_BCHW: Tensor, channels: int) -> None:
    """Checks the form of a batch of images; does not look at values.

    Raises:
        ValueError: no tensor [B, C, H, W] of floating point numbers on a device that holds data.
    """
    needed = f"needed: [B, {channels}, H, W]"
    if not isinstance(image_BCHW, Tensor):
        raise ValueError(f"image of type {type(image_BCHW).__name__}; {needed}, a float tensor in [-1, 1]")
    _check_dense(image_BCHW, "image")
    if image_BCHW.ndim != 4 or image_BCHW.shape[1] != channels:
        raise ValueError(f"image of shape {tuple(image_BCHW.shape)}; {needed}")
    if not image_BCHW.is_floating_point():
        raise ValueError(f"image of dtype {image_BCHW.dtype}; needed: floating point in [-1, 1]")


def check_clip(clip_BTCHW: Tensor, channels: int) -> None:
    """Checks the form of a batch of clips; does not look at values.

    Raises:
        ValueError: no tensor [B, T, C, H, W] of floating point numbers on a device that holds data.
    """
    needed = f"needed: [B, frames, {channels}, H, W]"
    if not isinstance(clip_BTCHW, Tensor):
        raise ValueError(f"clip of type {type(clip_BTCHW).__name__}; {needed}, a float tensor in [-1, 1]")
    _check_dense(clip_BTCHW, "clip")
    if clip_BTCHW.ndim != 5 or clip_BTCHW.shape[2] != channels:
        raise ValueError(f"clip of shape {tuple(clip_BTCHW.shape)}; {needed}")
    if not clip_BTCHW.is_floating_point():
        raise ValueError(f"clip of dtype {clip_BTCHW.dtype}; needed: floating point in [-1, 1]")


def check_values(image_BCHW: Tensor) -> None:
    """Checks that images are in [-1, 1], with a margin for what resizing and decoding overshoot; waits for the device.

    Pixels that are NaN give a warning.

    Raises:
        ValueError: they are not.
    """
    if image_BCHW.numel() and not image_BCHW.abs().amax() <= 1.0 + _MARGIN:
        low, high = (float(bound) for bound in torch.aminmax(image_BCHW))
        if math.isnan(low):
            warnings.warn("image with pixels that are NaN: its ids mean nothing", RuntimeWarning, stacklevel=3)
            return
        raise ValueError(f"image with values from {low:g} to {high:g}; needed: in [-1, 1] (uint8 / 127.5 - 1)")


def check_vectors(tokens_BNC: Tensor, count: int, channels: int) -> None:
    """Checks the form of continuous tokens; does not look at values.

    Raises:
        ValueError: no floats [B, count, channels].
    """
    needed = f"needed: floats [B, {count}, {channels}]"
    if not isinstance(tokens_BNC, Tensor):
        raise ValueError(f"tokens of type {type(tokens_BNC).__name__}; {needed}")
    _check_dense(tokens_BNC, "tokens")
    if not tokens_BNC.is_floating_point() or tokens_BNC.ndim != 3 or tokens_BNC.shape[1:] != (count, channels):
        raise ValueError(f"tokens of shape {tuple(tokens_BNC.shape)}, {tokens_BNC.dtype}; {needed}")


def check_ids(ids_BN: Tensor, codebook_size: int) -> None:
    """Checks ids; waits for the device.

    Raises:
        ValueError: no integers [B, N], or one outside 0 ... codebook_size - 1.
    """
    if not isinstance(ids_BN, Tensor):
        raise ValueError(f"ids of type {type(ids_BN).__name__}; needed: a tensor of integers [B, N]")
    _check_dense(ids_BN, "ids")
    if ids_BN.ndim != 2 or ids_BN.is_floating_point() or ids_BN.is_complex() or ids_BN.dtype == torch.bool:
        raise ValueError(f"ids of shape {tuple(ids_BN.shape)}, {ids_BN.dtype}; needed: integers [B, N]")
    low, high = (int(bound) for bound in ids_BN.aminmax()) if ids_BN.numel() else (0, 0)
    if low < 0 or high >= codebook_size:
        raise ValueError(f"id {low if low < 0 else high} is outside the codebook; allowed: 0 ... {codebook_size - 1}")
