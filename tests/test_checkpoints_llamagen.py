"""LlamaGen's files: every released layout fits, numbers agree, there and back is identity, wrong files are refused."""

import argparse
import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from visar.checkpoints.common import check_keys, count_modules, empty, read, rename, unwrap
from visar.checkpoints.llamagen import NUM_HEADS, convert_gpt, convert_vq, export_gpt, export_vq, load_gpt, load_vq
from visar.core.condition import Condition
from visar.generators.raster import RASTER_PRESETS, RasterGPT
from visar.tokenizers.vq import VQTokenizer


def tiny_vq() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(
        image_size=8,
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=16,
        codebook_size=12,
    ).eval()


def tiny_gpt(**changes) -> RasterGPT:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=11, grid=(2, 3), width=16, num_layers=2, num_heads=2, hidden_width=24, num_classes=5
    )
    return RasterGPT(**settings | changes).eval()


def _meta_state(manifest):
    return {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest["keys"].items()}


def _gpt_settings(folder) -> dict[str, Any]:
    rows, columns = folder.config["derived"]["grid"]
    return dict(grid=(rows, columns), num_heads=folder.config["constructor"]["ModelArgs"]["n_head"])


# --------------------------------------------------------------------------------------------------- released layouts
def test_every_released_tokenizer_fits(parity):
    manifests = [json.loads(path.read_text()) for path in parity("llamagen_vq").manifests()]
    for manifest in manifests:
        config, state = convert_vq({"model": _meta_state(manifest), "steps": 0})
        facts = manifest["config"]
        model = empty(VQTokenizer, config)
        assert sum(parameter.numel() for parameter in model.parameters()) == manifest["parameters_total"]
        assert model.factor == facts["downsample"]
        assert config["channel_multipliers"] == tuple(facts["ch_mult"])
        assert (config["num_res_blocks"], config["base_channels"]) == (facts["num_res_blocks"], facts["ch"])
        assert (config["latent_channels"], config["codebook_size"]) == (facts["z_channels"], facts["codebook_size"])
        check_keys(model.state_dict(), state, manifest["release_file"])


@pytest.mark.parametrize("system", ["llamagen_gpt_c2i", "llamagen_gpt_t2i"])
def test_every_released_transformer_fits(parity, system):
    for path in parity(system).manifests():
        manifest = json.loads(path.read_text())
        facts = manifest["config"]
        side = facts["image_size"] // facts["downsample"]
        config, state = convert_gpt(_meta_state(manifest), grid=(side, side))
        assert (config["num_layers"], config["width"]) == (facts["n_layer"], facts["dim"])
        assert (config["num_heads"], config["hidden_width"]) == (facts["n_head"], facts["ffn_hidden"])
        assert config["num_classes"] == (facts["num_classes"] if facts["model_type"] == "c2i" else 0)
        assert config.get("caption_width", 0) == facts.get("caption_dim", 0)
        model = empty(RasterGPT, config)
        assert model.prefix_length == facts["cls_token_num"] and model.num_tokens == facts["block_size"]
        assert sum(parameter.numel() for parameter in model.parameters()) == manifest["parameters_total"]
        check_keys(model.state_dict(), state, manifest["release_file"])


def test_heads_are_known_for_every_preset():
    assert all(NUM_HEADS[p["num_layers"], p["width"]] == p["num_heads"] for p in RASTER_PRESETS.values())


# ------------------------------------------------------------------------------------------------------------ numbers
@torch.no_grad()
def test_converted_tokenizer_agrees(parity, tmp_path):
    folder = parity("llamagen_vq")
    io, grid = folder.io, tuple(folder.config["grid"])
    model = load_vq(
        folder.folder / "checkpoint.safetensors",
        normalize_codes=folder.config["constructor"]["ModelArgs"]["codebook_l2_norm"],
        image_size=io["encode.image"].shape[-1],
    )
    assert model.encoder.conv_in.weight.dtype == torch.float32 and not model.training
    assert torch.equal(model.encode(io["encode.image"]).flatten(), io["encode.indices"])
    torch.testing.assert_close(model.decode(io["decode.indices"], grid), io["decode.image"], atol=3e-5, rtol=0)
    model.save_pretrained(tmp_path)
    again = VQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.decode(io["decode.indices"], grid), model.decode(io["decode.indices"], grid))


