"""How a decoding loop runs: eagerly, or as CUDA graphs; samplers are written once for both.

A sampler's loop is a sequence of steps whose tensors live in a session: allocated once, changed in place. On a GPU
the first step of a kind runs eagerly (which also warms its kernels up), the second is captured and then
replayed, and all later ones are replays: one launch per step, no work for the host. Sessions are kept between calls of
the same model, batch and settings, so capture is paid once.

A family fits in by naming the kinds of its steps: a raster generator has one kind for all its tokens, a next-scale
generator one kind per scale, a sampler that verifies windows one kind per size of the window.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from visar.kernels.finite import watched
from visar.kernels.mode import active


def places(model: Any) -> int:
    """A number that tells where a model's weights are: it changes when one of them is moved or cast."""
    return hash(tuple(parameter.data_ptr() for parameter in model.parameters()))


def check_inference(model: Any) -> None:
    """Checks that a model has no dropout that is active.

    Raises:
        ValueError: it is in training mode, and has dropout.
    """
    if not getattr(model, "training", False):
        return
    for layer in model.modules():
        rates = [getattr(layer, name, 0.0) for name in ("dropout", "drop_path")]
        rates.append(layer.p if isinstance(layer, nn.Dropout) else 0.0)
        if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
            raise ValueError(f"{type(model).__name__} is in training mode and drops values: call eval() first")


class Session:
    """Static buffers and captured steps of one model, batch and settings.

    Attributes:
        state: the generator's decoding state, kept for the next call; None at first.
        weights: where the model's weights were when the first step ran; None before that.
        invalid_1: int32 [1], 1 once logits were not finite; None for a session that does not watch.
    """

    def __init__(self, capture: bool, model: Any = None, device: torch.device | None = None) -> None:
        self.state: Any = None
        self.invalid_1 = None if device is None else torch.zeros(1, dtype=torch.int32, device=device)
        self.weights: int | None = None
        self._model = None if model is None else weakref.ref(model)
        self._capture = capture
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def static(self, name: str, value: Tensor) -> Tensor:
        """The session's static buffer of that name, with `value` copied in; captured steps may read it."""
        if name not in self._tensors:
            self._tensors[name] = value.clone()
        else:
            self._tensors[name].copy_(value)
        return self._tensors[name]

    def buffer(self, name: str) -> Tensor:
        """The static buffer of that name, as it is."""
        return self._tensors[name]

    def serves(self, model: Any) -> bool:
        """Whether this session is the model's, and its weights still are where the steps read them.

        They are looked at when the first step runs, because starting to decode may lay them out anew.
        """
        return self._model is not None and self._model() is model and self.weights == places(model)

    def run(self, step: Callable[[], None], kind: Hashable = "step") -> None:
        """Runs a step that reads and writes tensors of this session only; steps of one kind do the same work."""
        if self.weights is None and self._model is not None:
            self.weights = places(self._model())
        if kind in self._graphs:
            self._graphs[kind].replay()
            return
        with watched(self.invalid_1):
            if not self._capture or kind not in self._seen:
                self._seen.add(kind)
                step()
                return
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step()
        self._pool = self._pool or graph.pool()
        self._graphs[kind] = graph
        graph.replay()

    def check_finite(self) -> None:
        """Checks that all logits that tokens were drawn from were finite; waits for the device.

        Raises:
            ValueError: some were not.
        """
        check_finite(self.invalid_1)


def check_finite(invalid_1: Tensor | None) -> None:
    """Checks a session's flag `invalid_1`; waits for the device, and raises what `Session.check_finite` does."""
    if invalid_1 is not None and bool(invalid_1):
        raise ValueError(
            "logits are not finite: the model's weights hold NaN or overflow in its dtype (try float32), or the "
            "guidance scale or the temperature is too extreme"
        )


class Runtime:
    """Opens sessions, and keeps the latest few.

    Args:
        capture: capture steps as CUDA graphs where the model is on a GPU; elsewhere steps always run eagerly.
        max_sessions: sessions kept; the one unused for longest is freed first.
    """

    def __init__(self, capture: bool = True, max_sessions: int = 4) -> None:
        self.capture = capture
        self.max_sessions = max_sessions
        self._sessions: OrderedDict[Hashable, Session] = OrderedDict()

    def session(self, model: Any, device: torch.device, key: Hashable) -> Session:
        """The session of this model and key (batch, guided or not, every setting that changes a step's work).

        A model whose weights were moved or cast gets a new one. On a CPU nothing is captured and nothing is kept.

        Raises:
            ValueError: the model is in training mode, and has dropout.
        """
        check_inference(model)
        if not (self.capture and device.type == "cuda"):
            return Session(capture=False, device=device)
        full_key = (id(model), str(device), active(), key)
        session = self._sessions.pop(full_key, None)
        if session is None or not session.serves(model):
            session = Session(capture=True, model=model, device=device)
        if session.invalid_1 is not None:
            session.invalid_1.zero_()
        self._sessions[full_key] = session
        while len(self._sessions) > self.max_sessions:
            self._sessions.popitem(last=False)
        return session

    def clear(self) -> None:
        """Frees all graphs, caches and static buffers."""
        self._sessions.clear()


EAGER = Runtime(capture=False)
"""Runs every step eagerly."""
