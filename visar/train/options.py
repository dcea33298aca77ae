"""What all training recipes share: options of the run itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visar.train.schedule import Schedule, check_schedule

# Options that do not change what a step computes, so a run may go on with others.
FREE_OPTIONS = frozenset(
    {"out", "log_every", "sample_every", "save_every", "keep_checkpoints", "resume", "max_minutes", "tracker"}
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the loop, the optimiser's schedule and the folder of results."""

    out: Path
    """Folder of the run: model/ (what it is for), metrics.jsonl, samples/, checkpoints/, logs/ (TensorBoard)."""
    initial: Path | None = None
    """Folder of a model of the same architecture to start from (a run's model/), for fine-tuning."""
    steps: int = 4000
    """Optimiser steps; schedules depend on it."""
    batch_size: int = 128
    """Images of a step, over all processes."""
    gradient_accumulation: int = 1
    """Parts that a process cuts its share of a step into, to need less memory."""
    learning_rate: float = 4e-4
    """Of AdamW, at its highest."""
    schedule: Schedule = "cosine"
    """After the warm-up: constant; cosine; or wsd: constant, then linear over the last decay_steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    decay_steps: int = 0
    """Steps in which it falls at the end, for schedule wsd."""
    final_fraction: float = 0.0
    """Share of the learning rate that is left at the end."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 = off."""
    ema_decay: float = 0.999
    """Of the moving average of weights, which is what is measured and saved; lower in early steps; 0 = no average."""
    seed: int = 0
    """Of everything random in the run."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """bf16: matrix products and convolutions in bfloat16; weights stay float32."""
    compile: bool = False
    """torch.compile of the trained module: about a minute at the start, faster steps on a GPU."""
    tf32: bool = True
    """TF32 for what stays float32 on a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU of the process, if there is one."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl, which hold means since the line before."""
    validate_every: int = 500
    """Steps between validations; 0 = at the end only."""
    sample_every: int = 1000
    """Steps between sheets of pictures; 0 = at the end only."""
    save_every: int = 1000
    """Steps between checkpoints; 0 = at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best model by validation is kept in model/ besides."""
    resume: Literal["auto", "restart"] = "auto"
    """auto: go on from the newest checkpoint in `out`, if there is one. restart: remove them and begin anew."""
    max_minutes: float = 0.0
    """Stop with a checkpoint after this time, to be gone on from; 0 = no limit."""
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    """Where curves and sheets go besides the folder."""


def check_run_options(options: RunOptions, num_processes: int) -> None:
    """Checks the options that all recipes share.

    Raises:
        ValueError: an option outside its range.
    """
    for name in ("steps", "batch_size", "gradient_accumulation", "log_every", "keep_checkpoints"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)}; it must be at least 1")
    for name in ("validate_every", "sample_every", "save_every", "clip_norm", "max_minutes", "seed"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} {getattr(options, name)}; it must not be negative")
    if not options.learning_rate > 0:
        raise ValueError(f"learning_rate {options.learning_rate}; it must be above 0")
    if not 0.0 <= options.ema_decay < 1.0:
        raise ValueError(f"ema_decay {options.ema_decay}; allowed: 0 <= ema_decay < 1")
    parts = num_processes * options.gradient_accumulation
    if options.batch_size % parts:
        raise ValueError(
            f"batch_size {options.batch_size} must be a multiple of {num_processes} processes x "
            f"{options.gradient_accumulation} accumulated parts"
        )
    check_schedule(options.schedule, options.steps, options.warmup_steps, options.decay_steps, options.final_fraction)
