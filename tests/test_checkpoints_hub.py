"""Names: official rows, the pipelines' default settings, silent loading, and no network."""

import json
import warnings
from pathlib import Path

import diffusers.utils.logging
import huggingface_hub.constants
import pytest
import torch

from visar.checkpoints import hub
from visar.core.guidance import Guidance
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RASTER_PRESETS
from visar.pipelines.components import load_tokenizer
from visar.pipelines.drafters import CLASSES, load_drafter
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.pipelines.sampling import guidance_of_defaults
from visar.samplers.drafters.interface import target_digest
from visar.samplers.index import find_sampler
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

SCALES = (1, 2, 4)
VAR_LIKE = {"sampler": "next_scale", "guidance": {"scale": 1.5, "convention": "extrapolate", "schedule": "linear"}}


def make(defaults: dict | None = None) -> ImagePipeline:
    torch.manual_seed(0)
    tokenizer = MultiScaleVQTokenizer(
        codebook_size=24, codebook_dim=8, scales=SCALES, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1
    )
    generator = NextScaleTransformer(
        vocab_size=24, codebook_width=8, scales=SCALES, width=16, num_layers=1, num_heads=2, num_classes=3
    )
    for parameter in [*tokenizer.parameters(), *generator.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    generator.set_tokenizer(tokenizer.quantizer)
    pipeline = ImagePipeline(tokenizer.eval(), generator.eval(), defaults=defaults)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_official_names():
    assert {"var-d16", "var-d20", "var-d24", "var-d30", "var-d36"} <= hub.official().keys()
    assert {"hmar-d16", "hmar-d20", "hmar-d24", "hmar-d30"} <= hub.official().keys()
    released = {name.removeprefix("llamagen-") for name in RASTER_PRESETS}
    named = {name.split("-")[2] for name in hub.official() if name.startswith("llamagen-c2i")}
    assert named == released
    for name, entry in hub.official().items():
        assert (entry.grid is not None) == (entry.source in ("llamagen", "nar")), name
        assert ("non-commercial" in entry.note) == (entry.source == "hmar"), name
        # The settings are ones that a pipeline takes, of a sampler that there is.
        pipeline = ImagePipeline(None, None, defaults=entry.defaults)
        find_sampler(pipeline.sampling_settings()["sampler"])
        students = entry.source == "distilled_decoding"  # they have learned their teachers' guidance
        assert pipeline.sampling_settings()["guidance"].active(10) != students, name
    assert hub.official()["var-d36"].note.endswith("512 x 512")
    message = str(hub.unknown_model("var-d61"))
    assert "nearest: var-d" in message and "hmar-d30" in message


@pytest.mark.parametrize("name", ["llamagen-c2i-b-256", "var-d16", "hmar-d16"])
def test_official_names_without_a_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="could not be fetched.*visar convert"):
        load(name, device="cpu")
    assert not list(tmp_path.rglob("*"))


