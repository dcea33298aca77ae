"""Continuous speculative decoding of masked models: parity with the released code, its rules, seeds, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visar.checkpoints.mar import convert_generator
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.core.runtime import Session
from visar.generators.masked import MaskedGenerator
from visar.samplers import masked_speculation as csp
from visar.samplers.masked import masked_after, strengths
from visar.samplers.masked_speculation import sample_masked_speculation

PROCESSED = ("narrow_T1", "narrow_T42", "wide_T1", "wide_T42", "same_law_fixed_below_1")


def released(folder, which: str) -> MaskedGenerator:
    name = "checkpoint.safetensors" if which == "target" else "checkpoint-draft.safetensors"
    state = {key.removeprefix("model_ema."): value for key, value in folder.checkpoint(name).items()}
    sizes = folder.config[which]
    config, converted = convert_generator({"model_ema": state}, num_heads=sizes["encoder_num_heads"])
    spacing = sizes["num_sampling_steps"]
    config["head_arguments"] |= dict(steps=int(spacing.removeprefix("ddim")), strided=spacing.startswith("ddim"))
    model = MaskedGenerator(**config).eval()
    model.load_state_dict(converted)
    return model


# ------------------------------------------------------------------------------------------------------------ parity
def test_parity_of_the_published_and_the_released_rule(parity):
    io = parity("cspd").io
    near: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)  # of logarithms in the hundreds
    for name in PROCESSED:
        target, draft = (
            csp.ChainEnd(*(io[f"proc_{name}.{model}_{part}"] for part in ("mean", "std", "log_var")))
            for model in ("x2", "x1")
        )
        case = {key.split(".")[1]: value for key, value in io.items() if key.startswith(f"proc_{name}.")}
        log_ratio = csp.reference_log_ratio(case["x"], target, draft, float(case["inner_temperature"]))
        torch.testing.assert_close(log_ratio, case["ratio"].log(), **near)
        accepted = case["u"] < log_ratio.exp()
        assert torch.equal(accepted, case["accept"])
        probe = target.mean + target.std * case["probe_noise"]
        alpha = csp.residual_chance(csp.reference_log_ratio(probe, target, draft, 1.0))
        torch.testing.assert_close(alpha, case["probe_alpha"], **near)
        exactly = [csp.ChainEnd(*(each.double() for each in vars(end).values())) for end in (target, draft)]
        log_paper = csp.paper_log_ratio(case["x"].double(), *exactly)
        torch.testing.assert_close(log_paper, case["paper_log_ratio"], rtol=1e-5, atol=1e-5)
        alpha = csp.residual_chance(csp.paper_log_ratio(probe.double(), *exactly))
        torch.testing.assert_close(alpha, case["paper_alpha"], **near)
        if len(case["prop_u"]):
            proposal = target.mean + target.std * case["prop_noise"]
            chance = csp.residual_chance(csp.reference_log_ratio(proposal, target, draft, 1.0))
            index, found = csp.last_taken(chance, case["prop_u"])
            resampled = proposal[index, torch.arange(len(index))] * found[:, None]  # the code leaves zeros
            out = torch.where(accepted[:, None], case["x"], resampled)
            torch.testing.assert_close(out, case["out"], rtol=1e-5, atol=1e-5)
            assert bool(found.all()) == (name != "same_law_fixed_below_1")


@torch.no_grad()
def test_parity_of_whole_runs(parity):
    """Orders, noises, uniforms and proposals as recorded; tokens, chain ends and decisions must come out."""
    folder = parity("cspd")
    io, models = folder.io, [released(folder, which) for which in ("target", "draft")]
    for name, run in folder.config["runs"].items():
        labels, steps = torch.tensor(run["labels"])[:, None], run["num_iter"]
        noises, between = io[f"{name}.noise"], io[f"{name}.inter_noise"]
        rows, verified = torch.arange(len(labels))[:, None], iter(range(100))
        seen: list[int] = []

        def chain(places: Tensor, number: int, rows=rows, noises=noises, between=between) -> Tensor:
            levels = between.shape[2]
            return noises[rows, places] if number == 0 else between[rows, places, levels - number]

        def uniform(step: int, places: Tensor, name=name, verified=verified, seen=seen) -> Tensor:
            seen.append(next(verified))
            return io[f"{name}.v{seen[-1]}.u"].view(places.shape)

        def proposals(step: int, places: Tensor, name=name, seen=seen) -> tuple[Tensor, Tensor]:
            case = {part: io[f"{name}.v{seen[-1]}.prop_{part}"] for part in ("noise", "u")}
            count = len(case["u"])
            return case["noise"].view(count, *places.shape, -1), case["u"].view(count, *places.shape)

        guidance = Guidance(run["cfg"], schedule=run["cfg_schedule"])
        made = csp._Run(
            *models, Session(capture=False), io[f"{name}.orders"], csp.Draws(chain, uniform, proposals),
            strengths(guidance, models[0].num_tokens, steps),
        )  # fmt: skip
        made.start(Condition(labels_BA=labels), run["cfg"] != 1.0)
        passes = made.windows(run["num_draft"], run["ratio"], "reference", run["temperature"], None, None)
        stats, kinds = folder.config["stats"][name], io[f"{name}.events"][:, 0].tolist()
        assert passes == (kinds.count(0) + kinds.count(2), kinds.count(1))
        assert len(seen) == stats["verifications"] and made.totals[1] == stats["accepted"]
        side = models[0].config["grid"]
        final = made.states[0].tokens.transpose(1, 2).unflatten(2, side)
        expected = io[f"{name}.final_latent"]
        assert float((final - expected).abs().max() / expected.abs().max().clamp(min=1.0)) < 1e-4, name


# --------------------------------------------------------------------------------------------------------- the rules
def test_rounds_of_the_released_code_go_on_for_all_and_overwrite():
    chance = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    uniform = torch.full((3, 3), 0.5)
    assert [each.tolist() for each in csp.first_taken(chance, uniform)] == [[0, 1, 0], [True, True, False]]
    assert [each.tolist() for each in csp.last_taken(chance, uniform)] == [[2, 1, 0], [True, True, False]]
    index, found = csp.last_taken(chance[:, :2], uniform[:, :2])
    assert index.tolist() == [0, 1] and bool(found.all())


def tiny(seed: int, distance: float = 0.0, **changes) -> MaskedGenerator:
    sizes: dict[str, Any] = dict(
        channels=2, grid=(2, 5), width=16, encoder_layers=1, decoder_layers=1, num_heads=2, buffer_size=2,
        head_arguments=dict(width=8, depth=1, prediction="velocity", variance="large", steps=4), num_classes=3,
    )  # fmt: skip
    model = MaskedGenerator(**{**sizes, **changes})
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.data += distance * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def classes(count: int) -> Condition:
    return Condition(labels_BA=torch.arange(count)[:, None] % 3)


@pytest.mark.parametrize("rule", ["paper", "reference"])
def test_counts_and_a_drafter_that_is_the_target(rule):
    target = tiny(0)
    settings: dict = dict(noise=Noise(list(range(6))), guidance=Guidance(1.5), steps=6, num_drafts=2, rule=rule)
    out = sample_masked_speculation(target, classes(6), drafter=tiny(0, 0.3), target_share=0.1, **settings)
    # Step 0 is the model's own; steps 2, 4 and 5 verify.
    assert out.statistics.forward_passes == {"generator": 4, "drafter": 5}
    own = 10 - masked_after(10, 6)[0]
    assert out.statistics.proposed == 6 * (10 - own)
    assert out.statistics.counts["head_passes"] == 16 and bool((out.tokens != 0).all())
    same = sample_masked_speculation(target, classes(6), drafter=target, target_share=0.7, **settings)
    assert same.statistics.accepted == same.statistics.proposed > 0


def test_an_image_of_a_seed_does_not_depend_on_its_batch():
    target, drafter = tiny(0), tiny(0, 0.02)
    settings: dict = dict(drafter=drafter, steps=6, num_drafts=2, guidance=Guidance(1.5))
    together = sample_masked_speculation(target, classes(8), noise=Noise(list(range(8))), **settings).tokens
    for row in (0, 5):
        condition = Condition(labels_BA=torch.tensor([[row % 3]]))
        alone = sample_masked_speculation(target, condition, noise=Noise([row]), **settings).tokens
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


def test_bad_input():
    target, two, noise = tiny(0), classes(2), Noise([0, 1])
    flow = tiny(1, head="flow", head_arguments=dict(width=8, depth=1, steps=4))
    other = tiny(1, head_arguments=dict(width=8, depth=1, steps=5, variance="large"))
    for changed, says in (
        ({"drafter": None}, "needs drafter"),
        ({"rule": "exact"}, "rule 'exact'; choose paper or reference, both lossy"),
        ({"num_drafts": 0}, "num_drafts 0"),
        ({"target_share": 1.5}, "target_share 1.5"),
        ({"temperature": 0.0}, "temperature 0.0; the rules compare densities"),
        ({"drafter": tiny(1, channels=3)}, "made for different tokenizers"),
        ({"drafter": flow}, "a FlowHead with these settings has transitions without noise"),
        ({"drafter": other}, "other transitions than the model's"),
    ):
        with pytest.raises(ValueError, match=says):
            sample_masked_speculation(target, two, noise=noise, **{"drafter": tiny(1), **changed})
