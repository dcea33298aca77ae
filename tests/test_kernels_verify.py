"""Kernels of speculative passes against the plain PyTorch they stand for; on a GPU, or with TRITON_INTERPRET=1."""

import pytest
import torch
from torch import nn

from visar import kernels
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import Runtime
from visar.core.window import DraftTree
from visar.evaluate.exactness import check_distribution, joint_distribution
from visar.generators.raster import RasterGPT
from visar.generators.tabular import TabularGenerator
from visar.samplers.drafters.eagle import FeatureDrafter
from visar.samplers.filtering import draw, filtered_probs
from visar.samplers.grouped import sample_grouped
from visar.samplers.jacobi import sample_jacobi
from visar.samplers.jacobi_drafts import refresh
from visar.samplers.relaxed import relaxed_probs, relaxed_rule, sample_lantern
from visar.samplers.speculative import sample_speculative
from visar.samplers.tree_speculation import sample_dynamic_tree, sample_k_seq, sample_static_tree
from visar.samplers.trees import drawn_rule, walk, walk_by_kernel, walk_chains, walk_chosen, walk_drawn
from visar.samplers.verify import Verdict, one_hot, verify

VOCABULARIES = [50, 128, 300]


def plain(monkeypatch, call):
    """The call's result with every kernel switched off."""
    with monkeypatch.context() as patch:
        patch.setenv("VISAR_TRITON", "0")
        return call()


