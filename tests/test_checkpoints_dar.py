"""D-AR's files: all released layouts fit, numbers agree from tokens to images, there and back, wrong files."""

import json
import pickle
import sys
from collections import OrderedDict
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from visar.checkpoints import hub, llamagen
from visar.checkpoints.common import check_keys, empty, find_weights, read
from visar.checkpoints.convert import find_rows, read_models
from visar.checkpoints.dar import OFFICIAL, convert_tokenizer, export_tokenizer
from visar.checkpoints.options import Convert
from visar.cli.convert import convert
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.raster import RasterGPT
from visar.pipelines.components import load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.ancestral import sample_ancestral
from visar.tokenizers.diffusion import DIFFUSION_PRESETS, FAMILY, DiffusionTokenizer

GPT: dict[str, Any] = dict(vocab_size=64, width=16, num_layers=1, num_heads=2, hidden_width=24, num_classes=5)
CLOSE: dict[str, Any] = dict(atol=3e-5, rtol=0)
REPA = "diff_decoder.net.repa_out."


def meta(manifest) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest["keys"].items()}


def sizes(parity) -> dict[str, Any]:
    facts = parity("dar_tokenizer").config["constructor"]["model"]
    return dict(
        image_size=facts["sampling_resolution"],
        num_tokens=facts["num_all_queries"],
        num_groups=facts["num_query_groups"],
        num_steps=facts["num_denoising_steps"],
        data_std=facts["diff_decoder"]["data_std"],
        time_shift=facts["diff_decoder"]["time_shift"],
    )


def other_sizes(parity) -> dict[str, Any]:
    return {name: value for name, value in sizes(parity).items() if name != "num_tokens"}


def generator_of(parity) -> RasterGPT:
    folder = parity("dar_gpt")
    args = folder.config["constructor"]["ModelArgs"]
    config, state = llamagen.convert_gpt(
        folder.checkpoint(), grid=(1, args["block_size"]), rope="1d", num_heads=args["n_head"]
    )
    model = RasterGPT(**config).eval()
    model.load_state_dict(state)
    return model


def tokenizer_of(parity) -> DiffusionTokenizer:
    config, state = convert_tokenizer(parity("dar_tokenizer").checkpoint(), **sizes(parity))
    model = DiffusionTokenizer(**config).eval()
    model.load_state_dict(state)
    return model


# --------------------------------------------------------------------------------------------------- released layouts
def test_the_released_tokenizer_fits(parity):
    for path in parity("dar_tokenizer").manifests():
        manifest = json.loads(path.read_text())
        state, facts = meta(manifest), manifest["config"]
        config, converted = convert_tokenizer({"ema": state, "model": {"other": torch.zeros(1)}})
        model = empty(DiffusionTokenizer, config)
        trained_only = sum(value.numel() for key, value in state.items() if key.startswith(REPA))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert trained_only and count == manifest["parameters_total"] - trained_only
        assert (config["num_tokens"], config["num_groups"]) == (facts["num_all_queries"], facts["num_query_groups"])
        assert (config["num_pixel_layers"], config["pixel_patch_size"], config["data_std"]) == (
            facts["diff_decoder"]["depth"],
            facts["diff_decoder"]["patch_size"],
            facts["diff_decoder"]["data_std"],
        )
        assert model.group_size == facts["queries_per_step"] and len(model.group_starts) == 8
        check_keys(model.state_dict(), converted, manifest["release_file"])
        preset = empty(DiffusionTokenizer, DIFFUSION_PRESETS["dar-v1"])
        assert preset.layout == model.layout and preset.times == model.times
        check_keys(preset.state_dict(), converted, "the preset")


def test_the_released_generators_fit(parity):
    files = {entry.file for entry in OFFICIAL.values()}
    for path in parity("dar_gpt").manifests():
        manifest = json.loads(path.read_text())
        config, state = llamagen.convert_gpt({"model": meta(manifest)}, grid=(1, 256), rope="1d")
        model = empty(RasterGPT, config)
        check_keys(model.state_dict(), state, manifest["release_file"])
        assert manifest["release_file"] in files
        if "parameters_total" in manifest:
            assert sum(p.numel() for p in model.parameters()) == manifest["parameters_total"]
    small = empty(DiffusionTokenizer, DIFFUSION_PRESETS["dar-64"])
    assert 10e6 < sum(parameter.numel() for parameter in small.parameters()) < 20e6


