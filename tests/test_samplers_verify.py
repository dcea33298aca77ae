"""The accept/resample rule: recorded decisions, its distribution by enumeration, and planted bugs that are caught."""

import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise, Use, image_seeds
from visar.evaluate.exactness import (
    check_distribution,
    chi_squared,
    joint_distribution,
    noise_floor,
    position_distances,
)
from visar.generators.tabular import TabularGenerator
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.filtering import draw, filter_logits, filtered_probs
from visar.samplers.verify import acceptance, leading, one_hot, residual, row_at, verify


def cases(io, prefix):
    return sorted({key.split(".")[0] for key in io if key.startswith(prefix)})


def fields(io, case):
    return {key.split(".")[1]: value for key, value in io.items() if key.startswith(case + ".")}


def target_probs(case):
    guided = case["logits_uncond"] + (case["logits_cond"] - case["logits_uncond"]) * case["cfg_scale"]
    top_p = float(case["top_p"]) if "top_p" in case else 1.0
    return filtered_probs(guided, 1.0, int(case["top_k"]), top_p)


def verdict_on(case):
    """The verdict on a recorded window: slot 0 is the committed token, slot i is verified by row i - 1."""
    p, q, draft = target_probs(case), case["draft_probs"][:, 1:], case["draft_tokens"][:, 1:]
    emit = case["u_resample"][:, None].repeat(1, p.shape[1])
    emit[:, -1] = case["u_fresh"][:, -1]
    return p, q, draft, verify(p, q, draft, case["u_accept"][:, 1:], emit)


def test_recorded_windows(parity):
    io = parity("sjd").io
    for name in [*cases(io, "step"), *cases(io, "quirk")]:
        case = fields(io, name)
        p, q, draft, verdict = verdict_on(case)
        torch.testing.assert_close(p, case["target_probs"], atol=1e-5, rtol=0)
        torch.testing.assert_close(acceptance(p[:, :-1], q, draft), case["accept_prob"][:, 1:], atol=1e-5, rtol=0)
        assert torch.equal(verdict.count_B, case["first_reject"])
        if name == "quirk_top_p":
            continue
        for row, count in enumerate(verdict.count_B.tolist()):
            assert torch.equal(verdict.tokens_BL[row, :count], case["tokens_after"][row, :count])
            if count <= draft.shape[1]:
                mass = residual(p[row, count - 1], q[row, count - 1])
                torch.testing.assert_close(mass / mass.sum(), case["residual"][row], atol=1e-5, rtol=0)


def test_recorded_mistakes_are_not_made(parity):
    io = parity("sjd").io
    filtered = fields(io, "quirk_top_p")
    p, q, _, verdict = verdict_on(filtered)
    row = int(verdict.count_B) - 1
    mass = (p[0, row] - q[0, row]).clamp(min=0)
    torch.testing.assert_close(residual(p[0, row], q[0, row]), mass)
    assert (mass / mass.sum() - filtered["residual"][0]).abs().max() > 1e-3
    batch = fields(io, "quirk_batch")
    counts = verdict_on(batch)[3].count_B
    assert counts.min() == batch["n_commit"] and counts.max() > batch["n_commit"]


def test_grouped_windows_without_groups(parity):
    io = parity("gsd").io
    for name in cases(io, "step"):
        case = fields(io, name)
        p = target_probs(case)
        plain = acceptance(p[:, :-1], case["draft_probs"][:, 1:], case["draft_tokens"][:, 1:])
        torch.testing.assert_close(plain, case["accept_prob_plain"][:, 1:], atol=1e-5, rtol=0)


