"""Learning rates as functions of the step."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "wsd"]


def schedule_factor(
    step: int,
    *,
    schedule: Schedule,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_fraction: float = 0.0,
) -> float:
    """Factor on the learning rate in a step.

    All schedules rise linearly over the first `warmup_steps` (the first step has 1 / warmup_steps). Then "constant"
    stays at 1; "cosine" falls from 1 to `final_fraction` at the end of the run (arXiv 1608.03983 without restarts);
    "wsd" stays at 1 and falls linearly over the last `decay_steps` (arXiv 2405.18392).

    Args:
        step: 0 ... steps - 1.
        schedule: see above.
        steps: length of the run.
        warmup_steps, decay_steps: see above.
        final_fraction: factor that the fall ends at, in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    length = decay_steps if schedule == "wsd" else steps - warmup_steps
    progress = 1.0 - (steps - step) / length if step >= steps - length else 0.0
    remaining = 1.0 - progress if schedule == "wsd" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final_fraction + (1.0 - final_fraction) * remaining


def check_schedule(schedule: str, steps: int, warmup_steps: int, decay_steps: int, final_fraction: float) -> None:
    """Checks the settings of a schedule.

    Raises:
        ValueError: a setting outside its range, or a warm-up and a decay that overlap.
    """
    if schedule not in ("constant", "cosine", "wsd"):
        raise ValueError(f"schedule {schedule!r}; choose constant, cosine or wsd")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps {warmup_steps}; allowed: 0 ... steps = {steps}")
    if schedule == "wsd" and not 1 <= decay_steps <= steps - warmup_steps:
        raise ValueError(f"decay_steps {decay_steps}; schedule wsd allows 1 ... steps - warmup_steps")
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(f"final_fraction {final_fraction}; allowed: 0 ... 1")