# ------------------------------------------------------------------------------------------------------------- parity
@torch.no_grad()
def test_from_tokens_to_images_parity(parity):
    """The generator's own tokens through the tokenizer of the same tree."""
    folder = parity("dar_gpt")
    generator, tokenizer, facts = generator_of(parity), tokenizer_of(parity), folder.config
    tokens = folder.io[facts["e2e"]["tokens"]].long()
    first, last = (float(value) for value in facts["e2e"]["tokens"].split("cfg")[1].split(".tokens")[0].split("to"))
    labels = Condition(labels_BA=torch.tensor(facts["greedy_labels"])[:, None])
    guidance = Guidance(last, schedule="linear", start=first)
    made = sample_ancestral(generator, labels, noise=Noise(range(len(tokens))), guidance=guidance, top_k=1)
    assert torch.equal(made.tokens, tokens)
    noise = parity("dar_tokenizer").io["decode.noise"][: len(tokens)]
    torch.testing.assert_close(tokenizer.decode(made.tokens, noise=noise), folder.io["e2e.image"], **CLOSE)


@torch.no_grad()
def test_first_tokens_parity(parity):
    """Layout control: all rows begin with the first tokens of row 0 and go on with their own labels."""
    folder = parity("dar_gpt")
    generator, facts = generator_of(parity), folder.config
    for key in folder.io:
        if not key.startswith("prefix"):
            continue
        count, scale = key.removeprefix("prefix").removesuffix(".tokens").split(".cfg")
        tokens = folder.io[key].long()
        assert int(count) == facts["shared_prefix_tokens"] and len(set(facts["greedy_labels"])) > 1
        first = tokens[:1, : int(count)].expand(len(tokens), -1)
        condition = Condition(labels_BA=torch.tensor(facts["greedy_labels"])[:, None], first_BK=first)
        for sampler in ("ancestral", "jacobi"):
            made = ImagePipeline(tokenizer_of(parity), generator).sample_tokens(
                condition,
                [0] * len(tokens),
                sampler=sampler,
                guidance=Guidance(float(scale)),
                temperature=1.0,
                top_k=1,
                top_p=1.0,
            )
            assert torch.equal(made.tokens, tokens), sampler


# ------------------------------------------------------------------------------------------------------------- files
class Config(dict):
    """What the released tokenizer's file has beside its weights: an object of its project's own class."""


def write(path, content, of_class=Config):
    """A file whose class Config is of a module that nobody else has."""
    module = ModuleType("tokenizer_settings")
    module.Config = of_class  # type: ignore[attr-defined]
    of_class.__module__, sys.modules["tokenizer_settings"] = "tokenizer_settings", module
    try:
        torch.save(content, path)
    finally:
        del sys.modules["tokenizer_settings"]
    return path


def files(tmp_path, parity):
    tokenizer = parity("dar_tokenizer").checkpoint()
    tokenizer |= {f"{REPA}0.weight": torch.zeros(3, 2), "quantize.codebook_used": torch.zeros(9)}
    other = {key: value + 1 for key, value in tokenizer.items()}
    content = {"config": Config(model={"vq_dim": 8}), "ema": tokenizer, "model": other, "steps": 3}
    generator = {f"_orig_mod.{key}": value for key, value in parity("dar_gpt").checkpoint().items()}
    torch.save({"model": {"module": generator}}, tmp_path / "gpt.pt")
    return write(tmp_path / "tokenizer.pt", content), tmp_path / "gpt.pt"


def test_files_become_a_pipeline(parity, tmp_path, monkeypatch):
    tokenizer_file, file = files(tmp_path, parity)
    content = read(tokenizer_file)
    assert type(content["config"]) is OrderedDict and content["config"] == {"model": {"vq_dim": 8}}
    args = parity("dar_gpt").config["constructor"]["ModelArgs"]
    # What files do not tell is the released model's.
    monkeypatch.setattr("visar.checkpoints.dar.convert_tokenizer", partial(convert_tokenizer, **other_sizes(parity)))
    grid = (1, args["block_size"])
    settings: dict[str, Any] = dict(source="dar", grid=grid, num_heads=args["n_head"])
    line = convert(Convert(file, tmp_path / "out", tokenizer_file, **settings))
    alone = convert(Convert(tokenizer_file, tmp_path / "alone", grid=grid))
    assert "from dar's gpt.pt" in line and "ema weights of tokenizer.pt, which has both" in alone
    pipeline = load(tmp_path / "out", device="cpu")
    assert pipeline.generator.config["rope"] == "1d" and tuple(pipeline.generator.config["grid"]) == grid
    expected = tokenizer_of(parity)
    ids = parity("dar_tokenizer").io["decode.codes"]
    noise = expected.starting_noise(Noise(list(range(len(ids)))))
    with torch.no_grad():
        want = expected.decode(ids, noise=noise)
        assert torch.equal(pipeline.tokenizer.decode(ids, noise=noise), want)
        assert torch.equal(load_tokenizer(tmp_path / "alone", device="cpu").decode(ids, noise=noise), want)
    exported = export_tokenizer(expected)["model"]
    for key, value in parity("dar_tokenizer").checkpoint().items():
        assert torch.equal(exported.pop(key), value), key
    assert not exported


