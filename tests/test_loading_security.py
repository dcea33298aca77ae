"""Loading a folder makes models from a table and calls nothing else, whatever the folder names."""

import importlib
import json
import pkgutil
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import ModelMixin

import visar
from visar.pipelines import components
from visar.pipelines.components import DRAFTERS, GENERATORS, TOKENIZERS, load_component, load_tokenizer
from visar.pipelines.components import model_class as class_of
from visar.pipelines.drafters import load_drafter
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load

TABLES = (TOKENIZERS, GENERATORS, DRAFTERS)


def reachable() -> list[tuple[str, str]]:
    """Module and name of every callable that some module of visar defines or imports."""
    found = []
    for info in pkgutil.walk_packages(visar.__path__, "visar."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # needs an optional package that is not installed here
            continue
        found += [(info.name, name) for name, value in vars(module).items() if callable(value)]
    return found


@pytest.fixture
def saved(tmp_path):
    """A folder of an embedded pipeline."""
    load("emoji-raster", device="cpu").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_only_classes_of_the_tables_are_named():
    names = reachable()
    assert len(names) > 1000
    assert ("visar.evaluate.extractors", "load_extractor") in names
    for table in TABLES:
        own = {(module, name) for name, module in table.items()}
        for module, name in names:
            if (module, name) in own:
                assert issubclass(class_of(table, name, module), ModelMixin)
            else:
                with pytest.raises(ValueError, match="is no class that may be loaded here; allowed: "):
                    class_of(table, name, module)


def test_nothing_that_a_folder_names_is_imported_or_called(saved, monkeypatch):
    imported = []
    real = importlib.import_module
    monkeypatch.setattr(components.importlib, "import_module", lambda name: imported.append(name) or real(name))
    index = json.loads((saved / "model_index.json").read_text())
    for part in ("generator", "tokenizer"):
        for module, name in (
            ("visar.cli.main", "main"),
            ("visar.evaluate.extractors", "load_extractor"),
            ("os", "system"),
            ("visar.generators.raster", "register_to_config"),
            ("visar.generators.raster", "ModelMixin"),
            ("visar.generators.tabular", "RasterGPT"),
            ("visar.generators.raster.RasterGPT", "from_pretrained"),
        ):
            (saved / "model_index.json").write_text(json.dumps(index | {part: [module, name]}))
            with pytest.raises(ValueError, match="is no class that may be loaded here; allowed: "):
                load(saved, device="cpu")
    own = {name for name in imported if not name.startswith("visar.checkpoints.")}  # the list of official names
    assert own <= {*TOKENIZERS.values(), *GENERATORS.values()}


@pytest.mark.parametrize("name", ["ConfigMixin", "RasterGPT", "main", None, 7, ["VQTokenizer"], {"a": 1}])
def test_classes_in_config_files_come_from_the_tables(saved, tmp_path, name):
    config = saved / "tokenizer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": name}))
    with pytest.raises(ValueError, match="is no class that may be loaded here; allowed: .*VQTokenizer"):
        load_tokenizer(saved / "tokenizer", device="cpu")
    shutil.copytree(saved / "tokenizer", tmp_path / "drafter")
    with pytest.raises(ValueError, match="is no class that may be loaded here; allowed: FeatureDrafter"):
        load_drafter(tmp_path / "drafter", load("emoji-raster", device="cpu").generator)


def test_a_class_of_another_room_is_refused(saved):
    with pytest.raises(
        ValueError, match="RasterGPT is no class that may be loaded here; allowed: FeatureDrafter, SpatialHeads"
    ):
        load_component(DRAFTERS, "RasterGPT", saved / "generator")


def test_from_pretrained_works_in_a_fresh_process(saved):
    program = (
        "import sys; from visar import ImagePipeline; pipeline = ImagePipeline.from_pretrained(sys.argv[1]);"
        "print(type(pipeline.tokenizer).__name__, float(pipeline.generator.output.weight.double().sum()))"
    )
    run = subprocess.run([sys.executable, "-c", program, str(saved)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    name, total = run.stdout.split()
    assert name == "VQTokenizer"
    assert float(total) == float(load(saved, device="cpu").generator.output.weight.double().sum())


@pytest.mark.parametrize("part", ["generator", "tokenizer", "_class_name"])
def test_from_pretrained_refuses_what_is_no_model_of_visar(saved, tmp_path, monkeypatch, part):
    index = json.loads((saved / "model_index.json").read_text())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Model: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for named in (["os", "system"], ["evil", "Model"]):
        (saved / "model_index.json").write_text(json.dumps(index | {part: named}))
        with pytest.raises(ValueError, match="is no class that may be loaded here|an ImagePipeline is needed"):
            ImagePipeline.from_pretrained(saved)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_arguments_of_from_pretrained_are_honoured_or_refused(saved, tmp_path):
    honoured = dict(torch_dtype=torch.bfloat16, device_map="cpu", use_safetensors=True, local_files_only=True)
    pipeline = ImagePipeline.from_pretrained(saved, **honoured, variant=None, trust_remote_code=False)
    assert pipeline.generator.dtype == pipeline.tokenizer.dtype == torch.bfloat16
    assert ImagePipeline.from_pretrained(str(saved), dtype="float16").generator.dtype == torch.float16
    other = ImagePipeline.from_pretrained(saved, tokenizer=pipeline.tokenizer)
    assert other.tokenizer is pipeline.tokenizer and other.generator.dtype == torch.float32
    for arguments, message in (
        (dict(variant="fp16"), "has no weights of variant 'fp16'; it has None"),
        (dict(trust_remote_code=True), "does not take trust_remote_code=True"),
        (dict(use_safetensors=False), "does not take use_safetensors=False"),
        (dict(custom_pipeline="other"), "does not take custom_pipeline='other'"),
        (dict(device_map="balanced"), "unknown device 'balanced'"),
        (dict(device_map={"generator": 0}), "device_map {'generator': 0}; give one"),
        (dict(torch_dtype="auto"), "dtype 'auto'; choose one of float32"),
        (dict(torch_dtype={"default": torch.float16}), "torch_dtype {.*}; give one for all parts"),
    ):
        with pytest.raises(ValueError, match=message):
            ImagePipeline.from_pretrained(saved, **arguments)
    with pytest.raises(ValueError, match="emoji-raster is no folder; visar.load also takes names"):
        ImagePipeline.from_pretrained("emoji-raster")
    with pytest.raises(ValueError, match="has no model_index.json"):
        ImagePipeline.from_pretrained(saved / "generator")
