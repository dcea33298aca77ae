"""`visar reproduce`: rows of papers, what a run would fetch and do, and whole runs from files in official layout."""

import dataclasses
import json
import runpy
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import torch

from visar.checkpoints import hub
from visar.cli.main import main
from visar.evaluate.extractors import EXTRACTORS
from visar.evaluate.reproduce import FULL, Published, comparison, deviations, find, published, references
from visar.pipelines.image import ImagePipeline
from visar.samplers.index import find_sampler

FIXTURES = Path(__file__).parent / "fixtures"
EVALUATION = runpy.run_path(str(FIXTURES / "evaluation.py"))
# Fixtures in the authors' layout, of the generator and of the tokenizer, by project.
LAYOUTS = {
    "var": ("var", "var_vqvae"),
    "hmar": ("hmar", "var_vqvae"),
    "llamagen": ("llamagen_gpt_c2i", "llamagen_vq"),
    "mar": ("mar", "mar-kl16"),
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache, empty, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(EXTRACTORS, "tiny", EVALUATION["TINY"])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def keep(cache: Path, repository: str, file: str, state: dict) -> None:
    """Puts weights where the hub's client keeps a fetched file."""
    from safetensors.torch import save_file

    folder = cache / f"models--{repository.replace('/', '--')}"
    place = folder / "snapshots" / ("0" * 40)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    place.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(state, place / file)
    else:
        torch.save(state, place / file)


def bare(state: dict) -> dict:
    """A state without the names of the mappings that MAR's files nest it in, and that its mirror has not."""
    return {key.removeprefix("model_ema.").removeprefix("model."): value for key, value in state.items()}


def test_rows_name_official_models_and_settings_that_these_take():
    assert {name.split("-")[0] for name in published()} >= {"llamagen", "var", "hmar", "mar"}
    for row in published().values():
        entry = hub.official()[row.model]
        pipeline = ImagePipeline(None, None, defaults=entry.defaults)
        known = find_sampler(pipeline.sampling_settings()["sampler"]).settings()
        assert set(row.sampler_options) <= set(known), row.name
        assert row.reference in references() and 1.0 < row.figures["FID"] < 10.0 and row.figures["IS"] > 100.0
        assert row.deviations and set(row.figures) <= {"FID", "sFID", "IS", "precision", "recall"}
        side = int(entry.note.rsplit("x", 1)[1].split(";")[0]) if " x " in entry.note else 256
        assert (row.scored_size or side) == (512 if row.reference == "adm-imagenet512" else 256), row.name
    assert find("llamagen-b-256").labels == "random" and find("var-d16").labels == "balanced"
    with pytest.raises(ValueError, match="no row 'var'; choose one of llamagen-b-256"):
        find("var")


def test_dry_runs_of_every_row_fetch_nothing(cache, capsys):
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    for name, row in published().items():
        assert name in listed
        assert main(["reproduce", name, "--dry-run"]) == 0
        said = capsys.readouterr().out
        entry = hub.official()[row.model]
        for words in (f"{entry.repository}/{entry.file}: size not known", entry.tokenizer_file, row.labels, "50,000"):
            assert words in said, (name, words)
        assert references()[row.reference]["url"] in said and f"FID {row.figures['FID']}" in said
        assert f"converter: {entry.source}" in said and f"visar reproduce {name} --reference" in said
        for text in row.deviations:
            assert text in said
    assert not list(cache.parent.iterdir())


def test_sizes_of_files(cache, monkeypatch, capsys):
    entry = hub.official()["var-d16"]
    keep(cache, entry.repository, entry.file, {"a": torch.zeros(500_000)})
    metadata = type("Metadata", (), {"size": 435_700_000})
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: metadata)
    main(["reproduce", "var-d16", "--dry-run"])
    said = capsys.readouterr().out
    assert f"{entry.file}: 2.0 MB, in the cache" in said
    assert f"{entry.tokenizer_file}: 435.7 MB, to be fetched; a broken download resumes" in said


