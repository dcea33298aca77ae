"""LANTERN and LANTERN++: recorded trees, the relaxed distribution, exactness without relaxation, changes."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import EAGER, Runtime
from visar.core.window import DraftTree
from visar.evaluate.exactness import check_distribution, joint_distribution, position_distances, total_variation
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.drafters.model import ModelDrafter
from visar.samplers.filtering import filtered_probs
from visar.samplers.relaxed import neighbour_table, relaxed_probs, relaxed_rule, sample_lantern, walk_greedy
from visar.samplers.trees import check_paths, drawn_rule, path_parents, walk, walk_chosen, without

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))
tabular, transformer, labels, many = TINY.tabular, TINY.transformer, TINY.labels, TINY.many


# --------------------------------------------------------------------------------------------------- recorded trees
def recorded(io, kind):
    for name in sorted({key.split(".")[0] for key in io if key.startswith(kind)}):
        yield name, {key.split(".", 1)[1]: value for key, value in io.items() if key.startswith(name + ".")}


def tree_of(case):
    if "tree_choices" in case:
        paths = [tuple(rank for rank in path if rank >= 0) for path in case["tree_choices"].tolist()]
        parents = torch.tensor(path_parents(check_paths(paths)))
    else:
        parents = case["node_parents"][1:]
    return DraftTree.from_parents(case["node_tokens"][None, 1:], parents[None])


def drafted_probs(case, tree):
    """Each node's distribution without its elder siblings, from the drafter's distribution of its parent."""
    parents, drafted_from, left = tree.parents_BM[0].tolist(), [], {}
    expanded = sorted(set(parents))
    for node, parent in enumerate(parents):
        probs = left.get(parent, case["draft_probs"][expanded.index(parent)])
        drafted_from.append(probs)
        left[parent] = without(probs[None], tree.tokens_BM[:, node])[0]
    return torch.stack(drafted_from)[None]


def relaxation(case):
    if not int(case["lantern"]):
        return lambda probs, token: probs
    table, delta = case["neighbours"][:, : int(case["k"])].int(), float(case["delta"])
    bounds = dict(max_ratio=delta) if delta > 1 else dict(max_moved=delta)
    return lambda probs, token: relaxed_probs(probs, token, table, **bounds)


def uniforms(case, tree, trace):
    """The recorded numbers at the nodes that they verified; the paper's rule may verify more than were drawn."""
    uniform, current = torch.full((1, tree.num_nodes), 0.5), 0
    for draw, row in enumerate(trace.tolist()):
        mine = (tree.parents_BM[0] == current) & (tree.tokens_BM[0] == int(row[1]))
        node = int(mine.nonzero()[0])
        beyond = 0.0 if row[5] else 1.0
        uniform[0, node] = float(case["u"][draw]) if draw < len(case["u"]) else beyond
        current = node + 1 if row[5] else current
    return uniform


@pytest.mark.parametrize("kind", ["dyn", "static"])
def test_recorded_walks(parity, kind):
    """The papers' rule; and the released code's outcome where it agrees with them."""
    agreeing = 0
    for name, case in recorded(parity("lantern").io, kind):
        tree, seen = tree_of(case), []
        if kind == "static":
            assert torch.equal(tree.place_BL[0], case["tree_position"])
            assert torch.equal(tree.seen_BLL[0], case["tree_mask"].bool())
            q = drafted_probs(case, tree)
        p = filtered_probs(case["node_logits"][None], float(case["temperature"]), int(case["top_k"]), 1.0)
        relax = relaxation(case)

        def recorded_relax(probs, token, relax=relax, seen=seen):
            hat = relax(probs, token)
            seen.append((int(token), float(probs[0, token]), float(hat[0, token])))
            return hat

        rule = relaxed_rule(tree, q if kind == "static" else None, recorded_relax)
        trace = case["trace_paper"]
        path = walk(p, tree, rule, uniforms(case, tree, trace), torch.tensor([0.5]), int(tree.place_BL.max()))
        assert int(path.accepted_B) == int(case["accept_length_paper"]), name
        assert int(path.verified_BD.sum()) == len(trace)
        torch.testing.assert_close(path.probs_BV[0], case["next_dist_paper"], atol=1e-5, rtol=0)
        for row in trace.tolist():
            near = [s for s in seen if s[0] == int(row[1]) and abs(s[1] - row[2]) < 1e-5 and abs(s[2] - row[3]) < 1e-5]
            assert near, (name, row)
        if torch.equal(case["trace"], trace):
            agreeing += 1
            assert path.tokens_BL[0, : int(path.accepted_B)].tolist() == case["accepted"].tolist()
            torch.testing.assert_close(path.probs_BV[0], case["next_dist"], atol=1e-5, rtol=0)
        if not int(case["lantern"]):
            rest = (uniforms(case, tree, trace), torch.tensor([0.5]), path.slots_BD.shape[1])
            again = walk(p, tree, drawn_rule(tree, q), *rest) if kind == "static" else walk_chosen(p, tree, *rest)
            assert torch.equal(again.tokens_BL, path.tokens_BL)
    assert agreeing


