"""Per-image, counter-based random numbers: a draw is a pure function of (image seed, use, position, counter).

Nothing is stored between draws, so image i does not depend on its batch, its place in it, the number of devices or the
order of calls; loops that draw can be resumed, sharded and captured in a CUDA graph.

Source: Philox 4x32 with 10 rounds, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), on int64
tensors that hold 32-bit words, so that CPU and GPU give the same bits.
"""

import enum
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Use(enum.IntEnum):
    """What a draw is for; different uses at one position are independent. The values are part of a seed's meaning."""

    TOKEN = 0  # the token of a position
    DRAFT = 1  # a drafted token
    ACCEPT = 2  # accept or reject
    RESIDUAL = 3  # the token after a rejection
    INITIAL = 4  # first guess of a draft
    ORDER = 5  # decoding orders and masks
    LATENT = 6  # continuous tokens, diffusion noise
    CONDITION = 7  # unspecified conditions


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 of broadcastable int64 tensors holding 32-bit words; returns four such tensors."""
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for _ in range(10):
        # The product wraps modulo 2^64; the mask drops the copies of the sign that an arithmetic shift brings in.
        product_0, product_1 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_1
        word_0, word_1, word_2, word_3 = (
            ((product_1 >> 32) & _MASK) ^ word_1 ^ key_0,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ word_3 ^ key_1,
            product_0 & _MASK,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & _MASK, (key_1 + _WEYL_1) & _MASK
    return word_0, word_1, word_2, word_3


def image_seeds(seed: int, num_images: int) -> list[int]:
    """Seeds of the images of one call: image i has seed + i, so it can be made again alone with that seed."""
    return [seed + i for i in range(num_images)]


class Noise:
    """Source of all random numbers of a batch.

    Args:
        seeds: one integer per image, 0 <= seed < 2^63; a list, or an int64 tensor [B].
        device: where draws are made.

    Raises:
        ValueError: a seed is negative or too large.
    """

    def __init__(self, seeds: list[int] | Tensor, device: torch.device | str = "cpu") -> None:
        if isinstance(seeds, Tensor):
            self.seeds_B = seeds.to(device)
            return
        wrong = [seed for seed in seeds if not 0 <= seed < 2**63]
        if wrong:
            raise ValueError(f"seed {wrong[0]} is outside 0 ... 2^63 - 1")
        self.seeds_B = torch.tensor(seeds, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.seeds_B.shape[0]

    @property
    def device(self) -> torch.device:
        """Where draws are made."""
        return self.seeds_B.device

    def rows(self, index: Tensor) -> "Noise":
        """The source of some of the images: int64 or bool index into the batch."""
        return Noise(self.seeds_B[index], self.seeds_B.device)

    def bits(self, use: Use, position: int | Tensor, size: tuple[int, ...] = (), counter: int | Tensor = 0) -> Tensor:
        """32 random bits an element, as int64 in [0, 2^32).

        Args:
            use: what they are for.
            position: where: an int for all images, or an int64 tensor [B, ...] (or [1, ...]) of positions.
            size: shape of one draw, appended to the position's shape.
            counter: tells repeated draws of one use at one position apart; an int, or an int64 tensor that
                broadcasts with the positions (what a captured step counts with).

        Returns: [B, *size] for an int position, else [B, *position.shape[1:], *size].
        """
        if isinstance(position, Tensor):
            place = position
        else:
            place = torch.full((1,), position, dtype=torch.int64, device=self.device)
        seeds = self.seeds_B.view(-1, *[1] * (place.dim() - 1))
        place, seeds = (value[..., None] for value in torch.broadcast_tensors(place, seeds))
        count = math.prod(size)
        block = torch.arange((count + 3) // 4, device=self.device)
        use_word = torch.full_like(block, int(use))
        counter_word = counter[..., None] & _MASK if isinstance(counter, Tensor) else torch.full_like(block, counter)
        words = philox(
            (block, place & _MASK, use_word, counter_word),
            (seeds & _MASK, (seeds >> 32) & _MASK),
        )
        return torch.stack(words, dim=-1).flatten(-2)[..., :count].reshape(*place.shape[:-1], *size)

    def uniform(
        self, use: Use, position: int | Tensor, size: tuple[int, ...] = (), counter: int | Tensor = 0
    ) -> Tensor:
        """float32 in the open interval (0, 1), on a grid of 2^-23; shapes as in `bits`."""
        return ((self.bits(use, position, size, counter) >> 9).float() + 0.5) * 2.0**-23

    def exponential(
        self, use: Use, position: int | Tensor, size: tuple[int, ...] = (), counter: int | Tensor = 0
    ) -> Tensor:
        """float32 draws of the unit exponential law, fine-grained (2^-32) near zero; shapes as in `bits`."""
        small = ((self.bits(use, position, size, counter).float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
        return -torch.log1p(-small)

    def gumbel(
        self, use: Use, position: int | Tensor, size: tuple[int, ...] = (), counter: int | Tensor = 0
    ) -> Tensor:
        """float32 standard Gumbel draws: argmax(logits + gumbel) follows softmax(logits); shapes as in `bits`."""
        return -torch.log(self.exponential(use, position, size, counter))

    def normal(
        self, use: Use, position: int | Tensor, size: tuple[int, ...] = (), counter: int | Tensor = 0
    ) -> Tensor:
        """float32 standard normal draws (Box-Muller); shapes as in `bits`."""
        pair = self.uniform(use, position, (2, *size), counter)
        first, second = pair.movedim(-1 - len(size), 0).unbind(0)
        return torch.sqrt(-2.0 * torch.log(first)) * torch.cos((2.0 * math.pi) * second)
