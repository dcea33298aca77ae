"""Files that are no weights, weights that are no numbers, files with two kinds of weights, damaged model folders."""

import argparse
import bz2
import gzip
import json
import lzma
import pathlib
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save

import visar.checkpoints.hub as hub
from visar.checkpoints.convert import find_rows, read_models
from visar.checkpoints.llamagen import export_gpt, export_vq
from visar.checkpoints.options import Convert
from visar.cli.convert import convert
from visar.generators.raster import RasterGPT
from visar.io.files import load_weights
from visar.pipelines.components import load_generator, load_tokenizer
from visar.pipelines.fitting import check_defaults
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.tokenizers.vq import VQTokenizer

GPT = dict(vocab_size=12, grid=(4, 4), width=16, num_layers=2, num_heads=2, hidden_width=24, num_classes=5)
VQ = dict(
    image_size=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=16, codebook_size=12
)


def gpt(seed: int = 0, **changes) -> RasterGPT:
    torch.manual_seed(seed)
    return RasterGPT(**{**GPT, **changes}).eval()


def vq(**changes) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(**{**VQ, **changes}).eval()


def refusal(file: pathlib.Path, **options) -> str:
    with pytest.raises(ValueError) as error:
        convert(Convert(file, file.parent / "out", grid=(4, 4), num_heads=2, **options))
    assert file.name in str(error.value) and "\x1b" not in str(error.value) and "weights_only" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------- files that are no weights
WRONG = {
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n",
    "a web page": b"\n <!DOCTYPE html><html><body>Sign in</body></html>",
    "JSON": b'{"error": "access denied"}',
    "compressed with gzip": gzip.compress(b"weights"),
    "compressed with bzip2": bz2.compress(b"weights"),
    "compressed with xz": lzma.compress(b"weights"),
    "plain text": b"404: Not Found",
    "it is empty": b"",
    "a NumPy array": b"\x93NUMPY\x01\x00" + bytes(100),
}


