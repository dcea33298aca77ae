"""Causal models over continuous tokens: plain draws and exact speculation, its law, its bounds, bad input."""

import math
import os

import pytest
import torch
from torch import nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Categorical, Continuous, Windowed
from visar.core.noise import Noise
from visar.generators.causal_continuous import CausalContinuous
from visar.generators.raster import RasterGPT
from visar.layers.heads.schedule import schedule
from visar.samplers import continuous_densities as densities
from visar.samplers import continuous_speculation as speculation
from visar.samplers.continuous import head_steps_of, sample_continuous
from visar.samplers.continuous_speculation import coupled, sample_continuous_speculation
from visar.samplers.index import SAMPLERS

DRAWS = int(os.environ.get("VISAR_EXACTNESS_DRAWS", "20000"))
HEADS = {
    "diffusion": dict(width=8, depth=1, prediction="velocity", variance="large", steps=6),
    "flow": dict(width=8, depth=1, solver="sde", steps=6, power=2.0),
    "mixture": dict(components=3),
}


def model(seed: int, head: str = "diffusion", channels: int = 2, spread: float = 0.4, **changes) -> CausalContinuous:
    arguments = {**HEADS[head], **changes.pop("head_arguments", {})}
    sizes: dict = dict(grid=(1, 3), width=8, num_layers=1, num_heads=2, hidden_width=24, num_classes=2)
    made = CausalContinuous(channels=channels, head=head, head_arguments=arguments, **{**sizes, **changes})
    torch.manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=spread)
    return made.eval().requires_grad_(False)


def near(target: CausalContinuous, distance: float) -> CausalContinuous:
    """A drafter: the target with its weights moved."""
    made = CausalContinuous.from_config(dict(target.config))
    state = {name: value + distance * torch.randn_like(value) for name, value in target.state_dict().items()}
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)


def classes(count: int) -> Condition:
    return Condition(labels_BA=torch.arange(count)[:, None] % 2)


