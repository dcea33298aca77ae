"""Drafted speculation, chains and trees: the joint distribution with every drafter, and replayed passes."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise, Use, image_seeds
from visar.core.runtime import EAGER, Runtime, Session
from visar.core.window import DraftTree, Window
from visar.evaluate.exactness import check_distribution, chi_squared, joint_distribution
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.drafters.eagle import FeatureDrafter, feature_loss
from visar.samplers.drafters.heads import SpatialHeads, heads_loss
from visar.samplers.drafters.interface import Kept, Target, target_digest
from visar.samplers.drafters.model import ModelDrafter
from visar.samplers.drafters.ngram import NgramDrafter
from visar.samplers.filtering import draw
from visar.samplers.speculative import sample_speculative
from visar.samplers.tree_speculation import sample_dynamic_tree, sample_k_seq, sample_static_tree
from visar.samplers.trees import (
    check_paths,
    drawn_rule,
    full_paths,
    k_seq_ratio,
    path_parents,
    walk,
    walk_chains,
    walk_chosen,
    without,
)
from visar.samplers.verify import residual

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))
tabular, transformer, labels, many = TINY.tabular, TINY.transformer, TINY.labels, TINY.many

FILTERED = dict(guidance=Guidance(2.0), temperature=0.8, top_k=3, top_p=0.9)
SAMPLERS = {
    "chain": (sample_speculative, dict(num_drafts=3)),
    "static": (sample_static_tree, dict(branches=(3, 2, 1))),
    "paths": (sample_static_tree, dict(paths=((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))),
    "dynamic": (sample_dynamic_tree, dict(depth=3, children=3, nodes=9)),
    "k-seq": (sample_k_seq, dict(num_chains=3, num_drafts=3)),
}


def near(model, seed: int = 7, distance: float = 0.7):
    """A table that resembles another: a drafter for it."""
    other = tabular(model.config["vocab_size"], tuple(model.config["grid"]))
    generator = torch.Generator().manual_seed(seed)
    other.table.data = model.table.data + distance * torch.randn(model.table.shape, generator=generator)
    return ModelDrafter(other)


def assert_exact(name, model, drafter, count, **settings):
    sampler, own = SAMPLERS[name]
    out = sampler(
        model, many(1, count), noise=Noise(image_seeds(50_000, count)), drafter=drafter, **{**own, **settings}
    )
    filters = {k: settings[k] for k in ("guidance", "temperature", "top_k", "top_p") if k in settings}
    check = check_distribution(out.tokens, joint_distribution(model, labels(1), **filters), model.config["vocab_size"])
    assert check.passed, check
    return out.statistics


# ---------------------------------------------------------------------------------------- the joint distribution
@pytest.mark.parametrize("settings", [{}, FILTERED, dict(top_p=0.8), dict(temperature=0.7)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_distribution_with_another_table(name, settings):
    model = tabular()
    statistics = assert_exact(name, model, near(model), TINY.DRAWS, **settings)
    assert 0.3 < statistics.acceptance_rate < 1.0


@pytest.mark.parametrize("name", SAMPLERS)
def test_distribution_with_ngrams(name):
    assert_exact(name, tabular(3, (3, 2)), NgramDrafter(), TINY.DRAWS, top_p=0.8)


@pytest.mark.parametrize("num_drafts", [1, 2, 6])
def test_distribution_by_length_of_the_chain(num_drafts):
    model = tabular(4, (3, 2), sharpness=1.0)
    assert_exact("chain", model, near(model), TINY.DRAWS, num_drafts=num_drafts)


def drafters(model):
    torch.manual_seed(1)
    width, vocab_size, grid = (model.config[name] for name in ("width", "vocab_size", "grid"))
    return {
        "model": ModelDrafter(transformer(vocab_size, grid, seed=3, layers=1)),
        "feature": FeatureDrafter(vocab_size, grid, width, num_heads=2, hidden_width=32),
        "heads": SpatialHeads(vocab_size, grid, width, num_right=4),
    }


@pytest.mark.parametrize("which", ["model", "feature", "heads"])
@pytest.mark.parametrize("name", ["chain", "static", "dynamic", "k-seq"])
def test_distribution_of_a_transformer(name, which):
    model = transformer(3, (2, 2))
    assert_exact(name, model, drafters(model)[which], 4000, guidance=Guidance(2.0))


@pytest.mark.parametrize(
    "settings", [dict(nodes=1), dict(nodes=2, depth=2, children=2), dict(nodes=2, depth=4, children=3)], ids=str
)
@pytest.mark.parametrize("which", ["model", "feature", "heads", "ngram"])
def test_distribution_of_trees_that_are_smaller_than_what_was_drafted(which, settings):
    model = transformer(3, (2, 2))
    drafter = NgramDrafter() if which == "ngram" else drafters(model)[which]
    assert_exact("dynamic", model, drafter, 4000, guidance=Guidance(2.0), **settings)


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (sample_speculative, dict(num_drafts=5)),
        (sample_static_tree, dict(branches=(1,) * 5)),
        (sample_k_seq, dict(num_chains=1, num_drafts=5)),
    ],
)
def test_drafts_beyond_the_end_do_not_count(sampler, settings):
    """Nine tokens by passes of six: of the second pass's five drafts three are inside."""
    model = transformer(6, (3, 3))
    settings = dict(settings, drafter=ModelDrafter(model), noise=Noise(image_seeds(0, 4)))
    statistics = sampler(model, many(1, 4), **settings).statistics
    assert (statistics.proposed, statistics.accepted) == (4 * (5 + 3), 4 * (5 + 3))


