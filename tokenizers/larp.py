"""LARP: a clip as the codes of learned queries, which look at all of it.

Source: LARP, arXiv 2410.21264, hywang66/LARP, as ThisisBillhe/NAR@225c1fb has it (parameter names). A ViT reads
patches of the clip and the queries; the queries' outputs are quantised by cosine similarity. A second ViT reads the
codes and a query per patch, whose outputs are the pixels. Codes have no places in the clip: the box of the layout is
by index only (NAR, arXiv 2503.10696, draws them in it). Differs from the paper: training picks the nearest code
instead of drawing one, and no prior model shapes the latents.

B clips, T frames, C channels, H W pixels of a frame, P patches, N queries, D hidden size, V codes.
"""

import math
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
from visar.tokenizers.quantizer import VectorQuantizer
from visar.tokenizers.training import TokenizerFamily, sized_arguments
from visar.tokenizers.video_vq import VideoVQOutput

# larp-l-long: released, 16 frames of 128 x 128 as 1024 codes (173 M parameters). larp-64: 64 x 64, as 256 codes.
LARP_PRESETS: dict[str, dict] = {
    "larp-l-long": dict(),
    "larp-64": dict(image_size=64, box=(4, 8, 8), width=384, num_layers=6, num_heads=6, codebook_size=1024),
}


def sincos(positions: Tensor, width: int) -> Tensor:
    """Fixed embeddings [N, width] of positions [N]: sines in the first half, cosines in the second (MAE's)."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2.0))
    angle = positions.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def box_positions(box: tuple[int, int, int], width: int) -> Tensor:
    """Fixed embeddings [1, t * h * w, width] of a box: of the column and the row in halves, plus those of the time."""
    time, row, column = torch.meshgrid(*map(torch.arange, box), indexing="ij")
    place = torch.cat([sincos(axis.flatten(), width // 2) for axis in (column, row)], dim=1)
    return (place + sincos(time.flatten(), width))[None]


class Attention(nn.Module):
    """Self-attention; parameter names as in timm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        heads = rearrange(self.qkv(x_BLD), "b l (three h e) -> three b h l e", three=3, h=self.num_heads)
        out = functional.scaled_dot_product_attention(*heads.unbind(0))
        return self.proj(rearrange(out, "b h l e -> b l (h e)"))