def energy_statistic(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest Kolmogorov-Smirnov statistic of two samples over 24 fixed projections, in units of its 0.1 % point for
    one of them."""
    directions = torch.randn(24, first.shape[1], generator=torch.Generator().manual_seed(7))
    worst = 0.0
    for direction in directions:
        one, two = (first @ direction).sort().values, (second @ direction).sort().values
        both = torch.cat([one, two])
        gap = torch.searchsorted(one, both, right=True) / len(one) - torch.searchsorted(two, both, right=True) / len(
            two
        )
        worst = max(worst, float(gap.abs().max()))
    return worst / (1.95 * math.sqrt(1 / len(first) + 1 / len(second)))


# ------------------------------------------------------------------------------------------------- one transition
@pytest.mark.parametrize("distance", [0.3, 3.0])
def test_the_coupled_point_has_the_target_s_distribution_and_the_best_acceptance(distance):
    random = torch.Generator().manual_seed(0)
    noise, uniform = torch.randn(100_000, 2, generator=random), torch.rand(100_000, generator=random)
    draft, target, deviation = torch.tensor([0.1, -0.2]), torch.tensor([0.1 + 0.5 * distance, -0.2]), 0.5
    point, meets = coupled(draft, target, deviation, noise, uniform, draft + deviation * noise)
    for axis in range(2):
        law = torch.distributions.Normal(target[axis], deviation).cdf(point[:, axis].sort().values)
        assert float((law - torch.linspace(0, 1, 100_000)).abs().max()) < 1.95 / math.sqrt(100_000)
    assert abs(float((point[:, 0] * point[:, 1]).mean() - target[0] * target[1])) < 0.01
    bound = 1 + math.erf(-distance / 2 / math.sqrt(2))  # 1 - total variation
    assert float(meets.float().mean()) == pytest.approx(bound, abs=0.005)
    assert torch.equal(point[meets], (draft + deviation * noise)[meets])


@pytest.mark.parametrize(
    ("shift", "bound", "meeting", "stopping"), [(0.05, 0.841, 0.742, 0.477), (0.1, 0.689, 0.557, 0.228)]
)
def test_chains_that_meet_again_accept_far_more_than_those_that_stop(shift, bound, meeting, stopping):
    """Exact scores of one Gaussian in 16 dimensions, 25 transitions of the larger variance."""
    random = torch.Generator().manual_seed(0)
    chain, count = schedule(25), 8_000
    x = y = torch.randn(count, 16, generator=random)
    always = torch.ones(count, dtype=torch.bool)

    def mean(point: torch.Tensor, center: float, level: int) -> torch.Tensor:
        bar = float(chain.alphas_bar[level])
        variance = bar * 0.25 + 1 - bar
        clean = center + bar**0.5 * 0.25 / variance * (point - bar**0.5 * center)
        return float(chain.of_x0[level]) * clean + float(chain.of_xt[level]) * point

    for level in reversed(range(25)):
        deviation = float(chain.betas[level] if level else math.exp(chain.posterior_log_variance[0])) ** 0.5
        noise, uniform = torch.randn(count, 16, generator=random), torch.rand(count, generator=random)
        draft = mean(x, shift, level)
        x_next = draft + deviation * noise
        y, meets = coupled(draft, mean(y, 0.0, level), deviation, noise, uniform, x_next)
        x, always = x_next, always & meets
    accepted = float((x == y).all(-1).float().mean())
    assert accepted == pytest.approx(meeting, abs=0.02) and accepted <= bound + 0.02
    assert float(always.float().mean()) == pytest.approx(stopping, abs=0.02)
    assert float(y.mean()) == pytest.approx(0.0, abs=0.01)


# ------------------------------------------------------------------------------------------------- whole sampler
def draws_of(target, count, *, drafter=None, guidance=OFF, first=0, **settings) -> torch.Tensor:
    noise = Noise(list(range(first, first + count)))
    if drafter is None:
        return sample_continuous(target, classes(count), noise=noise, guidance=guidance, **settings).tokens.flatten(1)
    made = sample_continuous_speculation(
        target, classes(count), noise=noise, guidance=guidance, drafter=drafter, **settings
    )
    return made.tokens.flatten(1)


SHARP: dict = dict(guidance=Guidance(2.0, schedule="linear"), temperature=0.9)
CASES = [
    ("diffusion", dict(steps=4), 0.02),
    ("flow", dict(steps=3), 0.02),
]


@pytest.mark.parametrize(("head", "arguments", "distance"), CASES)
def test_speculation_has_the_target_s_distribution(head, arguments, distance):
    """Against as many plain draws of other seeds; guided, at another temperature, windows that end in the middle.

    100,000 draws: VISAR_EXACTNESS_DRAWS=100000.
    """
    target = model(0, head, grid=(1, 2), head_arguments=arguments)
    drafter = near(target, distance)
    plain = draws_of(target, DRAWS, first=10**7, **SHARP)
    seeds, settings = Noise(list(range(DRAWS))), dict(drafter=drafter, num_drafts=2, **SHARP)
    out = sample_continuous_speculation(target, classes(DRAWS), noise=seeds, **settings)
    assert energy_statistic(plain, out.tokens.flatten(1)) < 1.2
    assert 0.1 < out.statistics.acceptance_rate < 0.95
    assert energy_statistic(plain, draws_of(drafter, 4000, **SHARP)) > 1.5  # the test can tell the two apart


def uniforms_of(target: CausalContinuous, tokens: torch.Tensor) -> torch.Tensor:
    """Every number of tokens [B, N, C] through its conditional distribution function given those before it, [B, N C]:
    independent and uniform where the tokens have the target's distribution under SHARP."""
    condition = classes(len(tokens))
    hidden = [target.hidden(tokens, each) for each in (condition, target.null_condition(condition))]
    scale = torch.tensor(SHARP["guidance"].scales(target.num_tokens)).expand(len(tokens), -1)
    law = target.token_head.law(torch.cat(hidden), temperature=SHARP["temperature"], scale_BL=scale)
    apart = (tokens[..., None, :] - law.means) / law.deviations
    # Of a component given a token's first numbers: its weight times its density of them.
    densities = -0.5 * apart.square() - law.deviations.log()
    before = densities.cumsum(-1) - densities
    weights = (law.log_weights[..., None] + before).softmax(dim=-2)
    return (weights * torch.special.ndtr(apart)).sum(-2).flatten(1)


def uniform_statistic(uniforms: torch.Tensor) -> float:
    """Largest Kolmogorov-Smirnov distance from the uniform distribution, in units of its 0.1 % point: of every column,
    and of the sums of every two, modulo 1."""
    columns = list(uniforms.T)
    columns += [(one + two) % 1 for i, one in enumerate(columns) for two in columns[:i]]
    count = len(uniforms)
    gaps = [(each.sort().values - (torch.arange(count) + 0.5) / count).abs().max() for each in columns]
    return float(max(gaps)) * math.sqrt(count) / 1.95


def test_speculation_of_mixtures_has_the_distribution_that_is_known(monkeypatch):
    """By conditional distribution functions in closed form, without another sample."""
    monkeypatch.setattr(densities, "PROPOSALS", 12)  # those after a rejection go on over several passes
    target = model(0, "mixture", grid=(1, 2), head_arguments=dict(top_p=0.9))
    drafter = near(target, 0.6)
    plain, wrong = (draws_of(each, 4000, **SHARP).view(4000, 2, 2) for each in (target, drafter))
    assert uniform_statistic(uniforms_of(target, plain)) < 1.2
    assert uniform_statistic(uniforms_of(target, wrong)) > 3
    seeds, settings = Noise(list(range(DRAWS))), dict(drafter=drafter, num_drafts=2, **SHARP)
    out = sample_continuous_speculation(target, classes(DRAWS), noise=seeds, **settings)
    assert uniform_statistic(uniforms_of(target, out.tokens)) < 1.2
    assert out.statistics.counts["fallbacks"] == 0 and 0.05 < out.statistics.acceptance_rate < 0.95


def test_what_a_pass_proposes_does_not_change_the_draws(monkeypatch):
    target = model(0, "mixture")
    made = []
    for proposals in (16, 3):
        monkeypatch.setattr(densities, "PROPOSALS", proposals)
        torch.manual_seed(0)
        settings = dict(drafter=near(target, 0.4), num_drafts=3, **SHARP)
        made.append(sample_continuous_speculation(target, classes(500), noise=Noise(list(range(500))), **settings))
    torch.testing.assert_close(made[0].tokens, made[1].tokens, atol=1e-4, rtol=1e-4)
    assert made[0].statistics.counts["proposals"] == made[1].statistics.counts["proposals"]
    assert made[0].statistics.forward_passes["generator"] < made[1].statistics.forward_passes["generator"]


def test_mixtures_are_accepted_as_often_as_their_densities_overlap():
    """One place of one number: the overlap is an integral."""
    target = model(0, "mixture", channels=1, grid=(1, 1))
    drafter, draws = near(target, 0.4), 6_000
    condition = Condition(labels_BA=torch.zeros(draws, 1, dtype=torch.int64))
    settings = dict(noise=Noise(list(range(draws))), drafter=drafter, num_drafts=1)
    out = sample_continuous_speculation(target, condition, **settings)
    grid = torch.linspace(-15, 15, 60_001)[:, None]
    p, q = (
        each.token_head.law(each.features(each.start(classes(1)))[0]).log_prob(grid).exp()
        for each in (target, drafter)
    )
    overlap = float(torch.minimum(p, q).sum()) * 30 / 60_000
    assert float(p.sum()) * 30 / 60_000 == pytest.approx(1, abs=1e-3) and 0.2 < overlap < 0.95
    assert out.statistics.acceptance_rate == pytest.approx(overlap, abs=0.022)  # 3.5 deviations


def unreflected(draft, mean, deviation, noise, uniform, drafted):
    """Apart, the drafter's noise as it is."""
    point, meets = coupled(draft, mean, deviation, noise, uniform, drafted)
    return torch.where(meets[..., None], point, mean + deviation * noise), meets


def inverted(draft, mean, deviation, noise, uniform, drafted):
    """The ratio upside down."""
    meets = uniform.log() <= ((noise + (draft - mean) / deviation).square() - noise.square()).sum(-1) / 2
    apart = coupled(draft, mean, deviation, noise, uniform * 0 + 2, drafted)[0]
    return torch.where(meets[..., None], drafted, apart), meets


def stale(draft, mean, deviation, noise, uniform, drafted):
    """Another image's draft mean."""
    return coupled(draft.roll(1, 0), mean, deviation, noise, uniform, drafted)


def silent(draft, mean, deviation, noise, uniform, drafted):
    """Apart, no noise."""
    point, meets = coupled(draft, mean, deviation, noise, uniform, drafted)
    return torch.where(meets[..., None], point, mean), meets


def wide(draft, mean, deviation, noise, uniform, drafted):
    """Twice the deviation."""
    return coupled(draft, mean, 2 * deviation, noise, uniform, drafted)


@pytest.mark.parametrize("bug", [unreflected, inverted, stale, silent, wide], ids=lambda bug: bug.__name__)
def test_planted_bugs_of_chains_are_found(bug, monkeypatch, plain_chains):
    target, plain = plain_chains
    monkeypatch.setattr(speculation, "coupled", bug)
    found = draws_of(target, len(plain), drafter=near(target, 0.03), num_drafts=2, **SHARP)
    assert energy_statistic(plain, found) > 1.5


@pytest.fixture(scope="module")
def plain_chains():
    target = model(0, grid=(1, 2), head_arguments=dict(steps=3))
    return target, draws_of(target, 5000, first=10**7, **SHARP)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("accepted", lambda log_p, log_q, uniform: uniform.log() <= log_q - log_p),  # upside down
        ("accepted", lambda log_p, log_q, uniform: uniform.log() <= log_p - log_q + 2),  # too often
        ("taken", lambda log_p, log_q, uniform: uniform < 2),  # all of the target instead of what is left
        ("taken", lambda log_p, log_q, uniform: uniform < -torch.expm1(log_p - log_q)),  # what is left of the draft
    ],
    ids=["inverted", "generous", "target", "swapped"],
)
def test_planted_bugs_of_densities_are_found(name, bug, monkeypatch):
    target = model(0, "mixture", grid=(1, 2))
    monkeypatch.setattr(speculation if name == "accepted" else densities, name, bug)
    monkeypatch.setattr(densities, "MOST_PROPOSALS", 32)
    monkeypatch.setattr(densities, "PROPOSALS", 8)
    found = draws_of(target, 3000, drafter=near(target, 0.2), num_drafts=2, **SHARP)
    assert uniform_statistic(uniforms_of(target, found.view(3000, 2, 2))) > 1.5


