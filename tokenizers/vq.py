"""VQ tokenizer of raster models: one grid of ids per image.

Source: LlamaGen, arXiv 2406.06525 section 3.1, FoundationVision/LlamaGen@ce98ec4 (architecture and parameter names);
the autoencoder is VQGAN's (arXiv 2012.09841). The small presets and the codebook's training are this project's.

B images, C channels, H W image pixels, h w latent grid, N = h * w ids, V codes.
"""

from dataclasses import dataclass
from typing import Literal

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from visar.core.interface import TokenLayout
from visar.layers.packable import Packable
from visar.tokenizers.checks import check_ids, check_image, check_values
from visar.tokenizers.codebook_training import VQBottleneck
from visar.tokenizers.convnet import Decoder, Encoder
from visar.tokenizers.convnet_fused import run
from visar.tokenizers.quantizer import VectorQuantizer
from visar.tokenizers.training import TokenizerFamily, sized_arguments

# vq-16, vq-8: released sizes, 71.9 M and 70.1 M parameters (rFID 2.19 and 0.59 at 256 x 256, arXiv 2406.06525).
# vq-4-64*: 64 x 64 images as 16 x 16 ids, 5.6 M parameters.
VQ_PRESETS: dict[str, dict] = {
    "vq-16": dict(image_size=256, channel_multipliers=(1, 1, 2, 2, 4), codebook_size=16384),
    "vq-8": dict(image_size=256, channel_multipliers=(1, 2, 2, 4), codebook_size=16384),
    "vq-4-64": dict(
        image_size=64, base_channels=64, channel_multipliers=(1, 2, 2), latent_channels=64, codebook_size=1024
    ),
    "vq-4-64-4096": dict(
        image_size=64, base_channels=64, channel_multipliers=(1, 2, 2), latent_channels=64, codebook_size=4096
    ),
}

LookupLayout = Literal["flat", "channels_last", "channels_first"]


