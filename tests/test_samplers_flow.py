"""The flow map: exact cases in one dimension and for two codes, frequencies, invariances; and sampling through it."""

import runpy
from pathlib import Path

import pytest
import torch

from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.evaluate.exactness import check_distribution, joint_distribution, total_variation
from visar.pipelines.loading import load
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.flow import code_scale, denoise, flow_map, sample_flow

TINY = runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py"))
many, tabular = TINY["many"], TINY["tabular"]


def codes(number: int, width: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(number, width), dim=-1)
    return vectors * code_scale(vectors)


def share(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first != second).float().mean())


def test_in_one_dimension_it_is_the_quantile_map():
    torch.manual_seed(1)
    line = torch.linspace(-2.0, 2.0, 12)[:, None]
    probabilities = torch.softmax(torch.randn(12), 0)
    noise = torch.randn(4000, 1)
    ids = flow_map(noise, probabilities.log().expand(4000, -1), line, steps=50)
    quantile = torch.special.ndtr(noise[:, 0].double())
    expected = torch.searchsorted(probabilities.double().cumsum(0), quantile).clamp(max=11)
    assert share(ids, expected) < 2e-3


def test_two_codes_are_parted_by_a_plane():
    pair, probability = codes(2, 5), torch.tensor([0.3, 0.7])
    noise = torch.randn(4000, 5)
    ids = flow_map(noise, probability.log().expand(4000, -1), pair)
    along = noise @ torch.nn.functional.normalize(pair[1] - pair[0], dim=0)
    assert share(ids, (along > torch.special.ndtri(torch.tensor(0.3))).long()) < 3e-3


@pytest.mark.parametrize("width", [2, 8])
def test_frequencies_are_the_distribution(width):
    table, count = codes(16, width), 20_000
    torch.manual_seed(2)
    probabilities = torch.softmax(1.5 * torch.randn(16), 0)
    ids = flow_map(torch.randn(count, width), probabilities.log().expand(count, -1), table)
    seen = torch.bincount(ids, minlength=16) / count
    expected = 0.5 * (2 * probabilities * (1 - probabilities) / (torch.pi * count)).sqrt().sum()
    assert total_variation(seen, probabilities) < 3 * expected


def test_rotation_permutation_and_order_change_nothing_else():
    table = codes(32, 8)
    torch.manual_seed(3)
    logits, noise = torch.randn(2000, 32), torch.randn(2000, 8)
    ids = flow_map(noise, logits, table)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert share(flow_map(noise @ rotation, logits, table @ rotation), ids) < 1e-3
    order = torch.randperm(32)
    assert torch.equal(order[flow_map(noise, logits[:, order], table[order])], ids)
    rows = torch.randperm(2000)
    assert share(flow_map(noise[rows], logits[rows], table), ids[rows]) == 0
    assert share(torch.cat([flow_map(noise[:7], logits[:7], table), flow_map(noise[7:], logits[7:], table)]), ids) == 0


def test_large_vocabularies_are_cut_into_rows(monkeypatch):
    table = codes(32, 8)
    torch.manual_seed(3)
    logits, noise = torch.randn(5, 10, 32), torch.randn(5, 10, 8)
    whole = flow_map(noise, logits, table)
    monkeypatch.setattr("visar.samplers.flow._LARGEST", 96)
    assert whole.shape == (5, 10) and torch.equal(flow_map(noise, logits, table), whole)


def test_excluded_codes_are_never_reached():
    table, noise = codes(8, 3), torch.randn(5000, 3)
    logits = torch.randn(5000, 8)
    logits[:, ::2] = float("-inf")
    assert bool((flow_map(noise, logits, table) % 2 == 1).all())
    only = torch.full((5000, 8), float("-inf"))
    only[:, 3] = 0.0
    assert bool((flow_map(noise, only, table) == 3).all())


def test_denoiser_is_the_score_of_the_noised_mixture():
    table = codes(6, 3).double()
    torch.manual_seed(4)
    log_p = torch.log_softmax(torch.randn(5, 6, dtype=torch.float64), -1)
    for t in (0.05, 0.3, 0.9):
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        square = (x[:, None] - (1 - t) * table).square().sum(-1)
        density = torch.logsumexp(log_p - square / (2 * t**2), -1)
        (score,) = torch.autograd.grad(density.sum(), x)
        predicted = -(x - (1 - t) * denoise(x, t, log_p, table)) / t**2
        assert torch.allclose(predicted, score, atol=1e-9)


def test_sequences_follow_the_joint_distribution():
    model, count = tabular(vocab_size=4, grid=(2, 2)), 8_000
    guidance, filters = Guidance(1.5), dict(temperature=0.9, top_k=3)
    expected = joint_distribution(model, many(1, 1), guidance, **filters)
    out = sample_flow(
        model, many(1, count), noise=Noise(image_seeds(0, count)), codebook=codes(4, 3), guidance=guidance, steps=40,
        **filters,
    )  # fmt: skip
    assert check_distribution(out.tokens, expected, 4).passed
    wrong = joint_distribution(model, many(1, 1), Guidance(2.0), **filters)
    assert not check_distribution(out.tokens, wrong, 4).passed


def test_an_image_depends_on_its_seed_alone_and_differs_from_the_ancestral_one():
    pipe = load("emoji-var", device="cpu")
    model, book = pipe.generator, pipe.tokenizer.codebook
    condition, _ = pipe.prepare_condition([5, 6, 7])
    settings = dict(guidance=Guidance(2.0), top_k=50)
    both = sample_flow(model, condition, noise=Noise([5, 6, 7]), codebook=book, steps=3, **settings)
    second = condition.rows(torch.tensor([1]))
    alone = sample_flow(model, second, noise=Noise([6]), codebook=book, steps=3, **settings)
    assert torch.equal(alone.tokens[0], both.tokens[1])
    plain = sample_ancestral(model, condition, noise=Noise([5, 6, 7]), **settings)
    assert share(plain.tokens, both.tokens) > 0.5


def test_bad_settings_are_named():
    model, settings = tabular(), dict(noise=Noise([0]))
    with pytest.raises(ValueError, match="steps 1; allowed: 2 ... 10000"):
        sample_flow(model, many(0, 1), codebook=codes(4, 3), steps=1, **settings)
    with pytest.raises(ValueError, match="codebook of 5 codes; the model has 4"):
        sample_flow(model, many(0, 1), codebook=codes(5, 3), **settings)
