"""Filters against a plain reference, and the draw against its distribution."""

import pytest
import torch

from visar.core.noise import Noise, Use, image_seeds
from visar.core.runtime import EAGER
from visar.samplers.filtering import categorical, check_filters, draw, filter_logits, filtered_probs, sample_logits


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
            if code not in keep or total >= top_p:
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


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.5, [0]),
        ([0.5, 0.25, 0.125, 0.125], 0.75, [0, 1]),
        ([0.3, 0.1, 0.1, 0.5], 0.8, [0, 3]),
        ([0.25, 0.25, 0.5], 0.6, [0, 1, 2]),  # both of the tied codes
    ],
)
def test_top_p_ends_where_probabilities_reach_it(probs, top_p, kept):
    logits = torch.log(torch.tensor([probs]))
    assert torch.isfinite(filter_logits(logits, top_p=top_p)[0]).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sessions_find_logits_that_are_not_finite(value):
    logits = torch.zeros(2, 3, 10)
    uniform = torch.full((2, 3), 0.5)
    for draws in (lambda: sample_logits(logits, uniform), lambda: filtered_probs(logits, 1.0, 4, 0.9)):
        session = EAGER.session(None, torch.device("cpu"), "any")
        logits[1, 2, 4] = 0.0
        session.run(draws)
        session.check_finite()
        logits[1, 2, 4] = value
        session.run(draws)
        with pytest.raises(ValueError, match="not finite"):
            session.check_finite()


def test_codes_may_be_excluded_by_the_model():
    logits = torch.zeros(2, 10)
    logits[:, 3:] = float("-inf")
    session = EAGER.session(None, torch.device("cpu"), "any")
    session.run(lambda: sample_logits(logits, torch.full((2,), 0.5), top_k=4, top_p=0.5))
    session.check_finite()


def test_shapes_with_positions():
    logits = torch.randn(2, 3, 10)
    filtered = filter_logits(logits, top_k=4, top_p=0.9)
    for b in range(2):
        for position in range(3):
            assert torch.equal(filtered[b, position], filter_logits(logits[b, position], top_k=4, top_p=0.9))


@pytest.mark.parametrize("size", [1, 5, 128, 129, 1000])
def test_draw_follows_its_distribution(size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, generator=generator) * 2
    logits[::3] = -torch.inf
    if size == 1:
        logits[0] = 0.0
    n = 60_000
    uniform = Noise(image_seeds(0, n)).uniform(Use.TOKEN, 0)
    counts = torch.bincount(categorical(logits.expand(n, -1), uniform), minlength=size)
    probs = torch.softmax(logits, 0)
    assert counts[probs == 0].sum() == 0
    large = probs * n >= 5
    statistic = ((counts[large] - n * probs[large]) ** 2 / (n * probs[large])).sum()
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
