"""Weights stored in 8 bits: what is packed, how far values move, and everything that reads such folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from visar.checkpoints.common import read
from visar.checkpoints.rows import Models
from visar.cli.convert import save
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.one_step import OneStepGenerator
from visar.generators.raster import RasterGPT
from visar.io.packed import is_packed, pack, unpack
from visar.layers.packable import Packable, packed_names, save_model
from visar.pipelines.components import DRAFTERS, GENERATORS, TOKENIZERS, load_component, model_class
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.tokenizers.vq import VQTokenizer
from visar.train.building import load_initial

WEIGHTS = "diffusion_pytorch_model.safetensors"
RASTER = dict(vocab_size=40, grid=(4, 4), width=64, num_layers=2, num_heads=2, hidden_width=96, num_classes=3)
MODELS = {
    "raster": lambda: RasterGPT(**RASTER),
    "scales": lambda: NextScaleTransformer(
        vocab_size=40, codebook_width=32, scales=(1, 2), width=64, num_layers=2, num_heads=2, num_classes=3
    ),
    "student": lambda: OneStepGenerator(
        arguments={**RASTER, "grid": [4, 4], "token_input": "codebook", "codebook_width": 8}
    ),
}


def filled(name: str):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def moved(new: torch.Tensor, old: torch.Tensor) -> float:
    new, old = new.detach().float(), old.detach().float()
    return float((new - old).norm() / old.norm().clamp(min=1e-9))


@pytest.mark.parametrize("name", MODELS)
def test_every_reader_gets_weights_that_moved_by_less_than_a_hundredth(tmp_path, name):
    model = filled(name)
    save_model(model, tmp_path, "int8")
    assert is_packed(tmp_path / WEIGHTS)
    loaded = load_component(GENERATORS, type(model).__name__, tmp_path)
    started = filled(name)
    load_initial(started, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config["_name_or_path"] == str(tmp_path)
    stored, names = load_file(tmp_path / WEIGHTS), set(packed_names(model))
    packed = {key for key, value in stored.items() if value.dtype == torch.int8}
    assert packed <= names and len(packed) > 8 and all(stored[key].shape[1:].numel() < 32 for key in names - packed)
    for key, value in model.state_dict().items():
        for other in (loaded, started, again):
            found = other.state_dict()[key]
            assert 0 < moved(found, value) < 0.01 if key in packed else torch.equal(found, value), key
    assert torch.equal(read(tmp_path / WEIGHTS)[sorted(packed)[0]], again.state_dict()[sorted(packed)[0]])
    assert not any("pyramid" in key for key in packed)


def test_rows_keep_their_largest_value_and_zero_rows_stay_zero():
    matrix = torch.randn(5, 40)
    matrix[3] = 0
    back = unpack(pack({"m": matrix, "n": matrix[:, :8]}, ["m", "n"]), "it")
    assert torch.equal(back["n"], matrix[:, :8]) and bool((back["m"][3] == 0).all())
    assert torch.allclose(back["m"].abs().amax(1), matrix.abs().amax(1))
    assert bool(((back["m"] - matrix).abs() <= matrix.abs().amax(1, keepdim=True) / 254 + 1e-7).all())
    twice = unpack(pack(back, ["m"]), "it")
    assert torch.allclose(twice["m"], back["m"], rtol=1e-6)


def test_pipelines_and_converted_models_are_stored_in_8_bits(tmp_path):
    generator = filled("raster")
    tokenizer = VQTokenizer(
        image_size=8,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        codebook_size=40,
        latent_channels=8,
    )
    pipeline = ImagePipeline(tokenizer, generator)
    pipeline.save_pretrained(tmp_path / "plain")
    line = save(Models(tokenizer, generator), tmp_path / "packed", {}, "int8")
    assert line.startswith("VQTokenizer")
    sizes = [(tmp_path / kind / "generator" / WEIGHTS).stat().st_size for kind in ("plain", "packed")]
    assert sizes[1] < 0.4 * sizes[0]
    tokenizers = [load_file(tmp_path / kind / "tokenizer" / WEIGHTS) for kind in ("plain", "packed")]
    assert all(torch.equal(tokenizers[0][key], value) for key, value in tokenizers[1].items())
    pipe = load(tmp_path / "packed", device="cpu")
    assert 0 < moved(pipe.generator.output.weight, generator.output.weight) < 0.01
    with pytest.raises(ValueError, match="storage 'int4'; choose plain or int8"):
        pipeline.save_pretrained(tmp_path / "other", storage="int4")


def test_damaged_files_are_named(tmp_path):
    model = filled("raster")
    save_model(model, tmp_path, "int8")
    state = load_file(tmp_path / WEIGHTS)
    for key, value in (("output.weight:scale", torch.ones(3)), ("nothing:scale", torch.ones(3))):
        save_file({**state, key: value}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match="is damaged: the scale of (output.weight|nothing) has no int8 matrix"):
            load_component(GENERATORS, "RasterGPT", tmp_path)
    del state["output.weight:scale"]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="1 of another kind: output.weight int8"):
        load_component(GENERATORS, "RasterGPT", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "RasterGPT"


def test_every_model_with_matrices_reads_them():
    for table in (TOKENIZERS, GENERATORS, DRAFTERS):
        for name, module in table.items():
            if name not in ("TabularGenerator", "IndependentGenerator"):  # tables of their own
                assert issubclass(model_class(table, name, module), Packable)