@pytest.mark.parametrize("ending", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_weights_file_is_called_what_it_is(tmp_path, what, ending):
    file = tmp_path / f"model{ending}"
    file.write_bytes(WRONG[what])
    message = refusal(file)
    assert what in message and "could run code" not in message


def test_misnamed_files(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(save({"a": torch.zeros(2)}))
    assert "not a PyTorch file but a safetensors one: rename it to model.safetensors" in refusal(file)
    for zipped in (True, False):
        torch.save({"a": torch.zeros(2)}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        file = shutil.move(tmp_path / "x", tmp_path / "model.safetensors")
        assert "not a safetensors file but a PyTorch one: rename it to model.pt" in refusal(file)
    assert "it is a folder" in refusal(tmp_path)


class Call:
    """Its pickle asks for a function to be called."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (np.float64(0.5), "numpy"),
        (argparse.Namespace(out=pathlib.PurePosixPath("runs")), "pathlib.PurePosixPath"),
        (Call(), "print"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_refused_file_asks_for_is_named(tmp_path, extra, name, zipped, capsys):
    torch.save({"model": {"a": torch.zeros(2)}, "x": extra}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "a.pt")
    assert "is refused" in message and name in message
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"x": extra}))
    assert name in refusal(tmp_path / "b.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_end_in_one_error(tmp_path, legacy):
    draw, file = random.Random(0), tmp_path / "x.pt"
    torch.save({"model": {"a": torch.ones(3, 4), "b": torch.ones(2)}}, file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 3])):
            damaged[draw.randrange(min(len(damaged), 900))] = draw.randrange(256)
        file.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            load_weights(file)
        except ValueError as error:
            assert "x.pt" in str(error) and "\n" not in str(error) and "weights_only" not in str(error)


# ------------------------------------------------------------------------------------------------ the weights in them
def test_weights_that_are_no_numbers(tmp_path):
    file, state, key = tmp_path / "gpt.pt", gpt().state_dict(), "layers.1.attention.wo.weight"
    whole = state[key]
    broken = whole.clone()
    broken[0, 0] = float("nan")
    for value, message in (
        (broken, f"not finite (NaN or infinite): {key}"),
        (whole.to(torch.complex64), f"{key} (complex, complex64)"),
        (whole.to_sparse(), f"{key} (sparse, float32)"),
        (torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8), f"{key} (quantised, qint8)"),
        (whole.to(torch.int8), f"1 of another kind: {key} int8"),
        (torch.zeros(()), f"{key} [] (needed [16, 16])"),
    ):
        torch.save(state | {key: value}, file)
        assert message in refusal(file)
    torch.save(state | {f"module.{key}": whole}, file)
    assert f"has the weights {key} twice" in refusal(file)
    for key, value in (
        ("tok_embeddings.weight", torch.zeros(3)),
        ("layers.0.attention.wqkv.weight", torch.zeros(0, 16)),
    ):
        torch.save(state | {key: value}, file)
        assert f"tensors of impossible shapes: {key}" in refusal(file)
    assert not (tmp_path / "out").exists()


def test_mappings_that_hold_themselves(tmp_path):
    round_and_round: dict = {"model": {}}
    round_and_round["model"]["module"] = round_and_round
    torch.save(round_and_round, tmp_path / "x.pt")
    assert "holds no weights" in refusal(tmp_path / "x.pt")
    doubled: dict = {"layer": 1}
    for _ in range(60):
        doubled = {"a": doubled, "b": doubled}
    torch.save(doubled, tmp_path / "x.pt")
    assert "holds no weights" in refusal(tmp_path / "x.pt")


def test_files_with_averaged_and_plain_weights(tmp_path):
    plain, ema = gpt(0).state_dict(), gpt(1).state_dict()
    both, one = tmp_path / "both.pt", tmp_path / "one.pt"
    torch.save({"model": plain, "ema": ema}, both)
    torch.save({"model": plain}, one)
    options = dict(grid=(4, 4), num_heads=2)
    for asked, expected, said in ((None, plain, "plain"), ("plain", plain, "plain"), ("ema", ema, "ema")):
        models = read_models(Convert(both, tmp_path, weights=asked, **options))
        assert torch.equal(models.generator.output.weight, expected["output.weight"])
        assert models.notes[0].startswith(f"{said} weights of both.pt, which has both")
    assert "ema weights of both.pt" in convert(Convert(both, tmp_path / "new", weights="ema", **options))
    assert read_models(Convert(one, tmp_path, **options)).notes == ()
    with pytest.raises(ValueError, match="weights ema: .*one.pt has plain weights only"):
        read_models(Convert(one, tmp_path, weights="ema", **options))


# -------------------------------------------------------------------------------------------------------- the projects
def test_every_project_is_a_file_of_its_own():
    projects = hub.projects()
    assert {"code", "hmar", "llamagen", "var"} <= set(projects)
    for name, module in projects.items():
        assert all(row.source in projects and row.marks for row in module.ROWS)
        assert any(row.source == name for row in module.ROWS)
        assert all(entry.source == name for entry in module.OFFICIAL.values())
    with pytest.raises(ValueError, match="source 'vra'; choose one of code, dar, distilled_decoding, hmar"):
        find_rows({}, "vra", "file")


# ------------------------------------------------------------------------------------------------------- model folders
@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    folder = tmp_path / "run" / "model"
    ImagePipeline(vq(), gpt(), defaults={"guidance_scale": 2.0}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("of_generator", "of_tokenizer", "message"),
    [
        (dict(grid=(4, 3)), {}, r"the generator has grid 4 x 3 \(the tokenizer's: 4 x 4\)"),
        (dict(vocab_size=13), {}, r"codes 13 \(the tokenizer's: 12\)"),
        ({}, dict(codebook_size=11, image_size=16), r"codes 12 .*'s: 11\); grid 4 x 4 \(the tokenizer's: 8 x 8\)"),
        (dict(token_input="codebook", codebook_width=6), {}, r"width of a code 6 \(the tokenizer's: 8\)"),
    ],
)
def test_parts_that_do_not_fit(of_generator, of_tokenizer, message):
    with pytest.raises(ValueError, match=message):
        ImagePipeline(vq(**of_tokenizer), gpt(**of_generator))


def test_generators_over_scales_need_their_pyramid():
    scales, grid = load("emoji-var-small", device="cpu"), load("emoji-raster", device="cpu")
    for tokenizer, generator, message in (
        (scales.tokenizer, grid.generator, "grid 16 x 16 .*'s: 1 x 1, 2 x 2,"),
        (grid.tokenizer, scales.generator, "scales 1 x 1, 2 x 2.*num_phi 4 .*'s: None"),
        (
            scales.tokenizer.with_scales((1, 2, 4, 16)),
            scales.generator,
            "the tokenizer's: 1 x 1, 2 x 2, 4 x 4, 16 x 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ImagePipeline(tokenizer, generator)
    words = scales.vocabulary.to_dict()
    for change, message in (
        ({"words": words["words"][:-1]}, "has 1437 words, the generator 1438"),
        ({"attributes": {**words["attributes"], "class": ["one"]}}, r"has \[1, 9, 7, 4\] names of labels"),
        ({"columns": [words["columns"][0], "99", *words["columns"][2:]]}, "the vocabulary is damaged"),
        ({"columns": ["0", "99", "0", "0", "0"]}, "training rows have class outside of 0 ... 81"),
        ({"columns": ["5x99999999999"] * 5}, "at most 100000000"),
        ({"attributes": 3}, "the vocabulary is damaged"),
        ({"words": 3}, "the vocabulary is damaged"),
        ({"num_words": "many"}, "the vocabulary is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            ImagePipeline(scales.tokenizer, scales.generator, vocabulary=words | change)


@pytest.mark.parametrize(
    "defaults",
    [
        [1],
        {"sampler": "none"},
        {"sampler": ["ancestral"]},
        {"temperature": 0},
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"top_p": float("nan")},
        {"top_p": [0.5, 2.0]},
        {"guidance_scale": "2"},
        {"guidance_scale": -1},
        {"guidance": 2.0},
        {"guidance": {"scale": "2"}},
        {"guidance": {"scale": [1.0, 2.0, 3.0]}},
        {"guidance": {"scale": 2.0, "interval": "ab"}},
        {"guidance": {"scale": 2.0, "interval": 3}},
        {"text_encoder": 3},
    ],
)
def test_malformed_defaults(defaults):
    with pytest.raises(ValueError):
        check_defaults(defaults, num_blocks=16)


def test_folders_of_training_runs_load(saved):
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(load_tokenizer(saved.parent, device="cpu").decode(ids), vq().decode(ids))
    assert load(saved.parent, device="cpu").generator.config == load(saved, device="cpu").generator.config
    assert load_generator(saved.parent, device="cpu").config["vocab_size"] == 12


def test_damaged_folders_end_in_one_error(saved):
    deep = "[" * 100_000 + "]" * 100_000
    shallow = "[" * 300 + "]" * 300
    whole = {path: path.read_text() for path in saved.rglob("*.json")}
    config, index = saved / "generator" / "config.json", saved / "model_index.json"

    def changed(path: pathlib.Path, **values) -> str:
        return json.dumps(json.loads(whole[path]) | values)

    for path, text in [
        *((path, text) for path in whole for text in (deep, f'{{"a": {shallow}}}', "", "[]", "{}", "\ufffd{", "NaN")),
        (config, changed(config, num_layers=10**9)),
        (config, changed(config, num_layers="2")),
        (config, changed(config, width=-16)),
        (config, changed(config, width=0)),
        (config, changed(config, num_heads=0)),
        (config, changed(config, grid=None)),
        (config, changed(config, grid=[4])),
        (config, changed(config, attributes=5)),
        (config, changed(config, vocab_size=10**30)),
        (config, changed(config, **{"more": 1})),
        (index, changed(index, vocabulary=[])),
        (index, changed(index, defaults=3)),
        (index, changed(index, generator=7)),
        (index, changed(index, generator=["visar.generators.raster", "RasterGPT", 3])),
        (index, changed(index, tokenizer={"a": 1})),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            load(saved, device="cpu")
        assert str(saved) in str(error.value), path
        path.write_text(whole[path])
    weights = saved / "generator" / "diffusion_pytorch_model.safetensors"
    for text in (
        deep,
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ""}}',
    ):
        (weights.parent / f"{weights.name}.index.json").write_text(text)
        with pytest.raises(ValueError, match="generator is damaged"):
            load(saved, device="cpu")


def test_convert_says_what_to_do_next(tmp_path):
    torch.save(export_gpt(gpt()), tmp_path / "gpt.pt")
    torch.save(export_vq(vq()), tmp_path / "vq.pt")
    out = tmp_path / "my model"
    both = convert(Convert(tmp_path / "gpt.pt", out, tmp_path / "vq.pt", grid=(4, 4), num_heads=2))
    assert both.splitlines()[1] == f"Next: visar sample '{out}' --class 3"
    assert load(out, device="cpu").tokenizer.layout.num_tokens == 16
    alone = convert(Convert(tmp_path / "gpt.pt", tmp_path / "g", grid=(4, 4), num_heads=2))
    assert "convert it again with --tokenizer" in alone
    assert "visar.load_tokenizer" in convert(Convert(tmp_path / "vq.pt", tmp_path / "t", grid=(4, 4)))
