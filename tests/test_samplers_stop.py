"""A callback that returns True ends the sampling: every sampler returns what all images have by then."""

import runpy
from pathlib import Path

import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.samplers.index import SAMPLERS

ROOT = Path(__file__).parent
TINY = runpy.run_path(str(ROOT / "fixtures" / "tiny.py"))
CONDITION = Condition(labels_BA=torch.tensor([[0], [1]]))


def pyramid_model(seed=0, model_class=HierarchicalMaskedTransformer, **settings):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=16, codebook_width=4, scales=(1, 2, 3, 4), width=16, num_heads=2, num_classes=3)
    model = model_class(**sizes, num_layers=2, **settings)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model.eval()


RASTER = {
    "ancestral": {},
    "jacobi": dict(window=4, check_every=2),
    "speculative": dict(num_drafts=2, check_every=2),
    "static_tree": dict(branches=(2, 1), check_every=2),
    "dynamic_tree": dict(depth=2, children=2, nodes=3, check_every=2),
    "k_seq": dict(num_chains=2, num_drafts=2, check_every=2),
    "grouped": dict(window=4, group=3, check_every=2),
    "lantern": dict(max_moved=0.1, codebook=torch.randn(6, 3), depth=2, children=2, nodes=3, check_every=2),
}


@pytest.mark.parametrize("name", RASTER)
def test_raster_samplers(name):
    model, sample = TINY["transformer"](6, (3, 4)), SAMPLERS[name].load()
    shared = dict(guidance=Guidance(1.5), top_k=5, **RASTER[name])
    seen = []

    def stop(done, tokens_BN):
        seen.append(done)
        return done >= 4

    whole = sample(model, CONDITION, noise=Noise([1, 2]), **shared)
    part = sample(model, CONDITION, noise=Noise([1, 2]), callback=stop, **shared)
    done = seen[-1]
    assert 4 <= done < 12 and all(earlier < 4 for earlier in seen[:-1])
    assert torch.equal(part.tokens, whole.tokens[:, :done])
    assert part.statistics.forward_passes["generator"] < whole.statistics.forward_passes["generator"]
    if whole.outcome_BN is not None:
        assert torch.equal(part.outcome_BN, whole.outcome_BN[:, :done])


SCALES = ("ancestral", "next_scale", "masked_refinement", "collaborative", "edit")


@pytest.mark.parametrize("ending", [0, 1, 2])
@pytest.mark.parametrize("name", SCALES)
def test_samplers_over_scales(name, ending):
    model, sample = pyramid_model(num_refinement_layers=1), SAMPLERS[name].load()
    shared = dict(guidance=Guidance(1.5), top_k=9)
    if name == "collaborative":
        follower = pyramid_model(1, NextScaleTransformer)
        follower.set_tokenizer(model.pyramid)
        shared |= dict(followers=[follower], takes_over=[2])
    if name == "edit":
        shared |= dict(given_tokens=torch.randint(16, (2, 30)), keep=torch.zeros(1, 4, 4, dtype=torch.bool))
    end, seen = model.ends[ending], []
    whole = sample(model, CONDITION, noise=Noise([1, 2]), **shared)
    part = sample(
        model, CONDITION, noise=Noise([1, 2]), callback=lambda done, _: seen.append(done) or done == end, **shared
    )
    assert seen == list(model.ends[: ending + 1])
    assert torch.equal(part.tokens, whole.tokens[:, :end])
    histogram = part.statistics.tokens_per_pass
    assert sum(size * times for size, times in histogram.items()) == 2 * end
    if name != "masked_refinement":
        assert sum(part.statistics.forward_passes.values()) == ending + 1
    if name not in ("ancestral", "edit"):
        torch.testing.assert_close(part.latent, model.pyramid.running_maps(part.tokens)[-1], atol=1e-5, rtol=0)


def test_the_former_name_of_the_latent():
    model = pyramid_model(num_refinement_layers=1)
    out = SAMPLERS["next_scale"].load()(model, CONDITION, noise=Noise([1, 2]))
    with pytest.deprecated_call(match="SampleOutput.latent"):
        assert out.latent_BChw is out.latent


def test_a_callback_that_returns_nothing_ends_nothing():
    out = SAMPLERS["ancestral"].load()(
        TINY["tabular"](), CONDITION, noise=Noise([1, 2]), callback=lambda done, tokens: None
    )
    assert out.tokens.shape == (2, 4)
