"""Multi-scale VQ tokenizer: an image as token maps of growing size, each adding what the coarser ones lack.

Source: VAR, arXiv 2404.02905 section 3.2 and algorithms 1, 2; numerics of FoundationVision/VAR@78b9539. The release
has no training code for it; the training pass here follows the paper's loss.

B images, S scales, N all positions, V codes, C code width, H W image pixels, h w the finest grid.
"""

import itertools
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.interface import TokenLayout
from visar.layers.packable import Packable
from visar.tokenizers.checks import check_ids, check_image, check_values
from visar.tokenizers.codebook_training import CodebookBottleneck
from visar.tokenizers.convnet import Decoder, Encoder
from visar.tokenizers.convnet_fused import run
from visar.tokenizers.multiscale_quantizer import MultiScaleCodebookTrainer, MultiScaleQuantizer
from visar.tokenizers.training import Arguments, TokenizerFamily
from visar.tokenizers.vq import VQOutput

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

# var-vq16: the released tokenizer, shared by VAR, HMAR and CoDe at every resolution (109 M parameters).
# msvq-4-64: 64 x 64 images as 8 scales up to 16 x 16, 507 ids.
MULTISCALE_VQ_PRESETS: dict[str, dict] = {
    "var-vq16": dict(codebook_size=4096, codebook_dim=32, base_channels=160, channel_multipliers=(1, 1, 2, 2, 4)),
    "msvq-4-64": dict(
        codebook_size=1024,
        codebook_dim=32,
        scales=(1, 2, 3, 4, 6, 8, 11, 16),
        base_channels=64,
        channel_multipliers=(1, 2, 2),
        tail_dropout=0.1,
    ),
}


