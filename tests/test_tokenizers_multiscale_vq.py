"""Multi-scale VQ tokenizer: parity with VAR's, public steps against whole passes, training of codebook and phi."""

import json
import zlib

import numpy as np
import pytest
import torch

from visar.checkpoints.common import build
from visar.checkpoints.var import convert_vq
from visar.tokenizers.multiscale_quantizer import (
    MultiScaleCodebookTrainer,
    MultiScaleQuantizer,
    ScaleUsage,
    phi_choice,
    scale_pairs,
)
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

TINY = dict(
    codebook_size=32, codebook_dim=4, scales=(1, 2, 4), base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1
)


def from_released(weights, **settings):
    """Our model of a state dict in VAR's names."""
    config, state = convert_vq(weights, **settings)
    return build(MultiScaleVQTokenizer, config, state, "the fixture", torch.float32)


def scales_of(io, stem):
    """Tensors stem0, stem1, ... in order."""
    found = []
    while f"{stem}{len(found)}" in io:
        found.append(io[f"{stem}{len(found)}"])
    assert found, stem
    return found


def recipe_weights(folder, config):
    """Weights of the released topology at other sizes, drawn as the fixture's README says."""
    manifest = json.loads(next(iter(folder.manifests())).read_text())
    released = manifest["config"]
    state = {}
    for key, (shape, _) in manifest["keys"].items():
        sizes = [
            dim // released["ch"] * config["ch"]
            if dim % released["ch"] == 0
            else {
                released["z_channels"]: config["z_channels"],
                released["vocab_size"]: config["vocab_size"],
                len(released["v_patch_nums"]): len(config["v_patch_nums"]),
            }.get(dim, dim)
            for dim in shape
        ]
        random = np.random.RandomState((zlib.crc32(key.encode()) + config["recipe_seed"]) % 2**32)
        z = torch.from_numpy(random.standard_normal(sizes).astype(np.float32))
        if key == "quantize.ema_vocab_hit_SV":
            z = torch.zeros_like(z)
        elif key == "quantize.embedding.weight":
            z = z * 0.6
        elif key.endswith(".bias"):
            z = z * 0.15
        elif "norm" in key:
            z = 1 + z * 0.2
        else:
            gain = 0.9 if key == "decoder.conv_out.weight" else 1.0
            z = z * np.float32(gain / np.sqrt(np.prod(sizes[1:])))
        state[key] = z
    return state


def check_case(model, io, case):
    """Compares encoder, indices, maps, images and inputs with a case's values."""
    close = dict(atol=1e-4, rtol=0)
    latent = model.encode_latents(io[f"{case}/in/image"])
    torch.testing.assert_close(latent, io[f"{case}/out/f"], **close)
    ids = model.encode(io[f"{case}/in/image"])
    assert torch.equal(ids, torch.cat(scales_of(io, f"{case}/out/idx_s"), 1))
    expected = scales_of(io, f"{case}/out/encode_fhat_s")
    torch.testing.assert_close(model.quantizer.encode(latent)[1], expected, **close)
    torch.testing.assert_close(model.decode(ids).clamp(-1, 1), io[f"{case}/out/reconstruction"], **close)
    tokens = torch.cat(scales_of(io, f"{case}/in/tokens_s"), 1)
    maps = model.quantizer.running_maps(tokens)
    torch.testing.assert_close(maps, scales_of(io, f"{case}/out/decode_fhat_s"), **close)
    for scale in range(len(maps)):
        if f"{case}/out/decode_image_s{scale}" in io:
            preview = model.decode(tokens[:, : sum(model.quantizer.sizes[: scale + 1])])
            torch.testing.assert_close(preview.clamp(-1, 1), io[f"{case}/out/decode_image_s{scale}"], **close)
    torch.testing.assert_close(model.quantizer.inputs(tokens), io[f"{case}/out/var_input"], **close)
    total = model.quantizer.empty_map(tokens.shape[0])
    for scale, part in enumerate(tokens.split(model.quantizer.sizes, 1)):
        total = model.quantizer.accumulate(total, scale, model.codebook[part])
        torch.testing.assert_close(total, io[f"{case}/out/step_fhat_s{scale}"], **close)
        if scale + 1 < len(maps):
            following = model.quantizer.next_input(total, scale + 1)
            torch.testing.assert_close(following, io[f"{case}/out/step_next_s{scale}"].flatten(2).mT, **close)