def test_recorded_draws_without_replacement(parity):
    for _, case in recorded(parity("lantern").io, "static"):
        for row, tokens in enumerate(case["draft_tokens"]):
            probs = case["draft_probs"][row]
            for rank, token in enumerate(tokens):
                torch.testing.assert_close(probs[token], case["draft_cond_probs"][row, rank], atol=1e-5, rtol=1e-5)
                probs = without(probs[None], token[None])[0]


def test_recorded_greedy_paths(parity):
    for _, case in recorded(parity("lantern").io, "greedy"):
        tree = tree_of(case)
        p = filtered_probs(case["node_logits"][None], 1.0, 0, 1.0)
        path = walk_greedy(p, tree, relaxation(case), int(tree.place_BL.max()))
        accepted = int(path.accepted_B)
        assert accepted == int(case["accept_length"])
        assert path.tokens_BL[0, :accepted].tolist() == case["accepted"].tolist()
        assert int(path.tokens_BL[0, accepted]) == int(case["next_dist"].argmax())


def test_recorded_neighbours(parity):
    for _, case in recorded(parity("lantern").io, "dyn"):
        every = case["codebook"].shape[0] - 1
        table = neighbour_table(case["codebook"], every, chunk=7)
        assert table.dtype == torch.int32 and torch.equal(table.long(), case["neighbours"])
        assert torch.equal(neighbour_table(case["codebook"], 3), table[:, :3])


# ----------------------------------------------------------------------------------------- the relaxed distribution
def test_relaxed_probs_move_what_the_bounds_allow():
    p = torch.tensor([[0.1, 0.05, 0.2, 0.3, 0.35]])
    table = torch.tensor([[1, 2, 3, 4]] + [[0, 2, 3, 4]] * 4, dtype=torch.int32)
    token = torch.tensor([0])
    for bounds, wanted in (
        (dict(max_moved=0.04), [0.1, 0.05, 0.2, 0.3, 0.35]),
        (dict(max_moved=0.26), [0.35, 0.0, 0.0, 0.3, 0.35]),
        (dict(max_ratio=1.6), [0.15, 0.0, 0.2, 0.3, 0.35]),
        (dict(max_moved=0.26, max_ratio=1.6), [0.15, 0.0, 0.2, 0.3, 0.35]),
        (dict(max_moved=1.0), [1.0, 0.0, 0.0, 0.0, 0.0]),
    ):
        hat = relaxed_probs(p, token, table, **bounds)
        torch.testing.assert_close(hat, torch.tensor([wanted]))
        assert total_variation(hat, p) <= bounds.get("max_moved", 1.0) + 1e-6
        assert hat[0, 0] <= bounds.get("max_ratio", 100.0) * p[0, 0] + 1e-6


def lantern(model, count, seed=0, label=1, **settings):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(model.config["vocab_size"], 2, generator=generator)
    settings = dict(codebook=codebook, num_neighbours=3, depth=3, children=3, nodes=8, branches=(3, 2, 1)) | settings
    return sample_lantern(model, many(label, count), noise=Noise(image_seeds(seed, count)), **settings)


def near(model):
    other = tabular(model.config["vocab_size"], tuple(model.config["grid"]))
    generator = torch.Generator().manual_seed(7)
    other.table.data = model.table.data + torch.randn(model.table.shape, generator=generator)
    return ModelDrafter(other)


