"""Filters against a plain reference, and the draw against its law."""

import pytest
import torch

from visar.core.noise import Noise, Use, image_seeds
from visar.samplers.filtering import categorical, check_filters, draw, filter_logits


def reference_filter(logits, temperature, top_k, top_p):
    """The definition, one row at a time, with a sort."""
    out = []
    for row in logits / temperature:
        order = row.argsort(descending=True)
        keep = set(order[: top_k or len(order)].tolist())
        probability = torch.softmax(
            torch.where(torch.tensor([i in keep for i in range(len(row))]), row, -torch.inf), 0
        )
        total, chosen = 0.0, set()
        for code in order.tolist():
            if code not in keep or (chosen and total > top_p):
                break
            chosen.add(code)
            total += float(probability[code])
        out.append([float(value) if i in chosen else -torch.inf for i, value in enumerate(row)])
    return torch.tensor(out)


@pytest.mark.parametrize("top_k", [0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_filter_equals_the_definition(top_k, top_p, temperature):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 2
    expected = reference_filter(logits, temperature, top_k, top_p)
    torch.testing.assert_close(filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p), expected)


def test_shapes_with_positions():
    logits = torch.randn(2, 3, 10)
    filtered = filter_logits(logits, top_k=4, top_p=0.9)
    for b in range(2):
        for position in range(3):
            assert torch.equal(filtered[b, position], filter_logits(logits[b, position], top_k=4, top_p=0.9))


@pytest.mark.parametrize("size", [1, 5, 128, 129, 1000])
def test_draw_follows_its_law(size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, generator=generator) * 2
    logits[::3] = -torch.inf
    if size == 1:
        logits[0] = 0.0
    n = 60_000
    uniform = Noise(image_seeds(0, n)).uniform(Use.TOKEN, 0)
    counts = torch.bincount(categorical(logits.expand(n, -1), uniform), minlength=size)
    law = torch.softmax(logits, 0)
    assert counts[law == 0].sum() == 0
    large = law * n >= 5
    statistic = ((counts[large] - n * law[large]) ** 2 / (n * law[large])).sum()
    cells = int(large.sum())
    assert statistic < cells + 5 * (2 * cells) ** 0.5


def test_draw_never_takes_a_code_without_mass():
    mass = torch.zeros(4, 300)
    mass[:, 7] = 1e-30
    mass[:, 290] = 3e-30
    uniform = torch.tensor([2.0**-24, 0.2, 0.5, 1 - 2.0**-24])
    assert draw(mass, uniform).tolist() == [7, 7, 290, 290]


def test_bad_settings():
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            check_filters(temperature, 0, 1.0)
    for top_k in (-1, 1.5):
        with pytest.raises(ValueError, match="top_k"):
            check_filters(1.0, top_k, 1.0)
    for top_p in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="top_p"):
            check_filters(1.0, 0, top_p)