@torch.no_grad()
def test_converted_class_model_agrees(parity):
    folder = parity("llamagen_gpt_c2i")
    io = folder.io
    model = load_gpt(folder.folder / "checkpoint.safetensors", **_gpt_settings(folder))
    logits = model(io["tf.tokens"], Condition(labels_BA=io["tf.labels"][:, None]))
    torch.testing.assert_close(logits, io["tf.logits"], atol=3e-5, rtol=0)
    # The rotary embedding is not in the file, and it matters.
    other = load_gpt(folder.folder / "checkpoint.safetensors", rope="1d", **_gpt_settings(folder))
    assert (other(io["tf.tokens"], Condition(labels_BA=io["tf.labels"][:, None])) - logits).abs().max() > 0.1


@torch.no_grad()
def test_class_model_and_tokenizer_make_the_expected_image(parity):
    folder, vq = parity("llamagen_gpt_c2i"), parity("llamagen_vq")
    io = folder.io
    tokenizer = load_vq(vq.folder / "checkpoint.safetensors")
    image = tokenizer.decode(io["greedy.cfg4.tokens"].long(), tuple(folder.config["derived"]["grid"]))
    torch.testing.assert_close(image, io["e2e.image"], atol=3e-5, rtol=0)


@torch.no_grad()
def test_converted_caption_model_agrees(parity):
    folder = parity("llamagen_gpt_t2i")
    io = folder.io
    model = load_gpt(folder.folder / "checkpoint.safetensors", **_gpt_settings(folder))
    condition = Condition(text_BTC=io["in.caption_emb"], text_mask_BT=io["in.caption_mask"].bool())
    torch.testing.assert_close(model(io["tf.tokens"], condition), io["tf.logits_image"], atol=3e-5, rtol=0)
    null = model(io["tf.tokens"], model.null_condition(condition))
    torch.testing.assert_close(null, io["tf.logits_image_uncond"], atol=3e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------- there and back
def test_tokenizer_there_and_back(tmp_path):
    model = tiny_vq()
    exported = export_vq(model)
    assert exported["model"]["quantize.codebook_used"].shape == (65536,)
    torch.save(exported, tmp_path / "vq.pt")
    again = load_vq(tmp_path / "vq.pt", image_size=8)
    assert again.layout == model.layout
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    half = load_vq(tmp_path / "vq.pt", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_tokenizer_with_another_decoder_width(tmp_path):
    model = VQTokenizer(
        base_channels=32,
        channel_multipliers=(1, 2, 1),
        decoder_channel_multipliers=(2, 1, 3),
        num_res_blocks=2,
        latent_channels=24,
        codebook_size=7,
        codebook_dim=3,
    )
    config, state = convert_vq(export_vq(model))
    assert config["decoder_channel_multipliers"] == (2, 1, 3)
    check_keys(VQTokenizer(**config).state_dict(), state, "export")


@pytest.mark.parametrize("changes", [{}, dict(num_classes=0, caption_width=6, caption_length=4)])
def test_transformer_there_and_back(tmp_path, changes):
    model = tiny_gpt(**changes)
    torch.save(export_gpt(model), tmp_path / "gpt.pt")
    again = load_gpt(tmp_path / "gpt.pt", grid=(2, 3), num_heads=2)
    assert list(again.config["grid"]) == [2, 3]
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"no place for attributes=\(3,\)"):
        export_gpt(tiny_gpt(attributes=(3,)))


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"state": {}}, "steps": 3},
        lambda state: {"module": state},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {"model": {"module": state}},
        lambda state: {"ema": state},
        lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4)},
    ],
)
def test_nested_files(tmp_path, nest):
    model = tiny_gpt()
    torch.save(nest(model.state_dict() | {"freqs_cis": torch.zeros(7, 4, 2)}), tmp_path / "gpt.pt")
    again = load_gpt(tmp_path / "gpt.pt", grid=(2, 3), num_heads=2)
    assert torch.equal(again.output.weight, model.output.weight)


def test_averaged_weights_on_request():
    state = tiny_gpt().state_dict()
    content = {"model": state, "ema": {key: value + 1 for key, value in state.items()}}
    key = "output.weight"
    for prefer_ema, shift in ((False, 0), (True, 1)):
        _, found = convert_gpt(content, grid=(2, 3), num_heads=2, prefer_ema=prefer_ema)
        assert torch.equal(found[key], state[key] + shift)
    assert torch.equal(unwrap({"model": state}, "file", prefer_ema=True)[key], state[key])


