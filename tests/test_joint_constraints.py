"""Tokens that are drawn independently of each other break constraints that tie them, by a share that can be told.

Toy distributions over four tokens allow some sequences alone. Every generator here knows the exact conditionals, so
what it gets wrong is not a matter of training: tokens of one block follow the product of their marginals given the
blocks before. One by one, no constraint is ever broken.

B images, N tokens, V codes, J = V^N sequences, M clusters.
"""

import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visar.core.condition import Condition
from visar.core.interface import FineSampling, Masked, Staged
from visar.core.noise import Noise, image_seeds
from visar.evaluate.exactness import all_sequences, check_distribution, total_variation
from visar.generators.coarse_to_fine import CoarseToFine
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.independent import IndependentGenerator
from visar.generators.masked import MaskedState
from visar.generators.tabular import TabularGenerator
from visar.layers.heads.mixture import MixtureHead
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.jacobi import sample_jacobi
from visar.samplers.masked import masked_after, sample_masked
from visar.samplers.masked_refinement import least_certain, sample_masked_refinement

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))
many = TINY.many
V, N, DRAWS, FEWER = 4, 4, TINY.DRAWS, TINY.DRAWS // 5
SEQUENCES = all_sequences(V, N)
ALLOWED = {
    "equal": (SEQUENCES == SEQUENCES[:, :1]).all(1),
    "parity": SEQUENCES.sum(1) % 2 == 0,
    "pairs": (SEQUENCES[:, 0] == SEQUENCES[:, 1]) & (SEQUENCES[:, 2] != SEQUENCES[:, 3]),
}
EVERY, ONE_BY_ONE = [tuple(range(N))], [(n,) for n in range(N)]


def joint(name: str, even: bool = False) -> torch.Tensor:
    """A distribution float64 [J] over the allowed sequences; uneven ones have no two alike."""
    generator = torch.Generator().manual_seed(len(name))
    mass = torch.ones(len(SEQUENCES)) if even else torch.rand(len(SEQUENCES), generator=generator) + 0.2
    mass = mass.double() * ALLOWED[name]
    return mass / mass.sum()


def marginals(probs_J: torch.Tensor, tokens_BN: torch.Tensor, shown_BN: torch.Tensor) -> torch.Tensor:
    """p(x_n | shown tokens), float64 [B, N, V]; what is shown but never occurs says nothing."""
    fits_BJ = ((tokens_BN[:, None] == SEQUENCES) | ~shown_BN[:, None]).all(-1) * probs_J
    fits_BJ = torch.where(fits_BJ.sum(1, keepdim=True) > 0, fits_BJ, probs_J)
    each_BNV = fits_BJ @ torch.nn.functional.one_hot(SEQUENCES, V).double().flatten(1)
    return (each_BNV / fits_BJ.sum(1, keepdim=True)).view(-1, N, V)


def log(probs: torch.Tensor) -> torch.Tensor:
    """Logits float32; what is impossible stays so."""
    return probs.log().float()


def in_blocks(probs_J: torch.Tensor, blocks: list[tuple[int, ...]]) -> torch.Tensor:
    """Distribution [J] of drawing block after block, the tokens of a block independently of each other."""
    drawn_J, shown = torch.ones_like(probs_J), torch.zeros(N, dtype=torch.bool)
    for block in blocks:
        given = marginals(probs_J, SEQUENCES, shown.expand(len(SEQUENCES), -1))
        each = given.gather(-1, SEQUENCES[..., None])[..., 0]
        drawn_J = drawn_J * each[:, list(block)].prod(-1)
        shown = shown | torch.isin(torch.arange(N), torch.tensor(block))
    return drawn_J


def broken(name: str, tokens_BN: torch.Tensor) -> float:
    """Share of images that break the constraint."""
    place = V ** torch.arange(N - 1, -1, -1)
    return 1.0 - float(ALLOWED[name][(tokens_BN * place).sum(1)].double().mean())


def assert_as_predicted(name: str, tokens_BN: torch.Tensor, drawn_J: torch.Tensor) -> float:
    """The draws follow a distribution, and break the constraint as often as it says; returns how often."""
    share = float(drawn_J[~ALLOWED[name]].sum())
    assert drawn_J.sum().item() == pytest.approx(1.0)
    deviation = (share * (1 - share) / len(tokens_BN)) ** 0.5
    assert abs(broken(name, tokens_BN) - share) <= 4.5 * deviation + 1e-9
    check = check_distribution(tokens_BN, drawn_J, V)
    assert check.passed, check
    return share