@pytest.mark.parametrize("tree", ["dynamic", "static"])
@pytest.mark.parametrize("bounds", [dict(max_moved=0.0), dict(max_ratio=1.0)])
def test_bounds_of_nothing_are_exact(tree, bounds):
    model, n = tabular(5, (2, 2)), TINY.DRAWS
    settings = dict(guidance=Guidance(1.5), top_p=0.9)
    out = lantern(model, n, tree=tree, drafter=near(model), **bounds, **settings)
    assert check_distribution(out.tokens, joint_distribution(model, labels(1), **settings), 5).passed


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_looser_bounds_are_faster_and_further_from_the_distribution(tree):
    """A token's distribution moves by up to delta for every sibling that is verified: three here."""
    model, n = tabular(8, (2, 2), sharpness=1.0), TINY.DRAWS
    probs, rates, distances = joint_distribution(model, labels(1)), [], []
    for delta in (0.0, 0.05, 0.2, 0.4):
        out = lantern(model, n, tree=tree, drafter=near(model), max_moved=delta, num_neighbours=5)
        rates.append(out.statistics.mean_tokens_per_pass)
        distances.append(position_distances(out.tokens, probs, 8))
    first = [each[0] for each in distances]
    assert rates[0] < rates[2] < rates[3]
    assert max(distances[0]) < 0.015
    assert first[0] < first[1] + 0.005 and first[1] < first[2] < first[3]
    for delta, distance in zip((0.05, 0.2, 0.4), first[1:], strict=True):
        assert distance < 3 * delta


def test_ratio_bound_relaxes_less_where_the_draft_is_unlikely():
    model, n = tabular(8, (2, 2), sharpness=1.0), 10_000
    probs, distances = joint_distribution(model, labels(1)), []
    for ratio in (1.0, 3.0, 10.0):
        out = lantern(model, n, tree="static", drafter=near(model), max_ratio=ratio, num_neighbours=5)
        distances.append(position_distances(out.tokens, probs, 8)[0])
    assert distances[0] < 0.02 < distances[1] < distances[2]


def test_greedy_without_relaxation_is_the_likeliest_sequence():
    model = transformer(6, (3, 4))
    out = lantern(model, 3, max_moved=0.0, greedy=True, drafter=ModelDrafter(model), guidance=Guidance(2.0))
    likeliest = sample_ancestral(model, many(1, 3), noise=Noise([0, 1, 2]), guidance=Guidance(2.0), top_k=1)
    assert torch.equal(out.tokens, likeliest.tokens)
    assert out.statistics.mean_tokens_per_pass > 3
    relaxed = lantern(model, 3, max_moved=0.5, greedy=True, drafter=ModelDrafter(model), guidance=Guidance(2.0))
    assert relaxed.tokens.shape == likeliest.tokens.shape


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_replayed_passes_read_what_the_latest_call_gave(tree):
    model, runtime = transformer(5, (3, 4)), TINY.ReplayRuntime()
    for seed in (0, 100):
        settings = dict(codebook=torch.randn(5, 4), num_neighbours=3, max_moved=0.2, tree=tree, depth=3, nodes=9)
        settings |= dict(noise=Noise(image_seeds(seed, 3)), guidance=Guidance(2.0))
        eager = sample_lantern(model, labels(seed % 3, 1, 2), **settings)
        replayed = sample_lantern(model, labels(seed % 3, 1, 2), runtime=runtime, **settings)
        assert torch.equal(eager.tokens, replayed.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "max_moved .LANTERN."),
        (dict(max_moved=2.0), "max_moved 2"),
        (dict(max_ratio=0.5), "max_ratio 0.5"),
        (dict(max_moved=0.1, tree="oak"), "'oak'"),
        (dict(max_moved=0.1, codebook=None), "codebook"),
        (dict(max_moved=0.1, codebook=torch.randn(3, 2)), "3 codes"),
        (dict(max_moved=0.1, num_neighbours=0), "num_neighbours 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        lantern(tabular(), 1, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [dict(tree="dynamic"), dict(tree="static"), dict(greedy=True)])
def test_captured_ids_equal_eager_ids(settings):
    model, runtime = transformer(11, (4, 5)).cuda(), Runtime()
    settings = settings | dict(guidance=Guidance(2.0), codebook=torch.randn(11, 4), num_neighbours=4, max_moved=0.2)
    for seed in range(4):
        noise, condition = Noise(image_seeds(seed, 3), "cuda"), labels(0, 1, 2).to("cuda")
        eager = sample_lantern(model, condition, noise=noise, runtime=EAGER, **settings).tokens
        assert torch.equal(eager, sample_lantern(model, condition, noise=noise, runtime=runtime, **settings).tokens)
