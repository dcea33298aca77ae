"""Residual quantisation over a pyramid of scales with one shared codebook: the coarse map first, then what it lacks.

Source: VAR, arXiv 2404.02905 algorithms 1 and 2; details fixed by the outputs of FoundationVision/VAR@78b9539.
Training parts that the release lacks (tail dropout, moving averages, revival of unused codes) are this project's.

B images, S scales, L positions of one scale, N all positions, V codes, C code width, h w the finest grid.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar import kernels
from visar.tokenizers.quantizer import CodebookTrainer, CodebookUsage, Quantized, nearest_codes

Scale = tuple[int, int]


def scale_pairs(scales: Sequence[int | Sequence[int]]) -> tuple[Scale, ...]:
    """Scales as (height, width) pairs; a plain number is a square.

    Raises:
        ValueError: no scale, a size below 1, or a scale smaller than the one before it.
    """
    pairs = [(entry, entry) if isinstance(entry, int) else (int(entry[0]), int(entry[1])) for entry in scales]
    if not pairs or min(min(pair) for pair in pairs) < 1:
        raise ValueError(f"scales {scales}; one or more sizes >= 1 are needed, coarse to fine")
    for coarse, fine in zip(pairs, pairs[1:], strict=False):
        if fine[0] < coarse[0] or fine[1] < coarse[1]:
            raise ValueError(f"scale {fine} after {coarse}; scales go from coarse to fine")
    return tuple(pairs)


def phi_choice(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which phi convolution every scale uses: the one whose tick is nearest to s / (S - 1), the first on a tie.

    Ticks are `num_phi` evenly spaced numbers from m to 1 - m, m = 1 / (3 n) for n = 4 and 1 / (2 n) otherwise.
    Released models (S = 10, n = 4) have two ties on paper that float64 rounding decides; Python floats round as the
    original did, float32 does not.

    Args:
        num_scales: S.
        num_phi: n; 0 is one for every scale.
    """
    if num_phi == 0:
        return tuple(range(num_scales))
    if num_phi == 1:
        return (0,) * num_scales
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    step = ((1 - margin) - margin) / (num_phi - 1)
    ticks = [i * step + margin for i in range(num_phi - 1)] + [1 - margin]
    choice = []
    for scale in range(num_scales):
        distances = [abs(tick - scale / max(num_scales - 1, 1)) for tick in ticks]
        choice.append(distances.index(min(distances)))
    return tuple(choice)


def cubic_weights(size: int, larger: int) -> Tensor:
    """Weights of cubic interpolation along one axis, float32 [larger, size], on the CPU."""
    unit = torch.eye(size, dtype=torch.float64, device="cpu")[None, :, :, None]
    weights = functional.interpolate(unit, size=(larger, 1), mode="bicubic")
    return weights[0, :, :, 0].t().float().contiguous()


def _by_kernels(maps_BChw: Tensor) -> bool:
    """Whether maps are computed by products of a fixed order: inference on a GPU."""
    return kernels.usable(maps_BChw) and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _exact_product(x_ZMK: Tensor, weight_NK: Tensor) -> Tensor:
    """float32 x W^T, [Z, M, N], by full float32 sums whose order does not depend on Z and M."""
    from visar.kernels.fixed_order import product

    with kernels.on(x_ZMK.device):
        return product(x_ZMK, weight_NK)


