"""Grouped speculative decoding: recorded decisions, the bound on what one decision changes, and measured changes."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import EAGER, Runtime
from visar.evaluate.exactness import check_distribution, joint_distribution, position_distances, total_variation
from visar.samplers.filtering import filtered_probs
from visar.samplers.grouped import group_chance, group_members, sample_grouped, static_chance, static_groups
from visar.samplers.jacobi import sample_jacobi
from visar.samplers.verify import acceptance, residual, verify

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))
tabular, transformer, labels, many = TINY.tabular, TINY.transformer, TINY.labels, TINY.many


def recorded(io):
    for name in sorted({key.split(".")[0] for key in io if key.startswith("step")}):
        yield {key.split(".")[1]: value for key, value in io.items() if key.startswith(name + ".")}


def test_recorded_decisions(parity):
    for case in recorded(parity("gsd").io):
        guided = case["logits_uncond"] + (case["logits_cond"] - case["logits_uncond"]) * case["cfg_scale"]
        p = filtered_probs(guided, 1.0, int(case["top_k"]), 1.0)
        torch.testing.assert_close(p, case["target_probs"], atol=1e-5, rtol=0)
        q, draft = case["draft_probs"][:, 1:], case["draft_tokens"][:, 1:]
        settings = dict(
            below=int(case["cluster_below"]),
            above=int(case["cluster_above"]),
            max_gap=float(case["p_thr"]),
            max_distance=float(case["d_thr"]),
        )
        chance = group_chance(p[:, :-1], q, draft, case["embedding"], **settings)
        torch.testing.assert_close(chance, case["accept_prob"][:, 1:], atol=1e-5, rtol=0)
        codes, member = group_members(p[:, :-1], draft, case["embedding"], **settings)
        mask = torch.zeros(case["cluster_mask"][:, 1:].shape).scatter_add_(-1, codes, member.float()) > 0
        compared = (p[:, :-1].gather(-1, draft[..., None])[..., 0] > 0) & (case["fallback"][:, 1:] == 0)
        assert torch.equal(mask[compared], case["cluster_mask"][:, 1:].bool()[compared])
        emit = case["u_resample"][:, None].repeat(1, p.shape[1])
        emit[:, -1] = case["u_fresh"][:, -1]
        verdict = verify(p, q, draft, case["u_accept"][:, 1:], emit, chance_BK=chance)
        count = int(verdict.count_B)
        assert count == int(case["first_reject"])
        assert torch.equal(verdict.tokens_BL[:, :count], case["tokens_after"][:, :count])
        if count < p.shape[1]:
            mass = residual(p[0, count - 1], q[0, count - 1])
            torch.testing.assert_close(mass / mass.sum(), case["residual"][0], atol=1e-5, rtol=0)


def one_decision(p, q, chance):
    """Distribution of the token that one verified draft leads to."""
    rejected = (q * (1 - chance)).sum()
    mass = residual(p, q)
    return q * chance + rejected * mass / mass.sum()


@pytest.mark.parametrize("groups", ["dynamic", "static"])
def test_one_decision_changes_the_distribution_within_its_bound(groups):
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(50):
        p, q = torch.softmax(2 * torch.randn(2, 12, generator=generator), -1)
        codebook, every = torch.randn(12, 3, generator=generator), torch.arange(12)[None]
        both = p.expand(1, 12, -1), q.expand(1, 12, -1)
        if groups == "dynamic":
            limits = dict(below=2, above=2, max_gap=1.0, max_distance=4.0)
            chance = group_chance(*both, every, codebook, **limits)[0]
        else:
            chance = static_chance(*both, every, static_groups(codebook, 4))[0]
        exact = acceptance(*both, every)[0]
        assert total_variation(one_decision(p, q, exact), p) < 1e-5
        distance, bound = total_variation(one_decision(p, q, chance), p), (q * (chance - exact).abs()).sum()
        assert distance <= bound + 1e-6
        distances.append(float(distance))
    assert 0.01 < sum(distances) / len(distances) < 0.4


def test_a_partition_keeps_the_drafters_proportions():
    p, q = torch.tensor([[[0.6, 0.1, 0.1, 0.2]], [[0.1, 0.6, 0.2, 0.1]]])
    group = torch.tensor([0, 0, 1, 1])
    chance = static_chance(p.expand(4, 1, 4), q.expand(4, 1, 4), torch.arange(4)[:, None], group)[:, 0]
    assert torch.equal(chance, torch.ones(4))
    torch.testing.assert_close(total_variation(one_decision(p[0], q[0], chance), p[0]), torch.tensor(0.6))


def test_static_groups_follow_the_codebook():
    codebook = torch.cat(
        [torch.randn(6, 2) * 0.1 + torch.tensor(centre) for centre in ([0.0, 0.0], [5.0, 0.0], [0.0, 5.0])]
    )
    group = static_groups(codebook, 6)
    assert group.view(3, 6).min(1).values.equal(group.view(3, 6).max(1).values)
    assert len(group.unique()) == 3
    assert len(static_groups(codebook, 18).unique()) == 1


@pytest.mark.parametrize("settings", [dict(), dict(top_k=3, guidance=Guidance(2.0)), dict(top_p=0.8, temperature=0.7)])
def test_groups_of_one_are_exact(settings):
    model, n = tabular(), TINY.DRAWS
    out = sample_grouped(model, many(1, n), noise=Noise(image_seeds(0, n)), group=1, window=4, **settings)
    assert check_distribution(out.tokens, joint_distribution(model, labels(1), **settings), 4).passed
    same = sample_jacobi(model, many(1, n), noise=Noise(image_seeds(0, n)), window=4, **settings)
    assert torch.equal(out.tokens, same.tokens)


@pytest.mark.parametrize("groups", ["dynamic", "static"])
def test_larger_groups_are_faster_and_further_from_the_distribution(groups):
    model, n = tabular(8, (2, 2), sharpness=1.0), TINY.DRAWS
    codebook = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    probs = joint_distribution(model, labels(1))
    rates, distances = [], []
    for group in (1, 2, 4):
        settings = dict(group=group, groups=groups, codebook=codebook, max_gap=1.0, max_distance=9.0, window=4)
        out = sample_grouped(model, many(1, n), noise=Noise(image_seeds(0, n)), **settings)
        rates.append(out.statistics.mean_tokens_per_pass)
        distances.append(max(position_distances(out.tokens, probs, 8)))
    assert rates[0] < rates[1] < rates[2]
    assert distances[0] < 0.015 < distances[2] < 0.35


def test_distant_codes_are_left_out():
    model, n = tabular(8, (2, 2)), 2000
    settings = dict(noise=Noise(image_seeds(0, n)), group=8, max_gap=1.0, window=4)
    far = sample_grouped(model, many(1, n), codebook=torch.arange(8.0)[:, None] * 10, **settings)
    assert torch.equal(far.tokens, sample_grouped(model, many(1, n), **(settings | dict(group=1))).tokens)


@pytest.mark.parametrize("groups", ["dynamic", "static"])
def test_replayed_passes_read_what_the_latest_call_gave(groups):
    model, runtime = transformer(5, (3, 4)), TINY.ReplayRuntime()
    for seed in (0, 100):
        settings = dict(window=6, group=3, codebook=torch.randn(5, 4), groups=groups)
        settings |= dict(noise=Noise(image_seeds(seed, 3)), guidance=Guidance(2.0))
        eager = sample_grouped(model, labels(seed % 3, 1, 2), **settings)
        replayed = sample_grouped(model, labels(seed % 3, 1, 2), runtime=runtime, **settings)
        assert torch.equal(eager.tokens, replayed.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(group=0), "group 0"),
        (dict(max_gap=0.0), "max_gap 0"),
        (dict(groups="fixed"), "'fixed'"),
        (dict(groups="static"), "codebook"),
        (dict(codebook=torch.zeros(3, 2)), "3 codes"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        sample_grouped(tabular(), labels(0), noise=Noise([0]), **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", ["dynamic", "static"])
def test_captured_ids_equal_eager_ids(groups):
    model, runtime = transformer(11, (4, 5)).cuda(), Runtime()
    settings = dict(guidance=Guidance(2.0), window=6, group=3, groups=groups, codebook=torch.randn(11, 4))
    for seed in range(4):
        noise, condition = Noise(image_seeds(seed, 3), "cuda"), labels(0, 1, 2).to("cuda")
        eager = sample_grouped(model, condition, noise=noise, runtime=EAGER, **settings).tokens
        assert torch.equal(eager, sample_grouped(model, condition, noise=noise, runtime=runtime, **settings).tokens)
