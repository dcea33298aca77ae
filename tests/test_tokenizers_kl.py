"""KL tokenizer: parity with MAR, draws and scale, sizes and errors, training by the one trainer, files of others."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file

import visar
from visar.checkpoints.common import empty, rename
from visar.checkpoints.mar import convert_kl, export_kl
from visar.checkpoints.options import Convert
from visar.cli.convert import convert
from visar.core.interface import Tokenizer
from visar.data.images import as_float, load_image_set
from visar.evaluate.extractors import load_extractor
from visar.evaluate.images import ArrayImages
from visar.evaluate.reconstruction import evaluate_reconstruction
from visar.generators.families import find_family
from visar.io.pictures import to_uint8
from visar.layers.packable import save_model
from visar.pipelines.components import load_tokenizer
from visar.pipelines.fitting import check_codes, codes_of
from visar.tokenizers.decoding import decode_tokens
from visar.tokenizers.kl import KL_PRESETS, KLTokenizer, kl_divergence, measure_scale
from visar.train.token_batches import TokenSplit
from visar.train.token_cache import TokenCache, build_token_cache
from visar.train.tokenizer import train_tokenizer

TRAINING = runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py"))
CLOSE: dict[str, Any] = dict(atol=1e-5, rtol=1e-5)


def tiny(**changes) -> KLTokenizer:
    torch.manual_seed(0)
    settings = dict(
        image_size=16, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3,
        scale_factor=0.7,
    )  # fmt: skip
    return KLTokenizer(**{**settings, **changes}).eval()


def pictures(count=2, height=16, width=16):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def released(folder):
    """The model of a parity folder; every size in config.json is found in the file."""
    nested = {"model": {key.removeprefix("model."): value for key, value in folder.checkpoint().items()}}
    facts = folder.config
    config, state = convert_kl(nested, image_size=facts["resolution"], scale_factor=facts["scale_factor"])
    found = [config[name] for name in ("latent_channels", "channel_multipliers", "base_channels", "num_res_blocks")]
    assert found == [facts["embed_dim"], tuple(facts["ch_mult"]), facts["ch"], facts["num_res_blocks"]]
    assert config["decoder_attention"] == bool(facts["decoder_attn_resolutions"])
    model = KLTokenizer(**config).eval()
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------------------ parity
def reference_of(folder, multipliers, blocks, latents):
    """A parity folder of other sizes, made by diffusers' autoencoder, with batches and grids of its own."""
    torch.manual_seed(3)
    levels, scale = len(multipliers), 0.4
    other = AutoencoderKL(
        block_out_channels=[32 * multiplier for multiplier in multipliers],
        down_block_types=["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=blocks,
        latent_channels=latents,
    ).eval()
    rules = [
        (r"encoder\.down_blocks\.", "encoder.down."),
        *((rf"decoder\.up_blocks\.{level}\.", f"decoder.up.{levels - 1 - level}.") for level in range(levels)),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.downsamplers\.0\.", ".downsample."),
        (r"\.upsamplers\.0\.", ".upsample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        (r"\.conv_norm_out\.", ".norm_out."),
    ]
    state = {}
    for key, value in rename(other.state_dict(), rules).items():
        matrix = value.ndim == 2  # a convolution of one pixel here
        state[f"model.{key}"] = (value[..., None, None] if matrix else value).contiguous()
    io = {}
    side = 2 ** (levels - 1)
    for case, count, rows, columns in (("sq", 3, 4, 4), ("rect", 2, 3, 5)):
        image = pictures(count, rows * side, columns * side)
        law = other.encode(image).latent_dist
        noise = torch.randn(law.mean.shape)
        sample = law.mean + law.std * noise
        io |= {
            f"{case}.{name}": value
            for name, value in dict(
                image=image, moments=law.parameters, mean=law.mean, logvar=law.logvar, std=law.std, kl=law.kl(),
                noise=noise, scaled_latent=scale * sample, recon_from_sample=other.decode(sample).sample,
                recon_from_mean=other.decode(law.mean).sample,
            ).items()
        }  # fmt: skip
    latent = torch.randn(1, latents, 2, 3)
    io["gen.scaled_latent"], io["gen.image"] = scale * latent, other.decode(latent).sample
    pixels = (255 * ((io["gen.image"] + 1) / 2)).clamp(0, 255).round().to(torch.uint8)
    io["gen.uint8_hwc"] = pixels[0].permute(1, 2, 0).contiguous()
    io["clamp.parameters"] = 100 * torch.randn(2, 2 * latents, 3, 1)
    extreme = DiagonalGaussianDistribution(io["clamp.parameters"])
    io |= {"clamp.mean": extreme.mean.contiguous(), "clamp.logvar": extreme.logvar, "clamp.std": extreme.std}
    facts = dict(
        embed_dim=latents, ch_mult=multipliers, ch=32, num_res_blocks=blocks, resolution=4 * side, scale_factor=scale,
        decoder_attn_resolutions=[],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    save_file(state, folder / "checkpoint.safetensors")
    save_file({key: value.contiguous() for key, value in io.items()}, folder / "io.safetensors")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mar-kl16")
    with torch.no_grad():
        reference_of(folder, [1, 1, 2], 2, 6)
    return folder


@pytest.fixture(params=["released", "other sizes"])
def folder(request, parity, second):
    shipped = parity("mar-kl16")
    return shipped if request.param == "released" else replace(shipped, folder=second)


@torch.no_grad()
@pytest.mark.parametrize("case", ["sq", "rect"])
def test_parity_of_moments_draws_and_reconstructions(folder, case):
    model = released(folder)
    io = {key.removeprefix(f"{case}."): value for key, value in folder.io.items() if key.startswith(f"{case}.")}
    mean, logvar = model.moments(io["image"])
    torch.testing.assert_close(torch.cat([mean, logvar], 1), io["moments"], **CLOSE)
    torch.testing.assert_close(logvar, io["logvar"], **CLOSE)
    torch.testing.assert_close(kl_divergence(mean, logvar), io["kl"], **CLOSE)
    scale = folder.config["scale_factor"]
    mean_tokens, std_tokens = model.token_moments(io["image"])
    torch.testing.assert_close(std_tokens / scale, in_raster_order(io["std"]), **CLOSE)
    torch.testing.assert_close(model.encode(io["image"]), mean_tokens, rtol=0, atol=0)
    tokens = model.encode(io["image"], in_raster_order(io["noise"]))
    grid = tuple(io["mean"].shape[2:])
    torch.testing.assert_close(tokens, in_raster_order(io["scaled_latent"]), **CLOSE)
    torch.testing.assert_close(model.decode(tokens, grid), io["recon_from_sample"], **CLOSE)
    torch.testing.assert_close(model.decode_latents(io["mean"]), io["recon_from_mean"], **CLOSE)


def in_raster_order(latent):
    return latent.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_parity_of_generated_latents_and_extreme_moments(folder):
    model, io = released(folder), folder.io
    latent = io["gen.scaled_latent"]
    image = model.decode(in_raster_order(latent), latent.shape[2:])
    torch.testing.assert_close(image, io["gen.image"], **CLOSE)
    assert torch.equal(to_uint8(image)[0].permute(1, 2, 0), io["gen.uint8_hwc"])
    parameters = io["clamp.parameters"]
    count, width, rows, columns = parameters.shape
    model.encoder.forward = lambda image: parameters
    model.quant_conv.weight.copy_(torch.eye(width).view(width, width, 1, 1)), model.quant_conv.bias.zero_()
    image = torch.zeros(count, 3, rows * model.factor, columns * model.factor)
    mean, logvar = model.moments(image)
    assert torch.equal(mean, io["clamp.mean"]) and torch.equal(logvar, io["clamp.logvar"])
    deviation = model.token_moments(image)[1] / folder.config["scale_factor"]
    torch.testing.assert_close(deviation, in_raster_order(io["clamp.std"]))


def test_parity_of_manifests(parity):
    for path in parity("mar-kl16").manifests():
        manifest = json.loads(path.read_text())
        tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest["tensors"].items()}
        config, _ = convert_kl(tensors)
        assert config["channel_multipliers"] == tuple(manifest["config"]["ch_mult"])
        assert config["scale_factor"] == manifest["config"]["scale_factor"] and not config["decoder_attention"]
        model = empty(KLTokenizer, config)
        assert sum(value.numel() for value in model.parameters()) == manifest["num_params"]
        assert model.layout == empty(KLTokenizer, KL_PRESETS["kl-16"]).layout


@pytest.mark.parametrize("decoder_attention", [False, True])
def test_files_of_other_sizes_come_back(tmp_path, decoder_attention):
    """A second size: three levels, two blocks, attention in the decoder or not; through the command and back."""
    model = tiny(
        channel_multipliers=(1, 2, 2), num_res_blocks=2, latent_channels=5, base_channels=64, scale_factor=0.2325,
        decoder_attention=decoder_attention,
    )  # fmt: skip
    torch.save(export_kl(model), tmp_path / "kl.ckpt")
    assert "KLTokenizer" in convert(Convert(file=tmp_path / "kl.ckpt", out=tmp_path / "kl", dtype="float32"))
    again = load_tokenizer(str(tmp_path / "kl"), device="cpu")
    image = pictures(3, 24, 16)
    assert again.config["decoder_attention"] == decoder_attention
    assert torch.equal(again.encode(image), model.encode(image))


def test_a_file_of_another_kind_is_refused(tmp_path):
    state = export_kl(tiny())["model"]
    del state["encoder.conv_in.weight"]
    with pytest.raises(ValueError, match="is not a complete KL tokenizer: missing encoder.conv_in.weight"):
        convert_kl(state)


# ------------------------------------------------------------------------------------------------- what it computes
@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_scaled_latents_in_raster_order(patch):
    model = tiny(patch_size=patch)
    assert isinstance(model, Tokenizer)
    image = pictures(2)
    mean, logvar = model.moments(image)
    tokens = model.encode(image)
    side = 8 // patch
    assert tokens.shape == (2, side * side, 3 * patch * patch) == (2, model.layout.num_tokens, model.layout.channels)
    assert model.layout.vocab_size == 0 and model.downsampling == 2 * patch
    for place in (0, side, side * side - 1):
        row, column = patch * (place // side), patch * (place % side)
        expected = 0.7 * mean[:, :, row : row + patch, column : column + patch].flatten(1)
        assert torch.equal(tokens[:, place], expected)
    torch.testing.assert_close(model.latents(tokens), mean)
    noise = torch.randn(tokens.shape)
    mean_tokens, std_tokens = model.token_moments(image)
    assert torch.equal(model.encode(image, noise), mean_tokens + std_tokens * noise)
    torch.testing.assert_close(std_tokens, model.tokens_of(logvar.exp().sqrt()))
    whole = decode_tokens(model, tokens)
    torch.testing.assert_close(whole, model.decode_latents(mean))
    torch.testing.assert_close(decode_tokens(model, tokens[1:]), whole[1:])


@torch.no_grad()
def test_the_scale_makes_tokens_of_unit_deviation():
    model = tiny()
    images = [pictures(8), pictures(4)]
    scale = measure_scale(model, images)
    model.register_to_config(scale_factor=scale)
    tokens = torch.cat([model.encode(image, torch.randn(len(image), 64, 3)) for image in images])
    assert float(tokens.square().mean().sqrt()) == pytest.approx(1.0, abs=0.03)


def test_the_kl_is_that_of_torch():
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    first = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(first, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tiny(scale_factor=0.0), "scale_factor 0.0"),
        (lambda: tiny(image_size=9), "image size 9 x 9; both sides must be multiples of 2"),
        (lambda: tiny().encode(torch.zeros(1, 3, 5, 4)), "image size 5 x 4"),
        (lambda: tiny().encode(pictures() * 127), "needed: in"),
        (lambda: tiny().encode(pictures(), torch.zeros(64, 3)), r"noise of shape \(64, 3\); needed: \(2, 64, 3\)"),
        (lambda: tiny().decode(torch.zeros(2, 64, dtype=torch.int64)), r"needed: floats \[B, 64, 3\]"),
        (lambda: tiny().decode(torch.zeros(2, 63, 3)), r"tokens of shape \(2, 63, 3\)"),
        (lambda: find_family("raster", tiny().layout), "does not fit tokens that are vectors"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# ---------------------------------------------------------------------------------------------------------- training
def test_the_trainer_trains_it_and_measures_its_scale(tmp_path):
    data = TRAINING["write_images"](tmp_path / "data.npz")
    sizes = dict(base_channels=32, channel_multipliers=[1, 1], num_res_blocks=1, latent_channels=3)
    options = TRAINING["tokenizer_options"](
        data, tmp_path / "run", kind="kl", preset="kl-4-64", codebook_size=None, model_options=json.dumps(sizes),
        steps=6, validate_every=3, kl_weight=1e-3,
    )  # fmt: skip
    result = train_tokenizer(options)
    assert result.finished
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"validation/latent_std", "validation/latent_noise", "validation/kl"} <= set(rows[-1])
    assert all(row["train/kl"] > 0 for row in rows if "train/kl" in row)
    model = load_tokenizer(str(tmp_path / "run" / "model"), device="cpu")
    assert isinstance(model, KLTokenizer) and model.layout.channels == 3
    best = max((row["validation/psnr"], row["validation/latent_std"]) for row in rows if "validation/psnr" in row)[1]
    assert 1 / model.config["scale_factor"] == pytest.approx(best, rel=0.2)


def test_a_decoder_alone_is_trained_and_tokens_stay(tmp_path):
    data = TRAINING["write_images"](tmp_path / "data.npz")
    first = tiny(image_size=8, channel_multipliers=(1, 1))
    first.save_pretrained(tmp_path / "first")
    sizes = dict(base_channels=32, channel_multipliers=[1, 1], num_res_blocks=1, latent_channels=3)
    options = TRAINING["tokenizer_options"](
        data, tmp_path / "run", kind="kl", codebook_size=None, model_options=json.dumps(sizes), steps=3,
        validate_every=3, save_every=0, decoder_only=True, initial=tmp_path / "first", save_dtype="float32",
    )  # fmt: skip
    train_tokenizer(options)
    again = load_tokenizer(str(tmp_path / "run" / "model"), device="cpu")
    image = pictures(2, 8, 8)
    with torch.no_grad():
        tokens = first.encode(image)
        assert torch.equal(tokens, again.encode(image)) and codes_of(first) == codes_of(again)
        assert not torch.equal(first.decode(tokens), again.decode(tokens))
    other = tiny(image_size=8, channel_multipliers=(1, 1), scale_factor=0.6)
    with pytest.raises(ValueError, match="not the one that the generator was trained with"):
        check_codes(other, codes_of(first))


@torch.no_grad()
def test_moments_are_kept_and_tokens_are_drawn_by_them(tmp_path):
    images = load_image_set(TRAINING["write_images"](tmp_path / "data.npz"), 8)
    path = tmp_path / "tokens.safetensors"
    model = tiny(image_size=8)
    cache = build_token_cache(images, model, path)
    mean, std = model.token_moments(as_float(torch.from_numpy(images.images)))
    assert torch.equal(cache.tokens_NKL[:, 0], torch.cat([mean, std], -1).half())
    loaded = TokenCache.load(path)
    assert torch.equal(loaded.tokens_NKL, cache.tokens_NKL)
    count = torch.arange(len(images))
    split = TokenSplit(loaded.tokens_NKL, images.labels_NA, None, count, None)
    assert torch.equal(split.tokens(count), mean.half().float())
    drawn, again, other = (split.tokens(count, 0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    normal = (drawn - split.tokens(count)) / std.half().float()
    assert float(normal.mean()) == pytest.approx(0, abs=0.1) and float(normal.std()) == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="made with another scale_factor; remove it"):
        build_token_cache(images, tiny(image_size=8, scale_factor=0.6), path)


def test_its_reconstructions_are_evaluated():
    source = ArrayImages(to_uint8(pictures(6)).movedim(1, -1), "noise")
    with pytest.warns(UserWarning, match="6 reconstructions"):
        found = evaluate_reconstruction(tiny(), source, load_extractor(), batch_size=4)
    assert found.num_images == 6 and 0 < found.psnr < 100 and found.codes_used is found.code_perplexity is None


def test_it_is_saved_in_eight_bits(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "kl", "int8")
    again = visar.load_tokenizer(str(tmp_path / "kl"), device="cpu")
    image = pictures(2)
    torch.testing.assert_close(again.encode(image), model.encode(image), atol=0.05, rtol=0.05)