def given(count: int = DRAWS) -> dict[str, Any]:
    return dict(condition=many(0, count), noise=Noise(image_seeds(0, count)))


# ------------------------------------------------------------------------------------------------------ predictions
def test_shares_in_closed_form():
    assert float(in_blocks(joint("equal", even=True), EVERY)[~ALLOWED["equal"]].sum()) == pytest.approx(
        1 - V ** (1 - N)
    )
    assert float(in_blocks(joint("parity", even=True), EVERY)[~ALLOWED["parity"]].sum()) == pytest.approx(1 / 2)
    for name in ALLOWED:
        probs_J = joint(name)
        assert total_variation(in_blocks(probs_J, ONE_BY_ONE), probs_J) < 1e-12
        lost = [in_blocks(probs_J, blocks) for blocks in (EVERY, [(0, 1), (2, 3)], [(0, 2), (1, 3)], ONE_BY_ONE)]
        shares = [float(each[~ALLOWED[name]].sum()) for each in lost]
        assert shares[0] > 0.3 and shares[3] == 0.0
        assert all(shares[index] <= shares[0] for index in (1, 2))
    # What ties the tokens of one block is lost, what ties blocks is not.
    pairs = joint("pairs", even=True)
    assert float(in_blocks(pairs, [(0, 1), (2, 3)])[~ALLOWED["pairs"]].sum()) > 0.7
    assert float(in_blocks(pairs, [(0, 2), (1, 3)])[~ALLOWED["pairs"]].sum()) == 0.0


# ------------------------------------------------------------------------------------- one by one, and all in one pass
def table_of(probs_J: torch.Tensor, codes: int = V) -> TabularGenerator:
    """A table of all conditionals of a distribution over codes^N sequences; prefixes that never occur say nothing."""
    model = TabularGenerator(vocab_size=codes, grid=(2, 2), num_classes=1)
    shape, rows = probs_J.view((codes,) * N), []
    for n in range(N):
        mass = shape.sum(tuple(range(n + 1, N))).reshape(-1, codes) if n + 1 < N else shape.reshape(-1, codes)
        rows.append(torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0))
    model.table.data.copy_(log(torch.cat(rows)).clamp(min=-1e4))
    return model


@pytest.mark.parametrize("name", ALLOWED)
def test_one_by_one_nothing_is_broken(name):
    probs_J = joint(name)
    model = table_of(probs_J)
    assert assert_as_predicted(name, sample_ancestral(model, **given()).tokens, probs_J) == 0.0
    # Windows of drafts are verified one after another: nothing is lost there either.
    assert assert_as_predicted(name, sample_jacobi(model, window=4, **given(FEWER)).tokens, probs_J) == 0.0


@pytest.mark.parametrize("name", ALLOWED)
def test_one_pass_of_independent_tokens(name):
    probs_J = joint(name)
    model = IndependentGenerator(num_tokens=N, vocab_size=V, num_classes=1)
    model.set_counts(torch.einsum("j,jnv->nv", probs_J, torch.nn.functional.one_hot(SEQUENCES, V).double()))
    drawn_J = in_blocks(probs_J, EVERY)
    share = assert_as_predicted(name, sample_ancestral(model, **given()).tokens, drawn_J)
    assert share > 0.3
    # A test that could not tell the two apart would pass for the distribution itself.
    assert not check_distribution(sample_ancestral(model, **given()).tokens, probs_J, V).passed