def test_the_host_looks_only_where_an_image_may_be_complete(monkeypatch):
    target, looks = model(0, grid=(2, 5)), []
    least = torch.Tensor.min
    monkeypatch.setattr(torch.Tensor, "min", lambda self: looks.append(1) or least(self))
    settings: dict = dict(noise=Noise([0, 1]), num_drafts=3)
    out = sample_continuous_speculation(target, classes(2), drafter=near(target, 0.0), **settings)
    assert out.statistics.forward_passes["generator"] == 4 and len(looks) == 1
    looks.clear()
    out = sample_continuous_speculation(target, classes(2), drafter=near(target, 0.3), **settings)
    assert len(looks) < out.statistics.forward_passes["generator"] <= 10


@pytest.mark.parametrize("head", ["diffusion", "flow", "mixture"])
def test_a_drafter_that_is_the_target_is_always_accepted(head):
    target = model(0, head)
    settings: dict = dict(noise=Noise(list(range(5))), guidance=Guidance(1.5))
    out = sample_continuous_speculation(target, classes(5), drafter=near(target, 0.0), num_drafts=3, **settings)
    assert out.statistics.accepted == out.statistics.proposed == 15
    assert out.statistics.forward_passes == {"generator": 1, "drafter": 3}
    counts = out.statistics.counts
    if head == "mixture":
        assert counts == {"head_passes": 1, "drafter_head_passes": 3, "proposals": 0, "fallbacks": 0}
    else:
        assert counts["met"] == counts["transitions"] == 15 * 6 and counts["head_passes"] == 6
    plain = sample_continuous(target, classes(5), **settings)
    torch.testing.assert_close(out.tokens, plain.tokens, atol=1e-4, rtol=1e-4)


