"""What a verification window costs: whether speculative samplers can pay for a model on this machine."""

from collections.abc import Callable
from typing import Any

import torch

from visar.bench.options import Bench
from visar.bench.subjects import Subject
from visar.bench.timing import Timing, seconds_of
from visar.core.guidance import Guidance
from visar.core.interface import Windowed
from visar.core.runtime import Session
from visar.samplers.filtering import draw, filtered_probs, sample_logits

REPLAYS = 20


def check_windows(subject: Subject, windows: tuple[int, ...]) -> None:
    """Checks that the model can be asked.

    Raises:
        ValueError: a model that verifies no windows, or one that does not fit behind half of the sequence.
    """
    if not isinstance(subject.generator, Windowed):
        raise ValueError(f"{subject.name} verifies no windows: --window is for raster models")
    most = subject.generator.num_tokens - subject.generator.num_tokens // 2
    wrong = [window for window in windows if not 1 <= window <= most]
    if wrong:
        raise ValueError(f"window {wrong[0]}; {subject.name} is timed at half of its sequence: 1 ... {most}")


def pass_at_half(subject: Subject, options: Bench, batch: int, window: int) -> Callable[[], None]:
    """One pass at half of the sequence that leaves the state as it was.

    window: slots of a `verify` pass, with a draw for every one of them; 0 is a step of ancestral sampling.
    """
    model, device = subject.generator, next(subject.generator.parameters()).device
    half, slots = model.num_tokens // 2, max(window, 1)
    ragged: dict[str, Any] = dict(ragged=True, window=window - 1) if window else {}
    state = model.start(model.example_condition(batch), Guidance(options.guidance_scale), **ragged)
    state.length.fill_(half)
    state.block = half
    draft_BK = torch.zeros(batch, slots - 1, dtype=torch.int64, device=device)
    uniform_BL = torch.full((batch, slots), 0.5, device=device)
    none_B = torch.zeros(batch, dtype=torch.int64, device=device)
    filters: dict[str, Any] = dict(temperature=1.0, top_k=options.top_k, top_p=options.top_p)

    def verify() -> None:
        p_BLV = filtered_probs(model.verify(state, draft_BK), **filters)
        model.commit(state, draw(p_BLV, uniform_BL), none_B)

    def step() -> None:
        model.append(state, sample_logits(model.predict(state), uniform_BL, **filters))
        state.length.sub_(1)

    return verify if window else step


@torch.no_grad()
def time_pass(
    subject: Subject, options: Bench, batch: int, window: int, capture: bool, device: torch.device
) -> Timing:
    """Seconds of one pass; see `pass_at_half`."""
    session = Session(capture=capture)
    step = pass_at_half(subject, options, batch, window)
    repeats = REPLAYS if device.type == "cuda" else 1

    def many() -> None:
        for _ in range(repeats):
            session.run(step)

    for _ in range(2):
        seconds_of(many, device)
    return Timing(tuple(seconds_of(many, device) / repeats for _ in range(options.runs)))


def window_rows(
    subject: Subject, options: Bench, batch: int, path: str, device: torch.device
) -> list[dict[str, float | int]]:
    """One row a window: its time, and the ratios to a window of 1 and to a step of ancestral sampling.

    A speculative sampler gains (tokens accepted a pass) / (ratio to the ancestral step), what drafting costs not
    counted.
    """
    capture = path == "captured"
    one_token = time_pass(subject, options, batch, 0, capture, device)
    times = {w: time_pass(subject, options, batch, w, capture, device) for w in dict.fromkeys((1, *options.window))}
    return [
        {
            "window": window,
            **times[window].row("pass"),
            "one_token_ms": one_token.median * 1e3,
            "of_window_1": times[window].median / times[1].median,
            "of_one_token": times[window].median / one_token.median,
        }
        for window in options.window
    ]