class MultiScaleVQTokenizer(Packable, ModelMixin, ConfigMixin):
    """Convolutional autoencoder with residual quantisation over a pyramid of scales. arXiv 2404.02905.

    Args:
        codebook_size, codebook_dim: V and C; one codebook for all scales.
        scales: sizes, coarse to fine (numbers or (height, width) pairs); the last is the grid of the image's latent,
            so it times the downsampling factor 2^(levels - 1) is the image's size.
        image_channels: 3 for colour.
        base_channels, channel_multipliers, num_res_blocks, attention, dropout: of encoder and decoder, see
            `visar.tokenizers.convnet`.
        quant_conv_size: kernel of the convolutions before and after the quantiser.
        num_phi, phi_ratio, cosine, tail_dropout: see `MultiScaleQuantizer`.

    Raises:
        ValueError: sizes that exclude each other.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["quantizer"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        scales: tuple = SCALES_256,
        image_channels: int = 3,
        base_channels: int = 160,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention: bool = True,
        dropout: float = 0.0,
        quant_conv_size: int = 3,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        cosine: bool = False,
        tail_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels=image_channels,
            out_channels=codebook_dim,
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            attention=attention,
            dropout=dropout,
        )
        self.decoder = Decoder(
            in_channels=codebook_dim,
            out_channels=image_channels,
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            attention=attention,
            dropout=dropout,
        )
        padding = quant_conv_size // 2
        self.quant_conv = nn.Conv2d(codebook_dim, codebook_dim, quant_conv_size, padding=padding)
        self.post_quant_conv = nn.Conv2d(codebook_dim, codebook_dim, quant_conv_size, padding=padding)
        self.quantizer = MultiScaleQuantizer(
            codebook_size,
            codebook_dim,
            scales,
            num_phi=num_phi,
            phi_ratio=phi_ratio,
            cosine=cosine,
            tail_dropout=tail_dropout,
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Quantiser weights for training from scratch; convolutions keep PyTorch's start."""
        self.quantizer.reset_parameters(generator)

    # -------------------------------------------------------------------------------------------------- properties
    @property
    def layout(self) -> TokenLayout:
        """Token maps of all scales, coarse to fine; every leading number of scales decodes to an image."""
        quantizer = self.quantizer
        return TokenLayout(
            quantizer.scales,
            "scales",
            quantizer.vocab_size,
            quantizer.channels,
            previews=tuple(itertools.accumulate(quantizer.sizes)),
        )

    @property
    def codebook(self) -> Tensor:
        """Code vectors [V, C], as looked up."""
        return self.quantizer.codebook

    @property
    def downsampling(self) -> int:
        """Pixels of an image along one side of a position of the finest grid."""
        return 2 ** (len(self.config["channel_multipliers"]) - 1)

    # ---------------------------------------------------------------------------------------------- encode, decode
    def encode_latents(self, image_BCHW: Tensor) -> Tensor:
        """Latent [B, C, h, w] of images in [-1, 1], before quantisation.

        Raises:
            ValueError: another number of channels, or not the size that the finest scale asks for.
        """
        check_image(image_BCHW, self.config["image_channels"])
        height, width = (side * self.downsampling for side in self.quantizer.scales[-1])
        if tuple(image_BCHW.shape[2:]) != (height, width):
            raise ValueError(f"images {tuple(image_BCHW.shape[2:])}; the finest scale asks for {(height, width)}")
        return self.quant_conv(self.encoder(image_BCHW.to(self.quant_conv.weight.dtype)))

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Ids int64 [B, N], coarse to fine, raster order inside a scale, of images in [-1, 1].

        Raises:
            ValueError: as of `encode_latents`, or values outside of [-1, 1].
        """
        check_image(image_BCHW, self.config["image_channels"])
        check_values(image_BCHW)
        return self.quantizer.encode(self.encode_latents(image_BCHW))[0]

    def latents(self, tokens_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Accumulated map float32 [B, C, h, w], what `decode_latents` takes, of ids int64 [B, N].

        Args:
            tokens_BN: of a whole number of leading scales.
            grid: None, or the finest scale: the pyramid fixes it.

        Raises:
            ValueError: an id outside [0, V), not a whole number of scales, or another grid.
        """
        check_ids(tokens_BN, self.quantizer.vocab_size)
        if grid is not None and tuple(grid) != self.quantizer.scales[-1]:
            raise ValueError(f"grid {tuple(grid)}; this tokenizer's is {self.quantizer.scales[-1]}")
        return self.quantizer.running_maps(tokens_BN)[-1]

    def decode_latents(self, latent_BChw: Tensor) -> Tensor:
        """Images [B, 3, H, W], not clamped, of an accumulated map."""
        return run(self.decoder, self.post_quant_conv(latent_BChw.to(self.post_quant_conv.weight.dtype)))

    def decode(self, tokens_BN: Tensor) -> Tensor:
        """Images [B, 3, H, W], not clamped, of ids int64 [B, N].

        Fewer scales are fine too: the ids of the first n give a preview at full size.

        Raises:
            ValueError: an id outside [0, V), or not a whole number of scales.
        """
        return self.decode_latents(self.latents(tokens_BN))

    def split(self, tokens_BN: Tensor) -> list[Tensor]:
        """Ids of every scale, int64 [B, h, w] each; of a whole number of leading scales."""
        num_scales = self.quantizer.num_scales_of(tokens_BN.shape[1])
        parts = tokens_BN.split(self.quantizer.sizes[:num_scales], dim=1)
        return [part.unflatten(1, scale) for part, scale in zip(parts, self.quantizer.scales, strict=False)]

    def with_scales(self, scales: Sequence[int | Sequence[int]]) -> "MultiScaleVQTokenizer":
        """A copy for another pyramid, with the same weights: everything is convolutional (VAR at 512 px uses the
        weights trained at 256 px).

        Raises:
            ValueError: one phi per scale (num_phi 0), and another number of scales.
        """
        config = {**self.config, "scales": tuple(scales)}
        other = type(self).from_config(config)
        if len(other.quantizer.phi) != len(self.quantizer.phi):
            raise ValueError(f"one phi per scale: another pyramid needs {len(self.quantizer.phi)} scales, as before")
        other.load_state_dict(self.state_dict())
        return other.to(self.device, self.dtype).train(self.training)

    # ---------------------------------------------------------------------------------------------------- training
    def forward(self, image_BCHW: Tensor) -> VQOutput:
        """Reconstruction of images in [-1, 1] with straight-through gradients, and the losses of the codebook (not
        weighted; the paper weights commitment with 0.25)."""
        latent_BChw = self.encode_latents(image_BCHW)
        quantized = self.quantizer(latent_BChw)
        return VQOutput(
            image_BCHW=self.decode_latents(quantized.quantized_BChw),
            ids_BN=quantized.ids_BN,
            latent_BChw=latent_BChw,
            commitment_loss=quantized.commitment_loss,
            codebook_loss=quantized.codebook_loss,
        )


# -------------------------------------------------------------------------------------------- training and benchmark
def pyramid_of(side: int) -> tuple[int, ...]:
    """Sides of the scales for a latent of a side, coarse to fine: VAR's ten for 16 x 16, in proportion for others."""
    sizes = {1, 2, 3, *(round(size * side / 16) for size in SCALES_256)}
    return tuple(sorted(size for size in sizes if 1 <= size <= side))


def _arguments(preset: Arguments, given: Arguments, image_size: int) -> Arguments:
    """The pyramid is the user's, or the preset's where that ends at the images' latent, or else made for it."""
    arguments = {**preset, **given}
    if "scales" in given:
        return arguments
    factor = 2 ** (len(arguments["channel_multipliers"]) - 1)
    if image_size % factor:
        raise ValueError(f"image size {image_size}; this tokenizer needs a multiple of {factor}")
    if (side := image_size // factor) != arguments.get("scales", SCALES_256)[-1]:
        arguments["scales"] = pyramid_of(side)
    return arguments


class MultiScaleBottleneck(CodebookBottleneck):
    """Training of the codebook that all scales share."""

    quantizer, trainer = "quantizer", MultiScaleCodebookTrainer


FAMILY = TokenizerFamily(
    model=MultiScaleVQTokenizer,
    presets=MULTISCALE_VQ_PRESETS,
    default="msvq-4-64",
    tiny=dict(
        codebook_size=128,
        codebook_dim=8,
        scales=(1, 2, 4),
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
    ),
    frozen=("encoder", "quant_conv", "quantizer"),
    bottleneck=MultiScaleBottleneck,
    arguments=_arguments,
)
