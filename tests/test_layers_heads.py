"""Heads of continuous tokens: MAR's diffusion against its recorded values, laws of draws, rounding, bad settings."""

import math

import pytest
import torch
from torch import nn

from visar.core.interface import DensityHead, TokenHead
from visar.layers.heads.diffusion import GaussianDiffusionHead
from visar.layers.heads.flow import FlowHead
from visar.layers.heads.mixture import MixtureHead
from visar.layers.heads.schedule import schedule
from visar.layers.heads.solvers import flow_scheduler, noisiest_level

CLOSE = dict(atol=1e-5, rtol=1e-5)


def released(parity, **changes) -> tuple[dict, dict, GaussianDiffusionHead]:
    folder = parity("mar")
    sizes = folder.config["constructor"]
    spacing = sizes["num_sampling_steps"]
    head = GaussianDiffusionHead(
        sizes["vae_embed_dim"] * sizes["patch_size"] ** 2,
        sizes["decoder_embed_dim"],
        sizes["diffloss_w"],
        sizes["diffloss_d"],
        **{"steps": int(spacing.removeprefix("ddim")), "strided": spacing.startswith("ddim"), **changes},
    ).eval()
    prefix = "model_ema.diffloss.net."
    state = {key.removeprefix(prefix): value for key, value in folder.checkpoint().items() if key.startswith(prefix)}
    head.net.load_state_dict(state)
    return folder.config, folder.io, head


