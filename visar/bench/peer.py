"""Timing a peer's own code: a process of its own, in turns with ours.

The user writes FOLDER/visar_peer.py; nothing of a peer comes with visar. The process answers lines of its standard
input with lines of JSON, see visar/bench/peer_process.py.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visar.bench.timing import Timing

FILE_NAME = "visar_peer.py"


class Peer:
    """A running peer; a context manager that ends the process.

    Args:
        folder: with visar_peer.py.
        arguments: arguments of its `load`: preset, batch, dtype ("bfloat16" or "float32"), guidance_scale, top_k.

    Attributes:
        product: "tokens" or "images", what a call of it makes.
        load_s: seconds that its `load` took.

    Raises:
        ValueError: no such file, or it fails or ends; the message holds what it printed last.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        file = folder / FILE_NAME
        if not file.is_file():
            raise ValueError(
                f"no {FILE_NAME} in {folder}; it needs `def load(preset, batch, dtype, guidance_scale, top_k)` that "
                "returns a function making one batch"
            )
        self._file = file
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        command = [sys.executable, "-m", "visar.bench.peer_process", str(file.absolute()), json.dumps(arguments)]
        # The process finds this visar, also where it runs from a checkout.
        paths = [str(Path(__file__).parent.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        try:
            ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_s, self.product = float(ready["load_s"]), str(ready["product"])

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise ValueError(f"{self._file} ended with status {status}{self._last_lines()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self._file} failed: {answer['error']}{self._last_lines()}")
        return answer

    def _last_lines(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()[-8:]
        return "".join(f"\n  {line}" for line in lines)

    def run(self) -> float:
        """Makes one batch; its seconds, device work included.

        Raises:
            ValueError: it fails or ends.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ValueError(f"{self._file} ended with status {self._process.wait()}{self._last_lines()}") from error
        return float(self._answer()["seconds"])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], runs: int) -> tuple[Timing, Timing]:
    """Times of both, taken A B A B after two calls each that are not counted."""
    for _ in range(2):
        ours()
        theirs()
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return Timing(tuple(pair[0] for pair in pairs)), Timing(tuple(pair[1] for pair in pairs))