def test_the_head_s_transitions_fall_and_other_solvers_are_cheap():
    target, two = model(0, grid=(1, 5)), classes(2)
    noise = Noise([0, 1])
    falling = sample_continuous(target, two, noise=noise, head_steps=6, last_head_steps=2, head_schedule="cosine")
    wanted = [head_steps_of(step, 5, 6, 2, "cosine") for step in range(5)]
    assert falling.statistics.counts == {"head_passes": sum(wanted)} and wanted == sorted(wanted, reverse=True)
    same = sample_continuous(target, two, noise=noise, head_steps=6, last_head_steps=6)
    assert torch.equal(same.tokens, sample_continuous(target, two, noise=noise).tokens)
    assert not torch.equal(falling.tokens, same.tokens)
    settings: dict = dict(noise=noise, guidance=Guidance(1.5), head_steps=3)
    cheap = [sample_continuous(target, two, head_solver=solver, **settings) for solver in (None, "ddim", "dpm")]
    assert all(out.statistics.counts == {"head_passes": 15} for out in cheap)
    assert all(bool(out.tokens.isfinite().all()) for out in cheap) and not torch.equal(
        cheap[1].tokens, cheap[2].tokens
    )
    alone = sample_continuous(
        target, classes(1), noise=Noise([0]), head_solver="dpm", guidance=Guidance(1.5), head_steps=3
    )
    torch.testing.assert_close(alone.tokens[0], cheap[2].tokens[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [50, 38, 27, 16, 5]),
        ("cosine", [50, 43, 27, 11, 5]),
        ("two_stage", [50, 50, 50, 5, 5]),
        ("constant", [50] * 5),
    ],
)
def test_the_schedules_of_transitions(schedule, expected):
    assert [head_steps_of(step, 5, 50, 5, schedule) for step in range(5)] == expected
    assert head_steps_of(0, 1, 50, 5, schedule) == 50


