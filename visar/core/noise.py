"""Per-image, counter-based random numbers: a draw is a pure function of (image seed, use, position, counter).

Nothing is stored between draws, so image i does not depend on its batch, its place in it, the number of devices or the
order of calls; loops that draw can be resumed, sharded and captured in a CUDA graph.

Source: Philox 4x32 with 10 rounds, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), on int64
tensors that hold 32-bit words, so that CPU and GPU give the same bits. On a GPU one kernel draws them, with the same
bits again.
"""

import enum
import functools
import math

import torch
from torch import Tensor

from visar import kernels

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
    FINE = 8  # the code of a position whose cluster was drawn before
    PIXELS = 9  # what a decoder that draws begins with
    CLIP = 10  # what clips of `visar data` show


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers int64 [2], and what the rounds add to the keys, int64 [10, 2]; made once per device."""
    rounds = [[number * _WEYL_0, number * _WEYL_1] for number in range(10)]
    return torch.tensor([_MULTIPLIER_0, _MULTIPLIER_1], device=device), torch.tensor(rounds, device=device)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 of broadcastable int64 tensors holding 32-bit words; returns four such tensors.

    Words 0 and 2 are multiplied, and words 1 and 3 mixed in, by the same operations: each pair is one tensor [2, ...].
    """
    words = torch.broadcast_tensors(*counter)
    even_2X, odd_2X = torch.stack(words[::2]), torch.stack(words[1::2])
    ones = [1] * (even_2X.dim() - 1)
    multipliers_2, rounds_R2 = _constants(even_2X.device)
    multipliers_2X, rounds_R2X = multipliers_2.view(2, *ones), rounds_R2.view(10, 2, *ones)
    key_2X = torch.stack(torch.broadcast_tensors(*key))
    key_2X = key_2X.view(2, *[1] * (even_2X.dim() - key_2X.dim()), *key_2X.shape[1:])
    for key_of_round_2X in ((key_2X + rounds_R2X) & _MASK).unbind(0):
        # Products wrap modulo 2^64. One mask per round drops the sign copies of an arithmetic shift and the
        # upper halves of words 1 and 3, which stay until then.
        product_2X = (even_2X * multipliers_2X).flip(0)
        even_2X, odd_2X = ((product_2X >> 32) ^ odd_2X ^ key_of_round_2X) & _MASK, product_2X
    (word_0, word_2), (word_1, word_3) = even_2X, odd_2X & _MASK
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
        """32 random bits per element, as int64 in [0, 2^32).

        Args:
            use: what they are for.
            position: where: an int for all images, or an int64 tensor [B, ...] (or [1, ...]) of positions.
            size: shape of one draw, appended to the position's shape.
            counter: tells repeated draws of one use at one position apart; an int, or an int64 tensor that
                broadcasts with the positions (what a captured step counts with).

        Returns: [B, *size] for an int position, else [B, *position.shape[1:], *size].
        """
        place = self._place(position)
        if kernels.available(self.device):
            return self._by_kernel(use, place, size, counter, as_uniform=False)
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

    def _place(self, position: int | Tensor) -> Tensor:
        """Positions int64 [B, ...] or [1, ...]."""
        if isinstance(position, Tensor):
            return position
        return torch.full((1,), position, dtype=torch.int64, device=self.device)

    def _by_kernel(
        self, use: Use, place: Tensor, size: tuple[int, ...], counter: int | Tensor, as_uniform: bool
    ) -> Tensor:
        """What `bits`, or `uniform`, computes, in one launch."""
        from visar.kernels.philox import draw_words

        place = place.expand(self.batch, *place.shape[1:])
        if isinstance(counter, Tensor):
            place, counts = torch.broadcast_tensors(place, counter)
            counter = counts.reshape(self.batch, -1)
        with kernels.on(self.device):
            words = draw_words(
                self.seeds_B.contiguous(),
                place.reshape(self.batch, -1),
                int(use),
                counter,
                math.prod(size),
                as_uniform,
            )
        return words.view(*place.shape, *size)

    def uniform(
        self, use: Use, position: int | Tensor, size: tuple[int, ...] = (), counter: int | Tensor = 0
    ) -> Tensor:
        """float32 in the open interval (0, 1), on a grid of 2^-23; shapes as in `bits`."""
        if kernels.available(self.device):
            return self._by_kernel(use, self._place(position), size, counter, as_uniform=True)
        return ((self.bits(use, position, size, counter) >> 9).float() + 0.5) * 2.0**-23

    def exponential(
        self, use: Use, position: int | Tensor, size: tuple[int, ...] = (), counter: int | Tensor = 0
    ) -> Tensor:
        """float32 draws of the unit exponential distribution, fine-grained (2^-32) near zero; shapes as in `bits`."""
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