# ---------------------------------------------------------------------------------------------------- coarse to fine
class TableStages(CoarseToFine):
    """Two stages that know the exact conditionals of a distribution."""

    def __init__(self, probs_J: torch.Tensor, cluster_V: torch.Tensor) -> None:
        clusters = int(cluster_V.max()) + 1
        sizes = dict(width=8, num_layers=1, num_heads=2, hidden_width=8, fine_width=8, fine_layers=1, fine_heads=2)
        super().__init__(vocab_size=V, clusters=clusters, grid=(2, 2), num_classes=1, fine_hidden_width=8, **sizes)
        ranks = [int((cluster_V[:code] == cluster_V[code]).sum()) for code in range(V)]
        self.set_clusters(cluster_V, torch.tensor(ranks))
        self.probs_J = probs_J
        labels_J = cluster_V[SEQUENCES]
        self.label_of_J = (labels_J * clusters ** torch.arange(N - 1, -1, -1)).sum(1)
        mass = torch.zeros(clusters**N, dtype=torch.float64).index_add_(0, self.label_of_J, probs_J)
        self.coarse: Any = table_of(mass, clusters)

    def check_condition(self, condition: Condition) -> None:
        pass

    def fine_logits(self, state: Any, labels_BN: torch.Tensor, first: int = 0) -> torch.Tensor:
        fits_BJ = (self.cluster_of[SEQUENCES] == labels_BN[:, None]).all(-1) * self.probs_J
        each = (fits_BJ @ torch.nn.functional.one_hot(SEQUENCES, V).double().flatten(1)).view(-1, N, V)
        return log(each)

    def drawn(self) -> torch.Tensor:
        """p(labels) times the product of the codes' marginals given all labels, [J]."""
        labels_JN = self.cluster_of[SEQUENCES]
        probs = self.fine_logits(None, labels_JN).double().softmax(-1).nan_to_num()
        mass = torch.zeros(int(self.label_of_J.max()) + 1, dtype=torch.float64)
        mass = mass.index_add_(0, self.label_of_J, self.probs_J)
        return mass[self.label_of_J] * probs.gather(-1, SEQUENCES[..., None])[..., 0].prod(-1)


@pytest.mark.parametrize(
    "name, clusters, keeps",
    [
        ("parity", (0, 1, 0, 1), True),  # the labels say all that ties the tokens
        ("parity", (0, 0, 1, 1), False),
        ("equal", (0, 1, 2, 3), True),
        ("equal", (0, 0, 1, 1), False),
        ("pairs", (0, 0, 0, 0), False),
    ],
)
def test_codes_that_are_drawn_given_all_labels(name, clusters, keeps):
    probs_J = joint(name)
    model = TableStages(probs_J, torch.tensor(clusters))
    assert isinstance(model, Staged) and model.fine_sampling == FineSampling()
    drawn_J = model.drawn()
    for sample, settings in ((sample_ancestral, {}), (sample_jacobi, dict(window=3))):
        tokens = sample(model, **given(FEWER), **settings).tokens
        share = assert_as_predicted(name, tokens, drawn_J)
        assert (share == 0.0) == keeps
    all_at_once = float(in_blocks(probs_J, EVERY)[~ALLOWED[name]].sum())
    assert share <= all_at_once + 1e-5
    if clusters == (0, 0, 0, 0):  # one label: the second stage is all there is
        torch.testing.assert_close(drawn_J, in_blocks(probs_J, EVERY))


# ------------------------------------------------------------------------------------------------- masked refinement
class TableRefinement(HierarchicalMaskedTransformer):
    """A model over scales of 1 and 4 tokens whose second scale has the exact conditionals of a distribution."""

    def __init__(self, probs_J: torch.Tensor) -> None:
        sizes = dict(codebook_width=4, scales=(1, 2), width=8, num_layers=2, num_heads=2, num_classes=1)
        super().__init__(vocab_size=V, num_refinement_layers=1, **sizes)
        self.probs_J = probs_J

    def predict(self, state: Any) -> torch.Tensor:
        hidden_BN = torch.zeros(state.batch, N, dtype=torch.bool)
        logits = log(marginals(self.probs_J, state.tokens[:, 1:], hidden_BN))
        return logits if state.block else logits[:, :1]

    def append(self, state: Any, tokens_BL: torch.Tensor, codes_BLC: Any = None) -> None:
        self.commit_map(state, tokens_BL, state.map_BChw)  # tables read no map

    def refine(self, state: Any, tokens_BL: Any, masked_BL: Any, guidance_scale: float = 1.0) -> torch.Tensor:
        return log(marginals(self.probs_J, tokens_BL, ~masked_BL))