@pytest.mark.parametrize("head", ["diffusion", "mixture"])
@pytest.mark.parametrize("speculative", [False, True])
def test_an_image_of_a_seed_is_the_same_alone_and_in_a_batch(head, speculative):
    target = model(0, head)
    drafter = near(target, 0.2) if speculative else None
    together = draws_of(target, 8, drafter=drafter, guidance=Guidance(1.7), **({"num_drafts": 2} if drafter else {}))
    sampler = sample_continuous_speculation if drafter else sample_continuous
    more = dict(drafter=drafter, num_drafts=2) if drafter else {}
    for row in (0, 5):
        condition = Condition(labels_BA=torch.tensor([[row % 2]]))
        alone = sampler(target, condition, noise=Noise([row]), guidance=Guidance(1.7), **more).tokens
        torch.testing.assert_close(alone.flatten(1)[0], together[row], atol=1e-5, rtol=1e-5)


def test_cached_decoding_is_teacher_forcing_and_chains_are_those_of_the_head():
    target = model(3, "mixture")
    out = sample_continuous(target, classes(4), noise=Noise(list(range(4))))
    hidden = target.hidden(out.tokens, classes(4))
    state = target.start(classes(4))
    for place in range(3):
        state.block = place
        torch.testing.assert_close(target.features(state)[:, 0], hidden[:, place], atol=1e-5, rtol=1e-5)
        target.append(state, out.tokens[:, place : place + 1])
    assert out.statistics.counts == {"head_passes": 3} and out.statistics.forward_passes == {"generator": 3}
    log_prob = target.log_prob(out.tokens, classes(4))
    assert log_prob.shape == (4, 3) and bool(log_prob.isfinite().all())
    with pytest.raises(ValueError, match="head 'diffusion' has no density"):
        model(0).log_prob(out.tokens, classes(4))