class ScalePyramid(nn.Module):
    """Codes to maps: the codebook shared by all scales and the convolutions phi that smooth upsampled codes.

    It stays float32 when the model that holds it is cast: sums over scales need it.

    Args:
        vocab_size: number of codes V.
        channels: code width C.
        scales: sizes of the scales, coarse to fine; the last is the latent's grid.
        num_phi: convolutions shared by the scales (VAR: 4); 0 is one per scale, 1 a single one.
        phi_ratio: share of the convolution in phi(x) = (1 - r) x + r conv(x) (VAR: 0.5).
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        scales: Sequence[int | Sequence[int]],
        *,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        self.scales = scale_pairs(scales)
        self.sizes = tuple(height * width for height, width in self.scales)
        self.vocab_size, self.channels, self.phi_ratio = vocab_size, channels, phi_ratio
        self.phi_of_scale = phi_choice(len(self.scales), num_phi)
        self.embedding = nn.Embedding(vocab_size, channels)
        self.phi = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_phi or len(self.scales))
        )
        # Not buffers: they have values when the weights are on the meta device.
        rows, columns = self.scales[-1]
        self._enlarging = [
            (cubic_weights(height, rows), cubic_weights(width, columns)) for height, width in self.scales[:-1]
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScalePyramid":
        """Moves between devices, but keeps float32 (see the class)."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if self.embedding.weight.device.type != "meta":
            self._enlarging = [(move(rows), move(columns)) for rows, columns in self._enlarging]
        return super()._apply(move, recurse)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights for training from scratch: codes of unit mean square length, phi's convolutions as usual."""
        nn.init.normal_(self.embedding.weight, std=self.channels**-0.5, generator=generator)
        for conv in cast(Iterable[nn.Conv2d], self.phi):
            bound = (9 * self.channels) ** -0.5
            nn.init.uniform_(conv.weight, -bound, bound, generator=generator)
            nn.init.zeros_(cast(Tensor, conv.bias))

    # ---------------------------------------------------------------------------------------------------- decoding
    @property
    def codebook(self) -> Tensor:
        """Code vectors [V, C], as looked up."""
        return self.embedding.weight

    def empty_map(self, batch: int) -> Tensor:
        """Accumulated map before the first scale: zeros [B, C, h, w]."""
        return self.embedding.weight.new_zeros(batch, self.channels, *self.scales[-1])

    def num_scales_of(self, num_tokens: int) -> int:
        """How many leading scales have this many tokens.

        Raises:
            ValueError: it is not a whole number of scales.
        """
        total = 0
        for scale, size in enumerate(self.sizes):
            total += size
            if total == num_tokens:
                return scale + 1
        whole = [sum(self.sizes[: scale + 1]) for scale in range(len(self.sizes))]
        raise ValueError(f"{num_tokens} tokens are not a whole number of scales; allowed: {whole}")

    def enlarge(self, maps_BChw: Tensor, scale: int) -> Tensor:
        """Float32 maps of a scale (not the finest) resized to the finest grid by bicubic interpolation.

        Two products instead of `torch.nn.functional.interpolate`, whose CUDA kernel has one thread a pixel for all
        images and channels and takes milliseconds for maps of this size. The same numbers to rounding.
        """
        rows, columns = self._enlarging[scale]
        if rows.device != maps_BChw.device:
            # A pyramid that was made on its device has not been moved. Kept there: a captured step must not copy.
            rows, columns = self._enlarging[scale] = (rows.to(maps_BChw.device), columns.to(maps_BChw.device))
        if not _by_kernels(maps_BChw):
            return rows @ maps_BChw @ columns.t()
        wide_BCwh = _exact_product(maps_BChw.flatten(0, 2)[None], columns)[0].unflatten(0, maps_BChw.shape[:3]).mT
        large_BCwh = _exact_product(wide_BCwh.flatten(0, 2)[None], rows)[0].unflatten(0, wide_BCwh.shape[:3])
        return large_BCwh.mT

    def smoothed(self, codes_BChw: Tensor, scale: int) -> Tensor:
        """The scale's phi convolution of a map.

        On a GPU a product in full float32: torch lets convolutions round to TF32, and the library's algorithm, with
        its rounding, depends on the batch. What a scale's tokens are then would depend on it too.
        """
        conv = cast(nn.Conv2d, self.phi[self.phi_of_scale[scale]])
        if not codes_BChw.is_cuda or torch.is_grad_enabled():
            return conv(codes_BChw)
        patches_BPK = functional.unfold(codes_BChw, 3, padding=1).mT
        weight_CK, bias_C = conv.weight.flatten(1), cast(Tensor, conv.bias)
        by_kernels = _by_kernels(codes_BChw)
        out_BPC = _exact_product(patches_BPK, weight_CK) if by_kernels else patches_BPK @ weight_CK.t()
        return (out_BPC + bias_C).mT.unflatten(2, codes_BChw.shape[2:])

    def contribution(self, scale: int, codes_BLC: Tensor) -> Tensor:
        """What a scale adds to the map: phi of its codes, bicubically resized to the finest grid; [B, C, h, w].

        Args:
            scale: index of the scale.
            codes_BLC: code vectors in raster order (means of several codes are fine too).
        """
        on_cpu = codes_BLC.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if on_cpu and codes_BLC.shape[0] > 1:  # one by one: libraries round by the batch
            return torch.cat([self.contribution(scale, one_1LC) for one_1LC in codes_BLC.split(1)])
        with torch.autocast(codes_BLC.device.type, enabled=False):
            codes = codes_BLC.float().transpose(1, 2).unflatten(2, self.scales[scale])
            if scale < len(self.scales) - 1:
                codes = self.enlarge(codes, scale)
            return (1 - self.phi_ratio) * codes + self.phi_ratio * self.smoothed(codes, scale)

    def accumulate(self, map_BChw: Tensor, scale: int, codes_BLC: Tensor) -> Tensor:
        """The map after adding a scale's codes."""
        return map_BChw + self.contribution(scale, codes_BLC)

    def next_input(self, map_BChw: Tensor, scale: int) -> Tensor:
        """The map seen at a scale's resolution (mean over areas): a generator's input of that scale, [B, L, C]."""
        return functional.interpolate(map_BChw, size=self.scales[scale], mode="area").flatten(2).transpose(1, 2)

    def running_maps(self, tokens_BN: Tensor) -> list[Tensor]:
        """Accumulated maps after every scale of ids int64 [B, N] (any whole number of leading scales)."""
        num_scales = self.num_scales_of(tokens_BN.shape[1])
        maps, total = [], self.empty_map(tokens_BN.shape[0])
        for scale, tokens_BL in enumerate(tokens_BN.split(self.sizes[:num_scales], dim=1)):
            total = self.accumulate(total, scale, self.embedding(tokens_BL))
            maps.append(total)
        return maps

    def inputs(self, tokens_BN: Tensor) -> Tensor:
        """Teacher-forcing inputs of the scales after the first, [B, N - L_0, C], from ids int64 [B, N]."""
        maps = self.running_maps(tokens_BN)
        scales = range(1, len(maps))
        parts = [self.next_input(maps[scale - 1], scale) for scale in scales]
        return torch.cat(parts, dim=1) if parts else maps[0].new_zeros(tokens_BN.shape[0], 0, self.channels)


