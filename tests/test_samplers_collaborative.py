"""Collaborative decoding: parity with CoDe, equality with plain sampling, memory, any models on any scales."""

import copy
import weakref

import pytest
import torch

from visar.checkpoints.common import build
from visar.checkpoints.var import convert_transformer, convert_vq
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.samplers.collaborative import plan_stages, sample_collaborative
from visar.samplers.next_scale import sample_next_scale
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer


def ramp(cfg):
    return Guidance(float(cfg), "extrapolate", "linear")


def from_parity(parity):
    """Tokenizer, drafter and refiner of the parity folder."""
    folder, tiny = parity("code"), parity("var_vqvae").config["tiny"]
    scales = folder.config["patch_nums"]
    config, state = convert_vq(parity("var_vqvae").checkpoint(), scales=scales, phi_ratio=tiny["quant_resi"])
    tokenizer = build(MultiScaleVQTokenizer, config, state, "tokenizer", torch.float32)
    models = []
    for role in ("drafter", "refiner"):
        weights, heads = folder.checkpoint(f"checkpoint_{role}.safetensors"), folder.config[role]["num_heads"]
        config, state = convert_transformer(weights, tokenizer, num_heads=heads, scales=scales)
        models.append(build(NextScaleTransformer, config, state, role, torch.float32))
    return tokenizer, *models


def tiny_models(count=2, scales=(1, 2, 3, 4), model_class=NextScaleTransformer):
    """Models of different depth that share a tokenizer, with logits far from uniform."""
    markov = model_class is HierarchicalMaskedTransformer
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        sizes = dict(vocab_size=16, codebook_width=4, scales=scales, width=16, num_heads=2, num_classes=3)
        model = model_class(num_layers=2 + seed, **sizes, **(dict(num_refinement_layers=1) if markov else {}))
        model.reset_parameters(torch.Generator().manual_seed(seed))
        with torch.no_grad():
            (model.ns_head if markov else model.head).weight.mul_(50)
        if models:
            model.set_tokenizer(models[0].pyramid)
        models.append(model.eval())
    return models


