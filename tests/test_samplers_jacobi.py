"""Speculative Jacobi decoding: recorded trajectories, the joint distribution, and replayed passes."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import EAGER, Runtime
from visar.evaluate.exactness import check_distribution, joint_distribution
from visar.generators.tabular import TabularGenerator
from visar.samplers.filtering import filtered_probs
from visar.samplers.jacobi import sample_jacobi
from visar.samplers.jacobi_drafts import COUPLINGS, INITIALS, guess, refresh, window_sizes
from visar.samplers.verify import one_hot, verify

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))
tabular, transformer, labels, many = TINY.tabular, TINY.transformer, TINY.labels, TINY.many

EVERYTHING = dict(guidance=Guidance(2.0), temperature=0.7, top_k=3, top_p=0.8)


def cases(system, prefix):
    """Recorded cases with their one-line notes."""
    io = system.io
    with safe_open(system.folder / "io.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["cases"])
    for name in sorted({key.split(".")[0] for key in io if key.startswith(prefix)}):
        yield notes[name], {key.split(".")[1]: value for key, value in io.items() if key.startswith(name + ".")}


# ------------------------------------------------------------------------------------------- recorded decisions
def test_recorded_carry(parity):
    for _, case in cases(parity("sjd"), "step"):
        q, draft = case["draft_probs"][:, 1:], case["draft_tokens"][:, 1:]
        p = case["target_probs"]
        emit = case["u_resample"][:, None].repeat(1, p.shape[1])
        emit[:, -1] = case["u_fresh"][:, -1]
        verdict = verify(p, q, draft, case["u_accept"][:, 1:], emit)
        fresh = refresh("none", p, q, draft, verdict, case["u_fresh"], emit)
        assert torch.equal(fresh, case["fresh_tokens"])
        count = int(verdict.count_B)
        assert torch.equal(fresh[:, count:], case["carry_tokens"])
        torch.testing.assert_close(p[:, count:], case["carry_probs"])


SCHEMES = {"random": "random", "repeat_horizon": "left", "sample_horizon": "left_mode"}


def test_recorded_guesses(parity):
    for note, case in cases(parity("sjd"), "init"):
        check_guess(case, SCHEMES[note.split(",")[0]])


def check_guess(case, initial):
    tokens = torch.cat([case["image_tokens"], case["carry_tokens"]], 1)
    known_probs = torch.cat([case["image_probs"], case["carry_probs"]], 1)
    vocab, known, new = known_probs.shape[-1], tokens.shape[1], case["init_tokens"].shape[1]
    position = known + torch.arange(new)[None]
    found, probs = guess(
        initial,
        position,
        torch.tensor([known]),
        int(case["row_width"]),
        torch.nn.functional.pad(tokens, (0, new)),
        known_probs,
        torch.tensor([0]),
        (case["random_guess"] + 0.5) / vocab,
        vocab,
    )
    assert torch.equal(found, case["init_tokens"]) and probs is None
    assert torch.equal(one_hot(found, vocab), case["init_probs"])


def test_recorded_trajectories(parity):
    """The peer's whole loop: its first pass carries no guesses, and its windows never shrink at the end."""
    for _, case in cases(parity("sjd"), "traj"):
        check_trajectory(case)


def check_trajectory(case):
    vocab, length, window = (int(case[name]) for name in ("vocab", "length", "window"))
    model = TabularGenerator(vocab_size=vocab, grid=(1, length), num_classes=1)
    model.table.data = torch.stack([case["table_cond"], case["table_uncond"]])[:, : model.table.shape[1]]
    state = model.start(labels(0), Guidance(float(case["cfg_scale"])), ragged=True, window=window)
    draft, q = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, vocab)
    passes = 0
    while int(state.length) < int(case["stop"]):
        if passes:
            empty = window - 1 - draft.shape[1]
            guessed = case["guess"][passes, window - empty :][None]
            draft, q = torch.cat([draft, guessed], 1), torch.cat([q, one_hot(guessed, vocab)], 1)
            last = state.tokens[0, int(state.length) - 1]
            assert case["pass_input"][passes].tolist() == [int(last), *draft[0].tolist()]
        p = filtered_probs(model.verify(state, draft), 1.0, int(case["top_k"]), 1.0)
        slots = p.shape[1]
        fresh_uniform = case["u_fresh"][passes, :slots][None].float()
        emit = case["u_resample"][passes].float().expand(1, slots).clone()
        emit[:, -1] = fresh_uniform[:, -1]
        verdict = verify(p, q, draft, case["u_accept"][passes, 1:slots][None].float(), emit)
        fresh = refresh("none", p, q, draft, verdict, fresh_uniform, emit)
        count = int(verdict.count_B)
        assert count == int(case["pass_commit"][passes])
        model.commit(state, verdict.tokens_BL, verdict.count_B)
        draft, q = fresh[:, count:], p[:, count:]
        passes += 1
    assert passes == int(case["nfe"])
    assert torch.equal(state.tokens[:, : int(case["stop"])], case["tokens"])


# ---------------------------------------------------------------------------------------- the joint distribution
def draws(model, label, count, seed=0, **settings):
    return sample_jacobi(model, many(label, count), noise=Noise(image_seeds(seed, count)), **settings)


def assert_exact(model, count, seed=0, **settings):
    sampled_settings = {k: settings[k] for k in ("guidance", "temperature", "top_k", "top_p") if k in settings}
    out = draws(model, 1, count, seed, **settings)
    check = check_distribution(
        out.tokens, joint_distribution(model, labels(1), **sampled_settings), model.config["vocab_size"]
    )
    assert check.passed, check
    return out


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize("settings", [{}, dict(guidance=Guidance(2.0)), EVERYTHING])
def test_distribution_by_window(window, settings):
    out = assert_exact(tabular(), TINY.DRAWS, window=window, **settings)
    assert sum(k * v for k, v in out.statistics.tokens_per_pass.items()) == 4 * TINY.DRAWS
    assert (out.statistics.mean_tokens_per_pass > 1.1) == (window > 1)