# ------------------------------------------------------------------------------------------------------------ parity
def test_parity_of_schedules(parity):
    config, io, head = released(parity)
    names = {
        "train1000": schedule(1000),
        f"resp{config['long_respacing']}": schedule(int(config["long_respacing"])),
        f"resp_{config['constructor']['num_sampling_steps']}": schedule(head.steps, head.strided),
    }
    for name, chain in names.items():
        assert chain.times == io[f"diff.{name}.timestep_map"].tolist()
        for key, values in (
            ("betas", chain.betas),
            ("alphas_cumprod", chain.alphas_bar),
            ("posterior_log_variance_clipped", chain.posterior_log_variance),
            ("posterior_mean_coef1", chain.of_x0),
            ("posterior_mean_coef2", chain.of_xt),
        ):
            if f"diff.{name}.{key}" in io:
                torch.testing.assert_close(torch.from_numpy(values), io[f"diff.{name}.{key}"], rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_parity_of_the_network_and_one_transition(parity):
    _, io, head = released(parity)
    torch.testing.assert_close(head.net(io["head.x"], io["head.t"], io["head.c"]), io["head.out"], **CLOSE)
    rows = len(io["head.x"]) // 2
    both, scale = torch.cat([io["head.x"][:rows]] * 2), io["head.cfg_scale"]
    output = head.net(both, io["head.t"], io["head.c"])
    mixed, share = output.split(head.channels, dim=-1)
    conditional, null = mixed.chunk(2)
    combined = null + scale * (conditional - null)
    expected = io["head.cfg_out"]
    torch.testing.assert_close(torch.cat([torch.cat([combined] * 2), share], dim=-1), expected, **CLOSE)
    for row, level in enumerate(io["pmv.t_index"].tolist()):
        one = slice(row, row + 1)
        mean, deviation = head.transition(io["head.x"][one], head.steps - 1 - level, io["head.c"][one])
        torch.testing.assert_close(mean, io["pmv.mean"][one], **CLOSE)
        torch.testing.assert_close(deviation.square(), io["pmv.variance"][one], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["short", "long"])
@pytest.mark.parametrize("guidance", ["nocfg", "cfg"])
def test_parity_of_draws(parity, spacing, guidance):
    config = parity("mar").config
    changes = {} if spacing == "short" else {"steps": int(config["long_respacing"]), "strided": False}
    _, io, head = released(parity, **changes)
    case = {key: io[f"sample_{spacing}_{guidance}.{key}"] for key in ("z", "noise_init", "noise_steps", "latent")}
    noises = [case["noise_init"], *case["noise_steps"]]
    scale = None if guidance == "nocfg" else io[f"sample_{spacing}_cfg.cfg"].expand(len(case["latent"]), 1)
    tokens = head.draw(
        case["z"][:, None],
        lambda number: noises[number][:, None],
        temperature=float(io[f"sample_{spacing}_{guidance}.temperature"]),
        scale_BL=scale,
    )[:, 0]
    error = (tokens - case["latent"]).abs().max() / case["latent"].abs().max().clamp(min=1.0)
    assert float(error) < 1e-5


# ---------------------------------------------------------------------------------------------------------- laws
class Exact(nn.Module):
    """In place of the network: what the best one would say of a standard deviation `deviation` around `mean`."""

    def __init__(self, head, mean: float, deviation: float) -> None:
        super().__init__()
        self.head, self.mean, self.deviation = head, mean, deviation

    def forward(self, x, time, features):
        if isinstance(self.head, FlowHead):
            t = time[..., None] / 1000
            signal, spread = 1 - t, t
        else:
            bar = torch.from_numpy(schedule(1000).alphas_bar).float()[time.long()][..., None]
            signal, spread = bar.sqrt(), (1 - bar).sqrt()
        variance = signal**2 * self.deviation**2 + spread**2
        clean = self.mean + signal * self.deviation**2 / variance * (x - signal * self.mean)
        noise = (x - signal * clean) / spread
        if isinstance(self.head, FlowHead):
            return clean if self.head.prediction == "token" else noise - clean
        out = noise if self.head.prediction == "noise" else signal * noise - spread * clean
        return torch.cat([out, torch.zeros_like(out)], -1) if self.head.variance == "learned" else out


def name_of(head) -> str:
    return f"{head.prediction}-{getattr(head, 'variance', None) or head.solver}-{head.steps}"


HEADS = [
    GaussianDiffusionHead(2, 4, 8, 1, prediction=prediction, variance=variance, steps=steps)
    for prediction, variance, steps in (
        ("noise", "learned", 100),
        ("noise", "large", 200),
        ("velocity", "large", 200),
        ("velocity", "small", 200),
    )  # fmt: skip
] + [
    FlowHead(2, 4, 8, 1, prediction="velocity", solver="euler", steps=100),
    FlowHead(2, 4, 8, 1, prediction="token", solver="heun", steps=30),
    FlowHead(2, 4, 8, 1, prediction="velocity", solver="sde", steps=200, power=2.0),
]


@torch.no_grad()
@pytest.mark.parametrize(
    "head", HEADS, ids=lambda head: f"{head.prediction}-{getattr(head, 'variance', '')}{head.steps}"
)
def test_chains_of_exact_networks_end_in_their_distribution(head):
    """Mean and deviation of 20,000 draws, within what the number of steps allows."""
    original, head.net = head.net, Exact(head, 0.7, 0.5)
    random = torch.Generator().manual_seed(0)
    tokens = head.draw(torch.zeros(20_000, 1, 4), lambda number: torch.randn(20_000, 1, 2, generator=random))
    head.net = original
    assert float(tokens.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(tokens.std()) == pytest.approx(0.5, rel=0.04)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_solvers_of_the_probability_flow_end_in_the_distribution_in_few_steps(solver, prediction):
    """Of a Gaussian the flow is linear: draws are the first point, moved and scaled, up to the solver's error."""
    head = GaussianDiffusionHead(2, 4, 8, 1, prediction=prediction, variance="learned")
    head.net = Exact(head, 0.7, 0.5)
    first = torch.randn(2000, 1, 2, generator=torch.Generator().manual_seed(0))
    errors = {}
    for steps in (5, 10, 20, 40):
        tokens = head.draw(torch.zeros(2000, 1, 4), lambda number: first, steps=steps, solver=solver)
        errors[steps] = float((tokens - (0.7 + 0.5 * first)).abs().mean())
    assert errors[40] < 0.01 if solver == "dpm" else errors[40] < 0.03
    assert errors[5] > 2 * errors[20] > 2 * errors[40] - 1e-3
    assert errors[10] < (0.05 if solver == "dpm" else 0.12)


@torch.no_grad()
def test_solvers_are_guided_and_begin_where_noise_predictions_can_be_divided():
    head = GaussianDiffusionHead(2, 4, 8, 1, variance="large")
    torch.manual_seed(0)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    features, first = torch.randn(6, 2, 4), torch.randn(3, 2, 2)
    for solver in head.silent_solvers:
        draw = dict(steps=4, solver=solver)
        plain = head.draw(features[:3], lambda number: first, **draw)
        one, three = (
            head.draw(features, lambda number: first, scale_BL=torch.full((3, 2), scale), **draw)
            for scale in (1.0, 3.0)
        )
        torch.testing.assert_close(one, plain, atol=1e-4, rtol=1e-4)
        assert float((three - one).abs().max()) > 0.01
        for steps in (1, 2, 7, 50, 1000):
            levels = flow_scheduler(solver, "noise", steps).timesteps.tolist()
            assert len(levels) == steps and levels == sorted(levels, reverse=True)
            assert levels[0] <= noisiest_level() + 4 and min(levels) >= 0
    alpha_bar = schedule(1000).alphas_bar
    assert 0.5 * math.log(alpha_bar[noisiest_level()] / (1 - alpha_bar[noisiest_level()])) >= -5.1


@torch.no_grad()
def test_a_draw_may_take_another_solver_of_a_flow():
    head = FlowHead(2, 4, 8, 1, solver="euler", steps=4)
    head.net = Exact(head, 0.7, 0.5)
    noises = torch.randn(5, 20_000, 1, 2, generator=torch.Generator().manual_seed(0))
    features = torch.zeros(20_000, 1, 4)
    made = {solver: head.draw(features, lambda number: noises[number], solver=solver) for solver in head.solvers}
    assert torch.equal(made["euler"], head.draw(features, lambda number: noises[number]))
    ideal = 0.7 + 0.5 * noises[0]
    assert (made["heun"] - ideal).abs().mean() < 0.5 * (made["euler"] - ideal).abs().mean()
    other = FlowHead(2, 4, 8, 1, solver="sde", steps=4)
    other.net = head.net
    assert torch.equal(made["sde"], other.draw(features, lambda number: noises[number]))
    assert head.solvers == ("euler", "heun", "sde") and other.solvers == ("sde", "euler", "heun")


@torch.no_grad()
def test_guidance_of_a_mixture_is_linear_in_its_parameters():
    head, features = MixtureHead(2, 3, components=4, floor=0.1), torch.randn(10, 1, 3)
    scale, noise = torch.full((5, 1), 2.5), torch.randn(5, 1, 2)
    mixed = features[5:] + 2.5 * (features[:5] - features[5:])
    for found, expected in zip(head.parameters_of(features, scale), head.parameters_of(mixed), strict=True):
        torch.testing.assert_close(found, expected)
    drawn = head.draw(features, lambda number: noise, scale_BL=scale, temperature=0.5)
    law = head.law(features, scale_BL=scale, temperature=0.5)
    torch.testing.assert_close(drawn, law.draw(noise[..., 0], noise))
    torch.testing.assert_close(law.deviations, 0.5 * head.parameters_of(mixed)[2])
    assert isinstance(head, DensityHead)
    assert all(isinstance(each, TokenHead) and not isinstance(each, DensityHead) for each in HEADS)


@pytest.mark.parametrize(
    "head", HEADS, ids=lambda head: f"{head.prediction}-{getattr(head, 'variance', '')}{head.steps}"
)
def test_the_exact_network_has_the_least_loss(head):
    original, losses = head.net, []
    for off in (0.0, 0.4):
        random = torch.Generator().manual_seed(0)
        tokens = 0.7 + 0.5 * torch.randn(20_000, 2, generator=random)
        head.net = Exact(head, 0.7 + off, 0.5)
        losses.append(float(head.loss(torch.zeros(20_000, 4), tokens, random).mean()))
    head.net = original
    assert losses[0] < 0.98 * losses[1]


@torch.no_grad()
def test_a_mixture_draws_what_its_density_says():
    torch.manual_seed(1)
    head = MixtureHead(1, 3, components=3, floor=0.05)
    nn.init.normal_(head.output.weight, std=1.5)
    features = torch.randn(3)
    grid = torch.linspace(-12, 12, 24_001)[:, None]
    density = head.log_prob(features.expand(len(grid), 3), grid).exp()
    assert float(density.sum() * 24 / 24_000) == pytest.approx(1.0, abs=1e-3)
    draws = (
        head.draw(features.expand(100_000, 1, 3), lambda number: torch.randn(100_000, 1, 1)).flatten().sort().values
    )
    law = torch.cumsum(density, 0) * 24 / 24_000
    at = law[torch.searchsorted(grid[:, 0], draws).clamp(max=24_000)]
    distance = (at - torch.linspace(0, 1, len(draws))).abs().max()
    assert float(distance) < 1.95 / math.sqrt(len(draws)) + 1e-3  # Kolmogorov-Smirnov, 0.1 %
    log_weights, means, deviations = head.parameters_of(features)
    weights = log_weights.exp()
    mean = float((weights * means[:, 0]).sum())
    variance = float((weights * (deviations[:, 0] ** 2 + means[:, 0] ** 2)).sum()) - mean**2
    assert float(draws.mean()) == pytest.approx(mean, abs=0.03) and float(draws.var()) == pytest.approx(
        variance, rel=0.03
    )
    assert bool((deviations >= 0.05).all())
    nats = -float((density * density.clamp(min=1e-30).log()).sum() * 24 / 24_000)
    assert float(head.loss(features.expand(100_000, 3), draws[:, None], torch.Generator()).mean()) == pytest.approx(
        nats, abs=0.02
    )


@torch.no_grad()
def test_components_outside_top_p_are_never_drawn():
    head = MixtureHead(2, 3, components=4, top_p=0.6)
    features, noise = torch.randn(500, 1, 3) * 3, torch.randn(500, 1, 2)
    mean, _ = head.transition(noise, 0, features)
    log_weights, means, _ = head.parameters_of(features)
    ordered, order = log_weights.exp().sort(-1, descending=True)
    likely = (ordered.cumsum(-1) - ordered) < 0.6
    allowed = means.gather(-2, order[..., None].expand(-1, -1, -1, 2))
    found = ((mean[..., None, :] == allowed).all(-1) & likely).any(-1)
    assert bool(found.all())


@torch.no_grad()
def test_rounding_hurts_noise_prediction_at_the_noisy_end():
    """Error of x_0 after one pass whose output is rounded to bfloat16, at both ends of the chain: the table of MMAR's
    argument for velocities."""
    errors = {}
    for prediction in ("noise", "velocity"):
        head = GaussianDiffusionHead(2, 4, 8, 1, prediction=prediction, variance="large")
        chain = schedule(100)
        for name, level in (("noisy", len(chain.times) - 1), ("clean", 0)):
            bar = float(chain.alphas_bar[level])
            clean, noise = torch.randn(4000, 2), torch.randn(4000, 2)
            x = bar**0.5 * clean + (1 - bar) ** 0.5 * noise
            output = noise if prediction == "noise" else bar**0.5 * noise - (1 - bar) ** 0.5 * clean
            errors[prediction, name] = float((head.clean(x, output.bfloat16().float(), bar) - clean).abs().mean())
    assert errors["noise", "noisy"] > 100 * errors["velocity", "noisy"]
    assert errors["noise", "clean"] < 1e-3 and errors["velocity", "clean"] < 1e-3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: GaussianDiffusionHead(2, 4, 8, 1, prediction="x"), "prediction 'x'; choose noise or velocity"),
        (lambda: GaussianDiffusionHead(2, 4, 8, 1, variance="x"), "variance 'x'; choose learned, large or small"),
        (lambda: GaussianDiffusionHead(2, 4, 8, 1, steps=0), r"head_steps 0; needed: 2 \.\.\. 1000"),
        (lambda: GaussianDiffusionHead(2, 4, 8, 1, steps=1001), r"head_steps 1001; needed: 2 \.\.\. 1000"),
        (lambda: GaussianDiffusionHead(2, 4, 8, 1, steps=300, strided=True), "no whole stride"),
        (lambda: FlowHead(2, 4, 8, 1, solver="rk4"), "solver 'rk4'; choose euler, heun or sde"),
        (lambda: FlowHead(2, 4, 8, 1, prediction="noise"), "prediction 'noise'; choose velocity or token"),
        (lambda: MixtureHead(2, 4, components=0), "components 0"),
        (lambda: MixtureHead(2, 4).check_steps(5), "head_steps 5; a mixture is drawn in 1"),
        (
            lambda: FlowHead(2, 4, 8, 1).check_steps(5, "dpm"),
            "head_solver 'dpm' is not defined for a FlowHead; choose",
        ),
        (
            lambda: GaussianDiffusionHead(2, 4, 8, 1, steps=50, strided=True).check_steps(300, "ancestral"),
            "no whole stride",
        ),
    ],
)
def test_bad_settings(call, says):
    with pytest.raises(ValueError, match=says):
        call()
