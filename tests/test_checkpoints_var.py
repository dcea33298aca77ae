"""Converters of VAR, HMAR and CoDe: released layouts, nesting, phases, names of what does not fit."""

import json

import pytest
import torch

from visar.checkpoints import code, hmar
from visar.checkpoints.common import build, empty
from visar.checkpoints.var import (
    convert_transformer,
    convert_vq,
    export_transformer,
    export_vq,
    load_transformer,
    load_vq,
)
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import SCALES_256, SCALES_512, NextScaleTransformer
from visar.tokenizers.multiscale_vq import MULTISCALE_VQ_PRESETS, MultiScaleVQTokenizer


def on_meta(manifest):
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in manifest["keys"].items()
    }


def released_tokenizer():
    return empty(MultiScaleVQTokenizer, MULTISCALE_VQ_PRESETS["var-vq16"])


def num_parameters(model):
    return sum(value.numel() for key, value in model.named_parameters() if not key.startswith("pyramid."))


def var_vqvae(parity, scales=None):
    folder = parity("var_vqvae")
    scales = scales or folder.config["tiny"]["v_patch_nums"]
    config, state = convert_vq(folder.checkpoint(), scales=scales, phi_ratio=folder.config["tiny"]["quant_resi"])
    return build(MultiScaleVQTokenizer, config, state, "tokenizer", torch.float32)


def test_released_tokenizer_is_accepted(parity):
    for path in parity("var_vqvae").manifests():
        manifest = json.loads(path.read_text())
        config, state = convert_vq(on_meta(manifest))
        released = manifest["config"]
        assert config["base_channels"] == released["ch"] and config["num_phi"] == released["share_quant_resi"]
        model = empty(MultiScaleVQTokenizer, config)
        assert sum(value.numel() for value in model.parameters()) == manifest["n_parameters"]
        assert list(model.state_dict()) and set(model.state_dict()) == set(state)


def test_released_transformers_are_accepted(parity):
    seen = 0
    for folder in (parity("var"), parity("code")):
        for path in folder.manifests():
            manifest = json.loads(path.read_text())
            config, _ = convert_transformer(on_meta(manifest), released_tokenizer())
            released = manifest["config"]
            assert config["num_layers"] == released["depth"] and config["width"] == released["embed_dim"]
            assert config["num_heads"] == released["num_heads"] and list(config["scales"]) == released["patch_nums"]
            assert config["shared_adaln"] == released["shared_aln"] and config["qk_norm"] == released["attn_l2_norm"]
            model = empty(NextScaleTransformer, config)
            assert num_parameters(model) == manifest["n_parameters"]
            seen += 1
    assert seen or not parity("var").manifests()


def test_released_hierarchical_masked_transformers_are_accepted(parity):
    for path in parity("hmar").manifests():
        manifest = json.loads(path.read_text())
        config, _ = hmar.convert(on_meta(manifest), released_tokenizer())
        released = manifest["config"]
        assert config["num_layers"] == released["depth"]
        assert config["num_refinement_layers"] == released["n_layers_train"]
        assert num_parameters(empty(HierarchicalMaskedTransformer, config)) == manifest["n_parameters"]


def test_presets_are_the_released_sizes(parity):
    from visar.generators.hierarchical_masked import HIERARCHICAL_MASKED_PRESETS
    from visar.generators.next_scale import NEXT_SCALE_PRESETS

    tokenizer = released_tokenizer()
    for path in parity("var").manifests():
        config, _ = convert_transformer(on_meta(json.loads(path.read_text())), tokenizer)
        preset = empty(NextScaleTransformer, NEXT_SCALE_PRESETS[path.stem.split("-")[1].replace("_", "-")])
        assert {key: preset.config[key] for key in config} == config
    for path in parity("hmar").manifests():
        config, _ = hmar.convert(on_meta(json.loads(path.read_text())), tokenizer)
        name = path.stem.removeprefix("manifest-")
        preset = empty(HierarchicalMaskedTransformer, HIERARCHICAL_MASKED_PRESETS[name])
        assert {key: preset.config[key] for key in config} == config


def test_there_and_back_is_the_identity(parity):
    for system in ("var", "var_saln"):
        folder = parity(system)
        original = folder.checkpoint()
        tokenizer = var_vqvae(parity)
        config, state = convert_transformer(original, tokenizer, num_heads=folder.config["num_heads"])
        exported = export_transformer(build(NextScaleTransformer, config, state, system, torch.float32))
        assert exported.keys() == original.keys()
        for key, value in original.items():
            assert torch.equal(exported[key], value), key
    original = parity("var_vqvae").checkpoint()
    exported = export_vq(var_vqvae(parity))
    assert exported.keys() == original.keys()
    for key, value in original.items():
        assert key == "quantize.ema_vocab_hit_SV" or torch.equal(exported[key], value), key


