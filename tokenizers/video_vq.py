"""VQ tokenizer of clips: a box of ids, (frames, rows, columns), causal in time: an image is a clip of one frame.

Frames pass the image autoencoder of `visar.tokenizers.vq` one by one. Between it and the codebook, convolutions over
time see a position and those before it, and groups of frames become one map of codes: the first frame alone, then so
many frames each. That the first frame has maps of its own is Phenaki's (arXiv 2210.02399, section 2.1); causal
convolutions over time for a tokenizer are MAGVIT-v2's (arXiv 2310.05737, section 3.2). The rest is this project's.

B clips, T frames, C channels, H W pixels of a frame, t h w latent box, N = t * h * w ids, V codes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from visar.core.interface import TokenLayout
from visar.layers.packable import Packable
from visar.tokenizers.checks import check_clip, check_ids, check_values
from visar.tokenizers.codebook_training import VQBottleneck
from visar.tokenizers.convnet import Decoder, Encoder, group_norm
from visar.tokenizers.convnet_fused import run
from visar.tokenizers.quantizer import VectorQuantizer
from visar.tokenizers.training import TokenizerFamily, sized_arguments

_SMALL = dict(image_size=64, num_frames=16, frame_group=5, base_channels=64, latent_channels=64)

# 16 frames of 64 x 64: as 4 x 16 x 16 ids (6.5 M parameters) and as 4 x 8 x 8 (8.3 M).
VIDEO_VQ_PRESETS: dict[str, dict] = {
    "video-vq-4-64": _SMALL | dict(channel_multipliers=(1, 2, 2), codebook_size=1024),
    "video-vq-8-64": _SMALL | dict(channel_multipliers=(1, 2, 2, 2), codebook_size=4096),
}


class CausalConv(nn.Module):
    """3 x 3 x 3 convolution that sees a position in time and the two before it; zeros stand before the first.

    It is a 2D convolution over the channels of the three.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3 * in_channels, out_channels, 3, padding=1)

    def forward(self, x_BTChw: Tensor) -> Tensor:
        length = x_BTChw.shape[1]
        padded = functional.pad(x_BTChw, (0,) * 6 + (2, 0))
        seen = torch.cat([padded[:, first : first + length] for first in range(3)], dim=2)
        return self.conv(seen.flatten(0, 1)).unflatten(0, x_BTChw.shape[:2])


class CausalBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) with causal convolutions; norms see one position in time each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), CausalConv(channels, channels)
        self.norm2, self.conv2 = group_norm(channels), CausalConv(channels, channels)

    def forward(self, x_BTChw: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(_each(self.norm1, x_BTChw)))
        return x_BTChw + self.conv2(functional.silu(_each(self.norm2, hidden)))


def _each(module: nn.Module, x_BTChw: Tensor) -> Tensor:
    """A module of images on every position in time by itself."""
    return module(x_BTChw.flatten(0, 1)).unflatten(0, x_BTChw.shape[:2])


class FrameGrouping(nn.Module):
    """Features of frames [B, T, C, h, w] to those of groups of frames [B, t, C, h, w], T = 1 + (t - 1) * group."""

    def __init__(self, channels: int, group: int, num_blocks: int) -> None:
        super().__init__()
        self.group = group
        self.before = nn.Sequential(*(CausalBlock(channels) for _ in range(num_blocks)))
        self.first = nn.Conv2d(channels, channels, 1)
        self.gather = nn.Conv2d(group * channels, channels, 1)
        self.after = nn.Sequential(*(CausalBlock(channels) for _ in range(num_blocks)))

    def forward(self, x_BTChw: Tensor) -> Tensor:
        x = self.before(x_BTChw)
        maps = [_each(self.first, x[:, :1])]
        if x.shape[1] > 1:
            groups = rearrange(x[:, 1:], "b (t g) c h w -> b t (g c) h w", g=self.group)
            maps.append(_each(self.gather, groups))
        return self.after(torch.cat(maps, dim=1))


class FrameSpreading(nn.Module):
    """Features of groups of frames [B, t, C, h, w] to those of frames [B, T, C, h, w]; `FrameGrouping` mirrored."""

    def __init__(self, channels: int, group: int, num_blocks: int) -> None:
        super().__init__()
        self.group = group
        self.before = nn.Sequential(*(CausalBlock(channels) for _ in range(num_blocks)))
        self.first = nn.Conv2d(channels, channels, 1)
        self.spread = nn.Conv2d(channels, group * channels, 1)
        self.after = nn.Sequential(*(CausalBlock(channels) for _ in range(num_blocks)))

    def forward(self, x_BtChw: Tensor) -> Tensor:
        x = self.before(x_BtChw)
        frames = [_each(self.first, x[:, :1])]
        if x.shape[1] > 1:
            groups = _each(self.spread, x[:, 1:])
            frames.append(rearrange(groups, "b t (g c) h w -> b (t g) c h w", g=self.group))
        return self.after(torch.cat(frames, dim=1))