@pytest.mark.parametrize("name", ["var-d20", "hmar-d24", "llamagen-b-384", "mar-large"])
def test_a_whole_run_of_parity_files(name, cache, parity, monkeypatch, capsys):
    row, project = find(name), name.split("-")[0]
    entry = hub.official()[row.model]
    generator, tokenizer = (parity(system) for system in LAYOUTS[project])
    keep(cache, entry.repository, entry.file, bare(generator.checkpoint()))
    keep(cache, entry.tokenizer_repository, entry.tokenizer_file, bare(tokenizer.checkpoint()))
    module, config = hub.projects()[project], generator.config
    if project == "llamagen":  # what its files do not say and sizes tell; the fixture's is no released size
        sizes = config["constructor"]["ModelArgs"]
        monkeypatch.setitem(module.NUM_HEADS, (sizes["n_layer"], sizes["dim"]), sizes["n_head"])
        entry = dataclasses.replace(entry, grid=tuple(config["derived"]["grid"]))
        monkeypatch.setitem(module.OFFICIAL, row.model, entry)
        row = dataclasses.replace(row, scored_size=32)
    if project == "mar":
        sizes = config["constructor"]
        preset = {"width": sizes["encoder_embed_dim"], "num_heads": sizes["encoder_num_heads"]}
        monkeypatch.setitem(module.MASKED_PRESETS, "tiny", preset)
        row = dataclasses.replace(row, sampler_options={"steps": config["derived"]["seq_len"], "head_steps": 4})
    monkeypatch.setattr("visar.cli.reproduce.find", lambda name: row)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez("reference.npz", arr_0=images)
    words = f"reproduce {name} --reference reference.npz --extractor tiny --num-samples 6 --batch-size 3 --device cpu"
    words += " --keep-images npz --seed 2"
    assert main(words.split()) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "deviation: 6 images instead of 50,000" in said and "features of tiny, so no FID" in said
    found = json.loads(Path("reproduction/reproduction.json").read_text())
    assert found["figures"] == row.figures and found["distance_name"] == "FD-tiny"
    assert found["found"]["FD-tiny"] > 0 and set(row.deviations) < set(found["deviations"])
    protocol = found["protocol"]
    assert protocol["dtype"] == row.dtype and protocol["uint8_rule"] == row.uint8_rule
    assert protocol["labels"].startswith(row.labels) and protocol["seeds"] == "image i: 2 + i"
    guidance = entry.defaults.get("guidance", {"scale": entry.defaults.get("guidance_scale")})
    assert protocol["guidance"]["scale"] == guidance["scale"] and protocol.get("scored_size") == (
        None if row.scored_size is None else 32
    )
    made = np.load("reproduction/samples.npz")["arr_0"]
    assert made.shape[0] == 6 and made.dtype == np.uint8
    if row.scored_size is not None:
        assert made.shape[1:3] == (32, 32)
    # What it printed is what it wrote, and the paper's figures stand beside.
    lines = {
        line.split()[0]: line.split()[1:] for line in said.splitlines() if line and line.split()[0] in row.figures
    }
    assert all(float(lines[figure][0]) == pytest.approx(value, abs=1e-3) for figure, value in row.figures.items())


def test_what_a_run_needs(cache, capsys):
    assert main(["reproduce", "var-d16"]) == 1
    assert "give --reference, the file VIRTUAL_imagenet256_labeled.npz" in capsys.readouterr().err
    np.savez("reference.npz", arr_0=np.zeros((8, 8, 8, 3), dtype=np.uint8))
    assert main("reproduce var-d16 --reference reference.npz --extractor tiny --device cpu".split()) == 1
    assert "vae_ch160v4096z32.pth of FoundationVision/var could not be fetched" in capsys.readouterr().err
    assert main(["reproduce", "var-d61", "--dry-run"]) == 1
    assert "no row 'var-d61'" in capsys.readouterr().err


def test_deviations_of_options():
    row = find("var-d16")
    full = dict(count=FULL, extractor="inception-v3", dtype=row.dtype, reference="x/VIRTUAL_imagenet256_labeled.npz")
    assert deviations(row, **full) == list(row.deviations)
    for change, words in (
        ({"count": 5000}, "5,000 images instead of 50,000"),
        ({"extractor": "craft"}, "features of craft, so no FID"),
        ({"dtype": "float32"}, "generator in float32 instead of float16"),
        ({"reference": "own.npz"}, "reference own.npz instead of VIRTUAL_imagenet256_labeled.npz"),
    ):
        (added,) = deviations(row, **{**full, **change})[len(row.deviations) :]
        assert words in added


@pytest.mark.parametrize(("kind", "expected"), [("FID", "+0.250"), ("FD-tiny", "-")])
def test_figures_beside_the_papers(kind, expected):
    row: Published = find("var-d16")
    metrics = type("M", (), dict(distance_name=kind, distance=row.figures["FID"] + 0.25, spatial_distance=None))
    metrics.inception_score, metrics.precision, metrics.recall = 274.4, None, 0.5
    rows = {line[0]: line[1:] for line in comparison(row, type("R", (), {"metrics": metrics}))}
    assert rows[kind] == ("3.300" if kind == "FID" else "-", "3.550", expected)
    assert rows["precision"] == ("0.840", "-", "-")
    assert rows["recall"][2] == ("-0.010" if kind == "FID" else "-")