def random_probs(*shape: int, seed: int = 0, top_k: int = 0) -> torch.Tensor:
    """Random distributions with ties and, with top_k, zeros; sums of few bits, so that their order changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.randint(1, 9, shape, generator=generator).float()
    if top_k:
        mass *= torch.rand(shape, generator=generator).argsort(-1).argsort(-1) < top_k
    return mass / 2.0 ** mass.sum(-1, keepdim=True).log2().ceil()


def uniforms(*shape: int, seed: int = 1) -> torch.Tensor:
    return (torch.randint(2**20, shape, generator=torch.Generator().manual_seed(seed)).float() + 0.5) * 2.0**-20


# --------------------------------------------------------------------------------------------- distribution and draw
@pytest.mark.parametrize("filters", [(1.0, 0, 1.0), (0.7, 7, 1.0), (1.3, 0, 0.8), (1.0, 20, 0.9)])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_probs(device, monkeypatch, vocab_size, filters):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (3 * torch.randn(3, 2, vocab_size, generator=generator)).to(device)
    logits[0, 0, :9] = 2.0
    logits[0, 1, 5:] = float("-inf")
    assert kernels.usable(logits)
    expected = plain(monkeypatch, lambda: filtered_probs(logits, *filters))
    torch.testing.assert_close(filtered_probs(logits, *filters), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_draw_of_a_mass(device, monkeypatch, vocab_size):
    mass, uniform = random_probs(3, 4, vocab_size, top_k=9).to(device), uniforms(3, 4).to(device)
    mass[0, 0] = one_hot(torch.tensor(vocab_size - 1), vocab_size)
    expected = plain(monkeypatch, lambda: draw(mass, uniform))
    assert torch.equal(draw(mass, uniform), expected)
    assert (mass.gather(2, expected[..., None]) > 0).all()


# ----------------------------------------------------------------------------------------------------------- verdicts
@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
@pytest.mark.parametrize("slots", [1, 2, 17])
@pytest.mark.parametrize("top_k", [0, 12])
def test_verify_window(device, monkeypatch, slots, coupling, top_k):
    """Verdicts and new drafts are those of `verify` and `refresh`."""
    from visar.kernels.verify import verify_window

    batch, vocab_size = 3, 140
    p, q = (
        random_probs(batch, slots, vocab_size, top_k=top_k),
        random_probs(batch, slots, vocab_size, seed=5, top_k=top_k)[:, 1:],
    )
    q[:, 1::2] = p[:, 1:-1:2]  # accepted for certain; what is left of them is nothing
    accept, emit, fresh = uniforms(3, batch, slots)
    draft = plain(monkeypatch, lambda: draw(q, uniforms(batch, slots - 1, seed=3)))
    verified = torch.tensor([slots - 1, 0, slots // 2])
    noise = -torch.log(-torch.log(uniforms(batch, slots + 9, vocab_size, seed=4)))
    length = torch.tensor([0, 9, 4])
    p, q, accept, emit, fresh, draft, verified, noise, length = (
        value.to(device) for value in (p, q, accept, emit, fresh, draft, verified, noise, length)
    )

    def expected() -> tuple[Verdict, torch.Tensor]:
        verdict = verify(p, q, draft, accept[:, :-1], emit, verified_B=verified)
        place = length[:, None] + torch.arange(slots, device=device)
        gumbel = noise.gather(1, place[..., None].expand(-1, -1, vocab_size))
        return verdict, refresh(coupling, p, q, draft, verdict, fresh, emit, gumbel, verified)

    verdict, drafts = plain(monkeypatch, expected)
    given = dict(coupling=coupling, fresh_BL=fresh, gumbel_BTV=noise, length_B=length)
    _, got, new = verify_window(p, q, draft, accept, emit, verified_B=verified, **given)
    got = Verdict(*got)
    assert torch.equal(new, drafts)
    for name in ("tokens_BL", "count_B", "accepted_B", "accepted_BK"):
        assert torch.equal(getattr(got, name), getattr(verdict, name)), name
    assert torch.equal(verify(p, q, draft, accept[:, :-1], emit, verified_B=verified).tokens_BL, verdict.tokens_BL)
    # From logits and by chances that are given.
    logits, chance = p.log(), torch.rand(batch, slots - 1, device=device)
    probs, got, _ = verify_window(logits, q, draft, accept, emit, filters=(1.0, 0, 1.0), chance_BK=chance)
    torch.testing.assert_close(probs, torch.softmax(logits, -1))
    expected_verdict = plain(monkeypatch, lambda: verify(probs, q, draft, accept[:, :-1], emit, chance_BK=chance))
    assert torch.equal(got[1], expected_verdict.count_B) and torch.equal(got[3], expected_verdict.accepted_BK)


# -------------------------------------------------------------------------------------------------------------- trees
def random_tree(batch: int, nodes: int, vocab_size: int, device: torch.device) -> DraftTree:
    """Trees whose siblings differ in their tokens."""
    generator = torch.Generator().manual_seed(nodes)
    parents = torch.stack([torch.randint(0, node // 2 + 1, (batch,), generator=generator) for node in range(nodes)], 1)
    tokens = torch.stack([torch.randperm(vocab_size, generator=generator)[:nodes] for _ in range(batch)])
    return DraftTree.from_parents(tokens.to(device), parents.to(device))


def test_tree_of_one_row_is_begun_for_every_row():
    tree = random_tree(1, 7, 20, torch.device("cpu"))
    part = tree.begun(tree.tokens_BM.expand(3, -1), 4)
    whole = DraftTree.from_parents(part.tokens_BM, part.parents_BM)
    assert torch.equal(part.seen_BLL, whole.seen_BLL) and torch.equal(part.place_BL, whole.place_BL)


@pytest.mark.parametrize("kind", ["drawn", "chosen", "moved", "ratio"])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_walk(device, monkeypatch, vocab_size, kind):
    batch, nodes = 6, 11
    tree = random_tree(batch, nodes, vocab_size, device)
    depth = int(tree.place_BL.max())
    p = random_probs(batch, nodes + 1, vocab_size).to(device)
    q = random_probs(batch, nodes, vocab_size, seed=2, top_k=vocab_size // 2).to(device)
    q.scatter_(2, tree.tokens_BM[..., None], (2.0 if kind == "drawn" else 8.0) / vocab_size)
    accept, emit = uniforms(batch, nodes).to(device), uniforms(batch).to(device)
    if kind == "chosen":
        accept *= 4.0 / vocab_size  # so that unlikely drafts are accepted too
    near = torch.stack([torch.arange(1, 8).add(code) % vocab_size for code in range(vocab_size)]).int().to(device)
    bounds = dict(max_moved=0.02 if kind == "moved" else None, max_ratio=3.0 if kind == "ratio" else None)

    def expected():
        if kind == "chosen":
            return walk_chosen(p, tree, accept, emit, depth)
        rule = drawn_rule(tree, q)
        if kind in ("moved", "ratio"):
            rule = relaxed_rule(tree, q, lambda probs, token: relaxed_probs(probs, token, near, **bounds))
        return walk(p, tree, rule, accept, emit, depth)

    path = plain(monkeypatch, expected)
    if kind == "chosen":
        got = walk_chosen(p, tree, accept, emit, depth)
    elif kind == "drawn":
        got = walk_drawn(p, tree, q, accept, emit, depth)
    else:
        got = walk_by_kernel(p, tree, q, accept, emit, depth, neighbours_Vk=near, **bounds)
    assert path.accepted_B.max() > 0 and (path.verified_BD.sum(1) > path.accepted_B).any()
    for name in ("slots_BD", "accepted_B", "verified_BD", "refused_B"):
        assert torch.equal(getattr(got, name), getattr(path, name)), name
    torch.testing.assert_close(got.probs_BV, path.probs_BV, atol=1e-6, rtol=1e-4)
    assert torch.equal(got.tokens_BL, path.tokens_BL)


def test_walk_of_chains(device, monkeypatch):
    batch, depth, chains, vocab_size = 5, 3, 4, 140
    p = random_probs(batch, 1 + depth * chains, vocab_size, top_k=40).to(device)
    levels = [
        random_probs(batch, 1, vocab_size, seed=7 + d, top_k=30).expand(-1, chains, -1).to(device)
        for d in range(depth)
    ]
    tokens = plain(monkeypatch, lambda: torch.cat([draw(q, uniforms(batch, chains).to(device)) for q in levels], 1))
    parents = torch.tensor([max(0, node + 1 - chains) for node in range(depth * chains)], device=device)
    tree = DraftTree.from_parents(tokens, parents.expand(batch, -1))
    accept, emit = uniforms(batch, depth, chains).to(device), uniforms(batch).to(device)
    path = plain(monkeypatch, lambda: walk_chains(p, tree, levels, accept, emit))
    got = walk_chains(p, tree, levels, accept, emit)
    assert path.accepted_B.max() > 0
    for name in ("slots_BD", "accepted_B", "verified_BD", "refused_B", "tokens_BL"):
        assert torch.equal(getattr(got, name), getattr(path, name)), name
    torch.testing.assert_close(got.probs_BV, path.probs_BV, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("nodes", [6, 40])
def test_tree_attention(device, dtype, nodes, first):
    from visar.kernels.attention import cached_attention
    from visar.layers.cache import visible_tree
    from visar.layers.rope import rope_table, rotate

    batch, rows, heads, width, prefix = 2, 4, 2, 32, 3
    generator = torch.Generator().manual_seed(nodes)
    tree = random_tree(batch, nodes, 99, device)
    rope = rope_table("2d", prefix_length=prefix, grid=(3, 30), head_width=width).to(device)
    slots = rope.shape[0] + nodes
    length = torch.tensor([0, 87], device=device)
    keys, values = (torch.randn(rows, heads, slots, width, generator=generator).to(device, dtype) for _ in range(2))
    valid = torch.rand(rows, slots, generator=generator) < 0.8
    valid[:, prefix - 1 :] = True
    valid = valid.to(device)
    qkv = torch.randn(rows, nodes + 1 - first, 3 * heads * width, generator=generator).to(device, dtype)
    root = (length[:, None] + prefix - 1).repeat(2, 1)
    place = root + tree.place_BL.repeat(2, 1)[:, first:]
    table = rope[place.clamp(max=len(rope) - 1)]
    query, key, value = qkv.unflatten(-1, (3, heads, width)).unbind(2)
    query, key, value = rotate(query, table).transpose(1, 2), rotate(key, table).transpose(1, 2), value.transpose(1, 2)
    slot = root + torch.arange(first, nodes + 1, device=device)
    all_keys, all_values = keys.clone(), values.clone()
    index = slot[:, None, :, None].expand_as(key)
    all_keys.scatter_(2, index, key)
    all_values.scatter_(2, index, value)
    mask = visible_tree(root, tree.seen_BLL.repeat(2, 1, 1), slots, valid)[:, :, first:]
    expected = nn.functional.scaled_dot_product_attention(query, all_keys, all_values, attn_mask=mask)
    got = cached_attention(
        qkv, keys, values, rope, length, ahead=prefix - 1, batch=batch, key_valid_RS=valid,
        tree=tree, first=first,
    )  # fmt: skip
    limit = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(2), **limit)
    torch.testing.assert_close(keys, all_keys, **limit)
    assert torch.equal(values, all_values)


# -------------------------------------------------------------------------------------------------------- compilation
BATCH, CODES, WINDOW, POSITIONS, BRANCHES = 2, 1024, 16, 256, (4, 2, 1, 1)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def counters() -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    return POSITIONS, ids(WINDOW + 1), ids(2), torch.zeros(BATCH, POSITIONS + WINDOW, dtype=torch.int8)


def drafted_tree() -> DraftTree:
    widths = torch.tensor(BRANCHES).cumprod(0).tolist()
    first = [sum(widths[:level]) for level in range(len(widths))]
    parents = [0] * widths[0]
    for level in range(1, len(widths)):
        parents += [1 + first[level - 1] + node // BRANCHES[level] for node in range(widths[level])]
    return DraftTree.from_parents(ids(BATCH, len(parents)), torch.tensor([parents]).expand(BATCH, -1))


def launch_verify(coupling: str | None, filtered: bool, chance: bool) -> None:
    from visar.kernels.verify import verify_window

    rows, drafts = torch.zeros(BATCH, WINDOW, CODES), ids(BATCH, WINDOW - 1)
    fresh, accept, emit = torch.zeros(BATCH, WINDOW, 3).unbind(-1)
    verify_window(
        rows, rows[:, 1:], drafts, accept, emit, filters=(0.9, 100, 0.95) if filtered else None,
        verified_B=ids(BATCH) if coupling else None, chance_BK=torch.zeros(drafts.shape) if chance else None,
        coupling=coupling, fresh_BL=fresh, gumbel_BTV=torch.zeros(BATCH, POSITIONS + WINDOW, CODES),
        length_B=ids(BATCH), counts=counters() if coupling else None,
    )  # fmt: skip


def launch_commit() -> None:
    from visar.kernels.verify import commit, count_pass

    count_pass(*(ids(BATCH) for _ in range(4)), torch.zeros(BATCH, dtype=torch.bool), counters())
    commit(ids(BATCH, POSITIONS + WINDOW), ids(BATCH), ids(BATCH, WINDOW), ids(BATCH), POSITIONS)


def launch_carry(initial: str) -> None:
    from visar.kernels.jacobi import carry

    probs, remembered = torch.zeros(BATCH, WINDOW, CODES), torch.zeros(BATCH, 16, CODES)
    tokens, uniform = ids(BATCH, POSITIONS + WINDOW), torch.zeros(BATCH, POSITIONS + WINDOW)
    draft, draft_probs = ids(BATCH, WINDOW - 1), torch.zeros(BATCH, WINDOW - 1, CODES)
    numbers = (ids(BATCH) for _ in range(3))
    carry(initial, ids(BATCH, WINDOW), probs, *numbers, tokens, uniform, remembered, draft, draft_probs, columns=16)


def launch_ngram(in_tree: bool) -> None:
    from visar.kernels.ngram import ngram_probs

    tree = drafted_tree()
    tokens, parents = ids(BATCH, POSITIONS + WINDOW), tree.parents_BM if in_tree else None
    sizes = dict(num_tokens=POSITIONS, columns=16, vocab_size=CODES, weight=8.0)
    ngram_probs(tokens, ids(BATCH), tree.tokens_BM, parents, first=5, nodes=8, depth=2, **sizes)


def launch_tree_pass() -> None:
    from visar.kernels.attention import cached_attention
    from visar.kernels.elementwise import guide
    from visar.kernels.tree_paths import move_path

    tree, rows, heads, width, slots = drafted_tree(), 2 * BATCH, 12, 64, POSITIONS + 40
    cache = torch.zeros(2, 2, rows, heads, slots, width, dtype=torch.bfloat16)
    cached_attention(
        torch.zeros(rows, tree.place_BL.shape[1], 3 * heads * width, dtype=torch.bfloat16), *cache[0],
        torch.zeros(POSITIONS, width // 2, 2), ids(BATCH), ahead=0, batch=BATCH,
        key_valid_RS=torch.ones(rows, slots, dtype=torch.bool), tree=tree,
    )  # fmt: skip
    logits = torch.zeros(rows, tree.place_BL.shape[1], CODES, dtype=torch.bfloat16)
    guide(logits, torch.zeros(POSITIONS + 40), ids(BATCH), depth_BL=tree.place_BL)
    move_path(cache[0], cache[1], ids(BATCH), ids(BATCH, len(BRANCHES)), ahead=0)


def launch_drafting() -> None:
    from visar.kernels.tree_drafting import Growth, draw_siblings

    probs, nodes = torch.zeros(BATCH, 8, CODES), 28
    draw_siblings(probs, ids(8, 2), torch.zeros(BATCH, nodes), torch.zeros(BATCH, nodes, CODES), ids(BATCH, nodes))
    growth = Growth(BATCH, depth=3, children=8, device=probs.device)
    for level in range(3):
        growth.add(probs if level else probs[:, :1])
        if level < 2:
            growth.expand()
    growth.pruned(nodes)


def launch_walk(kind: str) -> None:
    from visar.kernels.tree_paths import walk, walk_chains

    if kind == "chains":
        depth, chains = 4, 4
        p, q = torch.zeros(BATCH, 1 + depth * chains, CODES), torch.zeros(BATCH, depth, chains, CODES)
        nodes = depth * chains
        walk_chains(p, q, ids(BATCH, nodes), torch.zeros(BATCH, nodes), torch.zeros(BATCH))
        return
    tree = drafted_tree()
    nodes = tree.tokens_BM.shape[1]
    p, q = torch.zeros(BATCH, nodes + 1, CODES), None if kind == "chosen" else torch.zeros(BATCH, nodes, CODES)
    bounds = dict(max_moved=0.1 if kind == "moved" else None, max_ratio=3.0 if kind == "ratio" else None)
    near = torch.zeros(CODES, 100, dtype=torch.int32) if kind in ("moved", "ratio") else None
    uniforms = torch.zeros(BATCH, nodes), torch.zeros(BATCH)
    walk(p, q, tree.tokens_BM, tree.parents_BM, *uniforms, len(BRANCHES), neighbours_Vk=near, **bounds)


VERIFIED = [(None, False, False), ("none", True, False), ("maximal", True, True), ("gumbel", True, False)]
LAUNCHES = [
    *((launch_verify, options, "_verify_window _settle") for options in VERIFIED),
    (launch_commit, (), "_count _commit"),
    *((launch_carry, (initial,), "_carry") for initial in ("random", "left", "above", "left_mode", "above_law")),
    *((launch_ngram, (in_tree,), "_ngram") for in_tree in (False, True)),
    (launch_tree_pass, (), "_window _guide _move"),
    (launch_drafting, (), "_siblings _candidates _expand _candidates _expand _candidates _prune"),
    *((launch_walk, (kind,), "_walk") for kind in ("drawn", "chosen", "moved", "ratio")),
    (launch_walk, ("chains",), "_chains"),
]


@pytest.mark.parametrize(("launch", "options", "kernels"), LAUNCHES)
def test_kernels_compile_for_a_gpu_that_is_not_here(hopper, launch, options, kernels):
    assert [name for name, _ in hopper(launch, *options)] == kernels.split()


# ----------------------------------------------------------------------------------------------------------- samplers
BOOK = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
SAMPLERS = {
    "jacobi": (sample_jacobi, dict(window=5)),
    "jacobi alone": (sample_jacobi, dict(window=1)),
    "jacobi maximal": (sample_jacobi, dict(window=7, coupling="maximal", initial="left_law", adaptive=True)),
    "jacobi gumbel": (sample_jacobi, dict(window=5, coupling="gumbel", initial="left_mode")),
    "jacobi above": (sample_jacobi, dict(window=6, initial="above")),
    "jacobi above distribution": (sample_jacobi, dict(window=6, initial="above_law", top_p=0.9)),
    "grouped": (sample_grouped, dict(window=5, codebook=BOOK)),
    "speculative": (sample_speculative, dict(num_drafts=3)),
    "static tree": (sample_static_tree, dict(branches=(3, 2))),
    "dynamic tree": (sample_dynamic_tree, dict(depth=3, children=2, nodes=7)),
    "k_seq": (sample_k_seq, dict(num_chains=3, num_drafts=2)),
    "lantern": (sample_lantern, dict(codebook=BOOK, max_moved=0.3, depth=2, children=3, nodes=8)),
}
LEARNED = ["speculative", "static tree", "dynamic tree"]
CASES = [(name, False) for name in SAMPLERS] + [(name, True) for name in LEARNED]


@pytest.mark.parametrize(("name", "learned"), CASES)
def test_samplers_draw_the_same_ids(device, monkeypatch, name, learned):
    """With and without kernels, guided, with three images; on a GPU captured too."""
    torch.manual_seed(0)
    size = dict(vocab_size=24, grid=(2, 3), width=32, num_heads=2, hidden_width=48)
    model = RasterGPT(num_classes=3, num_layers=1, **size).eval()
    nn.init.normal_(model.output.weight, std=0.5)
    sampler, settings = SAMPLERS[name]
    if learned:
        drafter = FeatureDrafter(**size).eval()
        drafter.reset_parameters(torch.Generator().manual_seed(0))
        settings = {**settings, "drafter": drafter.to(device)}
    model = model.to(device)
    condition = Condition(labels_BA=torch.tensor([[0], [2], [1]], device=device))
    runtime = Runtime()

    def call():
        noise = Noise(image_seeds(5, 3), device)
        return sampler(model, condition, noise=noise, guidance=Guidance(scale=1.5), runtime=runtime, **settings)

    got = call()
    if device.type == "cuda":
        assert torch.equal(call().tokens, got.tokens)
    runtime.clear()
    expected = plain(monkeypatch, call)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.outcome_BN, expected.outcome_BN)
    assert got.statistics.tokens_per_pass == expected.statistics.tokens_per_pass
    assert got.statistics.proposed == expected.statistics.proposed
    assert got.statistics.accepted == expected.statistics.accepted


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["jacobi", "jacobi maximal", "jacobi gumbel", "static tree", "dynamic tree", "k_seq"])
def test_distribution_through_kernels(name):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = TabularGenerator(vocab_size=4, grid=(2, 2)).to(device)
    sampler, settings = SAMPLERS[name]
    n = 20_000
    condition = Condition(labels_BA=torch.zeros(n, 1, dtype=torch.int64, device=device))
    assert kernels.usable(model.table)
    out = sampler(model, condition, noise=Noise(image_seeds(0, n), device), **settings)
    check = check_distribution(
        out.tokens, joint_distribution(model, condition.rows(torch.zeros(1, dtype=torch.int64))), 4
    )
    assert check.passed, check
