"""A family of generators is added in four places, and every command knows it: shown on a copy of the package."""

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOY = Path(__file__).parent / "fixtures" / "toy"
FOLDERS = ("visar", "tokenizers", "samplers", "checkpoints", "tests")
ROW = '    "toy": ("visar.generators.toy", "ToyGenerator"),'
FAMILIES = "visar/generators/families.py"


def contents(root: Path) -> dict[str, bytes]:
    """All files of a tree but compiled ones, by path; what links point to counts where it is."""
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files if "__pycache__" not in path.parts}


def test_a_family_is_added_in_four_places(tmp_path):
    copy = tmp_path / "package"
    for folder in FOLDERS[:-1]:
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    (copy / "tests").mkdir()
    before = contents(copy)

    # 1: the class and what training and the benchmark need of it; 2: one row; 3: the converter; 4: the test.
    shutil.copy(TOY / "generator.py", copy / "visar" / "generators" / "toy.py")
    text = (copy / FAMILIES).read_text()
    last = next(line for line in text.splitlines() if line.startswith('    "hmar": ('))
    (copy / FAMILIES).write_text(text.replace(last, f"{last}\n{ROW}"))
    shutil.copy(TOY / "converter.py", copy / "checkpoints" / "toy.py")
    shutil.copy(TOY / "check.py", copy / "tests" / "test_generators_toy.py")

    after = contents(copy)
    new = {"visar/generators/toy.py", "checkpoints/toy.py", "tests/test_generators_toy.py"}
    assert after.keys() - before.keys() == new and not before.keys() - after.keys()
    assert {name for name in before if before[name] != after[name]} == {FAMILIES}
    lines = [content[FAMILIES].decode().splitlines() for content in (before, after)]
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "+-"]
    assert changed == [f"+ {ROW}"]

    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    (tmp_path / "work").mkdir()
    check = (
        f"runpy.run_path({str(copy / 'tests' / 'test_generators_toy.py')!r})['test_one_by_one_is_teacher_forcing']()"
    )
    program = f"import runpy; {check}; runpy.run_path({str(TOY / 'commands.py')!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "work", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Next: visar sample converted --class 3" in done.stdout and "toy-released" in done.stdout
    assert "--out evaluation" in done.stdout and "Traceback" not in done.stderr
