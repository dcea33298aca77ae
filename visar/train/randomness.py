"""Random numbers of a training run: everything drawn in a step is a function of (run seed, step, use, process).

So nothing about random states has to be saved, and a run that was killed draws the same numbers when it resumes.
"""

import enum
import hashlib

import torch
from torch import Tensor


class Draw(enum.IntEnum):
    """What a generator is for; different uses of one step are independent."""

    DATA = 0  # which images
    AUGMENT = 1  # their augmentation
    CONDITION = 2  # which conditions are dropped
    LAYERS = 3  # dropout inside models, from PyTorch's default generators
    REVIVE = 4  # latents that replace unused codes
    INITIAL = 5  # initial weights
    SUBSET = 6  # fixed subsets for measurements
    MASK = 7  # which tokens are replaced, then which are hidden
    LATENT = 8  # continuous tokens of an image


def step_seed(seed: int, step: int, use: Draw, process: int = 0, part: int = 0) -> int:
    """Hash of the arguments to an integer in [0, 2^63)."""
    text = f"{seed}/{step}/{int(use)}/{process}/{part}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class StepRandom:
    """Generators of one process of a run.

    Args:
        seed: seed of the run.
        process: number of this process.
        device: where generators draw.
    """

    def __init__(self, seed: int, process: int, device: torch.device) -> None:
        self.seed = seed
        self.process = process
        self.device = device

    def generator(self, step: int, use: Draw, *, part: int = 0, shared: bool = False) -> torch.Generator:
        """A fresh generator on the device.

        Args:
            step: number of the step.
            use: what is drawn.
            part: micro-batch of the step, or another number that tells generators of one use apart.
            shared: the same numbers in all processes.
        """
        seed = step_seed(self.seed, step, use, 0 if shared else self.process, part)
        return torch.Generator(self.device).manual_seed(seed)

    def seed_layers(self, step: int, part: int = 0) -> None:
        """Seeds PyTorch's default generators of CPU and GPU, which dropout inside models draws from."""
        torch.manual_seed(step_seed(self.seed, step, Draw.LAYERS, self.process, part))


class IndexDraws:
    """Which images a step trains on: independent weighted draws with replacement, the same in all processes.

    Args:
        weight_N: relative frequency of every image, >= 0; None = all alike.
        num_images: N.
        device: where indices are made.

    Raises:
        ValueError: no image, or weights that do not fit.
    """

    def __init__(self, num_images: int, weight_N: Tensor | None, device: torch.device) -> None:
        if num_images < 1:
            raise ValueError("there is no image to train on")
        weights: Tensor = torch.ones(num_images) if weight_N is None else weight_N
        if weights.shape != (num_images,) or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
            raise ValueError(f"weights of shape {tuple(weights.shape)} for {num_images} images; needed: one >= 0 each")
        total_N = weights.double().cumsum(0)
        self._share_N = (total_N / total_N[-1]).to(device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices int64 [count]."""
        uniform = torch.rand(count, dtype=torch.float64, generator=generator, device=self._share_N.device)
        index = torch.searchsorted(self._share_N, uniform, right=True)
        return index.clamp(max=self._share_N.shape[0] - 1)


def balanced_weights(class_N: Tensor, power: float) -> Tensor:
    """Weight n^-power of every image, n the size of its class: 0 = as in the data, 1 = all classes alike.

    Args:
        class_N: int64 [N] classes, >= 0.
        power: in [0, 1].

    Raises:
        ValueError: the power is outside [0, 1].
    """
    if not 0.0 <= power <= 1.0:
        raise ValueError(f"class balance power {power}; allowed: 0 ... 1")
    return torch.bincount(class_N).double()[class_N].pow(-power)