def test_rule_on_one_position():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.softmax(torch.randn(2, 6, generator=generator) * 1.5, -1)
    n = 200_000
    noise = Noise(image_seeds(1, n))
    uniform = noise.uniform(Use.DRAFT, 0, (4,))
    draft = draw(q.expand(n, -1), uniform[:, 0])[:, None]
    both = torch.stack([p, p.flip(0)]).expand(n, -1, -1)
    verdict = verify(both, q.expand(n, 1, -1), draft, uniform[:, 1:2], uniform[:, 2:4])
    counts = torch.bincount(verdict.tokens_BL[:, 0], minlength=6).double()
    assert chi_squared(counts, p.double()) > 1e-3
    overlap = torch.minimum(p, q).sum()
    assert abs(verdict.accepted_BK.float().mean() - overlap) < 0.004
    bonus = torch.bincount(verdict.tokens_BL[verdict.count_B == 2, 1], minlength=6).double()
    assert chi_squared(bonus, p.flip(0).double()) > 1e-3


def test_verifying_fewer_drafts_ends_with_a_token_of_the_target():
    p = torch.tensor([[[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]]).expand(2, -1, -1)
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).expand(2, -1, -1)
    draft = torch.tensor([[0, 1], [0, 1]])
    uniform = torch.full((2, 2), 0.1)
    verdict = verify(p, q, draft, uniform, torch.full((2, 3), 0.9), verified_B=torch.tensor([2, 0]))
    assert verdict.count_B.tolist() == [3, 1]
    assert verdict.tokens_BL[0].tolist() == [0, 1, 0] and verdict.tokens_BL[1, 0] == 1
    assert leading(torch.tensor([[True, False, True], [False, True, True]])).tolist() == [1, 0]


def test_residual_that_rounds_to_nothing_is_the_target():
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(p, p), p)
    assert acceptance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor(0)) == 0


def test_counters_may_be_tensors():
    noise, position = Noise([3, 4]), torch.tensor([[5, 6, 7]])
    for counter in (0, 9):
        wanted = noise.uniform(Use.DRAFT, position, (3,), counter)
        assert torch.equal(noise.uniform(Use.DRAFT, position, (3,), torch.tensor([[counter]])), wanted)


# ------------------------------------------------------------------------------- the check itself: planted mistakes
BUGS = ("none", "stale distribution", "filtered residual", "target instead of residual", "lockstep")


def drafted_loop(model, label, n, bug, *, window, filters, group=4, seed=0):
    """Speculative Jacobi decoding spelled out, with one mistake; "lockstep" commits the least of groups of rows."""
    condition = Condition(labels_BA=torch.full((n, 1), label))
    noise = Noise(image_seeds(seed, n))
    state = model.start(condition, OFF, ragged=True, window=window - 1)
    vocab, draft = model.config["vocab_size"], torch.zeros(n, window - 1, dtype=torch.int64)
    q = one_hot(draft, vocab)
    settings = (filters.get("temperature", 1.0), filters.get("top_k", 0), filters.get("top_p", 1.0))
    for counter in range(model.num_tokens * 4):
        if bool((state.length == model.num_tokens).all()):
            break
        p = filtered_probs(model.verify(state, draft), *settings)
        position = state.length[:, None] + torch.arange(window)
        fresh, accept, emit = noise.uniform(Use.DRAFT, position, (3,), counter).unbind(-1)
        accepted = accept[:, :-1] < acceptance(p[:, :-1], q, draft)
        num_accepted = leading(accepted)
        mass = residual(row_at(p, num_accepted), row_at(torch.cat([q, torch.zeros(n, 1, vocab)], 1), num_accepted))
        if bug == "filtered residual":
            mass = torch.softmax(filter_logits(mass.log(), **filters), -1)
        if bug == "target instead of residual":
            mass = row_at(p, num_accepted)
        emitted = draw(mass, row_at(emit[..., None], num_accepted)[:, 0])
        after = torch.cat([draft, draft[:, :1]], 1).scatter(1, num_accepted[:, None], emitted[:, None])
        count = num_accepted + 1
        redrawn = draw(p, fresh)
        later = torch.arange(window) > num_accepted[:, None]
        if bug == "lockstep":
            count = count.view(-1, group).amin(1, keepdim=True).expand(-1, group).reshape(-1)
            old_q = torch.cat([q, one_hot(after[:, -1:], vocab)], 1)
            emitted_here = torch.arange(window) == num_accepted[:, None]
            probs = torch.where(later[..., None] | emitted_here[..., None], p, old_q)
            following = torch.where(later, redrawn, after)
        else:
            probs, following = p, redrawn
        model.commit(state, after, count)
        index = count[:, None] + torch.arange(window - 1)
        empty = index >= window
        index = index.clamp(max=window - 1)
        draft = torch.where(empty, 0, following.gather(1, index))
        if bug == "stale distribution":
            q = torch.where(empty[..., None], one_hot(draft, vocab), torch.full_like(q, 1 / vocab))
        else:
            carried = probs.gather(1, index[..., None].expand(-1, -1, vocab))
            q = torch.where(empty[..., None], one_hot(draft, vocab), carried)
    return state.tokens[:, : model.num_tokens]


