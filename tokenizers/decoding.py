"""Decoding of a whole batch: through CUDA graphs where launches would set the pace, and in tiles for large images.

B images, C channels, H W image pixels, h w latent grid.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from visar.core.interface import Tokenizer
from visar.core.runtime import EAGER, Runtime, check_inference
from visar.tokenizers.convnet import mark

# Output pixels of a call (32 images of 256 x 256) from which on a GPU needs longer than its host does to launch the
# work: a graph would gain nothing there, and it keeps its memory.
_LARGEST_CAPTURE = 32 * 256 * 256
INVARIANT_BATCH = 8
"""Images that a GPU decodes at a time where an image must not depend on its batch."""


@torch.no_grad()
def decode_tokens(
    tokenizer: Tokenizer,
    tokens: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    tile: int | None = None,
    overlap: int = 4,
    runtime: Runtime = EAGER,
    invariant: bool = False,
) -> Tensor:
    """Images [B, C, H, W], about [-1, 1], not clamped, of tokens or latents.

    Convolutions are rounded by algorithms that a library chooses by the batch. A CPU therefore decodes one image at a
    time, which costs it nothing.

    In tiles it is lossy: norms and attention of the decoder look at the whole image, so tiles see other statistics.
    Neighbouring tiles are blended linearly over their overlap.

    Args:
        tokenizer: decodes.
        tokens: ids int64 [B, N] or vectors float [B, N, C]; or latents float [B, C, h, w].
        grid: (h, w) of ids that are not of the tokenizer's own size; None = as `latents` of the tokenizer says.
        tile: side of a tile in positions of the latent grid; None = whole images, as for images that are no larger.
        overlap: positions that neighbouring tiles share.
        runtime: eager, or CUDA graphs (one for every shape; large batches always run eagerly).
        invariant: on a GPU decode batches of one size only (the last is filled up): an image is then the same bits
            whatever batch it is in.

    Raises:
        ValueError: ids that do not fit, a tile < 1, an overlap that is not in 0 ... tile - 1, or a tokenizer with
            dropout in training mode.
    """
    check_inference(tokenizer)
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile}; it must be >= 1, or None for whole images")
    if tile is not None and not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap}; it must be in 0 ... tile - 1 = {tile - 1}")
    if tokens.device.type == "cpu" and tokens.shape[0] > 1:
        settings: dict[str, Any] = dict(grid=grid, tile=tile, overlap=overlap, runtime=runtime)
        return torch.cat([decode_tokens(tokenizer, one, **settings) for one in tokens.split(1)])
    latent_BChw = tokens if tokens.ndim == 4 else tokenizer.latents(tokens, grid)
    if tile is None or max(latent_BChw.shape[2:]) <= tile:
        return _decode_parts(tokenizer, latent_BChw, runtime, invariant)
    return _decode_tiles(tokenizer, latent_BChw, tile, overlap, runtime, invariant)


def _decode_parts(tokenizer: Tokenizer, latent_BChw: Tensor, runtime: Runtime, invariant: bool) -> Tensor:
    """`_decode` of all images, or on a GPU and if `invariant` of one number of images at a time, filled up."""
    if not invariant or not latent_BChw.is_cuda or not len(latent_BChw):
        return _decode(tokenizer, latent_BChw, runtime)
    parts, cudnn = [], torch.backends.cudnn
    # Rounded to TF32, an image would also depend on its place in the batch.
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
        for part_BChw in latent_BChw.split(INVARIANT_BATCH):
            count = part_BChw.shape[0]
            filled_BChw = torch.cat([part_BChw, part_BChw[-1:].expand(INVARIANT_BATCH - count, -1, -1, -1)])
            parts.append(_decode(tokenizer, filled_BChw, runtime)[:count])
    return torch.cat(parts)


def _decode(tokenizer: Tokenizer, latent_BChw: Tensor, runtime: Runtime) -> Tensor:
    batch, _, height, width = latent_BChw.shape
    if batch * height * width * tokenizer.downsampling**2 > _LARGEST_CAPTURE or not latent_BChw.is_cuda:
        return tokenizer.decode_latents(latent_BChw)
    # Kernels of convolutions may be read from copies: another graph after every change of a weight.
    marks = hash(tuple(mark(weight) for weight in tokenizer.parameters()))
    key = ("decode", tuple(latent_BChw.shape), tokenizer.training, marks, torch.backends.cudnn.allow_tf32)
    session = runtime.session(tokenizer, latent_BChw.device, key)
    static_BChw = session.static("latent", latent_BChw)

    def step() -> None:
        session.state = session.static("image", tokenizer.decode_latents(static_BChw))

    session.run(step)
    return session.state.clone()


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """First positions of tiles that cover a side; the last ends where the side does."""
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def _ramp(first: int, size: int, length: int, overlap: int, factor: int, device: torch.device) -> Tensor:
    """float32 [size * factor]: weights of a tile's pixels, rising over the overlap except at the image's edges."""
    pixel = torch.arange(size * factor, device=device) + 0.5
    weight = torch.ones_like(pixel)
    if first > 0 and overlap:
        weight = weight.minimum(pixel / (overlap * factor))
    if first + size < length and overlap:
        weight = weight.minimum((size * factor - pixel) / (overlap * factor))
    return weight


def _tiles(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            yield top, left


def _decode_tiles(
    tokenizer: Tokenizer, latent_BChw: Tensor, tile: int, overlap: int, runtime: Runtime, invariant: bool
) -> Tensor:
    batch, _, height, width = latent_BChw.shape
    device, factor = latent_BChw.device, tokenizer.downsampling
    rows, columns = min(tile, height), min(tile, width)
    total = weight_sum = None
    for top, left in _tiles(height, width, tile, overlap):
        part = latent_BChw[:, :, top : top + rows, left : left + columns].contiguous()
        image = _decode_parts(tokenizer, part, runtime, invariant).float()
        if total is None or weight_sum is None:
            total = image.new_zeros(batch, image.shape[1], height * factor, width * factor)
            weight_sum = image.new_zeros(height * factor, width * factor)
        weight_HW = (
            _ramp(top, rows, height, overlap, factor, device)[:, None]
            * _ramp(left, columns, width, overlap, factor, device)[None, :]
        )
        window = (
            slice(top * factor, (top + rows) * factor),
            slice(left * factor, (left + columns) * factor),
        )
        total[:, :, *window] += image * weight_HW
        weight_sum[*window] += weight_HW
    assert total is not None and weight_sum is not None
    return (total / weight_sum).to(tokenizer.dtype)
