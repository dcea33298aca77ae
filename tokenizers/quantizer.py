"""Vector quantiser: nearest code, training losses, and what a trainer does to the codebook between steps.

Source: arXiv 1711.00937 (losses in equation 3, moving-average codebook in appendix A.1); l2-normalised lookup as in
LlamaGen (arXiv 2406.06525, FoundationVision/LlamaGen@ce98ec4). Revival of unused codes follows Jukebox
(arXiv 2005.00341, section 3.1). All of it is float32 whatever the dtype of the model or of an autocast region.

B images, h w latent grid, N = h * w, M = B * N latents, V codes, C code width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional


def nearest_codes(latent_MC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Index of the code at the least Euclidean distance; the first where several products are equal.

    |z|^2 is the same for all codes and left out: argmax of z.e - |e|^2 / 2.

    Returns: int64 [M].
    """
    # Autocast would compute the products in bfloat16 and move ids.
    with torch.autocast(latent_MC.device.type, enabled=False):
        latent_MC, codebook_VC = latent_MC.float(), codebook_VC.float()
        half_square_V = codebook_VC.square().sum(1) * -0.5
        return torch.addmm(half_square_V, latent_MC, codebook_VC.t()).argmax(1)


@dataclass
class Quantized:
    """Result of quantising a batch.

    Attributes:
        quantized_BChw: z + (e - z).detach() with z the latents as compared and e their codes; dtype of the input.
        ids_BN: int64 [B, h * w], raster order.
        commitment_loss: mean squared z - e.detach(); weight it with 0.25 as the papers do.
        codebook_loss: mean squared z.detach() - e; has no gradient under a moving-average codebook.
    """

    quantized_BChw: Tensor
    ids_BN: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class VectorQuantizer(nn.Module):
    """A codebook and the nearest-neighbour map into it.

    Args:
        codebook_size: V.
        codebook_dim: C.
        normalize: both latents and codes are scaled to unit length before they are compared and looked up.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        if normalize:
            with torch.no_grad():
                self.embedding.weight.copy_(functional.normalize(self.embedding.weight, dim=-1))

    def as_compared(self, vectors: Tensor) -> Tensor:
        """Float32 vectors [..., C] as they enter the distance: of unit length if `normalize`."""
        vectors = vectors.float()
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors

    @property
    def codebook(self) -> Tensor:
        """Float32 [V, C], the vectors as looked up."""
        return self.as_compared(self.embedding.weight)

    def nearest(self, latent_BChw: Tensor) -> Tensor:
        """Ids int64 [B, h * w] of the nearest codes, raster order."""
        latent_BNC = self.as_compared(latent_BChw.flatten(2).transpose(1, 2))
        return nearest_codes(latent_BNC.flatten(0, 1), self.codebook).view(latent_BNC.shape[:2])

    def forward(self, latent_BChw: Tensor) -> Quantized:
        """Quantises with straight-through gradients."""
        with torch.autocast(latent_BChw.device.type, enabled=False):
            latent_BNC = self.as_compared(latent_BChw.flatten(2).transpose(1, 2))
            codebook_VC = self.codebook
            ids_BN = nearest_codes(latent_BNC.flatten(0, 1), codebook_VC).view(latent_BNC.shape[:2])
            codes_BNC = functional.embedding(ids_BN, codebook_VC)
            straight_BNC = latent_BNC + (codes_BNC - latent_BNC).detach()
            quantized = straight_BNC.transpose(1, 2).reshape(latent_BChw.shape)
            return Quantized(
                quantized_BChw=quantized.to(latent_BChw.dtype),
                ids_BN=ids_BN,
                commitment_loss=functional.mse_loss(latent_BNC, codes_BNC.detach()),
                codebook_loss=functional.mse_loss(codes_BNC, latent_BNC.detach()),
            )


def _sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over all processes of a distributed run, in place; the value itself in a single process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(value)
    return value


class CodebookTrainer:
    """What is done to a codebook between steps: moving-average update, count of uses, revival of unused codes.

    Works beside the optimiser, as the optimiser does: the quantiser keeps nothing but its codes, so that a trained
    model has the keys of the released ones, and `state_dict` / `load_state_dict` carry the rest through a resume.
    In distributed runs uses are summed over processes and all of them hold the same codes.

    Args:
        quantizer: whose codes are trained; moved to its device before.
        update: "gradient": the optimiser trains the codes through `codebook_loss` (LlamaGen);
            "ema": a code is the moving average of the latents that chose it, and gets no gradient.
        decay: of the moving averages, in [0, 1).
        revive_below: a code is unused when the moving average of its uses per step is below this; 0 = never.

    Raises:
        ValueError: an unknown update, or a number outside its range.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        *,
        update: Literal["gradient", "ema"] = "gradient",
        decay: float = 0.99,
        revive_below: float = 0.2,
    ) -> None:
        if update not in ("gradient", "ema"):
            raise ValueError(f"codebook update {update!r}; choose gradient or ema")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay {decay}; allowed: 0 <= decay < 1")
        if revive_below < 0.0:
            raise ValueError(f"revive_below {revive_below}; allowed: 0 (never) and above")
        self.quantizer = quantizer
        self.update = update
        self.decay = decay
        self.revive_below = revive_below
        weight = quantizer.embedding.weight
        weight.requires_grad_(update == "gradient")
        # A fresh code counts as used once per step (more where that would already be too little).
        self.fresh_count = max(1.0, revive_below)
        self.count_V = torch.full(weight.shape[:1], self.fresh_count, device=weight.device)
        self.sum_VC = quantizer.codebook.detach() * self.fresh_count

    @torch.no_grad()
    def step(self, latent_BChw: Tensor, ids_BN: Tensor) -> None:
        """Takes in one batch after the optimiser's step: counts uses and, if update is "ema", moves the used codes.

        Args:
            latent_BChw: the encoder's output (`VQOutput.latent_BChw`).
            ids_BN: the codes that it was assigned.
        """
        latent_MC = self.quantizer.as_compared(latent_BChw.flatten(2).transpose(1, 2)).flatten(0, 1)
        ids_M = ids_BN.flatten()
        used_V = torch.zeros_like(self.count_V).index_add_(0, ids_M, torch.ones_like(latent_MC[:, 0]))
        used_V = _sum_over_ranks(used_V)
        self.count_V.lerp_(used_V, 1.0 - self.decay)
        if self.update == "ema":
            sum_VC = _sum_over_ranks(torch.zeros_like(self.sum_VC).index_add_(0, ids_M, latent_MC))
            self.sum_VC.lerp_(sum_VC, 1.0 - self.decay)
            # An unused code has both averages decayed alike and stays where it is.
            moved_VC = self.quantizer.as_compared(self.sum_VC / self.count_V[:, None])
            self._write(used_V > 0, moved_VC)

    @torch.no_grad()
    def revive(self, latent_BChw: Tensor, generator: torch.Generator) -> int:
        """Replaces unused codes by latents of the current batch, drawn without repetition while they last.

        Args:
            latent_BChw: the encoder's output.
            generator: seeded by the caller from (run seed, step): a resumed run then draws the same.

        Returns: how many codes were replaced.
        """
        latent_MC = self.quantizer.as_compared(latent_BChw.flatten(2).transpose(1, 2)).flatten(0, 1)
        codes, count = self.count_V.shape[0], latent_MC.shape[0]
        rounds = -(-codes // count)
        order = torch.cat([torch.randperm(count, generator=generator, device=generator.device) for _ in range(rounds)])
        dead_V = self.count_V < self.revive_below
        # The n-th unused code takes the n-th drawn latent.
        rank_V = dead_V.cumsum(0).sub(1).clamp(min=0)
        drawn_VC = latent_MC[order.to(latent_MC.device)[rank_V]]
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(drawn_VC, src=0)
        self._write(dead_V, drawn_VC)
        self.count_V.masked_fill_(dead_V, self.fresh_count)
        self.sum_VC.copy_(torch.where(dead_V[:, None], drawn_VC * self.fresh_count, self.sum_VC))
        return int(dead_V.sum())

    def _write(self, which_V: Tensor, vectors_VC: Tensor) -> None:
        weight = self.quantizer.embedding.weight
        weight.copy_(torch.where(which_V[:, None], vectors_VC.to(weight.dtype), weight))

    def state_dict(self) -> dict[str, Tensor]:
        """Moving averages, for a training checkpoint (the codes themselves are in the model's)."""
        return {"count": self.count_V, "sum": self.sum_VC}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the moving averages back.

        Raises:
            ValueError: other keys or shapes than `state_dict` gives.
        """
        mine = self.state_dict()
        found = {key: tuple(value.shape) for key, value in state.items()}
        wanted = {key: tuple(value.shape) for key, value in mine.items()}
        if found != wanted:
            raise ValueError(f"state of a codebook trainer has {wanted}; got {found}")
        for key, value in mine.items():
            value.copy_(state[key])


class CodebookUsage:
    """How a set of images uses a codebook.

    Args:
        codebook_size: V.
        device: where ids will be; counting does not wait for it.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        self.count_V = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, ids: Tensor) -> None:
        """Counts ids (any shape)."""
        flat = ids.flatten()
        self.count_V.index_add_(0, flat, torch.ones_like(flat))

    @property
    def fraction(self) -> float:
        """Share of the codes that occurred, 0 ... 1."""
        return float((self.count_V > 0).float().mean())

    @property
    def perplexity(self) -> float:
        """exp(entropy) of the codes' frequencies: 1 (one code) ... V (all alike); 0.0 before the first id."""
        total = self.count_V.sum()
        if total == 0:
            return 0.0
        frequency = self.count_V[self.count_V > 0].double() / total
        return float((-(frequency * frequency.log()).sum()).exp())
