"""Pipelines on the hub: what is uploaded, the card, and that it is the same pipeline when it comes back."""

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError

from visar.io.files import sha256
from visar.pipelines.components import load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load

tiny_pipeline = runpy.run_path(str(Path(__file__).parent / "fixtures" / "faults.py"))["tiny_pipeline"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict:
    """A hub whose repositories are what this machine's cache holds; what was asked of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    asked: dict = {}

    def create_repo(repo_id, **settings):
        asked["create"] = settings
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(*, repo_id, folder_path, **settings):
        asked["upload"] = settings
        repository = tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        asked["folder"] = repository / "snapshots" / ("0" * 40)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/0")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return asked


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_a_round_trip(hub, storage):
    pipeline = tiny_pipeline()
    address = pipeline.push_to_hub("someone/bars", storage=storage, private=True, token="t")
    assert address == "https://hub/someone/bars/commit/0"
    assert hub["create"] == dict(private=True, token="t", exist_ok=True)
    assert hub["upload"]["commit_message"] == "ImagePipeline saved by visar" and not hub["upload"]["create_pr"]
    names = {str(path.relative_to(hub["folder"])) for path in hub["folder"].rglob("*") if path.is_file()}
    parts = {f"{part}/{file}" for part in ("generator", "tokenizer") for file in ("config.json", "visar_model.py")}
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("generator", "tokenizer")}
    assert names == {"README.md", "model_index.json", "pipeline.py", "visar_model.py"} | parts | weights
    pipeline.save_pretrained("local", storage)
    found, local = load("someone/bars", device="cpu"), load("local", device="cpu")
    again = ImagePipeline.from_pretrained("someone/bars")
    for one in (found, again):
        one.set_progress_bar_config(disable=True)
        for part in ("generator", "tokenizer"):
            expected = getattr(local, part).state_dict()
            assert all(torch.equal(value, expected[key]) for key, value in getattr(one, part).state_dict().items())
    local.set_progress_bar_config(disable=True)
    assert torch.equal(found(1, seed=3).tokens, local(1, seed=3).tokens)
    assert type(load_tokenizer("someone/bars", device="cpu")) is type(pipeline.tokenizer)


def test_the_card(hub, tmp_path):
    place = tmp_path / "evaluation"
    place.mkdir()
    (place / "card.md").write_text(
        "# Evaluation of bars\n\n| run | FD |\n| --- | --- |\n\n## Protocol\n\n- seeds: 0 + i\n"
    )
    tiny_pipeline().push_to_hub(
        "someone/bars", evaluation=place, licence="apache-2.0", about="Trained on bars. Knows nothing else."
    )
    card = (hub["folder"] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "\nlicense: apache-2.0\n" in card
    for words in (
        "# bars\n", "RasterGPT", "16 codes", "Trained on bars.", 'visar.load("someone/bars")', "class_labels=0",
        "trust_remote_code=True", "## Evaluation of bars", "### Protocol", "- seeds: 0 + i",
    ):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in card
    for file in hub["folder"].rglob("*.safetensors"):
        assert sha256(file) in card
    # The two snippets are programs.
    for snippet in card.split("```python\n")[1:]:
        compile(snippet.split("```")[0], "card", "exec")


def test_a_card_without_figures_says_so(hub):
    tiny_pipeline().push_to_hub("someone/bars")
    card = (hub["folder"] / "README.md").read_text()
    assert "No figures were measured" in card and "license:" not in card


def test_what_is_refused(hub, tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    for name in ("bars", "a/b/c", "/bars", "some one/bars"):
        with pytest.raises(ValueError, match="write owner/model"):
            pipeline.push_to_hub(name)
    with pytest.raises(ValueError, match="card.md"):
        pipeline.push_to_hub("someone/bars", evaluation=tmp_path)
    with pytest.raises(ValueError, match=r"call pipeline.push_to_hub\(repository\)"):
        pipeline.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not hub and not (tmp_path / "x").exists()

    def refused(*_, **__):
        raise LocalTokenNotFoundError("no token found")

    monkeypatch.setattr(huggingface_hub, "create_repo", refused)
    with pytest.raises(
        ValueError, match="someone/bars could not be written .*LocalTokenNotFoundError: no token found"
    ):
        pipeline.push_to_hub("someone/bars")