class MultiScaleQuantizer(ScalePyramid):
    """Latents to codes, scale by scale, and the losses that train the codebook and phi.

    Args:
        vocab_size, channels, scales, num_phi, phi_ratio: see `ScalePyramid`.
        cosine: nearest code by cosine instead of euclidean distance (VAR: False).
        tail_dropout: chance that an image in training keeps only its first n scales, n uniform on 1 ... S - 1. What
            the coarse scales leave out is then lost, so they cannot be left unused. 0.0 = off (VAR).
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        scales: Sequence[int | Sequence[int]],
        *,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        cosine: bool = False,
        tail_dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, channels, scales, num_phi=num_phi, phi_ratio=phi_ratio)
        self.cosine, self.tail_dropout = cosine, tail_dropout

    def as_compared(self, vectors: Tensor) -> Tensor:
        """Float32 vectors, as codes are stored."""
        return vectors.float()

    def nearest(self, vectors_BLC: Tensor) -> Tensor:
        """Ids int64 [B, L] of the codes nearest to float vectors."""
        flat, codes = vectors_BLC.float().flatten(0, 1), self.embedding.weight
        if self.cosine:
            flat, codes = functional.normalize(flat, dim=-1), functional.normalize(codes, dim=-1)
        return nearest_codes(flat, codes).view(vectors_BLC.shape[:2])

    def at_scale(self, residual_BChw: Tensor, scale: int) -> Tensor:
        """A residual map at a scale's resolution, [B, L, C]."""
        if scale < len(self.scales) - 1:
            residual_BChw = functional.interpolate(residual_BChw, size=self.scales[scale], mode="area")
        return residual_BChw.flatten(2).transpose(1, 2)

    def check_latent(self, latent_BChw: Tensor) -> None:
        """Checks that a latent has the finest scale's grid.

        Raises:
            ValueError: it has another one.
        """
        if tuple(latent_BChw.shape[2:]) != self.scales[-1]:
            raise ValueError(f"latent grid {tuple(latent_BChw.shape[2:])}; the finest scale is {self.scales[-1]}")

    @torch.no_grad()
    def encode(self, latent_BChw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Ids int64 [B, N] of a latent, and the accumulated map after every scale."""
        self.check_latent(latent_BChw)
        latent = latent_BChw.float()
        ids, maps, residual, total = [], [], latent, torch.zeros_like(latent)
        for scale in range(len(self.scales)):
            ids_BL = self.nearest(self.at_scale(residual, scale))
            contribution = self.contribution(scale, self.embedding(ids_BL))
            total, residual = total + contribution, residual - contribution
            ids.append(ids_BL)
            maps.append(total)
        return torch.cat(ids, dim=1), maps

    @torch.no_grad()
    def residuals(self, latent_BChw: Tensor, ids_BN: Tensor) -> list[Tensor]:
        """What every scale had to quantise, [B, L, C] each, given the ids of all scales."""
        maps = [torch.zeros_like(latent_BChw, dtype=torch.float32), *self.running_maps(ids_BN)[:-1]]
        return [self.at_scale(latent_BChw.float() - before, scale) for scale, before in enumerate(maps)]

    # ---------------------------------------------------------------------------------------------------- training
    def forward(self, latent_BChw: Tensor) -> Quantized:
        """Quantises with straight-through gradients.

        Both losses are means over scales of the squared difference between latent and accumulated map (arXiv
        2404.02905 equation 5): the codebook loss trains codes and phi, the commitment loss the latent.
        """
        self.check_latent(latent_BChw)
        with torch.autocast(latent_BChw.device.type, enabled=False):
            latent = latent_BChw.float()
            target, ids = latent.detach(), []
            residual, total = target, torch.zeros_like(latent)
            kept_SB = self._kept_scales(latent.shape[0], latent.device)
            codebook_loss = commitment_loss = latent.new_zeros(())
            for scale, kept_B in enumerate(kept_SB):
                ids_BL = self.nearest(self.at_scale(residual, scale))
                contribution = self.contribution(scale, self.embedding(ids_BL))
                residual = residual - contribution.detach()
                total = total + contribution * kept_B[:, None, None, None]
                codebook_loss = codebook_loss + ((total - target).square().mean((1, 2, 3)) * kept_B).sum()
                commitment_loss = commitment_loss + ((total.detach() - latent).square().mean((1, 2, 3)) * kept_B).sum()
                ids.append(ids_BL)
            count = kept_SB.sum()
            straight = latent + (total - latent).detach()
            return Quantized(
                quantized_BChw=straight.to(latent_BChw.dtype),
                ids_BN=torch.cat(ids, dim=1),
                commitment_loss=commitment_loss / count,
                codebook_loss=codebook_loss / count,
            )

    def _kept_scales(self, batch: int, device: torch.device) -> Tensor:
        """float32 [S, B]: 1 where an image keeps a scale in this pass, 0 where tail dropout leaves it out."""
        num_scales = len(self.scales)
        if not (self.training and self.tail_dropout):
            return torch.ones(num_scales, batch, device=device)
        drop_B = torch.rand(batch, device=device) < self.tail_dropout
        depth_B = (torch.rand(batch, device=device) * (num_scales - 1)).long() + 1
        depth_B = torch.where(drop_B, depth_B, num_scales)
        return (torch.arange(num_scales, device=device)[:, None] < depth_B).float()


class MultiScaleCodebookTrainer(CodebookTrainer):
    """`CodebookTrainer` for the codebook of a pyramid: it learns from the residuals of all scales.

    Coarse scales have few positions, and their residuals look like those of no other scale: new codes drawn from all
    residuals alike would serve the finest scale alone, and the coarse ones collapse onto a handful. Revival draws from
    every scale equally often.

    Args: as of `CodebookTrainer`; the quantiser is a `MultiScaleQuantizer`. With update "ema" phi still learns by
        gradient.
    """

    quantizer: MultiScaleQuantizer  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, latent_BChw: Tensor, ids_BN: Tensor) -> None:
        """Takes in one batch after the optimiser's step, as `CodebookTrainer.step`."""
        residual_BNC = torch.cat(self.quantizer.residuals(latent_BChw, ids_BN), dim=1)
        super().step(residual_BNC.transpose(1, 2)[..., None], ids_BN)

    @torch.no_grad()
    def revive(self, latent_BChw: Tensor, generator: torch.Generator) -> int:
        """Replaces unused codes by residuals of the current batch, as many from each scale.

        Args, Returns: as of `CodebookTrainer.revive`.
        """
        ids_BN, _ = self.quantizer.encode(latent_BChw)
        residuals = [each.flatten(0, 1) for each in self.quantizer.residuals(latent_BChw, ids_BN)]
        share = -(-self.count_V.shape[0] // len(residuals))
        drawn = []
        for residual_MC in residuals:
            order = torch.randperm(residual_MC.shape[0], generator=generator, device=generator.device)
            place = torch.arange(share, device=order.device) % order.shape[0]
            drawn.append(residual_MC[order[place].to(residual_MC.device)])
        return super().revive(torch.cat(drawn).T[None, :, :, None], generator)


class ScaleUsage:
    """How a set of images uses the codebook at every scale.

    Args:
        sizes: tokens of every scale.
        codebook_size: V.
        device: where ids will be.
    """

    def __init__(self, sizes: Sequence[int], codebook_size: int, device: torch.device | str = "cpu") -> None:
        self.sizes = tuple(sizes)
        self.scales = [CodebookUsage(codebook_size, device) for _ in self.sizes]

    def update(self, ids_BN: Tensor) -> None:
        """Counts the ids of whole images."""
        for usage, ids_BL in zip(self.scales, ids_BN.split(self.sizes, dim=1), strict=True):
            usage.update(ids_BL)

    @property
    def fraction(self) -> list[float]:
        """Share of the codes that occurred at every scale."""
        return [usage.fraction for usage in self.scales]

    @property
    def perplexity(self) -> list[float]:
        """Effective number of codes of every scale, 1 ... V."""
        return [usage.perplexity for usage in self.scales]
