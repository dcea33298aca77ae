"""Loading a folder makes models from a table and calls nothing else, whatever the folder names."""

import importlib
import json
import pkgutil
import shutil

import pytest
from diffusers import ModelMixin

import visar
from visar.pipelines import components
from visar.pipelines.components import DRAFTERS, GENERATORS, TOKENIZERS, load_component, load_tokenizer
from visar.pipelines.components import model_class as class_of
from visar.pipelines.drafters import load_drafter
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
    assert set(imported) <= {*TOKENIZERS.values(), *GENERATORS.values()}


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