@torch.no_grad()
def test_parity(parity):
    tokenizer, drafter, refiner = from_parity(parity)
    io, cases = parity("code").io, parity("code").config["cases"]
    condition = Condition(labels_BA=io["in/label"][:, None])
    noise = Noise([0] * condition.batch)
    for name, model in (("plain_drafter", drafter), ("plain_refiner", refiner)):
        out = sample_next_scale(model, condition, noise=noise, guidance=ramp(cases["plain_*"]["cfg"]), top_k=1)
        assert torch.equal(out.tokens, io[f"{name}/out/tokens"])
        torch.testing.assert_close(out.latent, io[f"{name}/out/fhat"], atol=2e-4, rtol=0)
    names = [key.split("/")[0] for key in io if key.startswith("greedy_N") and key.endswith("/out/tokens")]
    assert names
    for name in names:
        takes_over = int(name.removeprefix("greedy_N"))
        settings = dict(noise=noise, guidance=ramp(cases["greedy_N*"]["cfg"]), top_k=1)
        out = sample_collaborative(drafter, condition, followers=[refiner], takes_over=[takes_over], **settings)
        assert torch.equal(out.tokens, io[f"{name}/out/tokens"])
        torch.testing.assert_close(out.latent, io[f"{name}/out/fhat"], atol=2e-4, rtol=0)
        image = ((tokenizer.decode_latents(out.latent) + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(image, io[f"{name}/out/image"], atol=2e-4, rtol=0)
        draft = sample_next_scale(drafter, condition, num_scales=takes_over, **settings)
        torch.testing.assert_close(draft.latent, io[f"{name}/out/draft_fhat"], atol=2e-4, rtol=0)
        assert out.statistics.forward_passes == {
            "drafter": takes_over,
            "refiner": len(drafter.scales) - takes_over,
        }
        if (key := f"{name}/out/draft_next_inputs") in io:
            tokens = torch.cat([draft.tokens, out.tokens[:, draft.tokens.shape[1] : drafter.ends[takes_over]]], 1)
            torch.testing.assert_close(drafter.pyramid.inputs(tokens), io[key], atol=2e-4, rtol=0)


@pytest.mark.parametrize("takes_over", [1, 2, 3])
@torch.no_grad()
def test_the_same_model_is_plain_sampling(takes_over):
    (model,) = tiny_models(1)
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    settings = dict(noise=Noise([1, 2]), guidance=ramp(1.5), top_k=9, top_p=0.9)
    plain = sample_next_scale(model, condition, **settings)
    itself = sample_collaborative(model, condition, followers=[model], takes_over=[takes_over], **settings)
    assert torch.equal(itself.tokens, plain.tokens) and torch.equal(itself.latent, plain.latent)
    assert itself.statistics.forward_passes == {"drafter": 4}
    twin = copy.deepcopy(model)  # takes over through a hand-over and reads the coarser scales in one pass
    handed = sample_collaborative(model, condition, followers=[twin], takes_over=[takes_over], **settings)
    assert torch.equal(handed.tokens, plain.tokens) and torch.equal(handed.latent, plain.latent)
    assert handed.statistics.forward_passes == {"drafter": takes_over, "refiner": 4 - takes_over}


class Watched(NextScaleTransformer):
    """Notes, whenever a cache is made, which of the caches before it are still held."""

    caches: list = []
    alive: list = []

    def make_cache(self, rows, num_scales, dtype, device):
        self.alive.append([reference() is not None for reference in self.caches])
        cache = super().make_cache(rows, num_scales, dtype, device)
        self.caches.append(weakref.ref(cache))
        self.slots = cache.num_slots
        return cache


@torch.no_grad()
def test_the_drafter_cache_is_gone_when_the_refiner_begins():
    drafter, refiner = tiny_models(2, model_class=Watched)
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    sample_collaborative(drafter, condition, followers=[refiner], takes_over=[2], noise=Noise([1, 2]))
    assert Watched.alive == [[], [False]]
    assert (drafter.slots, refiner.slots) == (5, 30)


@torch.no_grad()
def test_any_number_of_models_of_any_family():
    first, second, third = tiny_models(3)
    (markov,) = tiny_models(1, model_class=HierarchicalMaskedTransformer)
    markov.set_tokenizer(first.pyramid)
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    settings = dict(noise=Noise([1, 2]), guidance=ramp(1.5))
    out = sample_collaborative(first, condition, followers=[second, markov, third], takes_over=[1, 2, 3], **settings)
    assert out.statistics.forward_passes == {"drafter": 1, "refiner": 1, "refiner 2": 1, "refiner 3": 1}
    torch.testing.assert_close(out.latent, first.pyramid.running_maps(out.tokens)[-1], atol=1e-5, rtol=0)
    # The last model sees what the others drew as it would see a given prefix.
    alone = sample_next_scale(third, condition, prefix_tokens=out.tokens[:, :14], **settings)
    assert torch.equal(alone.tokens, out.tokens)
    early = sample_collaborative(first, condition, followers=[second], takes_over=[1], num_scales=2, **settings)
    assert torch.equal(early.tokens, out.tokens[:, :5])


@torch.no_grad()
def test_images_depend_on_their_own_seed_only():
    drafter, refiner = tiny_models(2)
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    together = sample_collaborative(
        drafter, condition, followers=[refiner], takes_over=[2], noise=Noise([7, 8]), guidance=ramp(1)
    )
    for row in (0, 1):
        only = sample_collaborative(
            drafter,
            condition.rows(slice(row, row + 1)),
            followers=[refiner],
            takes_over=[2],
            noise=Noise([7 + row]),
            guidance=ramp(1),
        )
        assert torch.equal(only.tokens[0], together.tokens[row])


def test_bad_plans_are_refused():
    drafter, refiner = tiny_models(2)
    for followers, takes_over in (([refiner], []), ([refiner], [0]), ([refiner], [4]), ([refiner, drafter], [2, 2])):
        with pytest.raises(ValueError, match="take over|takes_over"):
            plan_stages(drafter, followers, takes_over, 4)
    with torch.no_grad():
        refiner.pyramid.embedding.weight.add_(1)
    with pytest.raises(ValueError, match="another tokenizer"):
        plan_stages(drafter, [refiner], [2], 4)
