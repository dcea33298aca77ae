"""The causal generator of continuous tokens from training to images: trained, saved, loaded, sampled, refused."""

import json
import runpy
from pathlib import Path

import pytest
import torch

import visar
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.causal_continuous import CausalContinuous
from visar.generators.families import find_family
from visar.generators.masked import MaskedGenerator
from visar.pipelines.fitting import check_parts
from visar.pipelines.image import ImagePipeline
from visar.samplers.continuous import sample_continuous
from visar.samplers.continuous_speculation import sample_continuous_speculation
from visar.tokenizers.kl import KLTokenizer
from visar.tokenizers.vq import VQTokenizer
from visar.train.generator import train_generator
from visar.train.token_cache import TokenCache
from visar.train.tokenizer import train_tokenizer

TRAINING = runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py"))
HEADS = {
    "diffusion": dict(width=16, depth=1, prediction="velocity", variance="large", steps=5),
    "flow": dict(width=16, depth=1, steps=3),
    "mixture": dict(components=3),
    "energy": dict(width=16, depth=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set, and a KL tokenizer that was trained on it for a moment."""
    folder = tmp_path_factory.mktemp("continuous")
    data = TRAINING["write_images"](folder / "data.npz")
    sizes = dict(base_channels=32, channel_multipliers=[1, 1], num_res_blocks=1, latent_channels=3)
    train_tokenizer(
        TRAINING["tokenizer_options"](
            data, folder / "kl", kind="kl", preset="kl-4-64", codebook_size=None, model_options=json.dumps(sizes),
            steps=6, validate_every=6, save_every=0,
        )
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("head", list(HEADS))
def test_it_is_trained_saved_loaded_and_sampled(folder, tmp_path, head):
    options = TRAINING["generator_options"](
        folder / "data.npz", folder / "kl" / "model", tmp_path / "run", steps=20, validate_every=10, save_every=0,
        family="causal_continuous", tokens=tmp_path / "tokens.safetensors", sample_images=4, sample_guidance=1.0,
        model_options=json.dumps(dict(head=head, head_arguments=HEADS[head], head_draws=2)),
    )  # fmt: skip
    result = train_generator(options)
    assert result.finished and result.best is not None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    cache = TokenCache.load(tmp_path / "tokens.safetensors")
    assert cache.tokens_NKL.shape[2:] == (16, 6) and cache.tokens_NKL.dtype == torch.float16
    assert bool((cache.tokens_NKL[..., 3:] > 0).all())
    pipe = visar.load(tmp_path / "run" / "model", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.generator, CausalContinuous) and "16 tokens of 3 numbers" in repr(pipe)
    both = pipe(num_images=2, seed=3, output_type="pt")
    assert both.tokens.shape == (2, 16, 3) and both.images.shape == (2, 3, 8, 8)
    alone = pipe(num_images=1, seed=4, output_type="pt")
    torch.testing.assert_close(alone.images[0], both.images[1], atol=1e-4, rtol=0)
    assert both.statistics.counts["head_passes"] == 16 * pipe.generator.token_head.steps
    with pytest.raises(ValueError, match="sampler ancestral does not fit a CausalContinuous; samplers that do: cont"):
        pipe(sampler="ancestral", seed=1)


def test_it_reads_captions():
    sizes: dict = dict(grid=(1, 3), width=8, num_layers=1, num_heads=2, hidden_width=12, num_classes=0, channels=2)
    model = CausalContinuous(
        **sizes, head="mixture", head_arguments=HEADS["mixture"], caption_width=5, caption_length=3
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.eval().requires_grad_(False)
    text, given = torch.randn(2, 3, 5), torch.tensor([[False, True, True], [True, True, True]])
    condition = Condition(text_BTC=text, text_mask_BT=given)
    settings: dict = dict(guidance=Guidance(1.6))
    out = sample_continuous(model, condition, noise=Noise([3, 4]), **settings)
    alone = sample_continuous(model, condition.rows(slice(1, 2)), noise=Noise([4]), **settings)
    torch.testing.assert_close(alone.tokens[0], out.tokens[1], atol=1e-5, rtol=1e-5)
    drafted = sample_continuous_speculation(
        model, condition, noise=Noise([3, 4]), drafter=model, num_drafts=3, **settings
    )
    torch.testing.assert_close(drafted.tokens, out.tokens, atol=1e-4, rtol=1e-4)
    other = sample_continuous(model, Condition(text_BTC=text + 1, text_mask_BT=given), noise=Noise([3, 4]), **settings)
    assert not torch.equal(other.tokens, out.tokens)
    assert model(out.tokens, condition, torch.Generator()).shape == (2, 3)


def test_means_may_be_trained_on_instead_of_draws(folder, tmp_path):
    losses = {}
    for means in (False, True):
        options = TRAINING["generator_options"](
            folder / "data.npz", folder / "kl" / "model", tmp_path / str(means), steps=1, validate_every=1,
            save_every=0, family="causal_continuous", tokens=tmp_path / "tokens.safetensors", token_means=means,
            variants=1, model_options=json.dumps(dict(head="mixture", head_arguments=HEADS["mixture"])),
        )  # fmt: skip
        train_generator(options)
        rows = (tmp_path / str(means) / "metrics.jsonl").read_text().splitlines()
        losses[means] = next(row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row)
    assert losses[True] != losses[False]


def test_tokenizers_and_generators_of_another_kind_are_refused():
    kl = KLTokenizer(image_size=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=3)
    vq = VQTokenizer(image_size=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=8)
    sizes = dict(grid=(4, 4), width=16, num_layers=1, num_heads=2, hidden_width=24, num_classes=2)
    causal = CausalContinuous(channels=3, head="mixture", **sizes)
    check_parts(kl, causal)
    for tokenizer, generator, says in (
        (vq, causal, r"codes 0 \(the tokenizer's: 8\); numbers of a token 3 \(the tokenizer's: 8\)"),
        (kl, CausalContinuous(channels=4, head="mixture", **sizes), "numbers of a token 4 .the tokenizer's: 3"),
    ):
        with pytest.raises(ValueError, match=says):
            check_parts(tokenizer, generator)
    assert find_family("causal_continuous", kl.layout).model is CausalContinuous
    assert find_family("auto", kl.layout).model is MaskedGenerator
    with pytest.raises(ValueError, match="family causal_continuous does not fit tokens that are 8 codes"):
        find_family("causal_continuous", vq.layout)
    with pytest.raises(ValueError, match="head_solver 'ddim' is not defined for a MixtureHead"):
        ImagePipeline(kl, causal).check_settings(sampler="continuous", sampler_options={"head_solver": "ddim"})
