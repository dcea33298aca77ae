"""Continuous tokenizer: a convolutional autoencoder whose latents are Gaussian, kept near the unit one by a KL term.

Source: the KL-16 of MAR, arXiv 2406.11838 section 4.1, LTH14/mar@fe470ac (architecture, scale factor); the autoencoder
is latent diffusion's, arXiv 2112.10752. diffusers' `AutoencoderKL` of the same sizes, with attention in the last block
of its encoder only, computes the same (a test compares them); it is not used because the other tokenizers' blocks,
names and fused decoder (visar/tokenizers/convnet_fused.py) serve here too. The small preset is this project's.

B images, C channels of a token, Z latent channels, h w latent grid, N = h * w / p^2 tokens, p patch side.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from visar.core.interface import TokenLayout
from visar.layers.packable import Packable
from visar.tokenizers.checks import check_image, check_values, check_vectors
from visar.tokenizers.convnet import Decoder, Encoder
from visar.tokenizers.convnet_fused import run
from visar.tokenizers.training import Bottleneck, TokenizerFamily, sized_arguments

# kl-16: as released, 66.5 M parameters, 256 x 256 images as 16 x 16 tokens of 16 numbers (rFID 0.53 by a user's
# measure, LTH14/mar issue 3). kl-4-64: 64 x 64 images as 16 x 16 tokens of 8 numbers, 5.6 M parameters.
KL_PRESETS: dict[str, dict] = {
    "kl-16": dict(image_size=256, scale_factor=0.2325),
    "kl-4-64": dict(image_size=64, base_channels=64, channel_multipliers=(1, 2, 2), latent_channels=8),
}
_LOGVAR = (-30.0, 20.0)


@dataclass
class KLOutput:
    """Result of a training forward.

    Attributes:
        image_BCHW: reconstruction from drawn latents, not clamped.
        mean_BZhw, logvar_BZhw: float32 moments of the latents.
    """

    image_BCHW: Tensor
    mean_BZhw: Tensor
    logvar_BZhw: Tensor


class KLTokenizer(Packable, ModelMixin, ConfigMixin):
    """Convolutional autoencoder with Gaussian latents: images in [-1, 1] to vectors and back. arXiv 2406.11838.

    Args:
        image_size: side, or (height, width), of the images whose grid `layout` reports; other sizes work too as long
            as the factor 2^(number of levels - 1) times `patch_size` divides them.
        image_channels: 3.
        base_channels: 128 in the released model.
        channel_multipliers: width of every level over base_channels, fine to coarse.
        num_res_blocks: residual blocks of an encoder level; decoder levels have one more.
        latent_channels: Z, 16 in the released model.
        scale_factor: latents are multiplied by it to be tokens of about unit standard deviation; measured over the
            training images at the end of a training. No mean is subtracted.
        patch_size: p; p x p latents are one token, channel slowest.
        decoder_attention: attention in the decoder's coarsest level too; the released model has it in the encoder's
            and in the middle of both only.
        dropout: inside residual blocks, 0.0 = off.

    Raises:
        ValueError: widths that are not multiples of 32, a size that the factor does not divide, or a scale that is
            not positive.
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
        num_res_blocks: int = 2,
        latent_channels: int = 16,
        scale_factor: float = 1.0,
        patch_size: int = 1,
        decoder_attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < scale_factor < math.inf or patch_size < 1:
            raise ValueError(f"scale_factor {scale_factor}, patch_size {patch_size}; needed: > 0 and >= 1")
        self.factor = 2 ** (len(channel_multipliers) - 1)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._grid = self._grid_of(height, width)
        settings: dict[str, Any] = dict(
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            dropout=dropout,
        )
        self.encoder = Encoder(in_channels=image_channels, out_channels=2 * latent_channels, **settings)
        self.decoder = Decoder(
            in_channels=latent_channels, out_channels=image_channels, attention=decoder_attention, **settings
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    # ------------------------------------------------------------------------------------------------------ sizes
    @property
    def layout(self) -> TokenLayout:
        """One grid of vectors, for images of the configured size."""
        return TokenLayout((self._grid,), "grid", 0, self.config["latent_channels"] * self.config["patch_size"] ** 2)

    @property
    def downsampling(self) -> int:
        """Pixels of an image along one side of a token."""
        return self.factor * self.config["patch_size"]

    @property
    def known_by(self) -> Tensor:
        """Numbers that tell this tokenizer's tokens from those of another: scaled weights that make them.
        A decoder that was trained alone leaves them as they are."""
        return self.quant_conv.weight[: self.config["latent_channels"]].float() * self.config["scale_factor"]

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        side = self.factor * self.config["patch_size"]
        if min(height, width) <= 0 or height % side or width % side:
            raise ValueError(f"image size {height} x {width}; both sides must be multiples of {side}")
        return height // side, width // side

    # ------------------------------------------------------------------------------------- images to vectors, back
    def moments(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, float32 [B, Z, h, w]; not scaled.

        Raises:
            ValueError: no images, or of a size that the factor does not divide.
        """
        check_image(image_BCHW, self.config["image_channels"])
        self._grid_of(image_BCHW.shape[2], image_BCHW.shape[3])
        moments = self.quant_conv(self.encoder(image_BCHW.to(self.quant_conv.weight.dtype)))
        mean_BZhw, logvar_BZhw = moments.float().chunk(2, dim=1)
        return mean_BZhw, logvar_BZhw.clamp(*_LOGVAR)

    def token_moments(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the tokens, float32 [B, N, C]: a draw of them is mean + std * noise."""
        mean_BZhw, logvar_BZhw = self.moments(image_BCHW)
        return self.tokens_of(mean_BZhw), self.tokens_of(torch.exp(0.5 * logvar_BZhw))

    def encode(self, image_BCHW: Tensor, noise_BNC: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to tokens float32 [B, N, C], raster order.

        Args:
            image_BCHW: images.
            noise_BNC: standard normal numbers to draw the tokens by; None: their mean.

        Raises:
            ValueError: as of `moments`, values outside of [-1, 1], or noise that is not of the tokens' shape.
        """
        check_image(image_BCHW, self.config["image_channels"])
        check_values(image_BCHW)
        mean_BNC, std_BNC = self.token_moments(image_BCHW)
        if noise_BNC is None:
            return mean_BNC
        if noise_BNC.shape != mean_BNC.shape:
            raise ValueError(f"noise of shape {tuple(noise_BNC.shape)}; needed: {tuple(mean_BNC.shape)}")
        return mean_BNC + std_BNC * noise_BNC

    def tokens_of(self, latent_BZhw: Tensor) -> Tensor:
        """Latents [B, Z, h, w] as tokens [B, N, C], scaled."""
        side = self.config["patch_size"]
        tokens_BNC = rearrange(latent_BZhw, "b z (h p) (w q) -> b (h w) (z p q)", p=side, q=side)
        return tokens_BNC * self.config["scale_factor"]

    def latents(self, tokens_BNC: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """What `decode_latents` takes, float32 [B, Z, h, w].

        Args:
            tokens_BNC: float [B, N, C].
            grid: (rows, columns) of the tokens; None = the configured grid.

        Raises:
            ValueError: no vectors of this width, or they do not fill the grid.
        """
        rows, columns = grid or self._grid
        check_vectors(tokens_BNC, rows * columns, self.layout.channels)
        side = self.config["patch_size"]
        plain = tokens_BNC.float() / self.config["scale_factor"]
        return rearrange(plain, "b (h w) (z p q) -> b z (h p) (w q)", h=rows, w=columns, p=side, q=side)

    def decode_latents(self, latent_BZhw: Tensor) -> Tensor:
        """Latents [B, Z, h, w] to images; not clamped."""
        return run(self.decoder, self.post_quant_conv(latent_BZhw.to(self.post_quant_conv.weight.dtype)))

    def decode(self, tokens_BNC: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens [B, N, C] to images [B, C, H, W], about [-1, 1], not clamped; arguments and errors of `latents`."""
        return self.decode_latents(self.latents(tokens_BNC, grid))

    # --------------------------------------------------------------------------------------------------- training
    def forward(self, image_BCHW: Tensor) -> KLOutput:
        """Reconstruction from latents that are drawn by torch's own generator in training, the mean otherwise."""
        mean_BZhw, logvar_BZhw = self.moments(image_BCHW)
        latent_BZhw = mean_BZhw
        if self.training:
            latent_BZhw = mean_BZhw + torch.exp(0.5 * logvar_BZhw) * torch.randn_like(mean_BZhw)
        return KLOutput(self.decode_latents(latent_BZhw), mean_BZhw, logvar_BZhw)


def kl_divergence(mean_BZhw: Tensor, logvar_BZhw: Tensor) -> Tensor:
    """Divergence of every image's latents from the unit Gaussian, nats, float32 [B]."""
    return 0.5 * (mean_BZhw.square() + logvar_BZhw.exp() - 1.0 - logvar_BZhw).sum((1, 2, 3))


@torch.no_grad()
def measure_scale(model: KLTokenizer, images: Iterable[Tensor]) -> float:
    """1 / standard deviation of drawn latents about 0 over batches of images: what `scale_factor` is (MAR's 0.2325 is
    that of ImageNet)."""
    total, count = 0.0, 0
    for image_BCHW in images:
        mean_BZhw, logvar_BZhw = model.moments(image_BCHW)
        total += float((mean_BZhw.double().square() + logvar_BZhw.double().exp()).sum())
        count += mean_BZhw.numel()
    return (count / total) ** 0.5


class GaussianMeter:
    """Means over a set of images: standard deviation of the latents, the part of it that is noise, and the KL."""

    def __init__(self) -> None:
        self._sums: Tensor | float = 0.0
        self._images = 0

    def update(self, output: KLOutput) -> None:
        variance_BZhw = output.logvar_BZhw.double().exp()
        square_BZhw = output.mean_BZhw.double().square() + variance_BZhw
        divergence_B = kl_divergence(output.mean_BZhw, output.logvar_BZhw).double()
        means_3B = torch.stack([square_BZhw.mean((1, 2, 3)), variance_BZhw.mean((1, 2, 3)), divergence_B])
        self._sums, self._images = self._sums + means_3B.sum(1), self._images + means_3B.shape[1]

    def values(self) -> dict[str, float]:
        assert isinstance(self._sums, Tensor)
        square, variance, divergence = (self._sums / self._images).tolist()
        return {"latent_std": square**0.5, "latent_noise": variance**0.5, "kl": divergence}


class GaussianBottleneck(Bottleneck):
    """Training of Gaussian latents: the KL term, and the scale measured before the model is saved. A decoder that is
    trained alone keeps the scale of the model that it starts from."""

    def start(self, config: Mapping[str, Any]) -> None:
        self.model.register_to_config(scale_factor=config["scale_factor"])

    def loss(self, output: KLOutput) -> tuple[Tensor, dict[str, Tensor]]:
        divergence = kl_divergence(output.mean_BZhw, output.logvar_BZhw).mean()
        return self.options.kl_weight / output.image_BCHW[0].numel() * divergence, {"kl": divergence}

    def meter(self) -> GaussianMeter:
        return GaussianMeter()

    def finish(self, model: KLTokenizer, images: Iterable[Tensor]) -> None:
        if self.options.decoder_only:
            model.register_to_config(scale_factor=self.model.config["scale_factor"])
        else:
            model.register_to_config(scale_factor=measure_scale(model, images))


FAMILY = TokenizerFamily(
    model=KLTokenizer,
    presets=KL_PRESETS,
    default="kl-4-64",
    tiny=dict(
        image_size=8,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=4,
        scale_factor=0.5,
    ),
    frozen=("encoder", "quant_conv"),
    bottleneck=GaussianBottleneck,
    arguments=sized_arguments,
)