@dataclass
class VQOutput:
    """Result of a training forward.

    Attributes:
        image_BCHW: reconstruction, not clamped.
        ids_BN: int64 ids of the input.
        latent_BChw: encoder output before normalisation, what `CodebookTrainer` takes.
        commitment_loss, codebook_loss: see `visar.tokenizers.quantizer.Quantized`; not weighted.
    """

    image_BCHW: Tensor
    ids_BN: Tensor
    latent_BChw: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class VQTokenizer(Packable, ModelMixin, ConfigMixin):
    """Convolutional autoencoder around a vector quantiser: images in [-1, 1] to ids and back. arXiv 2406.06525.

    Args:
        image_size: side, or (height, width), of the images whose grid `layout` reports; other sizes work too as long
            as the factor 2^(number of levels - 1) divides them.
        image_channels: 3.
        base_channels: 128 in released models.
        channel_multipliers: width of every level over base_channels, fine to coarse.
        decoder_channel_multipliers: the same for the decoder (fine to coarse too); None = as the encoder's.
        num_res_blocks: residual blocks of an encoder level; decoder levels have one more.
        latent_channels: features before the map to codes (z_channels upstream).
        codebook_size: V.
        codebook_dim: width of a code.
        normalize_codes: l2-normalised lookup.
        dropout: inside residual blocks, 0.0 = off.

    Raises:
        ValueError: widths that are not multiples of 32, or an image size that the factor does not divide.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "AttentionBlock"]
    _repeated_blocks = ["ResnetBlock"]

    @register_to_config
    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        image_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        decoder_channel_multipliers: tuple[int, ...] | None = None,
        num_res_blocks: int = 2,
        latent_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        normalize_codes: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        decoder_multipliers = decoder_channel_multipliers or channel_multipliers
        if len(decoder_multipliers) != len(channel_multipliers):
            raise ValueError(
                f"decoder_channel_multipliers {tuple(decoder_multipliers)} must have as many levels as "
                f"channel_multipliers {tuple(channel_multipliers)}"
            )
        self.factor = 2 ** (len(channel_multipliers) - 1)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._grid = self._grid_of(height, width)
        self.encoder = Encoder(
            in_channels=image_channels,
            out_channels=latent_channels,
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            dropout=dropout,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=image_channels,
            base_channels=base_channels,
            channel_multipliers=decoder_multipliers,
            num_res_blocks=num_res_blocks,
            dropout=dropout,
        )
        self.quantize = VectorQuantizer(codebook_size, codebook_dim, normalize_codes)
        self.quant_conv = nn.Conv2d(latent_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, latent_channels, 1)

    # ------------------------------------------------------------------------------------------------------ sizes
    @property
    def layout(self) -> TokenLayout:
        """One grid of ids, for images of the configured size."""
        return TokenLayout((self._grid,), "grid", self.config["codebook_size"], self.config["codebook_dim"])

    @property
    def codebook(self) -> Tensor:
        """Float32 [V, C], the vectors as looked up (of unit length if `normalize_codes`)."""
        return self.quantize.codebook

    @property
    def downsampling(self) -> int:
        """Pixels of an image along one side of a position of the grid."""
        return self.factor

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        for side in (height, width):
            if side <= 0 or side % self.factor:
                raise ValueError(f"image size {height} x {width}; both sides must be multiples of {self.factor}")
        return height // self.factor, width // self.factor

    def _grid_for(self, num_ids: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        if grid is not None:
            if grid[0] * grid[1] != num_ids:
                raise ValueError(f"{num_ids} ids do not fill a grid of {grid[0]} x {grid[1]}")
            return grid[0], grid[1]
        if num_ids == self.layout.num_tokens:
            return self._grid
        scale = (num_ids / self.layout.num_tokens) ** 0.5
        rows, columns = round(self._grid[0] * scale), round(self._grid[1] * scale)
        if num_ids == 0 or rows * columns != num_ids or rows * self._grid[1] != columns * self._grid[0]:
            shape = "no square" if self._grid[0] == self._grid[1] else f"no grid shaped as {self._grid}"
            raise ValueError(f"{num_ids} ids make {shape}; say grid=(rows, columns)")
        return rows, columns

    def _check_image(self, image_BCHW: Tensor) -> None:
        check_image(image_BCHW, self.config["image_channels"])
        self._grid_of(image_BCHW.shape[2], image_BCHW.shape[3])

    # ----------------------------------------------------------------------------------------- images to ids, back
    def encode_latents(self, image_BCHW: Tensor) -> Tensor:
        """Encoder output [B, codebook_dim, h, w] before normalisation and quantisation.

        Raises:
            ValueError: another number of channels, or a size that the factor does not divide.
        """
        self._check_image(image_BCHW)
        return self.quant_conv(self.encoder(image_BCHW.to(self.quant_conv.weight.dtype)))

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to ids int64 [B, N], raster order.

        Raises:
            ValueError: as of `encode_latents`, or values outside of [-1, 1].
        """
        self._check_image(image_BCHW)
        check_values(image_BCHW)
        return self.quantize.nearest(self.encode_latents(image_BCHW))

    def lookup(self, ids_BN: Tensor, layout: LookupLayout = "flat", grid: tuple[int, int] | None = None) -> Tensor:
        """Code vectors of ids as the decoder reads them; float32.

        Args:
            ids_BN: integers [B, N].
            layout: "flat" [B, N, C], "channels_last" [B, h, w, C] or "channels_first" [B, C, h, w].
            grid: (h, w); None = the configured grid, or one of its proportions with N places. Not read for
                "flat".

        Raises:
            ValueError: unknown layout, an id outside [0, V), or N does not fit the grid.
        """
        if layout not in ("flat", "channels_last", "channels_first"):
            raise ValueError(f"layout {layout!r}; choose flat, channels_last or channels_first")
        check_ids(ids_BN, self.config["codebook_size"])
        codes_BNC = self.codebook[ids_BN]
        if layout == "flat":
            return codes_BNC
        codes_BhwC = codes_BNC.unflatten(1, self._grid_for(ids_BN.shape[1], grid))
        return codes_BhwC if layout == "channels_last" else rearrange(codes_BhwC, "b h w c -> b c h w")

    def latents(self, ids_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """What `decode_latents` takes, float32 [B, codebook_dim, h, w]; arguments and errors as of `lookup`."""
        return self.lookup(ids_BN, "channels_first", grid)

    def decode_latents(self, latent_BChw: Tensor) -> Tensor:
        """Code vectors [B, codebook_dim, h, w] (any vectors, not only codes) to images; not clamped."""
        return run(self.decoder, self.post_quant_conv(latent_BChw.to(self.post_quant_conv.weight.dtype)))

    def decode(self, ids_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Ids [B, N] to images [B, C, H, W], about [-1, 1], not clamped; arguments and errors as of `lookup`.

        Waits for the device once, to check the ids; `decode_latents` does not.
        """
        return self.decode_latents(self.latents(ids_BN, grid))

    # --------------------------------------------------------------------------------------------------- training
    def forward(self, image_BCHW: Tensor) -> VQOutput:
        """Reconstruction with straight-through gradients, and the losses of the codebook."""
        latent_BChw = self.encode_latents(image_BCHW)
        quantized = self.quantize(latent_BChw)
        return VQOutput(
            image_BCHW=self.decode_latents(quantized.quantized_BChw),
            ids_BN=quantized.ids_BN,
            latent_BChw=latent_BChw,
            commitment_loss=quantized.commitment_loss,
            codebook_loss=quantized.codebook_loss,
        )


FAMILY = TokenizerFamily(
    model=VQTokenizer,
    presets=VQ_PRESETS,
    default="vq-4-64",
    tiny=dict(
        image_size=8,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=16,
        codebook_size=128,
    ),
    frozen=("encoder", "quant_conv", "quantize"),
    bottleneck=VQBottleneck,
    arguments=sized_arguments,
)
