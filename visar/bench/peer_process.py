"""The process of a peer: `python -m visar.bench.peer_process FILE ARGUMENTS`, started by visar/bench/peer.py.

It imports FILE, calls its `load` with the arguments (a JSON object) and writes {"load_s": ..., "product": ...} to
standard output; then answers every line "run" with {"seconds": ...}, or anything that goes wrong with {"error": ...}.
What the peer itself prints goes to standard error.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

PRODUCTS = ("tokens", "images")


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _seconds(call: Callable[[], object]) -> tuple[float, Any]:
    _wait()
    begun = time.perf_counter()
    result = call()
    _wait()
    return time.perf_counter() - begun, result


def serve(file: Path, arguments: dict[str, Any], requests: TextIO, answers: TextIO) -> int:
    """Answers requests until there are no more; returns the exit status."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(f"{json.dumps(content)}\n")
        answers.flush()

    try:
        sys.path.insert(0, str(file.parent))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        product = getattr(module, "PRODUCT", "images")
        if product not in PRODUCTS:
            raise ValueError(f"PRODUCT {product!r}; choose one of {', '.join(PRODUCTS)}")
        load_s, make = _seconds(lambda: module.load(**arguments))
        answer({"load_s": load_s, "product": product})
        for line in requests:
            if line.strip() == "run":
                answer({"seconds": _seconds(make)[0]})
    except Exception as error:  # the peer's code may raise anything, and the other side has to hear of it
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.exit(serve(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.stdin, own_output))
