"""Decoding of a diffusion tokenizer's images group after group, see visar/tokenizers/diffusion.py.

Source: D-AR, arXiv 2505.23660, showlab/D-AR@3fb0f2d (solver, previews); that tokens may still be missing is this
project's.

B images, C channels, H W image pixels, K tokens of a group, L tokens of one call, Z width of a code, D width of a
condition token.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from visar.tokenizers.checks import check_ids, check_image
from visar.tokenizers.diffusion_blocks import Past, plain_norm

Solver = Literal["adams_bashforth", "euler"]
SOLVERS = ("adams_bashforth", "euler")


def check_solver(solver: str) -> None:
    """Checks the name of a solver.

    Raises:
        ValueError: there is none of that name.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}; choose {' or '.join(SOLVERS)}")


def needed_noise(noise_BCHW: Tensor | None) -> Tensor:
    """The noise that images are decoded from.

    Raises:
        ValueError: there is none.
    """
    if noise_BCHW is None:
        raise ValueError("this tokenizer's decoder draws: give noise, such as starting_noise(Noise(seeds))")
    return noise_BCHW


class ImageStream:
    """Decoding of images while their tokens still come. The denoising is carried from group to group: a complete group
    costs one step of the decoder (with one step a group), and the image that it points to costs nothing more.

    Args:
        tokenizer: a `DiffusionTokenizer`, which decodes.
        noise_BCHW: float [B, C, H, W], see `DiffusionTokenizer.starting_noise`.
        solver: None = as configured.

    Attributes:
        steps: steps of the decoder so far.
        num_tokens: tokens taken so far.

    Raises:
        ValueError: noise of another form, or an unknown solver.
    """

    def __init__(self, tokenizer: Any, noise_BCHW: Tensor, solver: Solver | None = None) -> None:
        check_image(noise_BCHW, tokenizer.config["image_channels"])
        tokenizer._check_size(noise_BCHW.shape[2], noise_BCHW.shape[3])
        self._solver = tokenizer.config["solver"] if solver is None else solver
        check_solver(self._solver)
        self._tokenizer = tokenizer
        self._x_BCHW = noise_BCHW.float()
        self._end_BCHW = self._x_BCHW  # where the last step points to
        self._velocity_BCHW: Tensor | None = None
        self._past = [Past() for _ in tokenizer.decoder_layers]
        self._waiting: list[Tensor] = []  # code vectors of a group that is not complete
        self._conditions: list[Tensor] = []
        self.steps = self.num_tokens = 0

    def feed(self, tokens_BL: Tensor) -> Tensor | None:
        """Takes in the next tokens, any number of them.

        Args:
            tokens_BL: ids [B, L].

        Returns: the images [B, C, H, W] that all complete groups give, about [-1, 1], not clamped; None where these
            tokens completed none.

        Raises:
            ValueError: ids that are no codes, of another batch, or more than an image has.
        """
        check_ids(tokens_BL, self._tokenizer.config["codebook_size"])
        return self.feed_latents(self._tokenizer.codebook[tokens_BL].transpose(1, 2)[:, :, None])

    def feed_latents(self, latent_BZhw: Tensor) -> Tensor | None:
        """As `feed`, of code vectors [B, Z, 1, L]; does not wait for the device."""
        config = self._tokenizer.config
        batch, length, total = self._x_BCHW.shape[0], latent_BZhw.shape[3], config["num_tokens"]
        if latent_BZhw.shape[0] != batch:
            raise ValueError(f"tokens of {latent_BZhw.shape[0]} images; the noise is of {batch}")
        if self.num_tokens + length > total:
            raise ValueError(f"{length} tokens after {self.num_tokens}; an image has {total}")
        self.num_tokens += length
        waiting_BLZ = torch.cat([*self._waiting, latent_BZhw.flatten(2).transpose(1, 2)], dim=1)
        image_BCHW = None
        while waiting_BLZ.shape[1] >= self._tokenizer.group_size:
            group_BKZ, waiting_BLZ = waiting_BLZ.tensor_split([self._tokenizer.group_size], dim=1)
            self._conditions.append(self._read(group_BKZ))
            image_BCHW = self._advance()
        self._waiting = [waiting_BLZ]
        return image_BCHW

    def _read(self, group_BKZ: Tensor) -> Tensor:
        """Condition tokens of the next group; keys and values of those before it are kept."""
        size = group_BKZ.shape[1]
        before = len(self._conditions) * size
        place = torch.arange(before + size, device=group_BKZ.device)
        x_BKD = self._tokenizer._embed(group_BKZ, before)
        for block, past in zip(self._tokenizer.decoder_layers, self._past, strict=True):
            x_BKD = block(x_BKD, None, place <= place[before:, None], past)
        return plain_norm(x_BKD)

    def _advance(self) -> Tensor:
        """Makes all steps whose group is there; the image that the last of them points to."""
        tokenizer, ready = self._tokenizer, len(self._conditions)
        times, starts = tokenizer.times, tokenizer.group_starts
        while self.steps < len(starts) and starts[self.steps] // tokenizer.group_size < ready:
            time, after = times[self.steps], times[self.steps + 1]
            condition_BKD = self._conditions[starts[self.steps] // tokenizer.group_size]
            time_1 = torch.full((1,), time, device=self._x_BCHW.device)
            velocity_BCHW = tokenizer.decoder(self._x_BCHW, time_1, condition_BKD).float()
            direction_BCHW = velocity_BCHW
            if self._velocity_BCHW is not None and self._solver == "adams_bashforth":
                direction_BCHW = 1.5 * velocity_BCHW - 0.5 * self._velocity_BCHW
            self._end_BCHW = self._x_BCHW + (1.0 - time) * direction_BCHW
            self._x_BCHW = self._x_BCHW + (after - time) * direction_BCHW
            self._velocity_BCHW = velocity_BCHW
            self.steps += 1
        return self._end_BCHW / tokenizer.config["data_std"]