@dataclass
class VideoVQOutput:
    """Result of a training forward.

    Attributes:
        clip_BTCHW: reconstruction, not clamped.
        ids_BN: int64 ids of the input.
        latent_BCthw: encoder output before normalisation, what `CodebookTrainer` takes.
        commitment_loss, codebook_loss: see `visar.tokenizers.quantizer.Quantized`; not weighted.
    """

    clip_BTCHW: Tensor
    ids_BN: Tensor
    latent_BCthw: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor

    @property
    def image_BCHW(self) -> Tensor:
        """All frames of all clips, as images [B * T, C, H, W]."""
        return self.clip_BTCHW.flatten(0, 1)

    @property
    def latent_BChw(self) -> Tensor:
        """The latents by the name that outputs of image tokenizers have for them."""
        return self.latent_BCthw


class VideoVQTokenizer(Packable, ModelMixin, ConfigMixin):
    """Causal autoencoder of clips around a vector quantiser: clips in [-1, 1] to ids and back.

    Ids stand in raster order, time first: those of the first h * w are the first frame's, those of every further h * w
    a group of frames'. They depend on their own frames and on earlier ones, and so do the frames decoded from them.

    Args:
        image_size: side, or (height, width), of the frames whose box `layout` reports; other sizes work too as long as
            the factor 2^(number of levels - 1) divides them.
        num_frames: frames of the clips whose box `layout` reports: 1 and a multiple of frame_group. Shorter and longer
            clips of this form work too; one frame is an image.
        frame_group: frames of a map of codes, but for the first frame's.
        image_channels: 3.
        base_channels, channel_multipliers, num_res_blocks, latent_channels: see `VQTokenizer`.
        num_time_blocks: causal blocks before and after the grouping of frames, and again in the decoder.
        codebook_size: V.
        codebook_dim: width of a code.
        normalize_codes: l2-normalised lookup.
        dropout: inside residual blocks, 0.0 = off.

    Raises:
        ValueError: widths that are not multiples of 32, or a size or number of frames that does not fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "AttentionBlock", "CausalBlock"]
    _repeated_blocks = ["ResnetBlock"]

    @register_to_config
    def __init__(
        self,
        image_size: int | tuple[int, int] = 64,
        num_frames: int = 16,
        frame_group: int = 5,
        image_channels: int = 3,
        base_channels: int = 64,
        channel_multipliers: tuple[int, ...] = (1, 2, 2),
        num_res_blocks: int = 2,
        latent_channels: int = 64,
        num_time_blocks: int = 1,
        codebook_size: int = 1024,
        codebook_dim: int = 8,
        normalize_codes: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if frame_group < 1 or num_time_blocks < 0:
            raise ValueError(f"frame_group {frame_group}, num_time_blocks {num_time_blocks}; needed: >= 1 and >= 0")
        if latent_channels <= 0 or latent_channels % 32:
            raise ValueError(f"latent_channels {latent_channels}; allowed: positive multiples of 32")
        self.factor = 2 ** (len(channel_multipliers) - 1)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._box = self._box_of(num_frames, height, width)
        levels: dict[str, Any] = dict(base_channels=base_channels, channel_multipliers=channel_multipliers)
        levels |= dict(num_res_blocks=num_res_blocks, dropout=dropout)
        self.encoder = Encoder(in_channels=image_channels, out_channels=latent_channels, **levels)
        self.grouping = FrameGrouping(latent_channels, frame_group, num_time_blocks)
        self.quant_conv = nn.Conv2d(latent_channels, codebook_dim, 1)
        self.quantize = VectorQuantizer(codebook_size, codebook_dim, normalize_codes)
        self.post_quant_conv = nn.Conv2d(codebook_dim, latent_channels, 1)
        self.spreading = FrameSpreading(latent_channels, frame_group, num_time_blocks)
        self.decoder = Decoder(in_channels=latent_channels, out_channels=image_channels, **levels)

    # ------------------------------------------------------------------------------------------------------ sizes
    @property
    def layout(self) -> TokenLayout:
        """One box of ids, for clips of the configured size and length."""
        return TokenLayout((self._box,), "box", self.config["codebook_size"], self.config["codebook_dim"])

    @property
    def codebook(self) -> Tensor:
        """Float32 [V, C], the vectors as looked up (of unit length if `normalize_codes`)."""
        return self.quantize.codebook

    @property
    def downsampling(self) -> int:
        """Pixels of a frame along one side of a position of the box."""
        return self.factor

    def _box_of(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        group = self.config["frame_group"]
        if frames < 1 or (frames - 1) % group:
            raise ValueError(
                f"{frames} frames; a clip has 1 + a multiple of {group}: 1, {1 + group}, {1 + 2 * group}, ..."
            )
        for side in (height, width):
            if side <= 0 or side % self.factor:
                raise ValueError(f"frames of {height} x {width}; both sides must be multiples of {self.factor}")
        return 1 + (frames - 1) // group, height // self.factor, width // self.factor

    def _box_for(self, num_ids: int, box: tuple[int, ...] | None) -> tuple[int, ...]:
        area = self._box[1] * self._box[2]
        if box is None and (num_ids == 0 or num_ids % area):
            raise ValueError(f"{num_ids} ids are no whole maps of {self._box[1]} x {self._box[2]}; say the box")
        found = (num_ids // area, *self._box[1:]) if box is None else tuple(box)
        if len(found) != 3 or found[0] * found[1] * found[2] != num_ids:
            raise ValueError(f"{num_ids} ids do not fill a box of {' x '.join(map(str, found))}")
        return found

    def _check_clip(self, clip_BTCHW: Tensor) -> None:
        check_clip(clip_BTCHW, self.config["image_channels"])
        self._box_of(clip_BTCHW.shape[1], clip_BTCHW.shape[3], clip_BTCHW.shape[4])

    # ------------------------------------------------------------------------------------------ clips to ids, back
    def encode_latents(self, clip_BTCHW: Tensor) -> Tensor:
        """Encoder output [B, codebook_dim, t, h, w] before normalisation and quantisation.

        Raises:
            ValueError: another number of channels, or frames that do not fit.
        """
        self._check_clip(clip_BTCHW)
        frames = clip_BTCHW.to(self.quant_conv.weight.dtype)
        grouped_BtChw = self.grouping(_each(self.encoder, frames))
        return rearrange(_each(self.quant_conv, grouped_BtChw), "b t c h w -> b c t h w")

    def encode(self, clip_BTCHW: Tensor) -> Tensor:
        """Clips [B, T, C, H, W] in [-1, 1] to ids int64 [B, N], raster order, time first.

        Raises:
            ValueError: as of `encode_latents`, or values outside of [-1, 1].
        """
        self._check_clip(clip_BTCHW)
        check_values(clip_BTCHW)
        return self.quantize.nearest(self.encode_latents(clip_BTCHW))

    def latents(self, ids_BN: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """What `decode_latents` takes, float32 [B, codebook_dim, t, h, w].

        Args:
            ids_BN: integers [B, N]; N of any number of whole maps.
            grid: (t, h, w); None = maps of the configured size.

        Raises:
            ValueError: an id outside [0, V), or N does not fit the box.
        """
        check_ids(ids_BN, self.config["codebook_size"])
        codes = self.codebook[ids_BN].unflatten(1, self._box_for(ids_BN.shape[1], grid))
        return rearrange(codes, "b t h w c -> b c t h w")

    def decode_latents(self, latent_BCthw: Tensor) -> Tensor:
        """Code vectors [B, codebook_dim, t, h, w] (any vectors, not only codes) to clips; not clamped."""
        maps = rearrange(latent_BCthw.to(self.post_quant_conv.weight.dtype), "b c t h w -> b t c h w")
        frames_BTChw = self.spreading(_each(self.post_quant_conv, maps))
        return run(self.decoder, frames_BTChw.flatten(0, 1)).unflatten(0, frames_BTChw.shape[:2])

    def decode(self, ids_BN: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Ids [B, N] to clips [B, T, C, H, W], about [-1, 1], not clamped; arguments and errors as of `latents`."""
        return self.decode_latents(self.latents(ids_BN, grid))

    # --------------------------------------------------------------------------------------------------- training
    def forward(self, clip_BTCHW: Tensor) -> VideoVQOutput:
        """Reconstruction with straight-through gradients, and the losses of the codebook."""
        latent_BCthw = self.encode_latents(clip_BTCHW)
        quantized = self.quantize(latent_BCthw)
        return VideoVQOutput(
            clip_BTCHW=self.decode_latents(quantized.quantized_BChw),
            ids_BN=quantized.ids_BN,
            latent_BCthw=latent_BCthw,
            commitment_loss=quantized.commitment_loss,
            codebook_loss=quantized.codebook_loss,
        )


FAMILY = TokenizerFamily(
    model=VideoVQTokenizer,
    presets=VIDEO_VQ_PRESETS,
    default="video-vq-4-64",
    tiny=dict(
        image_size=8,
        num_frames=3,
        frame_group=2,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=32,
        codebook_size=128,
    ),
    frozen=("encoder", "grouping", "quant_conv", "quantize"),
    bottleneck=VQBottleneck,
    arguments=sized_arguments,
    clips=True,
)
