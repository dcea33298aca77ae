"""Decoding of a whole batch: through CUDA graphs where launches would set the pace, and in tiles for large images.

B images, C channels, H W image pixels, h w latent grid.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from visar.core.interface import Drawing, Stream, Streaming, Tokenizer
from visar.core.noise import Noise
from visar.core.runtime import EAGER, Runtime, check_inference
from visar.tokenizers.convnet import mark

# Output pixels of a call (32 images of 256 x 256) from which on a GPU needs longer than its host does to launch the
# work: a graph would gain nothing there, and it keeps its memory.
_LARGEST_CAPTURE = 32 * 256 * 256
INVARIANT_BATCH = 8
"""Images that a GPU decodes at a time where an image must not depend on its batch."""


def image_sides(tokenizer: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that a tokenizer's layout is for."""
    if tokenizer.layout.arrangement == "sequence":
        size = tokenizer.config["image_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])
    height, width = tokenizer.layout.shapes[-1][-2:]
    return height * tokenizer.downsampling, width * tokenizer.downsampling


def decoder_noise(
    tokenizer: Tokenizer,
    seeds: Sequence[int] | None,
    device: torch.device | str,
    size: tuple[int, int] | None = None,
) -> Tensor | None:
    """What images of these seeds are decoded from, where the tokenizer's decoder draws; else None.

    Args:
        tokenizer: decodes.
        seeds: one per image; None only where they are not read.
        device: where the tokenizer is.
        size: (height, width) of the images; None = the tokenizer's own.

    Raises:
        ValueError: the decoder draws, and there are no seeds.
    """
    if not isinstance(tokenizer, Drawing):
        return None
    if seeds is None:
        raise ValueError("this tokenizer's decoder draws: give the seeds of the images that are decoded")
    return tokenizer.starting_noise(Noise(list(seeds), device), size)


@torch.no_grad()
def decode_tokens(
    tokenizer: Tokenizer,
    tokens: Tensor,
    *,
    noise: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    tile: int | None = None,
    overlap: int = 4,
    runtime: Runtime = EAGER,
    invariant: bool = False,
) -> Tensor:
    """Images [B, C, H, W], or clips [B, T, C, H, W], about [-1, 1], not clamped, of tokens or latents.

    Convolutions are rounded by algorithms that a library chooses by the batch. A CPU therefore decodes one image at a
    time, which costs it nothing.

    In tiles it is lossy: norms and attention of the decoder look at the whole image, so tiles see other statistics.
    Neighbouring tiles are blended linearly over their overlap.

    Args:
        tokenizer: decodes.
        tokens: ids int64 [B, N] or vectors float [B, N, C]; or latents float [B, C, h, w], of
            clips [B, C, t, h, w].
        noise: float [B, C, H, W] of a tokenizer whose decoder draws, see `decoder_noise`; None for others.
        grid: (h, w) of ids that are not of the tokenizer's own size; None = as `latents` of the tokenizer says.
        tile: side of a tile in positions of the latent grid; None = whole images, as for images that are no larger.
        overlap: positions that neighbouring tiles share.
        runtime: eager, or CUDA graphs (one for every shape; large batches always run eagerly).
        invariant: on a GPU decode batches of one size only (the last is filled up): an image is then the same bits
            whatever batch it is in.

    Raises:
        ValueError: ids that do not fit, a tile < 1 or for clips, an overlap that is not in 0 ... tile - 1, a tokenizer
            with dropout in training mode, or noise that is missing or not for it.
    """
    check_inference(tokenizer)
    _check_noise(tokenizer, noise, tokens.shape[0])
    if tile is not None and noise is not None:
        raise ValueError(f"tile {tile}; a decoder that draws makes whole images")
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile}; it must be >= 1, or None for whole images")
    if tile is not None and not 0 <= overlap < tile:
        raise ValueError(f"overlap {overlap}; it must be in 0 ... tile - 1 = {tile - 1}")
    if tokens.device.type == "cpu" and tokens.shape[0] > 1:
        settings: dict[str, Any] = dict(grid=grid, tile=tile, overlap=overlap, runtime=runtime)
        noises = _split(noise, 1, tokens.shape[0])
        pairs = zip(tokens.split(1), noises, strict=True)
        return torch.cat([decode_tokens(tokenizer, one, noise=its, **settings) for one, its in pairs])
    latent_BChw = tokens if tokens.ndim >= 4 else tokenizer.latents(tokens, grid)
    if tile is not None and latent_BChw.ndim > 4:
        raise ValueError(f"tile {tile}; clips are decoded whole")
    if tile is None or max(latent_BChw.shape[2:]) <= tile:
        return _decode_parts(tokenizer, latent_BChw, noise, runtime, invariant)
    return _decode_tiles(tokenizer, latent_BChw, tile, overlap, runtime, invariant)