# -------------------------------------------------------------------------------------------------------------- errors
def _without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (lambda: export_gpt(tiny_gpt()), ["is a LlamaGen transformer (GPT), not a LlamaGen VQ tokenizer"]),
        (lambda: {"model": {"decoder.up.0.block.0.conv1.weight": torch.zeros(1)}}, ["not a complete", "decoder.up.0"]),
        (
            lambda: _without(
                tiny_vq().state_dict(), "encoder.conv_out.weight", "decoder.conv_blocks.1.res.0.conv1.weight"
            ),
            ["encoder.conv_out.weight", "decoder.conv_blocks.1.res.0.conv1.weight"],
        ),
        (
            lambda: (
                _without(tiny_vq().state_dict(), "quant_conv.bias", "encoder.mid.1.q.weight") | {"x": torch.zeros(1)}
            ),
            ["2 missing", "quant_conv.bias", "encoder.mid.1.q.weight", "1 unexpected: x"],
        ),
        (
            lambda: tiny_vq().state_dict() | {"quant_conv.weight": torch.zeros(8, 17, 1, 1)},
            ["quant_conv.weight [8, 17, 1, 1] (needed [8, 16, 1, 1])"],
        ),
        (lambda: {"optimizer": {}, "steps": 3}, ["has no weights: keys are optimizer, steps", "model, module"]),
        (lambda: {}, ["has no weights: keys are none"]),
        (lambda: {"model": tiny_vq().state_dict() | {"steps": 3}}, ["steps (int)"]),
    ],
)
def test_tokenizer_files_that_do_not_fit(content, messages):
    with pytest.raises(ValueError) as error:
        convert_vq(content(), source="vq.pt")
    assert "vq.pt" in str(error.value)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "settings", "messages"),
    [
        (lambda: export_vq(tiny_vq()), {}, ["is a LlamaGen VQ tokenizer, not a LlamaGen transformer"]),
        (lambda: tiny_gpt().state_dict(), {"num_heads": None}, ["2 layers x 16", "24 x 3200", "--num-heads"]),
        (
            lambda: _without(tiny_gpt().state_dict(), "cls_embedding.embedding_table.weight"),
            {},
            ["neither", "cap_proj"],
        ),
        (lambda: _without(tiny_gpt().state_dict(), "norm.weight", "layers.1.attention.wo.weight"), {}, ["2 missing"]),
        (lambda: tiny_gpt(attributes=(3,)).state_dict(), {}, ["1 unexpected: attribute_embeddings.0"]),
        (
            lambda: tiny_gpt().state_dict() | {"layers.0.attention.wqkv.weight": torch.zeros(32, 16)},
            {},
            ["has 32 rows, 48 needed"],
        ),
        (lambda: tiny_gpt().state_dict(), {"num_heads": 3}, ["num_heads 3"]),
        (lambda: tiny_gpt().state_dict(), {"rope": "3d"}, ["rope '3d'"]),
    ],
)
def test_transformer_files_that_do_not_fit(content, settings, messages):
    with pytest.raises(ValueError) as error:
        convert_gpt(content(), **dict(grid=(2, 3), num_heads=2) | settings)
    for message in messages:
        assert message in str(error.value)


class Evil:
    """Pickles to a call that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_damaged_and_unsafe_files(tmp_path):
    whole, broken = tmp_path / "vq.pt", tmp_path / "broken.pt"
    torch.save(export_vq(tiny_vq()), whole)
    broken.write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"broken.pt is truncated"):
        load_vq(broken)
    save_file(tiny_vq().state_dict(), tmp_path / "vq.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((tmp_path / "vq.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"broken.safetensors is truncated"):
        load_vq(broken)
    with pytest.raises(ValueError, match="no weights file at .*absent.pt"):
        load_gpt(tmp_path / "absent.pt", grid=(2, 2))
    torch.save({"model": tiny_vq().state_dict(), "args": Evil(tmp_path / "made")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is refused"):
        load_vq(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


def test_helpers(tmp_path):
    state = {"down.0.block.1.w": torch.zeros(1), "down.1.block.0.w": torch.ones(1), "up.w": torch.ones(2)}
    assert count_modules(state, "down") == 2 and count_modules(state, "sideways") == 0
    renamed = rename(state, [(r"^down\.(\d+)\.block\.", r"levels.\1.res."), (r"^up\.", "top.")])
    assert list(renamed) == ["levels.0.res.1.w", "levels.1.res.0.w", "top.w"]
    with pytest.raises(ValueError, match="two keys become down.w"):
        rename(state, [(r"\.\d+\.block\.\d+", "")])
    torch.save({"model": state, "args": argparse.Namespace(seed=1)}, tmp_path / "file.pt")
    assert read(tmp_path / "file.pt")["args"] == argparse.Namespace(seed=1)
