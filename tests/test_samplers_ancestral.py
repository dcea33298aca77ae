"""Ancestral sampling: the enumerated distribution of a tiny model, batch invariance, callbacks."""

import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise, image_seeds
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_neighbor import NextNeighborTransformer
from visar.generators.raster import RasterGPT
from visar.generators.region_parallel import RegionParallelTransformer
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.filtering import filter_logits

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))


@pytest.fixture(scope="module")
def model() -> RasterGPT:
    torch.manual_seed(0)
    tiny = RasterGPT(
        vocab_size=4, grid=(2, 2), width=16, num_layers=2, num_heads=2, hidden_width=32, num_classes=3, attributes=(2,)
    )
    for parameter in tiny.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return tiny.eval()


def enumerate_probs(model, condition, guidance, **filters):
    """Probability of each of the V^N sequences, from teacher-forced passes."""
    sequences = torch.tensor(list(itertools.product(range(4), repeat=4)))
    many = condition.rows(torch.zeros(len(sequences), dtype=torch.int64))
    with torch.no_grad():
        logits = model(sequences, many)
        if guidance.active(4):
            null = model(sequences, model.null_condition(many))
            logits = null + (logits - null) * torch.tensor(guidance.scales(4))[None, :, None]
        probs = torch.softmax(filter_logits(logits, **filters), -1)
    return probs.gather(-1, sequences[..., None]).squeeze(-1).prod(-1)


@pytest.mark.parametrize(
    ("guidance", "filters"),
    [
        (OFF, {}),
        (Guidance(2.0), {}),
        (Guidance(3.0, schedule="linear"), dict(temperature=0.7)),
        (Guidance(1.5), dict(top_k=2)),
        (OFF, dict(top_p=0.8, temperature=1.3)),
    ],
)
def test_joint_distribution(model, guidance, filters):
    condition = Condition(labels_BA=torch.tensor([[1, 0]]))
    probs = enumerate_probs(model, condition, guidance, **filters)
    assert abs(float(probs.sum()) - 1) < 1e-5
    n = 20_000
    many = condition.rows(torch.zeros(n, dtype=torch.int64))
    tokens = sample_ancestral(model, many, noise=Noise(image_seeds(3, n)), guidance=guidance, **filters).tokens
    cell = (tokens * torch.tensor([64, 16, 4, 1])).sum(-1)
    counts = torch.bincount(cell, minlength=256).double()
    assert counts[probs == 0].sum() == 0
    expected = probs.double() * n
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert statistic < len(wanted) + 5 * (2 * len(wanted)) ** 0.5


def test_image_depends_on_its_seed_and_condition_only(model):
    labels = torch.tensor([[0, 0], [1, 1], [2, 0], [3, 2], [1, 0]])
    seeds = [4, 8, 15, 16, 23]
    settings = dict(guidance=Guidance(2.0), top_p=0.9)
    batch = sample_ancestral(model, Condition(labels_BA=labels), noise=Noise(seeds), **settings).tokens
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = sample_ancestral(
        model, Condition(labels_BA=labels[order]), noise=Noise([seeds[i] for i in order]), **settings
    ).tokens
    assert torch.equal(shuffled, batch[order])
    for row, seed in enumerate(seeds):
        alone = sample_ancestral(model, Condition(labels_BA=labels[row : row + 1]), noise=Noise([seed]), **settings)
        assert torch.equal(alone.tokens[0], batch[row])


@pytest.mark.parametrize(
    "model",
    [
        TINY.tabular(),
        TINY.transformer(),
        TINY.over_scales(),
        TINY.over_scales(HierarchicalMaskedTransformer),
        NextNeighborTransformer(vocab_size=4, grid=(3, 2), width=8, num_layers=1, num_heads=2, num_classes=2),
        RegionParallelTransformer(vocab_size=4, grid=(4, 2), width=8, num_layers=1, num_heads=2, num_classes=2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_positions_and_result_are_in_the_order_of_the_tokenizer(model):
    """What a block commits appears in the result at the positions that the model named for it, and nowhere else."""
    state, given, positions = model.start(TINY.labels(0, 1, 2)), torch.tensor([[3], [2], [1]]), []
    for block, size in enumerate(model.block_sizes):
        state.block = block
        positions.append(model.positions(state).expand(3, -1))
        assert positions[-1].shape == (3, size)
        model.append(state, given.expand(-1, size))
        done, expected = torch.cat(positions, dim=1), torch.zeros(3, model.num_tokens, dtype=torch.int64)
        assert torch.equal(model.result(state), expected.scatter(1, done, given.expand(-1, done.shape[1])))
    assert torch.equal(done.sort(1).values, torch.arange(model.num_tokens).expand(3, -1))


def test_statistics_and_callback(model):
    seen = []
    out = sample_ancestral(
        model,
        Condition(labels_BA=torch.tensor([[0, 0], [1, 1]])),
        noise=Noise([1, 2]),
        callback=lambda done, tokens: seen.append((done, tokens.clone())),
    )
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    for done, tokens in seen:
        assert torch.equal(tokens[:, :done], out.tokens[:, :done])
    assert out.statistics.forward_passes == {"generator": 4}
    assert out.statistics.tokens_per_pass == {1: 8}
    assert out.statistics.acceptance_rate is None and out.statistics.mean_tokens_per_pass == 1.0