@torch.no_grad()
def test_parity(parity):
    folder = parity("var_vqvae")
    config, io, weights = folder.config, folder.io, folder.checkpoint()
    tiny = config["tiny"]
    model = from_released(weights, scales=tiny["v_patch_nums"], phi_ratio=tiny["quant_resi"])
    check_case(model, io, "tiny")
    out = model.train()(io["tiny/in/image"])
    torch.testing.assert_close(out.image_BCHW, io["tiny/out/train_rec"], atol=1e-4, rtol=0)
    loss = out.codebook_loss + tiny["beta"] * out.commitment_loss
    torch.testing.assert_close(loss[None], io["tiny/out/train_vq_loss"], atol=1e-5, rtol=0)
    cosine = from_released(weights, scales=tiny["v_patch_nums"], cosine=True)
    assert torch.equal(cosine.encode(io["tiny/in/image"]), torch.cat(scales_of(io, "znorm/out/idx_s"), 1))


@torch.no_grad()
def test_parity_of_phi_sharing(parity):
    folder = parity("var_vqvae")
    config, io = folder.config, folder.io
    phis, scales = folder.checkpoint("checkpoint_phi_modes.safetensors"), config["tiny"]["v_patch_nums"]
    others = {key: value for key, value in folder.checkpoint().items() if not key.startswith("quantize.")}
    for case in ("share0", "share1", "share2"):
        mode = f"mode{config[case]['share_quant_resi']}/"
        own = {key.removeprefix(mode): value for key, value in phis.items() if key.startswith(mode)}
        model = from_released(others | own, scales=scales)
        assert model.config["num_phi"] == config[case]["share_quant_resi"]
        ids, maps = model.quantizer.encode(io["tiny/out/f"])
        assert torch.equal(ids, torch.cat(scales_of(io, f"{case}/out/idx_s"), 1))
        torch.testing.assert_close(maps[-1], io[f"{case}/out/encode_fhat_last"], atol=1e-4, rtol=0)
        torch.testing.assert_close(model.quantizer.inputs(ids), io[f"{case}/out/var_input"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_parity_of_released_topology(parity):
    folder = parity("var_vqvae")
    config = folder.config["full"]
    weights = recipe_weights(folder, config)
    for key, total in config["float64_sum_check"].items():
        assert weights[key].double().sum().item() == pytest.approx(total, rel=1e-9, abs=1e-6)
    model = from_released(weights, scales=config["v_patch_nums"])
    assert model.downsampling == config["downsample"]
    check_case(model, folder.io, "full")


def test_phi_choice_is_the_released_one():
    assert phi_choice(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_choice(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert phi_choice(4, 4) == (0, 1, 2, 3)
    assert phi_choice(5, 4) == (0, 1, 2, 2, 3)
    assert phi_choice(6, 4) == (0, 0, 1, 2, 3, 3)
    assert phi_choice(3, 0) == (0, 1, 2)
    assert phi_choice(3, 1) == (0, 0, 0)


def test_scales_that_are_no_pyramid_are_refused():
    assert scale_pairs((1, (2, 3))) == ((1, 1), (2, 3))
    for wrong in ((), (0, 1), (2, 1), ((2, 3), (3, 2))):
        with pytest.raises(ValueError, match="scale"):
            scale_pairs(wrong)


@torch.no_grad()
def test_a_wide_pyramid_round_trips_through_a_folder(tmp_path):
    torch.manual_seed(0)
    model = MultiScaleVQTokenizer(**(TINY | {"scales": ((1, 1), (1, 2), (2, 4))})).eval()
    image = torch.rand(2, 3, 4, 8) * 2 - 1
    ids = model.encode(image)
    assert ids.shape == (2, model.layout.num_tokens) == (2, 11)
    assert model.decode(ids).shape == image.shape
    assert [tuple(part.shape[1:]) for part in model.split(ids[:, :3])] == [(1, 1), (1, 2)]
    model.save_pretrained(tmp_path)
    again = MultiScaleVQTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.layout == model.layout
    assert again.quantizer.codebook.dtype == torch.float32 and again.quant_conv.weight.dtype == torch.bfloat16
    assert torch.equal(again.quantizer.codebook, model.quantizer.codebook)
    with pytest.raises(ValueError, match="whole number of scales; allowed: \\[1, 3, 11\\]"):
        model.decode(ids[:, :5])
    with pytest.raises(ValueError, match="finest scale asks for"):
        model.encode(image[:, :, :2])
    for wrong, message in (
        (lambda: model.encode(image[:, :1]), r"needed: \[B, 3, H, W\]"),
        (lambda: model.encode(image.to(torch.uint8)), "dtype torch.uint8"),
        (lambda: model.encode(image * 127.5), r"needed: in \[-1, 1\]"),
        (lambda: model.decode(ids + 1000), "outside the codebook"),
        (lambda: model.decode(ids - 1000), "outside the codebook"),
        (lambda: model.decode(ids.float()), "needed: integers"),
        (lambda: model.decode(ids[0]), r"needed: integers \[B, N\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


@torch.no_grad()
def test_the_quantiser_stays_float32_when_cast():
    model = MultiScaleVQTokenizer(**TINY)
    before = model.quantizer.codebook.clone()
    model.to(torch.bfloat16)
    assert model.quant_conv.weight.dtype == torch.bfloat16
    assert torch.equal(model.quantizer.codebook, before)


@torch.no_grad()
def test_another_pyramid_uses_the_same_weights():
    model = MultiScaleVQTokenizer(**TINY).eval()
    other = model.with_scales((1, 3, 5, 8))
    assert other.layout.num_tokens == 1 + 9 + 25 + 64
    assert other.decode(other.encode(torch.zeros(1, 3, 16, 16))).shape == (1, 3, 16, 16)
    assert torch.equal(other.codebook, model.codebook)


def test_gradients_reach_encoder_codebook_and_phi():
    torch.manual_seed(0)
    model = MultiScaleVQTokenizer(**TINY)
    out = model(torch.rand(2, 3, 8, 8) * 2 - 1)
    (out.image_BCHW.square().mean() + out.codebook_loss + 0.25 * out.commitment_loss).backward()
    for parameter in (model.quantizer.embedding.weight, model.encoder.conv_in.weight, model.decoder.conv_in.weight):
        assert parameter.grad.abs().sum() > 0
    assert all(conv.weight.grad.abs().sum() > 0 for conv in list(model.quantizer.phi)[:1])
    out = model(torch.rand(2, 3, 8, 8))
    (codes_grad,) = torch.autograd.grad(out.codebook_loss, model.quantizer.embedding.weight, retain_graph=True)
    assert codes_grad.abs().sum() > 0
    with pytest.raises(RuntimeError):  # the commitment loss does not move codes
        torch.autograd.grad(out.commitment_loss, model.quantizer.embedding.weight)


def test_tail_dropout_makes_a_reconstruction_of_the_first_scales():
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(32, 4, (1, 2, 4), tail_dropout=1.0).train()
    latent = torch.randn(64, 4, 4, 4)
    maps = torch.stack(quantizer.encode(latent)[1][:-1])
    out = quantizer(latent).quantized_BChw
    nearest = (maps - out).abs().amax((2, 3, 4)).min(0)
    torch.testing.assert_close(nearest.values, torch.zeros(64), atol=1e-5, rtol=0)
    assert set(nearest.indices.tolist()) == {0, 1}
    kept = quantizer.eval()(latent)
    torch.testing.assert_close(kept.quantized_BChw, quantizer.encode(latent)[1][-1], atol=1e-5, rtol=0)


def test_a_collapsed_codebook_recovers_at_every_scale():
    """All codes but four start far away, so that no latent chooses them."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(256, 4, 4, 4) + torch.randn(256, 4, 1, 1) * 2

    def train(revive_below):
        quantizer = MultiScaleQuantizer(64, 4, (1, 2, 4))
        quantizer.reset_parameters(torch.Generator().manual_seed(0))
        with torch.no_grad():
            quantizer.embedding.weight[4:] += 100.0
        trainer = MultiScaleCodebookTrainer(quantizer, update="ema", decay=0.8, revive_below=revive_below)
        for _ in range(12):
            latent = images[torch.randint(256, (32,), generator=generator)]
            ids = quantizer(latent).ids_BN
            trainer.step(latent, ids)
            if revive_below:
                trainer.revive(latent, generator)
        usage = ScaleUsage(quantizer.sizes, 64)
        ids, maps = quantizer.encode(images)
        usage.update(ids)
        return usage, (maps[-1] - images).square().mean()

    collapsed, collapsed_error = train(0.0)
    revived, error = train(0.2)
    assert max(collapsed.fraction) <= 4 / 64
    assert min(revived.perplexity) > 3 * max(collapsed.perplexity)
    assert error < collapsed_error / 2


# ------------------------------------------------------------------------------------------------------ enlarging
def test_maps_are_enlarged_as_by_interpolation():
    quantizer = MultiScaleQuantizer(8, 3, (1, (2, 3), (5, 7), (12, 16)))
    for scale, (height, width) in enumerate(quantizer.scales[:-1]):
        maps = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(scale))
        expected = torch.nn.functional.interpolate(maps, size=(12, 16), mode="bicubic")
        torch.testing.assert_close(quantizer.enlarge(maps, scale), expected, atol=2e-6, rtol=0)
    assert not any("enlarging" in key for key in quantizer.state_dict())
    with torch.device("meta"):
        empty = MultiScaleQuantizer(8, 3, (1, 2, 4))
    filled = empty.to_empty(device="cpu")
    assert torch.equal(filled.enlarge(torch.ones(1, 1, 2, 2), 1), torch.ones(1, 1, 4, 4))