def refined(probs_J: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Distribution [J] of HMAR's passes: every pass draws what is masked anew, and its most certain tokens stay."""
    states = {(sequence, (False,) * N): 1.0 for sequence in ((0,) * N,)}
    for index in range(len(counts)):
        after: dict[tuple, float] = {}
        for (tokens, shown), mass in states.items():
            kept, seen = torch.tensor([tokens]), torch.tensor([shown])
            each = marginals(probs_J, kept, seen)[0].gather(-1, SEQUENCES.T).T  # [J, N]
            drawn = torch.where(seen, kept, SEQUENCES)
            same = (drawn == SEQUENCES).all(1)  # every new sequence once
            chance = torch.where(seen, 1.0, each).prod(1) * same
            left = sum(counts[index + 1 :])
            hidden = least_certain(each.float(), ~seen.expand(len(SEQUENCES), -1), left)
            for j in chance.nonzero()[:, 0].tolist():
                masked = hidden[j].tolist()
                key = tuple(0 if m else t for t, m in zip(SEQUENCES[j].tolist(), masked, strict=True))
                place = (key, tuple(not m for m in masked))
                after[place] = after.get(place, 0.0) + mass * float(chance[j])
        states = after
    weights = V ** torch.arange(N - 1, -1, -1)
    drawn_J = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for (tokens, shown), mass in states.items():
        assert all(shown)
        drawn_J[int((torch.tensor(tokens) * weights).sum())] += mass
    return drawn_J


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("counts", [(4,), (2, 2), (1, 1, 1, 1)])
def test_masked_refinement(name, counts):
    probs_J = joint(name)
    model = TableRefinement(probs_J).eval()
    out = sample_masked_refinement(model, schedule=((1,), counts), **given(FEWER))
    drawn_J = refined(probs_J, counts)
    share = assert_as_predicted(name, out.tokens[:, 1:], drawn_J)
    if counts == (4,):
        torch.testing.assert_close(drawn_J, in_blocks(probs_J, EVERY))
    assert (share > 0.1) == (len(counts) < 4) and (len(counts) < 4 or share == 0.0)
    if len(counts) == 4 and name == "parity":  # nothing is broken, but what stays is not chosen at random
        assert total_variation(drawn_J, probs_J) > 0.01


# ------------------------------------------------------------------------------- masked generators of several a step
class TableMasked:
    """A masked generator whose tokens are codes as numbers, drawn by narrow mixtures with the exact weights."""

    config: dict[str, Any] = {}
    num_tokens = N

    def __init__(self, probs_J: torch.Tensor) -> None:
        self.probs_J = probs_J
        self.token_head = MixtureHead(channels=1, hidden_size=V, components=V, floor=1e-3)
        means_and_widths = torch.stack([torch.arange(V).float(), torch.full((V,), -20.0)], dim=1).flatten()
        with torch.no_grad():
            self.token_head.output.weight.copy_(torch.cat([torch.eye(V), torch.zeros(2 * V, V)]))
            self.token_head.output.bias.copy_(torch.cat([torch.zeros(V), means_and_widths]))

    def null_condition(self, condition: Condition) -> Condition:
        return condition

    def example_condition(self, batch: int) -> Condition:
        return many(0, batch)

    def start(self, condition: Condition, guidance: Any = None, *, state: Any = None) -> MaskedState:
        return MaskedState(torch.zeros(condition.batch, N, 1), torch.zeros(condition.batch, 1))

    def features_at(self, state: MaskedState, visible_BK: torch.Tensor, places_BL: torch.Tensor) -> torch.Tensor:
        shown = torch.zeros(len(places_BL), N, dtype=torch.bool).scatter(1, visible_BK, True)
        logits = log(marginals(self.probs_J, state.tokens[..., 0].round().long(), shown)).clamp(min=-1e4)
        return logits.gather(1, places_BL[..., None].expand(-1, -1, V))

    def commit_at(self, state: MaskedState, places_BL: torch.Tensor, tokens_BLC: torch.Tensor) -> None:
        state.tokens.scatter_(1, places_BL[..., None].expand_as(tokens_BLC), tokens_BLC)


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_several_tokens_a_step_in_a_random_order(name, steps):
    probs_J = joint(name)
    model = TableMasked(probs_J)
    assert isinstance(model, Masked)
    tokens = sample_masked(model, steps=steps, **given(FEWER)).tokens[..., 0]
    assert (tokens - tokens.round()).abs().max() < 0.01
    ends = [N, *masked_after(N, steps)]
    orders = list(itertools.permutations(range(N)))
    blocks = [[order[after:before] for before, after in itertools.pairwise(ends)] for order in orders]
    drawn_J = torch.stack([in_blocks(probs_J, each) for each in blocks]).mean(0)
    share = assert_as_predicted(name, tokens.round().long(), drawn_J)
    assert (share == 0.0) == (steps == 4)
    if steps == 4:
        torch.testing.assert_close(drawn_J, probs_J)
