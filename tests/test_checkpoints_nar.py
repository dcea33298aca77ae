"""NAR's files: every released layout fits, folders give the model's own tokens, there and back, wrong files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from visar.checkpoints import hub, llamagen
from visar.checkpoints.common import check_keys, empty, find_weights
from visar.checkpoints.convert import find_rows, read_models
from visar.checkpoints.nar import MARKS, NUM_HEADS, convert_generator, export_generator, load_generator
from visar.checkpoints.options import Convert
from visar.cli.convert import convert
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.next_neighbor import NEXT_NEIGHBOR_BOXES, NEXT_NEIGHBOR_PRESETS, NextNeighborTransformer
from visar.pipelines.loading import load
from visar.samplers.ancestral import sample_ancestral
from visar.tokenizers.vq import VQTokenizer

BOX = dict(grid=(2, 3, 4), positions="learned")


def tiny(**changes):
    torch.manual_seed(0)
    settings = dict(vocab_size=12, grid=(4, 4), width=16, num_layers=2, num_heads=2, hidden_width=24, num_classes=5)
    model = NextNeighborTransformer(**settings | changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def arguments(model):
    """What the model was made with."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def manifests(folder):
    return [json.loads(path.read_text()) for path in folder.manifests()]


@pytest.mark.parametrize("system", ["nar-image", "nar-video"])
def test_every_released_layout_fits(parity, system):
    presets = NEXT_NEIGHBOR_PRESETS if system == "nar-image" else NEXT_NEIGHBOR_BOXES
    released = {name: arguments(empty(NextNeighborTransformer, preset)) for name, preset in presets.items()}
    found = set()
    for manifest in manifests(parity(system)):
        facts = manifest["config"]
        if "n_layer" not in facts:  # the tokenizer of the video models
            continue
        state = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest["tensors"].items()}
        side = round(facts.get("block_size", 0) ** 0.5)
        grid = (side, side) if system == "nar-image" else NEXT_NEIGHBOR_BOXES["nar-ucf101-l"]["grid"]
        config, renamed = convert_generator({"model": state, "steps": 1}, grid=grid)
        assert (config["num_layers"], config["width"]) == (facts["n_layer"], facts["dim"])
        assert config["num_heads"] == facts["n_head"] == NUM_HEADS[facts["n_layer"], facts["dim"]]
        model = empty(NextNeighborTransformer, config)
        check_keys(model.state_dict(), renamed, manifest["release"])
        assert sum(value.numel() for value in renamed.values()) == manifest["num_params"]
        (row,) = [row for row in find_rows({"model": state}, None, "x") if row.source == "nar"]
        assert row.role == "generator" and row.sniff({"module": state})
        found |= {name for name, preset in released.items() if preset == arguments(model)}
    assert found == set(presets)


@torch.no_grad()
def test_a_converted_folder_gives_the_models_own_tokens(tmp_path):
    model = tiny()
    torch.save(export_generator(model), tmp_path / "last_version.pt")
    small = dict(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=16)
    tokenizer = VQTokenizer(image_size=8, codebook_size=12, **small)
    torch.save(llamagen.export_vq(tokenizer), tmp_path / "vq.pt")
    options = Convert(tmp_path / "last_version.pt", tmp_path / "out", tmp_path / "vq.pt", grid=(4, 4), num_heads=2)
    line = convert(options)
    assert "NextNeighborTransformer" in line and "from nar's last_version.pt" in line
    pipeline = load(tmp_path / "out", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.sampling_settings()["guidance"] == Guidance(2.0)
    noise = Noise([5, 6])
    expected = sample_ancestral(
        model, Condition(labels_BA=torch.tensor([[1], [2]])), noise=noise, guidance=Guidance(2.0)
    )
    assert torch.equal(pipeline([1, 2], seed=5, output_type="pt").tokens, expected.tokens)


@pytest.mark.parametrize("changes", [{}, dict(num_classes=0, caption_width=6, caption_length=4), BOX])
def test_there_and_back(changes, tmp_path):
    model = tiny(**changes)
    torch.save(export_generator(model), tmp_path / "model.pt")
    again = load_generator(tmp_path / "model.pt", grid=model.config["grid"], num_heads=2)
    assert arguments(again) == arguments(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for changes, name in ((dict(attributes=(3,)), "attributes"), (dict(positions="learned"), "positions")):
        with pytest.raises(ValueError, match=f"NAR has no place for {name}"):
            export_generator(tiny(**changes))


def test_weights_are_found_and_llamagens_files_are_not_nars(tmp_path):
    state = export_generator(tiny())["model"]
    assert set(find_weights({"model": state}, MARKS, "x")) == set(state)
    plain = {key: value for key, value in state.items() if not key.startswith(("medusa", "layers.2"))}
    assert [row.source for row in find_rows({"model": plain}, None, "x")] == ["llamagen"]
    save_file(plain, tmp_path / "stage1.safetensors")
    with pytest.raises(ValueError, match=r"llamagen_gpt.*|.*medusa_norm"):
        convert_generator({"model": plain}, grid=(4, 4))
    with pytest.raises(ValueError, match="nar generator: no .*medusa_norm.weight"):
        read_models(Convert(tmp_path / "stage1.safetensors", tmp_path / "out", source="nar", grid=(4, 4)))
    broken = {key: value for key, value in state.items() if key != "layers.2.attention.wo.weight"}
    with pytest.raises(ValueError, match="1 missing: layers.2.attention.wo.weight"):
        convert_generator({"model": broken}, grid=(4, 4), num_heads=2)


def test_what_files_do_not_tell_is_asked_for(tmp_path):
    torch.save(export_generator(tiny()), tmp_path / "image.pt")
    torch.save(export_generator(tiny(**BOX)), tmp_path / "video.pt")
    out = tmp_path / "out"
    for options, message in (
        (Convert(tmp_path / "image.pt", out), "grid of tokens is not in the file; say grid"),
        (Convert(tmp_path / "image.pt", out, grid=(4, 4)), r"heads of 2 layers x 16 is not .* 12 x 768, 18 x 1024"),
        (
            Convert(tmp_path / "video.pt", out, num_heads=2),
            "a video of 24 tokens; the released models have 4 x 16 x 16",
        ),
        (
            Convert(tmp_path / "video.pt", out, grid=(4, 4)),
            "grid .* is for .*llamagen, mar, nar; a generator of nar does not",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_models(options)
    half = tiny(grid=(4, 16, 16), positions="learned")
    torch.save(export_generator(half), tmp_path / "video.pt")
    models = read_models(Convert(tmp_path / "video.pt", out, num_heads=2))
    assert models.generator.num_tokens == 1024 and models.tokenizer is None


def test_official_name():
    entry = hub.official()["nar-c2i-b-256"]
    assert (entry.repository, entry.file) == ("chenfeng1271/NAR-imagenet-256-B", "last_version.pt")
    assert entry.grid == NEXT_NEIGHBOR_PRESETS["nar-b"].get("grid", (16, 16))