@pytest.mark.parametrize("name", ["chain", "static", "k-seq"])
def test_a_model_accepts_its_own_drafts(name):
    """A wrong cache, position or mask in drafter or target would show here."""
    model, (sampler, own) = transformer(6, (3, 4)), SAMPLERS[name]
    settings = dict(guidance=Guidance(2.0), top_k=4, drafter=ModelDrafter(model), **own)
    statistics = sampler(model, many(1, 8), noise=Noise(image_seeds(0, 8)), **settings).statistics
    assert statistics.forward_passes == {"generator": 3, "drafter": 9}
    assert statistics.tokens_per_pass == {4: 24}


# ------------------------------------------------------------------------------------------------------ the pieces
def test_k_seq_on_one_position():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.softmax(torch.randn(2, 6, generator=generator) * 1.5, -1)
    n, rates = 100_000, {}
    for chains in (1, 2, 4):
        uniform = Noise(image_seeds(1, n)).uniform(Use.DRAFT, 0, (2 * chains + 1,))
        probs = q.expand(n, chains, -1)
        parents = torch.zeros(n, chains, dtype=torch.int64)
        tree = DraftTree.root(n, "cpu").grown(draw(probs, uniform[:, :chains]), parents)
        target = p.expand(n, chains + 1, -1)
        path = walk_chains(target, tree, [probs], uniform[:, None, chains:-1], uniform[:, -1])
        assert chi_squared(torch.bincount(path.tokens_BL[:, 0], minlength=6).double(), p.double()) > 1e-3
        rates[chains] = float(path.accepted_B.float().mean())
    assert abs(rates[1] - float(torch.minimum(p, q).sum())) < 0.005
    assert rates[1] < rates[2] < rates[4]
    ratio = k_seq_ratio(p[None], q[None], torch.tensor([4]))
    beta = torch.minimum(q, p / ratio).sum()
    assert 1 < float(ratio) < 4
    torch.testing.assert_close(1 - (1 - beta) ** 4, ratio[0] * beta)


