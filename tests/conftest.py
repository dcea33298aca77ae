"""What tests share: where parity fixtures are, where kernels run or are compiled, and which tests need a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

# Tests run in as many processes as there are cores; threads of their own would only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Parity:
    """One system's parity folder: config.json, checkpoint and expected values."""

    folder: Path

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    def checkpoint(self, name: str = "checkpoint.safetensors") -> dict[str, Tensor]:
        return {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_file(self.folder / name).items()
        }

    def manifests(self) -> list[Path]:
        return sorted(self.folder.glob("manifest-*.json"))


@pytest.fixture
def parity() -> Callable[[str], Parity]:
    """Parity folder of a system: in VISAR_PARITY_DIR, by default tests/fixtures/parity."""
    shipped = Path(__file__).parent / "fixtures" / "parity"
    root = Path(os.environ.get("VISAR_PARITY_DIR", shipped))

    def find(system: str) -> Parity:
        if root != shipped and not (root / system).is_dir():
            pytest.skip(f"{root} has no folder {system}")
        return Parity(root / system)

    return find


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton kernels run: a GPU, or a CPU with TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    from triton.runtime import interpreter

    original, splat = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_splat

    def index(self) -> int:
        return self.handle.data.item()

    def patch(tensor, *scope) -> None:
        original(tensor, *scope)
        # Loop bounds: Triton 3.5 and 3.6 convert arrays of one element in a way that NumPy 2.4 refuses.
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    def create_splat(self, block, scalar):
        # Comparisons of scalars are labelled with the type of what they compare; Triton 3.9 refuses such masks.
        if scalar.data.dtype == bool:
            scalar = interpreter.TensorHandle(scalar.data, interpreter.tl.int1)
        return splat(self, block, scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", create_splat)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    return torch.device("cpu")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """float32 everywhere, bfloat16 on a GPU (the interpreter has none)."""
    if request.param == "bfloat16" and device.type != "cuda":
        pytest.skip("bfloat16 needs a GPU")
    return getattr(torch, request.param)


@pytest.fixture(scope="session")
def hopper() -> Iterator[Callable[..., list[tuple[str, str]]]]:
    """Names and PTX of the kernels that a function launches, compiled for a Hopper GPU that need not be here.

    Takes a function of the test's own file, which makes CPU tensors and calls kernels with them, and its arguments.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    program = [sys.executable, str(Path(__file__).parent / "fixtures" / "compile_kernels.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, env=environment, text=True) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def compiled(launch: Callable[..., object], *arguments: object) -> list[tuple[str, str]]:
            requests.write(json.dumps([launch.__code__.co_filename, launch.__name__, arguments]) + "\n")
            requests.flush()
            answer = json.loads(answers.readline() or '{"error": "the compiler crashed"}')
            assert "error" not in answer, answer["error"]
            return answer["kernels"]

        yield compiled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; the last GPU result is in docs/results.md")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
