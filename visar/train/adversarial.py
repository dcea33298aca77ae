"""Adversarial loss of tokenizer training: a patch discriminator and hinge losses.

Source: PatchGAN (arXiv 1611.07004), hinge losses (arXiv 1705.02894), adaptive weight (VQGAN, arXiv 2012.09841
equation 7), spectral norm (arXiv 1802.05957).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2, then two of stride 1: one logit a patch, positive = real.

    Differs from the paper: group norm in place of batch norm, so that an image's logits do not depend on its batch.

    Args:
        image_channels: channels of images in [-1, 1].
        base_channels: width of the first layer, doubled with every layer up to 8 times; a multiple of 8.
        num_layers: convolutions of stride 2.
        spectral: spectral norm on all convolutions, and no group norm then.
    """

    def __init__(
        self, image_channels: int = 3, base_channels: int = 64, num_layers: int = 3, spectral: bool = True
    ) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = []
        before = image_channels
        for i, width in enumerate(widths):
            stride = 2 if i < num_layers else 1
            layers.append(self._convolution(before, width, stride, spectral))
            if i and not spectral:
                layers.append(nn.GroupNorm(8, width))
            layers.append(nn.LeakyReLU(0.2))
            before = width
        layers.append(self._convolution(before, 1, 1, spectral))
        self.layers = nn.Sequential(*layers)

    @staticmethod
    def _convolution(before: int, width: int, stride: int, spectral: bool) -> nn.Module:
        convolution = nn.Conv2d(before, width, 4, stride, padding=1)
        return spectral_norm(convolution) if spectral else convolution

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits [B, 1, h, w] of patches."""
        return self.layers(image_BCHW)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss that pushes real logits above 1 and fake ones below -1; 2.0 where all logits are 0."""
    return (functional.relu(1.0 - real_logits.float()) + functional.relu(1.0 + fake_logits.float())).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Hinge loss of the generator: falls as fake logits rise."""
    return -fake_logits.float().mean()


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor, maximum: float) -> Tensor:
    """Ratio of the gradient norms of the two losses at the decoder's last layer, so that neither drowns the other.

    Args:
        loss: reconstruction loss, a scalar with its graph.
        adversarial: generator loss, the same.
        last_layer: weights of the decoder's last layer.
        maximum: the ratio is clamped to [0, maximum]; VQGAN has 1e4.
    """
    gradient = torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
    adversarial_gradient = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].float().norm()
    return (gradient / (adversarial_gradient + 1e-4)).clamp(0.0, maximum).detach()