def test_generators_look_like_another_projects_and_are_taken_where_they_are_named(parity):
    gpt, tokenizer = parity("dar_gpt").checkpoint(), parity("dar_tokenizer").checkpoint()
    assert [row.source for row in find_rows(gpt, None, "f")] == ["llamagen"]
    assert [row.source for row in find_rows(gpt, "dar", "f")] == ["dar"]
    assert [(row.source, row.role) for row in find_rows(tokenizer, None, "f")] == [("dar", "tokenizer")]
    nested = {"trainer": {"ema": {f"_orig_mod.{key}": value for key, value in tokenizer.items()}}}
    assert find_weights(nested, "query_embedding.weight", "f").keys() == tokenizer.keys()
    entry = hub.official()["dar-l"]
    assert entry.source == "dar" and Guidance(**entry.defaults["guidance"]).scales(256)[::255] == [1.1, 8.0]


def test_other_classes_of_settings_are_read_as_data_too(tmp_path):
    """An object with attributes instead of entries."""

    class Config:
        def __init__(self) -> None:
            self.model = {"vq_dim": 8}

    Config.__qualname__ = "Config"
    content = read(write(tmp_path / "object.pt", {"config": Config(), "x": torch.ones(2)}, Config))
    assert type(content["config"]) is OrderedDict and vars(content["config"]) == {"model": {"vq_dim": 8}}


class Runs:
    """Its pickle asks for a function to be called."""

    def __reduce__(self):
        return (print, ("run",))


def test_refused_files(parity, tmp_path):
    tokenizer_file, file = files(tmp_path, parity)
    state = parity("dar_tokenizer").checkpoint()
    short = {key: value for key, value in state.items() if key != "query_linear.bias"}
    save_file(short, tmp_path / "short.safetensors")
    fewer = {**state, "quantize.embedding.weight": state["quantize.embedding.weight"][:-1].clone()}
    save_file(fewer, tmp_path / "fewer.safetensors")
    torch.save({"config": Runs(), "model": state}, tmp_path / "unsafe.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"config": Runs(), "model": {}}, protocol=2))
    heads = parity("dar_gpt").config["constructor"]["ModelArgs"]["n_head"]
    codes = parity("dar_tokenizer").config["constructor"]["model"]["vq_codebook_size"]
    named: dict[str, Any] = dict(source="dar", grid=(1, 16), num_heads=heads)
    for arguments, message in (
        (dict(file=tmp_path / "unsafe.pt"), "unsafe.pt is refused: its pickle holds more than tensors"),
        (dict(file=tmp_path / "old.pt"), "old.pt is refused"),
        (dict(file=tmp_path / "short.safetensors", grid=(1, 16)), "1 missing: query_linear.bias"),
        (dict(file=tokenizer_file, grid=(3, 5)), "num_tokens 15 must be a multiple of num_groups 8"),
        (dict(file=tokenizer_file, grid=(64, 32)), "at most max_tokens 1024"),
        (
            dict(file=file, tokenizer=tmp_path / "fewer.safetensors", **named),
            f"predicts {codes} codes, .* has {codes - 1}",
        ),
        (dict(file=file, tokenizer=file, **named), "gpt.pt is a generator of llamagen; a tokenizer of dar is needed"),
        (
            dict(file=file, tokenizer=tokenizer_file, grid=(4, 4), num_heads=heads),
            "is a tokenizer of dar; a tokenizer of llamagen",
        ),
        (dict(file=file, source="dar"), "number of heads of .* not known"),
        (dict(file=file, rope="1d", **named), "rope 1d is for llamagen; a generator of dar does not take it"),
    ):
        with pytest.raises(ValueError, match=message):
            read_models(Convert(out=tmp_path / "out", **arguments))
    tokenizer = DiffusionTokenizer(**{**FAMILY.tiny, "codebook_size": 64})
    with pytest.raises(ValueError, match="rotary positions 2d .the tokenizer's: 1d"):
        ImagePipeline(tokenizer, RasterGPT(**GPT, rope="2d", grid=(1, 16)))
    with pytest.raises(ValueError, match="tokens 12 .the tokenizer's: 16"):
        ImagePipeline(tokenizer, RasterGPT(**GPT, rope="1d", grid=(1, 12)))