@pytest.mark.parametrize("initial", INITIALS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_distribution_by_guess_and_coupling(initial, coupling):
    assert_exact(tabular(3, (3, 2)), TINY.DRAWS, window=3, initial=initial, coupling=coupling, top_p=0.8)


@pytest.mark.parametrize("filters", [dict(top_k=2), dict(top_p=0.8), dict(temperature=0.7)])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_distribution_by_filter(filters, coupling):
    assert_exact(tabular(4, (2, 2), seed=1), TINY.DRAWS, window=4, coupling=coupling, initial="above", **filters)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_distribution_of_long_sequences(coupling):
    settings = dict(window=4, initial="above_law", guidance=Guidance(1.5, schedule="linear"))
    assert_exact(tabular(4, (3, 2), sharpness=1.0), 60_000, coupling=coupling, **settings)


@pytest.mark.parametrize("check_every", [1, 2])
def test_distribution_of_adaptive_windows(check_every):
    out = assert_exact(
        tabular(2, (4, 2)), TINY.DRAWS, window=7, adaptive=True, check_every=check_every, coupling="maximal"
    )
    assert max(out.statistics.tokens_per_pass) > 4
    assert window_sizes(16) == [4, 8, 16] and window_sizes(3) == [3]


@pytest.mark.parametrize("settings", [dict(coupling="none"), dict(coupling="maximal", **EVERYTHING)])
def test_distribution_of_a_transformer(settings):
    assert_exact(transformer(4, (2, 2)), TINY.DRAWS, window=3, initial="above", **settings)


# ------------------------------------------------------------------------------------------------ loops and errors


@pytest.mark.parametrize(
    "settings", [{}, dict(coupling="maximal", initial="above_law"), dict(coupling="gumbel"), dict(adaptive=True)]
)
def test_replayed_passes_read_what_the_latest_call_gave(settings):
    model, runtime = transformer(5, (3, 4)), TINY.ReplayRuntime()
    for seed in (0, 100, 0):
        arguments = dict(
            noise=Noise(image_seeds(seed, 3)), guidance=Guidance(2.0), window=6, check_every=3, **settings
        )
        condition = labels(seed % 3, 1, 2)
        eager = sample_jacobi(model, condition, **arguments)
        replayed = sample_jacobi(model, condition, runtime=runtime, **arguments)
        assert torch.equal(eager.tokens, replayed.tokens)
        assert eager.statistics.tokens_per_pass == replayed.statistics.tokens_per_pass


def test_looks_of_the_host_change_nothing():
    model = tabular(4, (3, 2))
    once, often = (draws(model, 0, 50, window=3, check_every=every) for every in (100, 1))
    assert torch.equal(once.tokens, often.tokens)
    assert once.statistics.forward_passes == often.statistics.forward_passes
    assert once.statistics.tokens_per_pass == often.statistics.tokens_per_pass


def test_statistics_and_callback():
    model, seen = transformer(4, (3, 2)), []
    out = sample_jacobi(
        model,
        labels(0, 1),
        noise=Noise([1, 2]),
        window=3,
        check_every=1,
        callback=lambda done, tokens: seen.append((done, tokens.clone())),
    )
    statistics = out.statistics
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == 6
    for done, tokens in seen:
        assert torch.equal(tokens[:, :done], out.tokens[:, :done])
        later = (tokens != out.tokens) & (tokens != 0)
        assert not later.any()
    assert sum(count * times for count, times in statistics.tokens_per_pass.items()) == 12
    assert 0 <= statistics.accepted <= statistics.proposed
    assert len(seen) == statistics.forward_passes["generator"] <= 6
    ancestral = draws(model, 0, 2, window=1).statistics
    assert ancestral.acceptance_rate is None and ancestral.tokens_per_pass == {1: 12}


def test_couplings_keep_more_drafts():
    model = transformer(16, (4, 6))
    settings = dict(window=16, temperature=1.5)
    rates = {c: draws(model, 0, 64, coupling=c, **settings).statistics.mean_tokens_per_pass for c in COUPLINGS}
    assert min(rates["maximal"], rates["gumbel"]) > rates["none"] + 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window=0), "window 0"),
        (dict(check_every=0), "check_every 0"),
        (dict(initial="below"), "'below'.*above"),
        (dict(coupling="strong"), "'strong'.*maximal"),
        (dict(top_p=0.0), "top_p"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        sample_jacobi(tabular(), labels(0), noise=Noise([0]), guidance=OFF, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [dict(), dict(coupling="maximal"), dict(coupling="gumbel"), dict(adaptive=True)])
def test_captured_ids_equal_eager_ids(settings):
    model, runtime = transformer(11, (4, 5)).cuda(), Runtime()
    for seed in range(4):
        arguments = dict(noise=Noise(image_seeds(seed, 3), "cuda"), guidance=Guidance(2.0), window=6, check_every=4)
        condition = labels(0, 1, 2).to("cuda")
        eager = sample_jacobi(model, condition, runtime=EAGER, **arguments, **settings)
        captured = sample_jacobi(model, condition, runtime=runtime, **arguments, **settings)
        assert torch.equal(eager.tokens, captured.tokens)
        assert eager.statistics.tokens_per_pass == captured.statistics.tokens_per_pass