@pytest.fixture(scope="module")
def table() -> TabularGenerator:
    torch.manual_seed(0)
    return TabularGenerator(vocab_size=4, grid=(2, 2), num_classes=2, sharpness=1.5)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_mistakes_are_caught(table, bug):
    filters = {"top_p": 0.8} if bug in ("none", "filtered residual") else {}
    tokens = drafted_loop(table, 1, 20_000, bug, window=3, filters=filters)
    check = check_distribution(
        tokens, joint_distribution(table, Condition(labels_BA=torch.tensor([[1]])), **filters), 4
    )
    if bug == "none":
        assert check.passed, check
    else:
        assert not check.passed and check.distance > check.floor and check.p_value < 1e-6, check


def test_the_check_accepts_perfect_draws(table):
    condition = Condition(labels_BA=torch.tensor([[0]]))
    probs = joint_distribution(table, condition, Guidance(2.0), top_k=3)
    assert abs(float(probs.sum()) - 1) < 1e-6
    n = 20_000
    out = sample_ancestral(
        table,
        condition.rows(torch.zeros(n, dtype=torch.int64)),
        noise=Noise(image_seeds(0, n)),
        guidance=Guidance(2.0),
        top_k=3,
    )
    assert check_distribution(out.tokens, probs, 4).passed
    assert max(position_distances(out.tokens, probs, 4)) < 0.02
    assert noise_floor(probs, 100) > noise_floor(probs, 10_000) > 0
    with pytest.raises(ValueError, match="sequences"):
        check_distribution(out.tokens, probs[:-1], 4)


# ----------------------------------------------------------------------------------------------- the tabular model
def test_tabular_saves_and_loads(table, tmp_path):
    table.save_pretrained(tmp_path)
    assert torch.equal(TabularGenerator.from_pretrained(tmp_path).table, table.table)


def test_tabular_decoding_equals_teacher_forcing(table):
    condition = Condition(labels_BA=torch.tensor([[0], [1], [2]]))
    tokens = torch.tensor([[1, 2, 3, 0], [0, 0, 3, 2], [3, 1, 1, 1]])
    full = table(tokens, condition)
    state = table.start(condition, ragged=True, window=2)
    table.commit(state, tokens[:, :2], torch.tensor([1, 0, 2]))
    draft = torch.stack([tokens[0, 1:3], tokens[1, :2], tokens[2, 2:]])
    logits = table.verify(state, draft)
    for row, start in enumerate((1, 0, 2)):
        wanted = full[row, start : start + 3]
        torch.testing.assert_close(logits[row, : len(wanted)], wanted)
    with pytest.raises(ValueError, match="label 3"):
        table.start(Condition(labels_BA=torch.tensor([[3]])))
    with pytest.raises(ValueError, match="too large"):
        TabularGenerator(vocab_size=64, grid=(8, 8))