def _check_noise(tokenizer: Tokenizer, noise: Tensor | None, batch: int) -> None:
    draws = isinstance(tokenizer, Drawing)
    if draws != (noise is not None):
        what = "needs noise: its decoder draws" if draws else "takes no noise: its decoder does not draw"
        raise ValueError(f"a {type(tokenizer).__name__} {what}")
    if noise is not None and noise.shape[0] != batch:
        raise ValueError(f"noise of {noise.shape[0]} images for tokens of {batch}")


def _split(noise: Tensor | None, size: int, batch: int) -> Sequence[Tensor | None]:
    """Noise of every so many images of a batch."""
    return [None] * -(-batch // size) if noise is None else noise.split(size)


def _filled(part: Tensor) -> Tensor:
    """A batch of `INVARIANT_BATCH`, filled up by its last row."""
    return torch.cat([part, part[-1:].expand(INVARIANT_BATCH - len(part), *part.shape[1:])])


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Rounded to TF32, an image would also depend on its place in the batch."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
        yield


def _decode_parts(
    tokenizer: Tokenizer, latent_BChw: Tensor, noise: Tensor | None, runtime: Runtime, invariant: bool
) -> Tensor:
    """`_decode` of all images, or on a GPU and if `invariant` of one number of images at a time, filled up."""
    if not invariant or not latent_BChw.is_cuda or not len(latent_BChw):
        return _decode(tokenizer, latent_BChw, noise, runtime)
    parts = []
    with _without_tf32():
        noises = _split(noise, INVARIANT_BATCH, len(latent_BChw))
        for part_BChw, its in zip(latent_BChw.split(INVARIANT_BATCH), noises, strict=True):
            filled_noise = None if its is None else _filled(its)
            parts.append(_decode(tokenizer, _filled(part_BChw), filled_noise, runtime)[: len(part_BChw)])
    return torch.cat(parts)


def _decode(tokenizer: Tokenizer, latent_BChw: Tensor, noise: Tensor | None, runtime: Runtime) -> Tensor:
    pixels = latent_BChw.shape[2:].numel() * tokenizer.downsampling**2 if noise is None else noise[0, 0].numel()
    if len(latent_BChw) * pixels > _LARGEST_CAPTURE or not latent_BChw.is_cuda:
        return decode_with(tokenizer, latent_BChw, noise)
    # Kernels of convolutions may be read from copies: another graph after every change of a weight.
    marks = hash(tuple(mark(weight) for weight in tokenizer.parameters()))
    shapes = (tuple(latent_BChw.shape), None if noise is None else tuple(noise.shape))
    key = ("decode", shapes, tokenizer.training, marks, torch.backends.cudnn.allow_tf32)
    session = runtime.session(tokenizer, latent_BChw.device, key)
    static_BChw = session.static("latent", latent_BChw)
    static_noise = None if noise is None else session.static("noise", noise)

    def step() -> None:
        session.state = session.static("image", decode_with(tokenizer, static_BChw, static_noise))

    session.run(step)
    return session.state.clone()


def decode_with(tokenizer: Tokenizer, latent_BChw: Tensor, noise: Tensor | None) -> Tensor:
    """`decode_latents` of a tokenizer whose decoder draws, or with noise None of another one."""
    if noise is None:
        return tokenizer.decode_latents(latent_BChw)
    assert isinstance(tokenizer, Drawing)
    return tokenizer.decode_latents(latent_BChw, noise)


class BatchStream:
    """Decoding of a batch whose tokens still come, with the bits that `decode_tokens` has.

    Where an image must not depend on its batch it is cut as there: a CPU decodes one image at a time.

    Args:
        tokenizer: decodes.
        noise: float [B, C, H, W], see `decoder_noise`.
        invariant: as of `decode_tokens`.
    """

    def __init__(self, tokenizer: Streaming, noise: Tensor, invariant: bool = False) -> None:
        check_inference(tokenizer)
        self._fill = invariant and noise.is_cuda
        self._size = INVARIANT_BATCH if self._fill else len(noise) if noise.is_cuda else 1
        self._streams: list[Stream] = [
            tokenizer.stream(_filled(part) if self._fill else part) for part in noise.split(self._size)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._streams[0].num_tokens

    @property
    def steps(self) -> int:
        """Steps of the decoder so far, of one image."""
        return self._streams[0].steps

    @torch.no_grad()
    def feed(self, tokens_BL: Tensor) -> Tensor | None:
        """Takes in the next tokens [B, L]; see `Stream`."""
        made = []
        with _without_tf32() if self._fill else contextlib.nullcontext():
            for stream, part_BL in zip(self._streams, tokens_BL.split(self._size), strict=True):
                image_BCHW = stream.feed(_filled(part_BL) if self._fill else part_BL)
                made += [] if image_BCHW is None else [image_BCHW[: len(part_BL)]]
        return torch.cat(made) if made else None


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
        image = _decode_parts(tokenizer, part, None, runtime, invariant).float()
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