class Mlp(nn.Module):
    """Feed-forward part of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x_BLD)))


class VitBlock(nn.Module):
    """Pre-norm transformer block of a ViT."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Vit(nn.Module):
    """Blocks of a ViT."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(VitBlock(width, num_heads) for _ in range(num_layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return x_BLD


class PatchEmbedding(nn.Module):
    """Patches of a clip [B, C, T, H, W] as vectors [B, P, D], raster order, time first."""

    def __init__(self, channels: int, patch: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, stride=patch)

    def forward(self, clip_BCTHW: Tensor) -> Tensor:
        return self.proj(clip_BCTHW).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Norm and linear map from hidden vectors to pixels of a patch."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x_BPD: Tensor) -> Tensor:
        return self.linear(self.norm_final(x_BPD))


class QueryBottleneck(nn.Module):
    """Hidden vectors to vectors of the codebook, and back."""

    def __init__(self, width: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.in_linear, self.out_linear = nn.Linear(width, codebook_dim), nn.Linear(codebook_dim, width)
        self.regularizer = VectorQuantizer(codebook_size, codebook_dim, normalize=True)


class LARPTokenizer(Packable, ModelMixin, ConfigMixin):
    """Clips in [-1, 1] to codes of learned queries and back. arXiv 2410.21264.

    Args:
        image_size: side of the frames.
        num_frames: T; other lengths are not read.
        patch: (frames, rows, columns) of a patch.
        box: (t, h, w) in which the t * h * w queries are counted, see the module's text.
        width, num_layers, num_heads: D, depth and heads of encoder and decoder.
        codebook_size, codebook_dim: V and the width of a code.

    Raises:
        ValueError: a clip that patches do not fill, or widths that do not fit each other.
    """

    encoder_patch_pe: Tensor
    decoder_latent_pe: Tensor
    decoder_patch_query_embed: Tensor
    _no_split_modules = ["VitBlock"]
    _repeated_blocks = ["VitBlock"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        num_frames: int = 16,
        patch: tuple[int, int, int] = (4, 8, 8),
        box: tuple[int, int, int] = (4, 16, 16),
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        codebook_size: int = 8192,
        codebook_dim: int = 16,
    ) -> None:
        super().__init__()
        clip = (num_frames, image_size, image_size)
        if (
            len(patch) != 3
            or min(patch) < 1
            or any(side < 1 or side % part for side, part in zip(clip, patch, strict=True))
        ):
            raise ValueError(f"patches of {tuple(patch)} do not fill a clip of {clip}")
        if width % 4 or width % num_heads:
            raise ValueError(f"width {width}; needed: a multiple of 4 and of num_heads {num_heads}")
        self._patches = (clip[0] // patch[0], clip[1] // patch[1], clip[2] // patch[2])
        queries = math.prod(box)
        self.x_embedder = PatchEmbedding(3, (patch[0], patch[1], patch[2]), width)
        self.encoder_latent_query_embed = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.encoder, self.decoder = (Vit(width, num_layers, num_heads) for _ in range(2))
        self.bottleneck = QueryBottleneck(width, codebook_size, codebook_dim)
        self.decoder_patch_query_token_type_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.final_layer = FinalLayer(width, math.prod(patch) * 3)
        # In the file, as released ones have them.
        self.register_buffer("encoder_patch_pe", box_positions(self._patches, width))
        self.register_buffer("decoder_patch_query_embed", box_positions(self._patches, width))
        self.register_buffer("decoder_latent_pe", sincos(torch.arange(queries), width)[None])

    @property
    def quantize(self) -> VectorQuantizer:
        """The codebook's module."""
        return self.bottleneck.regularizer

    @property
    def layout(self) -> TokenLayout:
        """The queries, counted in a box."""
        config = self.config
        return TokenLayout((tuple(config["box"]),), "box", config["codebook_size"], config["codebook_dim"])

    @property
    def codebook(self) -> Tensor:
        """Float32 [V, C] of unit length, the vectors as looked up."""
        return self.quantize.codebook

    @property
    def downsampling(self) -> int:
        """Pixels of a frame over columns of the box, as if codes had places."""
        return self.config["image_size"] // self.config["box"][2]

    def decoding_values(self, batch: int) -> int:
        """Entries of the widest tensors of decoding."""
        return batch * 6 * self.config["width"] * (self.layout.num_tokens + math.prod(self._patches))

    # ------------------------------------------------------------------------------------------ clips to ids, back
    def _check_clip(self, clip_BTCHW: Tensor) -> None:
        check_clip(clip_BTCHW, 3)
        config = self.config
        wanted = (config["num_frames"], config["image_size"], config["image_size"])
        found = (clip_BTCHW.shape[1], *clip_BTCHW.shape[3:])
        if found != wanted:
            raise ValueError(f"clip of {found} frames, rows and columns; this tokenizer reads {wanted}")

    def encode_latents(self, clip_BTCHW: Tensor) -> Tensor:
        """Encoder output [B, codebook_dim, t, h, w] before normalisation and quantisation.

        Raises:
            ValueError: a clip of another shape.
        """
        self._check_clip(clip_BTCHW)
        pixels = (clip_BTCHW.to(self.x_embedder.proj.weight.dtype) + 1.0) / 2.0
        x = self.x_embedder(rearrange(pixels, "b t c h w -> b c t h w")) + self.encoder_patch_pe
        queries = self.encoder_latent_query_embed.expand(len(x), -1, -1)
        encoded_BND = self.encoder(torch.cat([x, queries.to(x.dtype)], dim=1))[:, x.shape[1] :]
        return self.bottleneck.in_linear(encoded_BND).transpose(1, 2).unflatten(2, tuple(self.config["box"]))

    def encode(self, clip_BTCHW: Tensor) -> Tensor:
        """Clips [B, T, 3, H, W] in [-1, 1] to ids int64 [B, N].

        Raises:
            ValueError: as of `encode_latents`, or values outside of [-1, 1].
        """
        self._check_clip(clip_BTCHW)
        check_values(clip_BTCHW)
        return self.quantize.nearest(self.encode_latents(clip_BTCHW))

    def latents(self, ids_BN: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """What `decode_latents` takes, float32 [B, codebook_dim, t, h, w].

        Raises:
            ValueError: an id outside [0, V), another number of them, or another grid than the box.
        """
        check_ids(ids_BN, self.config["codebook_size"])
        box = tuple(self.config["box"])
        if ids_BN.shape[1] != math.prod(box) or grid not in (None, box):
            raise ValueError(f"{ids_BN.shape[1]} ids in {grid or 'no grid'}; needed: {math.prod(box)} in {box}")
        return self.codebook[ids_BN].transpose(1, 2).unflatten(2, box)

    def decode_latents(self, latent_BCthw: Tensor) -> Tensor:
        """Code vectors [B, codebook_dim, t, h, w] to clips [B, T, 3, H, W]; not clamped."""
        codes_BNC = latent_BCthw.flatten(2).transpose(1, 2).to(self.final_layer.linear.weight.dtype)
        x = self.bottleneck.out_linear(codes_BNC) + self.decoder_latent_pe
        queries = self.decoder_patch_query_embed + self.decoder_patch_query_token_type_embed
        out = self.decoder(torch.cat([x, queries.expand(len(x), -1, -1).to(x.dtype)], dim=1))[:, x.shape[1] :]
        (t, h, w), (frames, rows, columns) = self._patches, self.config["patch"]
        names = dict(t=t, h=h, w=w, f=frames, p=rows, q=columns)
        pixels = rearrange(self.final_layer(out), "b (t h w) (f p q c) -> b (t f) c (h p) (w q)", **names)
        return pixels * 2.0 - 1.0

    def decode(self, ids_BN: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Ids [B, N] to clips [B, T, 3, H, W], about [-1, 1], not clamped; arguments and errors as of `latents`."""
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


_TINY: dict[str, Any] = dict(image_size=8, num_frames=2, patch=(1, 4, 4), box=(2, 4, 4), width=32, num_layers=1)

FAMILY = TokenizerFamily(
    model=LARPTokenizer,
    presets=LARP_PRESETS,
    default="larp-64",
    tiny=_TINY | dict(num_heads=2, codebook_size=128, codebook_dim=8),
    frozen=("x_embedder", "encoder", "bottleneck"),
    bottleneck=VQBottleneck,
    arguments=sized_arguments,
    clips=True,
)
