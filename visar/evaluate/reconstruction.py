"""How well a tokenizer reconstructs images: PSNR, SSIM, the Frechet distance to the originals, use of codes.

These figures are of the "reconstruction" protocol: reconstructions against their originals. They never stand beside a
Frechet distance of samples, which is against the training set.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.core.interface import Tokenizer
from visar.core.noise import image_seeds
from visar.evaluate.extractors import Extractor
from visar.evaluate.images import ImageSource
from visar.evaluate.metrics import distance_name
from visar.evaluate.references import Reference, checked
from visar.evaluate.statistics import FeatureStatistics, RunningStatistics, frechet_distance, singular_note
from visar.io.pictures import to_uint8
from visar.tokenizers.decoding import decode_with, decoder_noise


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Figures of a tokenizer on N images.

    Attributes:
        protocol: always "reconstruction".
        num_images: N.
        psnr: dB on uint8 pixels, mean over images; an image without any error counts as 100 dB.
        ssim: structural similarity in [-1, 1], mean over images.
        distance_name: what the Frechet distance is called, with an r in front (rFID for Inception).
        distance: Frechet distance of the reconstructions to the reference.
        reference: what it is measured against.
        codes_used: share of the codebook that occurs, in [0, 1]; None for continuous tokens.
        code_perplexity: exp of the entropy of the codes' frequencies; None for continuous tokens.
        top_code_share: share of all tokens that are the most frequent code; None for continuous tokens.
        notes: what a reader should know.
    """

    protocol: str
    num_images: int
    psnr: float
    ssim: float
    distance_name: str
    distance: float
    reference: str
    codes_used: float | None
    code_perplexity: float | None
    top_code_share: float | None
    notes: tuple[str, ...]


def psnr(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images in dB, float64 [B]: 10 log10(255^2 / MSE), at most 100."""
    error_B = (first_BCHW.double() - second_BCHW.double()).square().flatten(1).mean(dim=1)
    return (10.0 * torch.log10(255.0**2 / error_B.clamp(min=1e-30))).clamp(max=100.0)


def ssim(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """Structural similarity of uint8 images, float64 [B], mean over channels and places.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): Gaussian
    window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, on RGB, places where the window fits.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(first_BCHW.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of 11x11 or more, got {tuple(first_BCHW.shape[-2:])}")
    offset = torch.arange(11, dtype=torch.float64, device=first_BCHW.device) - 5.0
    window = torch.exp(-(offset**2) / (2 * 1.5**2))
    window = window / window.sum()
    kernel = torch.outer(window, window)[None, None].expand(first_BCHW.shape[1], 1, 11, 11)

    def local_mean(values_BCHW: Tensor) -> Tensor:
        return F.conv2d(values_BCHW, kernel, groups=values_BCHW.shape[1])

    a, b = first_BCHW.double(), second_BCHW.double()
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a, variance_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    return score.flatten(1).mean(dim=1)


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer: Tokenizer,
    images: ImageSource,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    reference: Reference | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReconstructionMetrics:
    """Encodes and decodes images and compares. Where the tokenizer's decoder draws, image i has the noise of seed i.

    Args:
        tokenizer: in evaluation mode on `device`.
        images: images to reconstruct; held-out ones, for an honest figure.
        extractor: extractor of the Frechet distance.
        batch_size: images at a time.
        device: the tokenizer's.
        reference: statistics for the protocol "reconstruction"; None takes the statistics of `images` themselves.
        progress: told the number of images done.

    Raises:
        ValueError: a reference for generation, or for another extractor.
    """
    layer = extractor.layers[0]
    if reference is not None:
        reference = checked(reference, extractor, "reconstruction")
    layout = tokenizer.layout
    grid = None
    if layout.arrangement != "sequence":
        grid = (images.size[0] // tokenizer.downsampling, images.size[1] // tokenizer.downsampling)
    original, decoded = RunningStatistics(), RunningStatistics()
    counts_V = torch.zeros(max(layout.vocab_size, 1), dtype=torch.int64)
    ratios, similarities = [], []
    for image_BCHW in images.batches(batch_size):
        image = image_BCHW.to(device)
        tokens = tokenizer.encode(image.float() / 127.5 - 1.0)
        seeds = image_seeds(decoded.count, len(image))
        noise = decoder_noise(tokenizer, seeds, device, images.size)
        result = to_uint8(decode_with(tokenizer, tokenizer.latents(tokens, grid), noise))
        if layout.vocab_size:
            counts_V += torch.bincount(tokens.flatten().cpu(), minlength=layout.vocab_size)
        ratios.append(psnr(image, result).cpu())
        similarities.append(ssim(image, result).cpu())
        decoded.update(extractor(result)[layer])
        if reference is None:
            original.update(extractor(image)[layer])
        if progress is not None:
            progress(decoded.count)
    target: FeatureStatistics = original.finish() if reference is None else reference.statistics[layer]
    usage, perplexity, top = codebook_usage(counts_V) if layout.vocab_size else (None, None, None)
    note = singular_note(decoded.count, target.width, "reconstructions")
    return ReconstructionMetrics(
        protocol="reconstruction",
        num_images=decoded.count,
        psnr=torch.cat(ratios).mean().item(),
        ssim=torch.cat(similarities).mean().item(),
        distance_name="r" + distance_name(extractor.kind, layer),
        distance=frechet_distance(decoded.finish(), target),
        reference=f"the {decoded.count} originals of {images.name}" if reference is None else reference.name,
        codes_used=usage,
        code_perplexity=perplexity,
        top_code_share=top,
        notes=() if note is None else (note,),
    )


def codebook_usage(counts_V: Tensor) -> tuple[float, float, float]:
    """Share of codes that occur, perplexity of their frequencies, and the share of the most frequent code."""
    frequency_V = counts_V.double() / counts_V.sum()
    entropy = -torch.special.xlogy(frequency_V, frequency_V).sum()
    return (counts_V > 0).double().mean().item(), entropy.exp().item(), frequency_V.max().item()
