"""Diffusion tokenizer: tokens in the order of denoising steps, decoded by a diffusion decoder, group after group.

Source: D-AR, arXiv 2505.23660, showlab/D-AR@3fb0f2d (architecture, parameter names, time grid, solver). The small
preset and the decoding of tokens while they are still made are this project's.

A group of tokens conditions one step of a flow from noise to pixels, so the first tokens say what an image is like as
a whole and the last ones its details. An image therefore is a function of its tokens and of its noise.

B images, C channels, H W image pixels, Q tokens of an image, K tokens of a group, L tokens of one call, Z width of a
code, D width of a condition token, P patches.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from visar.core.interface import TokenLayout
from visar.core.noise import Noise, Use
from visar.layers.packable import Packable
from visar.tokenizers.checks import check_ids, check_image, check_values
from visar.tokenizers.codebook_training import CodebookBottleneck
from visar.tokenizers.diffusion_blocks import (
    Checkpointed,
    GridRope,
    PixelTransformer,
    TokenBlock,
    patches,
    plain_norm,
)
from visar.tokenizers.diffusion_stream import ImageStream, Solver, check_solver, needed_noise
from visar.tokenizers.quantizer import CodebookTrainer, VectorQuantizer
from visar.tokenizers.training import TokenizerFamily, sized_arguments

# dar-v1: as released, 300.1 M parameters, 256 x 256 images as 256 tokens in 8 groups (rFID 1.52, arXiv 2505.23660).
# dar-64: 64 x 64 images as 64 tokens in 8 groups, 16.8 M parameters.
DIFFUSION_PRESETS: dict[str, dict] = {
    "dar-v1": dict(image_size=256),
    "dar-64": dict(
        image_size=64,
        patch_size=8,
        encoder_width=256,
        num_encoder_layers=4,
        condition_width=256,
        num_condition_layers=4,
        pixel_width=256,
        num_pixel_layers=6,
        pixel_patch_size=4,
        num_tokens=64,
        max_tokens=64,
        codebook_size=1024,
    ),
}


@dataclass
class DiffusionOutput:
    """Result of a training forward.

    Attributes:
        image_BCHW: in training the image that a step at a random time points to; else the decoded image. Not clamped.
        ids_BN: int64 ids of the input.
        latent_BChw: encoder output before normalisation, what `CodebookTrainer` takes.
        commitment_loss, codebook_loss: see `visar.tokenizers.quantizer.Quantized`; not weighted.
        flow_loss: mean squared error of the velocity; None outside of training.
    """

    image_BCHW: Tensor
    ids_BN: Tensor
    latent_BChw: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    flow_loss: Tensor | None


def shifted(fraction: Any, shift: float) -> Any:
    """Time of a flow at a fraction of its steps, both in 0 ... 1; a shift > 1 makes early steps short."""
    return fraction / (fraction + shift * (1.0 - fraction))


class DiffusionTokenizer(Checkpointed, Packable, ModelMixin, ConfigMixin):
    """Query encoder, vector quantiser and diffusion decoder: images in [-1, 1] to ids and back. arXiv 2505.23660.

    Args:
        image_size: side, or (height, width), of the images that `layout` and `starting_noise` are for; other sizes
            work too as long as both patch sizes divide them.
        image_channels: 3.
        patch_size: pixels along one side of what one input of the encoder sees.
        encoder_width, num_encoder_layers: of the encoder.
        query_rank: width of the learned queries before they are mapped to the encoder's width.
        num_tokens: Q.
        max_tokens: rows of the tables of queries and of places, 1024 in the released model; Q of them are used.
        num_groups: groups of tokens, which divide Q.
        codebook_size: number of codes.
        codebook_dim: Z.
        condition_width, num_condition_layers: of the causal transformer that reads the codes.
        pixel_width, num_pixel_layers, pixel_patch_size: of the diffusion decoder.
        head_width: width of an attention head, which divides all widths; a multiple of 4, 64 in the released model.
        num_steps: denoising steps; None: one a group.
        time_shift: 1.0 = steps of equal length; larger ones give noisy images more steps.
        data_std: images are multiplied by it before noise is mixed in.
        solver: "adams_bashforth": 3/2 of a step's velocity less 1/2 of that of the step before, as released; or
            "euler".

    Raises:
        ValueError: sizes that do not divide each other, an unknown solver, or numbers out of range.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TokenBlock", "PixelBlock"]
    _repeated_blocks = ["TokenBlock", "PixelBlock"]

    @register_to_config
    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        image_channels: int = 3,
        patch_size: int = 16,
        encoder_width: int = 768,
        num_encoder_layers: int = 8,
        query_rank: int = 8,
        num_tokens: int = 256,
        max_tokens: int = 1024,
        num_groups: int = 8,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        condition_width: int = 768,
        num_condition_layers: int = 8,
        pixel_width: int = 768,
        num_pixel_layers: int = 12,
        pixel_patch_size: int = 8,
        head_width: int = 64,
        num_steps: int | None = None,
        time_shift: float = 2.0,
        data_std: float = 0.6,
        solver: Solver = "adams_bashforth",
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._size = (height, width)
        self._check_size(height, width)
        widths = (encoder_width, condition_width, pixel_width)
        if head_width < 4 or head_width % 4 or any(each < 1 or each % head_width for each in widths):
            raise ValueError(f"widths {widths} must be multiples of head_width {head_width}, which is one of 4")
        if num_groups < 1 or num_tokens < 1 or num_tokens % num_groups or num_tokens > max_tokens:
            raise ValueError(
                f"num_tokens {num_tokens} must be a multiple of num_groups {num_groups} and at most max_tokens "
                f"{max_tokens}"
            )
        if not (0 < time_shift < math.inf and 0 < data_std < math.inf):
            raise ValueError(f"time_shift {time_shift}, data_std {data_std}; needed: both > 0")
        self.group_size = num_tokens // num_groups
        self.times, self.group_starts = self._schedule(num_groups if num_steps is None else num_steps)
        check_solver(solver)
        self.patchify = nn.Linear(image_channels * patch_size**2, encoder_width)
        self.query_embedding = nn.Embedding(max_tokens, query_rank)
        self.query_linear = nn.Linear(query_rank, encoder_width)
        self.encoder_layers = nn.ModuleList(TokenBlock(encoder_width, head_width) for _ in range(num_encoder_layers))
        self.quant_in = nn.Linear(encoder_width, codebook_dim, bias=False)
        self.quantize = VectorQuantizer(codebook_size, codebook_dim)
        self.quant_out = nn.Linear(codebook_dim, condition_width, bias=False)
        self.decoder_embedding = nn.Embedding(max_tokens, condition_width)
        self.decoder_layers = nn.ModuleList(
            TokenBlock(condition_width, head_width) for _ in range(num_condition_layers)
        )
        self.decoder = PixelTransformer(
            image_channels, pixel_width, condition_width, pixel_patch_size, num_pixel_layers, head_width
        )
        self._rope = GridRope(head_width)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Weights to train from: the decoder begins with velocities of 0, and reads its condition from the first step
        on. (Were its blocks the identity at first, the commitment loss alone would move the encoder until then, and
        make all images one.)"""
        nn.init.normal_(self.decoder_embedding.weight, std=0.02)
        nn.init.zeros_(self.decoder.conv_out.weight)
        nn.init.zeros_(self.decoder.conv_out.bias)

    def _schedule(self, steps: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Times of all steps, with 1.0 behind the last, and the first token that conditions each of them."""
        if steps < 1:
            raise ValueError(f"num_steps {steps}; it must be >= 1, or None for one a group")
        groups, last = self.config["num_groups"], self.config["num_tokens"] - self.group_size
        times = [shifted(step / steps, self.config["time_shift"]) for step in range(steps)]
        # The nearest group, halves upwards.
        starts = [min(math.floor(step / steps * groups + 0.5) * self.group_size, last) for step in range(steps)]
        return (*times, 1.0), tuple(starts)

    # ------------------------------------------------------------------------------------------------------ sizes
    @property
    def layout(self) -> TokenLayout:
        """A sequence of ids; whole groups of leading tokens decode to images."""
        tokens = self.config["num_tokens"]
        previews = tuple(range(self.group_size, tokens + 1, self.group_size))
        return TokenLayout(
            ((tokens,),), "sequence", self.config["codebook_size"], self.config["codebook_dim"], previews
        )

    @property
    def codebook(self) -> Tensor:
        """Float32 [V, Z], the vectors as looked up, of unit length."""
        return self.quantize.codebook

    @property
    def downsampling(self) -> int:
        """Pixels along the image's first side: tokens have no places in the image."""
        return self._size[0]

    def _check_size(self, height: int, width: int) -> None:
        for name in ("patch_size", "pixel_patch_size"):
            side = self.config[name]
            if side < 1 or min(height, width) <= 0 or height % side or width % side:
                raise ValueError(f"image size {height} x {width}; both sides must be multiples of {name} {side}")

    def starting_noise(self, noise: Noise, size: tuple[int, int] | None = None) -> Tensor:
        """What images are decoded from, float32 [B, C, H, W]; image i is a function of its own seed.

        Args:
            noise: one seed per image.
            size: (height, width) of the images; None = the configured size.
        """
        height, width = size or self._size
        return noise.normal(Use.PIXELS, 0, (self.config["image_channels"], height, width))

    def decoding_values(self, batch: int) -> int:
        """Numbers that the decoder holds at once for a batch, about."""
        positions = self._size[0] * self._size[1] // self.config["pixel_patch_size"] ** 2
        # A block's six vectors of modulation, and the feed-forward part's hidden ones with their input and output.
        return batch * positions * self.config["pixel_width"] * (6 + 4 + 4)

    # ----------------------------------------------------------------------------------------------- images to ids
    def encode_latents(self, image_BCHW: Tensor) -> Tensor:
        """Encoder output [B, Z, 1, Q] before normalisation and quantisation.

        Raises:
            ValueError: another number of channels, or a size that the patches do not divide.
        """
        check_image(image_BCHW, self.config["image_channels"])
        height, width = image_BCHW.shape[2:]
        self._check_size(height, width)
        side, tokens, device = self.config["patch_size"], self.config["num_tokens"], image_BCHW.device
        seen_BPD = plain_norm(self.patchify(patches(image_BCHW.to(self.patchify.weight.dtype), side)))
        query_QD = self.query_linear(self.query_embedding.weight[:tokens])
        x_BLD = torch.cat([seen_BPD, query_QD.to(seen_BPD.dtype).expand(len(image_BCHW), -1, -1)], dim=1)
        # All see the patches; queries see earlier queries too, and are not rotated.
        place = torch.arange(x_BLD.shape[1], device=device)
        count = seen_BPD.shape[1]
        mask_LL = (place < count) | ((place <= place[:, None]) & (place[:, None] >= count))
        table = self._rope.table(height // side, width // side, device)
        still = torch.stack([torch.ones_like(table[0, :1, :, 0]), torch.zeros_like(table[0, :1, :, 0])], dim=-1)
        rope = torch.cat([table, still.expand(1, tokens, -1, -1)], dim=1)
        for block in self.encoder_layers:
            x_BLD = self.run(block, x_BLD, rope, mask_LL)
        return self.quant_in(plain_norm(x_BLD[:, count:])).transpose(1, 2)[:, :, None]

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to ids int64 [B, Q], coarse to fine.

        Raises:
            ValueError: as of `encode_latents`, or values outside of [-1, 1].
        """
        check_image(image_BCHW, self.config["image_channels"])
        check_values(image_BCHW)
        return self.quantize.nearest(self.encode_latents(image_BCHW))

    # ----------------------------------------------------------------------------------------------- ids to images
    def latents(self, tokens_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """What `decode_latents` takes, float32 [B, Z, 1, L], of the ids of an image or of its first groups.

        Args:
            tokens_BN: integers [B, L].
            grid: is not read: tokens have no places in the image.

        Raises:
            ValueError: an id that is no code, or tokens that are no whole number of groups.
        """
        check_ids(tokens_BN, self.config["codebook_size"])
        self._check_length(tokens_BN.shape[1])
        return self.codebook[tokens_BN].transpose(1, 2)[:, :, None]

    def _check_length(self, length: int) -> None:
        if length not in self.layout.previews:
            allowed = ", ".join(map(str, self.layout.previews))
            raise ValueError(f"{length} tokens are not a whole number of groups; allowed: {allowed}")

    def conditions(self, latent_BZhw: Tensor) -> Tensor:
        """Condition tokens [B, L, D] of code vectors [B, Z, 1, L], all in one pass; a token sees those before it."""
        length = latent_BZhw.shape[3]
        place = torch.arange(length, device=latent_BZhw.device)
        x_BLD = self._embed(latent_BZhw.flatten(2).transpose(1, 2), 0)
        for block in self.decoder_layers:
            x_BLD = self.run(block, x_BLD, None, place <= place[:, None])
        return plain_norm(x_BLD)

    def _embed(self, codes_BLZ: Tensor, first: int) -> Tensor:
        """Code vectors with the vectors of their places, from a first place on."""
        places_LD = self.decoder_embedding.weight[first : first + codes_BLZ.shape[1]]
        return self.quant_out(codes_BLZ.to(self.quant_out.weight.dtype)) + places_LD

    def stream(self, noise_BCHW: Tensor, solver: Solver | None = None) -> ImageStream:
        """Decoding of tokens as they come, see `ImageStream`; arguments and errors as of `decode`."""
        return ImageStream(self, noise_BCHW, solver)

    def decode_latents(
        self, latent_BZhw: Tensor, noise_BCHW: Tensor | None = None, solver: Solver | None = None
    ) -> Tensor:
        """Code vectors [B, Z, 1, L] (any vectors, not only codes) to images; arguments and errors of `decode`."""
        if latent_BZhw.ndim != 4 or latent_BZhw.shape[2] != 1:
            raise ValueError(f"latents of shape {tuple(latent_BZhw.shape)}; needed: [B, Z, 1, tokens]")
        self._check_length(latent_BZhw.shape[3])
        stream = self.stream(needed_noise(noise_BCHW), solver)
        image_BCHW = stream.feed_latents(latent_BZhw)
        assert image_BCHW is not None
        return image_BCHW

    def decode(
        self,
        tokens_BN: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        noise: Tensor | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Tokens to images [B, C, H, W], about [-1, 1], not clamped: those of an image, or its first groups.

        The first k groups give the image that k steps point to. It is what a stream shows, bit for bit.

        Args:
            tokens_BN: ids [B, L].
            grid: is not read.
            noise: float [B, C, H, W], see `starting_noise`; the images have its size.
            solver: None = as configured.

        Raises:
            ValueError: no noise, noise of another shape, an unknown solver, or see `latents`.
        """
        return self.decode_latents(self.latents(tokens_BN), noise, solver)

    # --------------------------------------------------------------------------------------------------- training
    def forward(self, image_BCHW: Tensor) -> DiffusionOutput:
        """In training: velocities at a random time of every image, by torch's own generator, with straight-through
        gradients, and the losses of the codebook. Otherwise: images decoded from the noise of seed 0."""
        latent_BZhw = self.encode_latents(image_BCHW)
        quantized = self.quantize(latent_BZhw)
        flow_loss = None
        if self.training:
            made_BCHW, flow_loss = self._flow(image_BCHW, self.conditions(quantized.quantized_BChw))
        else:
            noise = Noise([0] * len(image_BCHW), image_BCHW.device)
            start_BCHW = self.starting_noise(noise, (image_BCHW.shape[2], image_BCHW.shape[3]))
            made_BCHW = self.decode_latents(quantized.quantized_BChw, start_BCHW)
        return DiffusionOutput(
            image_BCHW=made_BCHW,
            ids_BN=quantized.ids_BN,
            latent_BChw=latent_BZhw,
            commitment_loss=quantized.commitment_loss,
            codebook_loss=quantized.codebook_loss,
            flow_loss=flow_loss,
        )

    def _flow(self, image_BCHW: Tensor, condition_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """The image that a step at a random time points to, and the loss of its velocity."""
        config, batch, device = self.config, len(image_BCHW), image_BCHW.device
        fraction_B = torch.rand(batch, device=device)
        group_B = torch.floor(fraction_B * config["num_groups"] + 0.5).long().clamp(max=config["num_groups"] - 1)
        place_BK = group_B[:, None] * self.group_size + torch.arange(self.group_size, device=device)
        group_BKD = condition_BQD.gather(1, place_BK[..., None].expand(-1, -1, condition_BQD.shape[-1]))
        time_B = shifted(fraction_B, config["time_shift"])
        time_B111, clean_BCHW = time_B.view(-1, 1, 1, 1), config["data_std"] * image_BCHW.float()
        noise_BCHW = torch.randn_like(clean_BCHW)
        mixed_BCHW = time_B111 * clean_BCHW + (1.0 - time_B111) * noise_BCHW
        velocity_BCHW = self.decoder(mixed_BCHW, time_B, group_BKD).float()
        loss = functional.mse_loss(velocity_BCHW, clean_BCHW - noise_BCHW)
        return (mixed_BCHW + (1.0 - time_B111) * velocity_BCHW) / config["data_std"], loss


# ------------------------------------------------------------------------------------------------------------- family
class DiffusionBottleneck(CodebookBottleneck):
    """Training of the codebook, and of the decoder by flow matching."""

    quantizer, trainer = "quantize", CodebookTrainer

    def loss(self, output: DiffusionOutput) -> tuple[Tensor, dict[str, Tensor]]:
        loss, scalars = super().loss(output)
        assert output.flow_loss is not None
        return loss + self.options.flow_weight * output.flow_loss, {**scalars, "flow": output.flow_loss}


FAMILY = TokenizerFamily(
    model=DiffusionTokenizer,
    presets=DIFFUSION_PRESETS,
    default="dar-64",
    tiny=dict(
        image_size=8,
        patch_size=2,
        encoder_width=32,
        num_encoder_layers=1,
        num_tokens=16,
        max_tokens=16,
        num_groups=4,
        codebook_size=128,
        condition_width=32,
        num_condition_layers=1,
        pixel_width=32,
        num_pixel_layers=2,
        pixel_patch_size=2,
        head_width=16,
    ),
    frozen=("patchify", "query_embedding", "query_linear", "encoder_layers", "quant_in", "quantize"),
    bottleneck=DiffusionBottleneck,
    arguments=sized_arguments,
)