@pytest.mark.parametrize(
    "mistake", [None, "distribution with elder siblings", "residual of the first distribution", "best sibling"]
)
def test_siblings_on_one_position(mistake):
    """Three siblings without replacement give the target's distribution, and slips in their bookkeeping do not."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.softmax(torch.randn(2, 6, generator=generator) * 1.5, -1)
    n, siblings = 100_000, 3
    uniform = Noise(image_seeds(1, n)).uniform(Use.DRAFT, 0, (2 * siblings + 1,))
    probs, tokens = [q.expand(n, -1)], []
    for rank in range(siblings):
        tokens.append(draw(probs[-1], uniform[:, rank]))
        probs.append(without(probs[-1], tokens[-1]))
    q_BMV, drafted = torch.stack(probs[:-1], 1), torch.stack(tokens, 1)
    if mistake == "best sibling":
        drafted = drafted.gather(1, p[drafted].argsort(1, descending=True))
    if mistake == "distribution with elder siblings":
        q_BMV = q.expand(n, siblings, -1)
    tree = DraftTree.root(n, "cpu").grown(drafted, torch.zeros(n, siblings, dtype=torch.int64))
    rule = drawn_rule(tree, q_BMV)
    if mistake == "residual of the first distribution":
        rule = lambda probs, node: (drawn_rule(tree, q_BMV)(probs, node)[0], residual(p.expand(n, -1), q_BMV[:, node]))  # noqa: E731
    path = walk(p.expand(n, siblings + 1, -1), tree, rule, uniform[:, siblings:-1], uniform[:, -1], 1)
    fits = chi_squared(torch.bincount(path.tokens_BL[:, 0], minlength=6).double(), p.double())
    assert fits > 1e-3 if mistake is None else fits < 1e-6


def test_chosen_siblings_at_once_equal_one_after_another():
    generator = torch.Generator().manual_seed(3)
    n, vocab_size = 500, 7
    parents = torch.tensor([0, 0, 0, 1, 1, 3, 4, 4, 4]).expand(n, -1)
    tokens = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(n)])
    tree = DraftTree.from_parents(torch.cat([tokens, tokens[:, :2]], dim=1), parents)
    p = torch.softmax(2.0 * torch.randn(n, tree.num_nodes + 1, vocab_size, generator=generator), -1)
    p[0] = torch.nn.functional.one_hot(tokens[0, :1], vocab_size).float()
    uniform = torch.rand(n, tree.num_nodes + 1, generator=generator).clamp(min=1e-6)

    def rule(probs, node):
        token = tree.tokens_BM[:, node]
        return probs.gather(1, token[:, None]).squeeze(1), without(probs, token)

    at_once = walk_chosen(p, tree, uniform[:, 1:], uniform[:, 0], 3)
    in_turn = walk(p, tree, rule, uniform[:, 1:], uniform[:, 0], 3)
    assert set(in_turn.accepted_B.tolist()) == {0, 1, 2, 3}
    for name in ("slots_BD", "tokens_BL", "accepted_B", "verified_BD", "refused_B"):
        assert torch.equal(getattr(at_once, name), getattr(in_turn, name)), name
    torch.testing.assert_close(at_once.probs_BV, in_turn.probs_BV, atol=1e-6, rtol=1e-5)


def test_paths_of_trees():
    assert full_paths((2, 1)) == [(0,), (1,), (0, 0), (1, 0)]
    shape = check_paths([(1,), (0, 0), (0,)])
    assert shape == [(0,), (1,), (0, 0)] and path_parents(shape) == [0, 0, 1]
    for wrong in ([(1,)], [(0, 0)], [()], []):
        with pytest.raises(ValueError, match="path"):
            check_paths(wrong)


def test_trees_from_parents_equal_grown_ones():
    grown = DraftTree.root(1, "cpu").grown(torch.tensor([[5, 6]]), torch.tensor([[0, 0]]))
    grown = grown.grown(torch.tensor([[7, 8, 9]]), torch.tensor([[2, 2, 1]])).grown(
        torch.tensor([[3]]), torch.tensor([[4]])
    )
    again = DraftTree.from_parents(grown.tokens_BM, grown.parents_BM)
    assert torch.equal(again.place_BL, grown.place_BL) and torch.equal(again.seen_BLL, grown.seen_BLL)
    assert grown.place_BL.tolist() == [[0, 1, 1, 2, 2, 2, 3]]


@torch.no_grad()
@pytest.mark.parametrize("make", [tabular, transformer])
def test_trees_read_like_chains(make):
    model, condition, guidance = make(4, (2, 3)), labels(0, 1, 2), Guidance(1.5, schedule="linear")
    parents = torch.tensor([[0, 0, 1, 2, 2, 4]]).expand(3, -1)
    tokens = torch.tensor([[0, 3, 1, 2, 0, 1], [2, 1, 3, 3, 0, 2], [1, 2, 0, 1, 3, 3]])
    start = torch.tensor([[1, 2], [3, 0], [2, 2]])
    counts = torch.tensor([0, 1, 2])
    state = model.start(condition, guidance, ragged=True, window=6)
    model.verify(state, start)
    model.commit(state, start, counts)
    logits = model.verify_tree(state, DraftTree.from_parents(tokens, parents))
    chain = tokens[:, [1, 3]], [0, 2, 4]
    torch.testing.assert_close(logits[:, chain[1]], model.verify(state, chain[0]))
    # Committing a path leaves the cache as if its tokens had been read one after another.
    model.verify_tree(state, DraftTree.from_parents(tokens, parents))
    committed = torch.cat([chain[0], torch.tensor([[1], [1], [1]])], 1)
    slots = torch.tensor([[2, 4]]).expand(3, -1)
    model.commit_path(state, slots, committed, torch.tensor([3, 3, 3]))
    assert state.length.tolist() == [3, 4, 5]
    teacher = model(state.tokens[:, :6], condition)
    null = model(state.tokens[:, :6], model.null_condition(condition))
    scale = torch.tensor(guidance.scales(6))
    wanted = null + (teacher - null) * scale[:, None]
    got = model.predict(state)[:, 0]
    torch.testing.assert_close(got, wanted[torch.arange(3), state.length], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_chain_is_a_window_like_any_other():
    """What a chain leaves unsaid may be said: each slot sees itself and those before it, and stands one place on."""
    model, tokens = transformer(4, (2, 3)), torch.tensor([[0, 3, 1], [2, 1, 3]])
    state = model.start(labels(0, 1), ragged=True, window=3)
    model.commit(state, tokens[:, :2], torch.tensor([1, 2]))
    seen, place = torch.ones(2, 4, 4, dtype=torch.bool).tril(), torch.arange(4).expand(2, -1)
    said = model.features(state, Window(tokens, seen, place))
    torch.testing.assert_close(said, model.features(state, Window.chain(tokens)), rtol=0, atol=0)
    # Slots that see nothing else of the window, at the place of slot 0: only slot 0 reads the same.
    alone = model.features(state, Window(tokens, torch.eye(4, dtype=torch.bool).expand(2, -1, -1), place * 0))
    torch.testing.assert_close(alone[:, 0], said[:, 0])
    assert not torch.allclose(alone[:, 2], said[:, 2])


def test_losses_train_drafters():
    model = transformer(6, (3, 4))
    condition, seeds = many(0, 256), image_seeds(100, 256)
    tokens = sample_ancestral(model, condition, noise=Noise(seeds)).tokens
    with torch.no_grad():
        hidden = model.hidden(tokens, condition)
    made = drafters(model)
    losses = {
        "feature": lambda: feature_loss(made["feature"], model, hidden, tokens),
        "heads": lambda: heads_loss(made["heads"], model, hidden),
    }
    for name, loss in losses.items():
        settings = dict(noise=Noise(image_seeds(0, 32)), drafter=made[name], num_drafts=3)
        before = sample_speculative(model, many(0, 32), **settings).statistics.mean_tokens_per_pass
        optimizer = torch.optim.Adam(made[name].parameters(), 1e-2)
        first = loss().detach()
        for _ in range(100):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss() < 0.95 * first  # not far: the distributions have an entropy of their own
        after = sample_speculative(model, many(0, 32), **settings).statistics.mean_tokens_per_pass
        assert after > before + 0.1
    noisy = feature_loss(made["feature"], model, hidden, tokens, uniform_BND=torch.rand_like(hidden))
    assert noisy > feature_loss(made["feature"], model, hidden, tokens)


@torch.no_grad()
def test_feature_drafter_reads_true_vectors():
    """Its distribution after a pass is the one that teacher forcing gives."""
    model = transformer(6, (3, 4))
    drafter = drafters(model)["feature"]
    tokens, condition = torch.randint(6, (2, 12)), labels(0, 1)
    hidden = model.hidden(tokens, condition)
    wanted = torch.softmax(model.output(drafter(model.embed(tokens), hidden)), -1)
    state = model.start(condition, ragged=True, window=3)
    target = Target(model, state, condition, Guidance(), 3, 3, (1.0, 0, 1.0))
    drafting = drafter.start(Session(capture=False), Kept(), target)
    torch.testing.assert_close(drafting.begin(), torch.full((2, 6), 1 / 6))
    for counts in ((2, 3), (4, 1), (1, 4)):
        start = state.length.clone()
        index = start[:, None] + torch.arange(3)
        window = tokens.gather(1, index.clamp(max=11))
        features = model.features(state, Window.chain(window))
        model.commit(state, torch.cat([window, tokens.gather(1, start[:, None] + 3)], 1), torch.tensor(counts))
        drafting.observe(start, features, torch.tensor(counts))
        probs = drafting.begin()
        torch.testing.assert_close(probs, wanted[torch.arange(2), state.length - 1], atol=1e-4, rtol=1e-3)
        drafting.extend(tokens.gather(1, state.length[:, None]))


def test_ngrams_vote_for_what_followed():
    model = transformer(5, (3, 4))
    state = model.start(labels(0), ragged=True, window=2)
    #      0 1 2 0        the token after (left 1, above 1) was never seen; left 1 was followed by 2
    #      1 ?
    state.tokens[0, :5] = torch.tensor([0, 1, 2, 0, 1])
    state.length[0] = 5
    target = Target(model, state, labels(0), Guidance(), 2, 2, (1.0, 0, 1.0))
    drafting = NgramDrafter(weight=3.0).start(Session(capture=False), Kept(), target)
    probs = drafting.begin()
    votes = torch.tensor([[2.0, 2.0, 1.0 + 3.0, 0.0, 0.0]]) + 0.2
    torch.testing.assert_close(probs, votes / votes.sum())
    again = drafting.extend(torch.tensor([[2]]))
    # Now left 2, above 2: the 0 at position 3 had left 2.
    votes = torch.tensor([[1.0 + 4.0, 2.0, 2.0, 0.0, 0.0]]) + 0.2
    torch.testing.assert_close(again, votes / votes.sum())


# ------------------------------------------------------------------------------------------------ loops and errors


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("which", ["ngram", "model", "feature", "heads"])
def test_replayed_passes_read_what_the_latest_call_gave(name, which):
    model, runtime, (sampler, own) = transformer(5, (3, 4)), TINY.ReplayRuntime(), SAMPLERS[name]
    drafter = NgramDrafter() if which == "ngram" else drafters(model)[which]
    for seed in (0, 100):
        settings = dict(noise=Noise(image_seeds(seed, 3)), guidance=Guidance(2.0), drafter=drafter, **own)
        condition = labels(seed % 3, 1, 2)
        eager = sampler(model, condition, **settings)
        replayed = sampler(model, condition, runtime=runtime, **settings)
        assert torch.equal(eager.tokens, replayed.tokens)
        assert eager.statistics.tokens_per_pass == replayed.statistics.tokens_per_pass


@pytest.mark.parametrize("name", SAMPLERS)
def test_statistics_and_callback(name):
    model, seen, (sampler, own) = transformer(4, (3, 2)), [], SAMPLERS[name]
    out = sampler(
        model,
        labels(0, 1),
        noise=Noise([1, 2]),
        check_every=1,
        callback=lambda done, tokens: seen.append((done, tokens.clone())),
        **own,
    )
    statistics = out.statistics
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == 6
    for done, tokens in seen:
        assert torch.equal(tokens[:, :done], out.tokens[:, :done])
    assert sum(count * times for count, times in statistics.tokens_per_pass.items()) == 12
    assert 0 <= statistics.accepted <= statistics.proposed
    assert statistics.forward_passes == {"generator": len(seen)}
    assert out.outcome_BN.shape == out.tokens.shape and set(out.outcome_BN.unique().tolist()) <= {0, 1, 2}
    assert int((out.outcome_BN == 2).sum()) == statistics.accepted
    passes = sum(times for count, times in statistics.tokens_per_pass.items())
    assert passes - 2 <= int((out.outcome_BN < 2).sum()) <= passes  # an image may end on an accepted draft


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chain", dict(num_drafts=0), "num_drafts 0"),
        ("static", dict(branches=()), "branches"),
        ("static", dict(branches=(9,)), "9 children"),
        ("paths", dict(paths=((1,),)), "path"),
        ("dynamic", dict(depth=0), "depth 0"),
        ("k-seq", dict(num_chains=0), "num_chains 0"),
        ("chain", dict(drafter=ModelDrafter(TINY.tabular(3))), "agree"),
        ("chain", dict(drafter=SpatialHeads(4, (2, 2), 16)), "TabularGenerator"),
    ],
)
def test_bad_settings(name, settings, message):
    sampler, own = SAMPLERS[name]
    with pytest.raises(ValueError, match=message):
        sampler(tabular(), labels(0), noise=Noise([0]), **{**own, **settings})


def test_bad_drafters():
    with pytest.raises(ValueError, match="weight -1"):
        NgramDrafter(weight=-1)
    model = transformer()
    without_grid = torch.nn.Identity()
    without_grid.config = {"vocab_size": 4}
    with pytest.raises(ValueError, match="Identity cannot draft here"):
        sample_speculative(model, labels(0), noise=Noise([0]), drafter=ModelDrafter(without_grid))
    with pytest.raises(ValueError, match="reach 2"):
        sample_speculative(model, labels(0), noise=Noise([0]), drafter=SpatialHeads(4, (2, 2), 16, num_right=2))
    with pytest.raises(ValueError, match="hidden size"):
        sample_speculative(model, labels(0), noise=Noise([0]), drafter=SpatialHeads(4, (2, 2), 8))
    other = SpatialHeads(4, (2, 2), 16, target="another", target_digest=target_digest(transformer(seed=1)))
    with pytest.raises(ValueError, match="trained for another "):
        sample_speculative(model, labels(0), noise=Noise([0]), drafter=other)
    own = SpatialHeads(4, (2, 2), 16, target_digest=target_digest(model))
    assert sample_speculative(model.bfloat16(), labels(0), noise=Noise([0]), drafter=own.bfloat16()).tokens.shape == (
        1,
        4,
    )


def test_drafters_save_and_load(tmp_path):
    for name, drafter in drafters(transformer()).items():
        if name == "model":
            continue
        drafter.save_pretrained(tmp_path / name)
        loaded = type(drafter).from_pretrained(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), loaded.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("which", ["ngram", "model", "feature", "heads"])
def test_captured_ids_equal_eager_ids(name, which):
    model, runtime, (sampler, own) = transformer(11, (4, 5)).cuda(), Runtime(), SAMPLERS[name]
    drafter = NgramDrafter() if which == "ngram" else drafters(model)[which]
    if which == "model":
        drafter.generator.cuda()
    elif which != "ngram":
        drafter.cuda()
    condition: Condition = labels(0, 1, 2).to("cuda")
    for seed in range(4):
        settings = dict(noise=Noise(image_seeds(seed, 3), "cuda"), guidance=Guidance(2.0), drafter=drafter, **own)
        eager = sampler(model, condition, runtime=EAGER, **settings)
        captured = sampler(model, condition, runtime=runtime, **settings)
        assert torch.equal(eager.tokens, captured.tokens)
        assert eager.statistics.tokens_per_pass == captured.statistics.tokens_per_pass