def keep(cache: Path, repository: str, file: str, state: dict) -> None:
    """Puts weights where the hub's client keeps a fetched file."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "snapshots" / ("0" * 40) / file)


@pytest.mark.parametrize(("name", "system"), [("var-d20", "var"), ("hmar-d24", "hmar")])
def test_official_files_that_were_fetched_before(name, system, parity, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    entry = hub.official()[name]
    keep(tmp_path, entry.tokenizer_repository, entry.tokenizer_file, parity("var_vqvae").checkpoint())
    keep(tmp_path, entry.repository, entry.file, parity(system).checkpoint())
    pipeline = load(name, device="cpu", dtype="bfloat16")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.generator.dtype == torch.bfloat16 and pipeline.generator.pyramid.codebook.dtype == torch.float32
    assert pipeline.tokenizer.layout.shapes == pipeline.generator.scales
    settings = pipeline.sampling_settings()
    assert settings["sampler"] == entry.defaults["sampler"] and settings["top_k"] == entry.defaults["top_k"]
    assert settings["guidance"] == Guidance(**entry.defaults["guidance"])
    result = pipeline(0, seed=0, output_type="pt")
    explicit = pipeline(0, seed=0, **{key: settings[key] for key in ("sampler", "top_k", "top_p")}, output_type="pt")
    assert torch.equal(result.tokens, explicit.tokens) and result.images.isfinite().all()


def test_default_settings_are_saved_and_used(tmp_path):
    pipeline = make({**VAR_LIKE, "top_k": 20, "top_p": 0.9})
    pipeline.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    linear = Guidance(1.5, "extrapolate", "linear")
    expected = {"sampler": "next_scale", "guidance": linear, "temperature": 1.0, "top_k": 20, "top_p": 0.9}
    assert loaded.sampling_settings() == pipeline.sampling_settings() == expected
    explicit = make()([0, 1, 2], seed=3, sampler="next_scale", guidance_scale=linear, top_k=20, top_p=0.9).tokens
    assert torch.equal(loaded([0, 1, 2], seed=3).tokens, explicit)
    # The model's own scale in the convention of numbers is the default again; 1.0 is off.
    assert torch.equal(loaded([0, 1, 2], seed=3, guidance_scale=2.5).tokens, explicit)
    assert not loaded.sampling_settings(guidance_scale=1.0)["guidance"].active(len(SCALES))
    assert loaded.sampling_settings(guidance_scale=4.0)["guidance"] == Guidance(4.0, schedule="linear")
    assert loaded.sampling_settings(sampler="ancestral", top_k=0)["sampler"] == "ancestral"
    assert loaded.sampling_settings(top_k=0)["top_k"] == 0


def test_lists_of_scales_come_back_from_json():
    defaults = json.loads(json.dumps({"guidance": {"scale": (1.0, 2.0, 3.0), "interval": (1, 2)}}))
    assert guidance_of_defaults(defaults) == Guidance((1.0, 2.0, 3.0), interval=(1, 2))
    assert guidance_of_defaults({}) == Guidance() and guidance_of_defaults({"guidance_scale": 2}) == Guidance(2.0)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"cfg": 2.0}, "default setting 'cfg'; choose from sampler, temperature, top_k, top_p, guidance_scale, guid"),
        ({"guidance": {"scale": 2.0}, "guidance_scale": 2.0}, "not both"),
        ({"guidance": {"cfg": 2.0}}, "default guidance cfg; its fields: scale, convention"),
        ({"guidance": {"schedule": "cosine"}}, "schedule 'cosine'; choose constant or linear"),
    ],
)
def test_bad_default_settings(defaults, message):
    with pytest.raises(ValueError, match=message):
        ImagePipeline(None, None, defaults=defaults)


def test_loading_says_nothing(tmp_path, capfd, caplog):
    pipeline = make(VAR_LIKE)
    weights = {key: value.clone() for key, value in pipeline.generator.state_dict().items()}
    for model in (pipeline.tokenizer, pipeline.generator):
        torch.nn.Module.to(model, torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    diffusers.utils.logging.enable_propagation()
    capfd.readouterr()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load(tmp_path, device="cpu")
            half = load(tmp_path, device="cpu", dtype="bfloat16")
            load_tokenizer(tmp_path, device="cpu", dtype="float16")
    finally:
        diffusers.utils.logging.disable_propagation()
    assert tuple(capfd.readouterr()) == ("", "") and not caplog.records
    for key, value in loaded.generator.state_dict().items():
        kept = weights[key] if key.startswith("pyramid.") else weights[key].bfloat16()
        assert value.dtype == torch.float32 and torch.equal(value, kept.float()), key
        assert half.generator.state_dict()[key].dtype == kept.dtype, key
    assert not loaded.generator.training and not loaded.tokenizer.training


def test_weights_in_several_files(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted((tmp_path / "generator").glob("*.safetensors"))
    assert len(shards) > 1
    loaded = load(tmp_path, device="cpu").generator.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in pipeline.generator.state_dict().items())
    shards[0].unlink()
    with pytest.raises(ValueError, match="damaged or incomplete: no weights file at .*-00001-of-"):
        load(tmp_path, device="cpu")


def test_load_tokenizer(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.tokenizer.save_pretrained(tmp_path / "alone")
    ids = torch.randint(24, (1, 21))
    with torch.no_grad():
        expected = pipeline.tokenizer.decode(ids)
        for folder in ("pipeline", "alone"):
            assert torch.equal(load_tokenizer(tmp_path / folder, device="cpu").decode(ids), expected)


def test_damaged_folders_are_named(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    content = json.loads(index.read_text())
    for change, message in (
        ({"_class_name": "OtherPipeline"}, "holds a OtherPipeline; an ImagePipeline is needed"),
        ({"generator": ["os", "path"]}, "what it names is no class that may be loaded here; allowed: .*RasterGPT"),
        ({"generator": ["visar.generators.raster", "Nothing"]}, "Nothing is no class that may"),
        ({"generator": ["visar.generators.none", "None"]}, "None is no class that may"),
        ({"generator": None}, "model_index.json has generator None"),
        (
            {"generator": ["visar.generators.raster", "RasterGPT"]},
            "made by another version of visar.*unexpected keyword",
        ),
        ({"defaults": {"cfg": 1}}, "default setting 'cfg'"),
    ):
        index.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path, device="cpu")
    index.write_text("{")
    with pytest.raises(ValueError, match="model_index.json is no JSON"):
        load(tmp_path, device="cpu")
    index.write_text(json.dumps(content))
    config = tmp_path / "generator" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    with pytest.raises(ValueError, match="generator does not fit the model. .* missing: blocks.1"):
        load(tmp_path, device="cpu")


def test_embedded_generators_name_their_tokenizer():
    for name in hub.embedded_names():
        facts = hub.about(name)
        tokenizer = load_tokenizer(name, device="cpu")
        expected = load_tokenizer(name if facts["kind"] == "tokenizer" else facts["tokenizer"], device="cpu")
        assert tokenizer.config["codebook_size"] == expected.config["codebook_size"]
        if facts["kind"] == "tokenizer":
            with pytest.raises(ValueError, match="is a tokenizer: use visar.load_tokenizer"):
                load(name, device="cpu")


def test_embedded_drafters_are_those_of_the_weights_that_ship():
    drafters = [name for name in hub.embedded_names() if hub.about(name)["kind"] == "drafter"]
    assert drafters
    for name in drafters:
        config = json.loads((hub.EMBEDDED_FOLDER / name / "config.json").read_text())
        target = load(config["target"], device="cpu").generator
        assert config["target_digest"] == target_digest(target)
        kind = {class_name: kind for kind, class_name in CLASSES.items()}[config["_class_name"]]
        assert load_drafter(kind, target).config["target"] == config["target"]
