"""The energy head: its score, what it learns, temperature, guidance, bad input."""

import math

import pytest
import torch

from visar.core.interface import TokenHead
from visar.layers.heads.energy import EnergyHead


class Known(EnergyHead):
    """Draws N(0, 1) whatever it reads, shifted by the first feature."""

    def token(self, noise, features):
        return noise + features[..., :1]


def test_the_score_is_that_of_the_energy_distance():
    head, count = Known(1, 2, 8, 1), 40_000
    random = torch.Generator().manual_seed(0)
    for shift in (0.0, 1.5):
        tokens = shift + torch.randn(count, 1, generator=random)
        loss = head.loss(torch.zeros(count, 2), tokens, random)
        assert loss.shape == (count,)
        # E|N(m, 2)| = 2 / sqrt(pi) exp(-m^2 / 4) + m erf(m / 2)
        apart = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
        assert float(loss.mean()) == pytest.approx(2 * apart - 2 / math.sqrt(math.pi), abs=0.03)


def test_it_learns_a_distribution_and_the_temperature_narrows_it():
    torch.manual_seed(0)
    head = EnergyHead(1, 2, 24, 1)
    head.reset_parameters(torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(120):
        tokens = 0.7 + 0.4 * torch.randn(128, 1, generator=random)
        loss = head.loss(torch.ones(128, 2), tokens, random).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    noise = torch.randn(1, 20_000, 1, generator=random)
    with torch.no_grad():
        drawn, narrow = (
            head.draw(torch.ones(1, 20_000, 2), lambda _: noise, temperature=temperature) for temperature in (1.0, 0.5)
        )
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.1) and float(drawn.std()) == pytest.approx(0.4, abs=0.1)
    assert float(narrow.std()) < 0.8 * float(drawn.std())
    assert isinstance(head, TokenHead)


def test_guidance_is_linear_in_the_hidden_vectors():
    head, noise = Known(1, 2, 8, 1), torch.zeros(1, 3, 1)
    features = torch.tensor([2.0, 0.5])[:, None, None].expand(2, 3, 2)
    tokens = head.draw(features, lambda _: noise, scale_BL=torch.tensor([[1.0, 2.0, 3.0]]))
    assert tokens[0, :, 0].tolist() == [2.0, 3.5, 5.0]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="tau 1.5; needed: above 0, up to 1"):
        EnergyHead(1, 2, 8, 1, tau=1.5)
    with pytest.raises(ValueError, match="head_steps 4; an energy head draws a token in 1"):
        EnergyHead(1, 2, 8, 1).check_steps(4)
