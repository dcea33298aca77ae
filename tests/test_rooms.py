"""Rooms stand in one order: a file imports only from its own room and from those before it."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "io", "core", "data", "layers", "tokenizers", "generators", "samplers", "checkpoints", "pipelines",
         "bench", "demo", "evaluate", "train", "distill", "cli")  # fmt: skip
FILES = {
    f"visar.{room}.{'.'.join(file.relative_to((ROOT / 'visar' / room).resolve()).with_suffix('').parts)}": file
    for room in ROOMS
    for file in (ROOT / "visar" / room).resolve().rglob("*.py")
    if file.name != "__init__.py"
}


def imported(file: Path) -> set[str]:
    """Rooms that a file imports from anywhere in it: inside functions and for types too."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}".split(".") for node in nodes if node.module for alias in node.names]
    return {name[1] for name in names if name[0] == "visar" and len(name) > 1 and name[1] in ROOMS}


def test_rooms_import_only_what_stands_before_them():
    upwards = []
    for rank, room in enumerate(ROOMS):
        for file in (ROOT / "visar" / room).resolve().rglob("*.py"):
            upwards += [
                f"{file.relative_to(ROOT)} -> {other}" for other in imported(file) if ROOMS.index(other) > rank
            ]
    assert not upwards, upwards


def test_root_has_no_loose_modules():
    assert sorted(file.name for file in (ROOT / "visar").glob("*.py")) == ["__init__.py", "__main__.py"]


def modules(file: Path) -> set[str]:
    """Modules of visar that a file imports from anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "visar":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in FILES} or {node.module}
    return found & FILES.keys()


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: modules(file) - {name} for name, file in FILES.items()}
    assert sum(map(len, graph.values())) > 500
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
