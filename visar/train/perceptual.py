"""Reconstruction losses: pixels, gradients of pixels, and distances between features of frozen networks.

Images are float in [-1, 1]; every loss returns one value an image.
"""

from abc import ABC, abstractmethod
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.evaluate.efficientnet_lite import load_efficientnet_lite0
from visar.train.options import PerceptualKind


def gradient_l1(image_BCHW: Tensor, target_BCHW: Tensor, num_scales: int = 3) -> Tensor:
    """Mean absolute difference of horizontal and vertical pixel differences, averaged over scales [B].

    A scale is the 2x2 mean of the one before. Edges count here, constant offsets do not.
    """
    difference = image_BCHW - target_BCHW
    total = torch.zeros_like(difference[:, 0, 0, 0])
    for scale in range(num_scales):
        if scale:
            difference = functional.avg_pool2d(difference, 2)
        horizontal, vertical = difference.diff(dim=3), difference.diff(dim=2)
        total = total + horizontal.abs().mean((1, 2, 3)) + vertical.abs().mean((1, 2, 3))
    return total / num_scales


def feature_distance(first: Tensor, second: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """LPIPS's distance of two feature maps [B, C, h, w] (arXiv 1801.03924, equation 1): [B], float32.

    Vectors are scaled to unit length; squared differences are summed over channels, with weights if given, and
    averaged over positions. The small number is inside the root: a zero vector has a gradient of zero, not of nan.
    """
    first, second = (
        map_BChw * torch.rsqrt(map_BChw.square().sum(1, keepdim=True) + 1e-10)
        for map_BChw in (first.float(), second.float())
    )
    square = (first - second).square()
    if weight_C is not None:
        square = square * weight_C.view(1, -1, 1, 1)
    return square.sum(1).mean((1, 2))


class Perceptual(nn.Module, ABC):
    """Distance of two batches of images by features of a frozen network."""

    @abstractmethod
    def maps(self, image_BCHW: Tensor) -> list[Tensor]:
        """Feature maps of images in [-1, 1], differentiable in the image."""

    @abstractmethod
    def weights(self) -> list[Tensor | None]:
        """Weights of the channels of every map."""

    def forward(self, image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Distances [B]; gradients reach the first images only."""
        with torch.no_grad():
            targets = self.maps(target_BCHW)
        maps = self.maps(image_BCHW)
        distances = [
            feature_distance(first, second, weight)
            for first, second, weight in zip(maps, targets, self.weights(), strict=True)
        ]
        return torch.stack(distances).sum(0)


class Lite0Perceptual(Perceptual):
    """LPIPS-like distance of EfficientNet-Lite0's features; its weights come in a package, so no network is needed.

    Differs from LPIPS: the network, and one constant weight a map in place of learned channel weights.

    Args:
        dtype: dtype of the network; bfloat16 is enough for a loss on a GPU.
        size: side that images are resized to (bilinear); smaller ones give features with too few positions.
        stage_weights: for the maps at strides 2, 4, 8, 16, 32; the coarsest counts less: it hardly says where things
            are.

    Raises:
        ImportError: the package of the weights is not installed.
    """

    stage_weights: Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        size: int = 128,
        stage_weights: tuple[float, ...] = (0.3, 0.3, 0.3, 0.3, 0.1),
    ) -> None:
        super().__init__()
        self.network = load_efficientnet_lite0(dtype=dtype)
        self.size = size
        self.register_buffer("stage_weights", torch.tensor(stage_weights))

    def maps(self, image_BCHW: Tensor) -> list[Tensor]:
        resized = functional.interpolate(image_BCHW.float(), size=(self.size, self.size), mode="bilinear")
        return self.network.features(resized)

    def weights(self) -> list[Tensor | None]:
        return list(self.stage_weights)


class LpipsPerceptual(Perceptual):
    """LPIPS with VGG-16 (arXiv 1801.03924), network and weights as in torch-fidelity 0.4.0.

    Raises:
        ValueError: the weights are not in PyTorch's folder of downloads and cannot be fetched.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS

        try:
            self.lpips = SampleSimilarityLPIPS("lpips-vgg16")
        except (URLError, OSError) as error:
            raise ValueError(
                f"LPIPS weights cannot be fetched ({error}). Put {URL_VGG16_LPIPS.rsplit('/', 1)[1]} (from "
                f"{URL_VGG16_LPIPS}) and torchvision's vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints, or "
                "choose the perceptual loss lite0, which needs no download"
            ) from error

    def maps(self, image_BCHW: Tensor) -> list[Tensor]:
        lpips: Any = self.lpips
        return list(lpips.net(lpips.normalize((image_BCHW + 1.0) * 127.5)))

    def weights(self) -> list[Tensor | None]:
        lpips: Any = self.lpips
        return [line.model[-1].weight.flatten() for line in lpips.lins]


def load_perceptual(kind: PerceptualKind, device: torch.device, dtype: torch.dtype) -> Perceptual:
    """A frozen perceptual distance on the device.

    Args:
        kind: "lite0" (offline) or "lpips".
        device: where it goes.
        dtype: dtype of the network of "lite0".

    Raises:
        ValueError: another kind, or weights that cannot be had.
        ImportError: the package of the weights is not installed.
    """
    if kind not in ("lite0", "lpips"):
        raise ValueError(f"perceptual loss {kind!r}; choose lite0 or lpips")
    loss: Perceptual = Lite0Perceptual(dtype) if kind == "lite0" else LpipsPerceptual()
    loss.to(device).to(memory_format=torch.channels_last)
    return loss.requires_grad_(False).eval()