def test_capabilities_and_the_end_by_a_callback():
    target, discrete = (
        model(0),
        RasterGPT(vocab_size=8, grid=(1, 3), width=16, num_layers=1, num_heads=2, hidden_width=24),
    )
    assert isinstance(target, Continuous) and not isinstance(target, Categorical | Windowed)
    assert not isinstance(discrete, Continuous)
    fitting = {name for name, entry in SAMPLERS.items() if entry.fits(target)}
    assert fitting == {"continuous", "continuous_speculation"}
    out = sample_continuous(target, classes(2), noise=Noise([0, 1]), callback=lambda done, tokens: done == 2)
    assert out.tokens.shape == (2, 2, 2)
    drafted = sample_continuous_speculation(
        target, classes(2), noise=Noise([0, 1]), drafter=near(target, 0.0), num_drafts=1,
        callback=lambda done, tokens: done == 2,
    )  # fmt: skip
    assert drafted.tokens.shape == (2, 2, 2)


def test_bad_input():
    target = model(0)
    noise, two = Noise([0, 1]), classes(2)
    for call, says in (
        (lambda: sample_continuous(target, two, noise=noise, head_steps=0), r"head_steps 0; needed: 2 \.\.\. 1000"),
        (lambda: sample_continuous(target, two, noise=noise, temperature=-1.0), "temperature -1"),
        (
            lambda: sample_continuous(target, two, noise=noise, head_solver="heun"),
            "head_solver 'heun' is not defined for a GaussianDiffusionHead; choose ancestral, ddim, dpm",
        ),
        (
            lambda: sample_continuous(model(0, "mixture"), two, noise=noise, head_solver="ddim"),
            "head_solver 'ddim' is not defined for a MixtureHead; it draws a token in one way: leave it out",
        ),
        (
            lambda: sample_continuous(target, two, noise=noise, head_solver="dpm", temperature=0.9),
            "temperature 0.9; head_solver dpm adds no noise",
        ),
        (
            lambda: sample_continuous(target, two, noise=noise, last_head_steps=2, head_schedule="constant"),
            "head_schedule constant has head_steps alone, 6 here",
        ),
        (
            lambda: sample_continuous(target, two, noise=noise, head_schedule="step"),
            "head_schedule 'step'; choose linear, cosine, two_stage, constant",
        ),
        (
            lambda: sample_continuous(target, two, noise=noise, guidance=Guidance((2.0, 1.0))),
            "2 guidance scales for 3 blocks",
        ),
        (lambda: sample_continuous_speculation(target, two, noise=noise), "needs drafter"),
        (lambda: draws_of(target, 2, drafter=near(target, 0.1), num_drafts=0), "num_drafts 0"),
        (lambda: draws_of(target, 2, drafter=near(target, 0.1), temperature=0.0), "needs noise in every transition"),
        (lambda: draws_of(target, 2, drafter=model(1, channels=3)), "made for different tokenizers"),
        (lambda: draws_of(target, 2, drafter=model(1, "flow")), "has other transitions than the model's"),
        (
            lambda: draws_of(model(0, head_arguments={"variance": "learned"}), 2, drafter=target),
            "a GaussianDiffusionHead with these settings cannot be verified",
        ),
        (
            lambda: draws_of(model(0, "flow", head_arguments={"solver": "euler"}), 2, drafter=target),
            "cannot be verified",
        ),
        (lambda: draws_of(model(0, "mixture"), 2, drafter=target), "cannot be verified"),
        (lambda: model(0, head_draws=0), "head_draws 0"),
        (lambda: CausalContinuous(head="x"), "head 'x'; choose one of diffusion, flow, mixture, energy"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