@torch.no_grad()
def test_trainer_checkpoints_are_unwrapped(parity, tmp_path):
    transformer, tokenizer = parity("var").checkpoint(), parity("var_vqvae").checkpoint()
    wrapped = {f"module._orig_mod.{key}": value for key, value in transformer.items()}
    content = {"epoch": 3, "iter": 0, "trainer": {"var_wo_ddp": wrapped, "vae_local": tokenizer, "config": {"pn": 1}}}
    torch.save(content, tmp_path / "ar-ckpt.pth")
    vq = load_vq(tmp_path / "ar-ckpt.pth", scales=parity("var").config["patch_nums"], dtype=torch.bfloat16)
    assert vq.quant_conv.weight.dtype == torch.bfloat16
    model = load_transformer(tmp_path / "ar-ckpt.pth", vq, dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.pyramid.codebook, tokenizer["quantize.embedding.weight"])
    assert not any(value.requires_grad for value in model.pyramid.parameters())


def test_what_does_not_fit_is_named(parity):
    state, tokenizer = parity("var").checkpoint(), var_vqvae(parity)
    with pytest.raises(ValueError, match="the key blocks.0.attn.mat_qkv.weight is needed; keys are encoder"):
        convert_transformer({"encoder.conv_in.weight": torch.zeros(1)}, tokenizer)
    with pytest.raises(ValueError, match="found at a, b"):
        convert_transformer({"a": state, "b": dict(state)}, tokenizer)
    broken = {key: value for key, value in state.items() if key != "head.bias"} | {"strange": torch.zeros(1)}
    with pytest.raises(ValueError, match="missing: head.bias; 1 unexpected: strange"):
        convert_transformer(broken, tokenizer)
    with pytest.raises(ValueError, match="zero_k_bias is not zero"):
        convert_transformer(
            state | {"blocks.0.attn.zero_k_bias": torch.ones_like(state["blocks.0.attn.q_bias"])}, tokenizer
        )
    without = {key: value for key, value in state.items() if key != "lvl_1L"}
    with pytest.raises(ValueError, match="say which with scales"):
        convert_transformer(without, tokenizer)
    config, _ = convert_transformer(without, tokenizer, scales=parity("var").config["patch_nums"])
    assert config["scales"] == tuple(parity("var").config["patch_nums"])


def test_the_released_pyramids_are_told_apart_by_their_length(parity):
    pyramids = set()
    for path in parity("var").manifests():
        manifest = json.loads(path.read_text())
        pyramids.add(convert_transformer(on_meta(manifest), released_tokenizer())[0]["scales"])
    assert pyramids <= {SCALES_256, SCALES_512}


def test_phases_of_hmar_merge_into_the_released_layout(parity):
    folder = parity("hmar")
    merged = folder.checkpoint()
    maps = {name: value for name, value in json.loads((folder.folder / "phase_key_map.json").read_text()).items()}
    phases = [
        {theirs: merged[released] for theirs, released in mapping.items()}
        for name, mapping in maps.items()
        if isinstance(mapping, dict)
    ]
    assert len(phases) == 2
    again = hmar.merge_phases(*phases, num_refinement_layers=folder.config["n_layers_train"])
    assert again.keys() == merged.keys()
    assert all(torch.equal(again[key], merged[key]) for key in merged)
    altered = phases[1] | {"blocks.0.attn.q_bias": phases[1]["blocks.0.attn.q_bias"] + 1}
    with pytest.raises(ValueError, match="the phases differ in base_blocks.0.attn.q_bias"):
        hmar.merge_phases(phases[0], altered, num_refinement_layers=folder.config["n_layers_train"])


def test_pairs_of_code_say_where_they_meet(parity, tmp_path):
    folder = parity("code")
    for role in ("drafter", "refiner"):
        torch.save(folder.checkpoint(f"checkpoint_{role}.safetensors"), tmp_path / f"{role}_8.pth")
    tokenizer = var_vqvae(parity)
    pair = code.load_pair(tmp_path / "drafter_8.pth", tmp_path / "refiner_8.pth", tokenizer)
    assert pair.takes_over == 8
    assert pair.drafter.config["num_layers"] == folder.config["drafter"]["depth"]
    assert pair.refiner.config["width"] == folder.config["refiner"]["embed_dim"]
    with pytest.raises(ValueError, match="say at which scale"):
        code.load_pair(folder.folder / "checkpoint_drafter.safetensors", tmp_path / "refiner_8.pth", tokenizer)
