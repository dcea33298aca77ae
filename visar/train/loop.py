"""The training loop of all recipes: optimiser steps, moving average, logs, images, checkpoints, exact resume.

A run that is killed resumes from its newest checkpoint and computes the same numbers as one that was not: all
randomness is a function of the step (visar/train/randomness.py), so a checkpoint is weights, their average,
optimisers, the step, the best validation and the sums of the log line in progress. Several processes are started by
`accelerate launch` or `torchrun`; each takes its share of every batch.

The host waits for the device only at log lines, validations, images and checkpoints.
"""

import contextlib
import logging
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from visar.io.files import check_folder_output, locked, replaced_folder, restore_folder, writing
from visar.train.checkpoint import CheckpointStore, check_same_options, options_to_json
from visar.train.log import RunLog, Sheet
from visar.train.memory import activation_bytes, checkpoint_blocks, sentence, state_bytes
from visar.train.options import FREE_OPTIONS
from visar.train.run import Averages, Part, Run, fast_math

logger = logging.getLogger(__name__)

# Seconds from which on it is worth saying, on a CPU, how long a run takes.
_LONG_RUN = 120.0


@dataclass(frozen=True)
class TrainResult:
    """How a call ended.

    Attributes:
        out: folder of the run.
        steps: optimiser steps done since its beginning.
        finished: False if the time limit or a signal stopped it.
        best: best value of the validation metric that models are chosen by; None without a validation.
        stopped_by: number of the signal that stopped it; None if none did.
    """

    out: Path
    steps: int
    finished: bool
    best: float | None
    stopped_by: int | None = None


class StopRequest:
    """Whether SIGINT (Ctrl-C) or SIGTERM (a scheduler's notice) asks a run to stop.

    Attributes:
        number: number of the signal; None before one arrives.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def _ask(self, number: int, frame: object) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        name = signal.Signals(number).name
        logger.warning("%s: a checkpoint will be written after this step (once more: stop at once)", name)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Region in which the first signal only asks and the second interrupts; handlers are put back after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Task(ABC):
    """What a recipe gives to the loop.

    Attributes:
        parts: trained modules by name; "model" is the one that is averaged and saved.
        select: name of the validation metric that the saved model is chosen by.
        higher_is_better: direction of `select`.
    """

    parts: dict[str, Part]
    select: str
    higher_is_better: bool

    @abstractmethod
    def step(self, step: int) -> dict[str, Tensor]:
        """Runs optimiser steps of the parts; returns scalars to be averaged, left on the device."""

    @abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Measures averaged weights; called in the main process only."""

    @abstractmethod
    def sheets(self, model: nn.Module) -> dict[str, Sheet]:
        """Images by name, made with averaged weights; called in the main process only."""

    @abstractmethod
    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes averaged weights in the form that `visar.load` reads."""

    def rehearse(self, rows: int) -> list[Callable[[], Tensor]]:
        """Losses of so many made-up rows, those whose backward passes a step runs one after the other; none where a
        run does not say how much memory it takes."""
        return []

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """State beyond weights and optimisers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the state back."""


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves averaged weights towards the model's; buffers are copied.

    The arithmetic is that of torch.optim.swa_utils; its AveragedModel would wait for the device in every step.
    """
    get_ema_multi_avg_fn(decay)(list(averaged.parameters()), list(model.parameters()), 0)
    for buffer, source in zip(averaged.buffers(), model.buffers(), strict=True):
        buffer.copy_(source)


def check_finite(values: dict[str, float], step: int) -> None:
    """Checks means of losses.

    Raises:
        ValueError: one is infinite or not a number; all of them are named.
    """
    wrong = [name for name, value in values.items() if not abs(value) < float("inf")]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} not finite in the steps up to {step}: a smaller learning_rate, longer warmup_steps "
            "or mixed_precision no may help; the newest checkpoint is from before"
        )


class Loop:
    """Runs a task from its newest checkpoint to its last step, or to the time limit.

    Args:
        run: this process.
        task: the recipe.

    Raises:
        ValueError: the folder holds a run with other options, or a damaged one.
    """

    def __init__(self, run: Run, task: Task) -> None:
        self.run, self.task, self.options = run, task, run.options
        self.folder = run.options.out
        self.stop = StopRequest()
        self.store = CheckpointStore(self.folder / "checkpoints", run.options.keep_checkpoints)
        self.averages = Averages()
        self.best: float | None = None
        # Of the bare module: a compiled or distributed one would give other names.
        self.ema = deepcopy(task.parts["model"].module).requires_grad_(False).eval()
        self.begin = self._resume()
        if run.options.gradient_checkpointing:
            checkpoint_blocks(part.module for part in task.parts.values())
        if run.is_main:
            self._say_how_much_memory()
        if run.options.compile:
            task.parts["model"].module.compile()
        for part in task.parts.values():
            if run.accelerator.num_processes > 1:
                part.call = run.accelerator.prepare_model(part.module)
        self.log = RunLog(run.options, run.accelerator, self.begin)
        self.window_begin, self.window_steps = time.perf_counter(), 0

    # ------------------------------------------------------------------------------------------------- checkpoints
    def _resume(self) -> int:
        if self.run.is_main:
            self.store.remove_parts()
            restore_folder(self.folder / "model")
            if self.options.resume == "restart":
                self.store.clear()
        self.run.accelerator.wait_for_everyone()
        steps = self.store.steps()
        if not steps:
            return 0
        check_same_options(self.store.config(steps[-1]), self.options, FREE_OPTIONS, self.folder)
        state = self.store.load(steps[-1])
        try:
            self._take(state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise self.store.misfit(steps[-1], error) from error
        if self.run.is_main:
            logger.warning("resuming %s after step %d of %d", self.folder, state["step"], self.options.steps)
        return state["step"]

    def _take(self, state: dict[str, Any]) -> None:
        for name, part in self.task.parts.items():
            part.module.load_state_dict(state["parts"][name]["module"])
            for optimizer, saved in zip(part.optimizers, state["parts"][name]["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])
        self.task.load_state_dict(state["task"])
        self.averages.load_state_dict(state["averages"], self.run.device)
        self.best = state["best"]

    def _save(self, step: int) -> None:
        if self.run.is_main:
            check_finite({name: float(value) for name, value in self.averages.means().items()}, step)
            self.store.save(
                step,
                {
                    "step": step,
                    "best": self.best,
                    "parts": {
                        name: {
                            "module": part.module.state_dict(),
                            "optimizers": [optimizer.state_dict() for optimizer in part.optimizers],
                        }
                        for name, part in self.task.parts.items()
                    },
                    "ema": self.ema.state_dict(),
                    "task": self.task.state_dict(),
                    "averages": self.averages.state_dict(),
                },
                options_to_json(self.options),
            )
        self.run.accelerator.wait_for_everyone()

    def _save_model(self) -> None:
        with replaced_folder(self.folder / "model") as temporary:
            self.task.save_model(self.ema, temporary)

    # -------------------------------------------------------------------------------------------------- measurements
    def _validate(self, step: int) -> None:
        if self.run.is_main:
            with torch.no_grad():
                values = self.task.validate(self.ema)
            self.log.write(step, {f"validation/{name}": value for name, value in values.items()})
            value = values[self.task.select]
            sign = 1.0 if self.task.higher_is_better else -1.0
            if self.best is None or sign * value > sign * self.best:
                self.best = value
                self._save_model()
        self.run.accelerator.wait_for_everyone()

    def _sheets(self, step: int) -> None:
        if self.run.is_main:
            with torch.no_grad():
                sheets = self.task.sheets(self.ema)
            for name, sheet in sheets.items():
                self.log.picture(step, name, sheet)
        self.run.accelerator.wait_for_everyone()

    def _log(self, step: int, deadline: float | None) -> bool:
        """Writes the means since the last line; returns whether to stop, agreed on by all processes."""
        averages = self.averages.means()
        late = self.stop.number is not None or (deadline is not None and time.monotonic() > deadline)
        flag = torch.tensor(float(late), dtype=torch.float64, device=self.run.device)
        reduced: Any = self.run.accelerator.reduce(torch.stack([*averages.values(), flag]), reduction="mean")
        both = reduced.tolist()
        values = {f"train/{name}": mean for name, mean in zip(averages, both, strict=False)}
        seconds = time.perf_counter() - self.window_begin
        check_finite(values, step)
        values["train/learning_rate"] = self.options.learning_rate * self.run.learning_rate_factor(step - 1)
        values["train/images_per_second"] = self.options.batch_size * self.window_steps / seconds
        self.log.write(step, values)
        self.log.progress(step, values)
        self.averages = Averages()
        self.window_begin, self.window_steps = time.perf_counter(), 0
        return both[-1] > 0

    # ------------------------------------------------------------------------------------------------------ the loop
    def _due(self, step: int, every: int) -> bool:
        return step == self.options.steps or (every > 0 and step % every == 0)

    def train(self) -> TrainResult:
        """Runs the loop.

        SIGINT and SIGTERM stop it with a checkpoint: after the step at hand in a run of one process, at the next line
        of the log in one of several, which have to agree.
        """
        with self.stop.listening(), writing(self.folder):
            try:
                return self._train()
            finally:
                self.log.close()

    def _train(self) -> TrainResult:
        options, task = self.options, self.task
        deadline = time.monotonic() + 60.0 * options.max_minutes if options.max_minutes else None
        step, late = self.begin, False
        model = task.parts["model"].module
        for part in task.parts.values():
            part.module.train()
        first_steps: list[float] = []
        while step < options.steps and not late:
            first_steps = self._say_how_long(step, first_steps)
            self.averages.add(task.step(step))
            update_average(self.ema, model, min(options.ema_decay, (1 + step) / (10 + step)))
            step += 1
            self.window_steps += 1
            if self._due(step, options.log_every):
                late = self._log(step, deadline)
            elif self.run.accelerator.num_processes == 1:
                late = self.stop.number is not None
            self.log.advance(step)
            begun = time.perf_counter()
            if self._due(step, options.validate_every):
                self._validate(step)
            if self._due(step, options.sample_every):
                self._sheets(step)
            if late or self._due(step, options.save_every):
                self._save(step)
            self.window_begin += time.perf_counter() - begun
        self.log.close()
        finished = step == options.steps
        if not finished and self.run.is_main:
            if self.best is None:
                self._save_model()
            asked = self.stop.number
            reason = f"after {options.max_minutes:g} minutes" if asked is None else f"by {signal.Signals(asked).name}"
            logger.warning(
                "stopped %s at step %d of %d: give the same command again to resume from there",
                reason,
                step,
                options.steps,
            )
        return TrainResult(self.folder, step, finished, self.best, None if finished else self.stop.number)

    def _say_how_much_memory(self) -> None:
        """Says how much memory the run takes, of tasks that can tell; before anything is compiled."""
        rows, parts = self.run.part_size, self.task.parts.values()
        if not self.task.rehearse(1):
            return
        outside = [tensor for part in parts for tensor in part.module.state_dict().values()]
        with self.run.autocast():
            activations = activation_bytes(self.task.rehearse, rows, outside)
        optimizers = [optimizer for part in parts for optimizer in part.optimizers]
        state = state_bytes([part.module for part in parts], optimizers, self.ema)
        logger.warning(sentence(state, activations, rows))

    def _say_how_long(self, step: int, begun: list[float]) -> list[float]:
        """Says on a CPU, once the second and third step have shown it, how long the rest takes if that is long.

        Args:
            step: about to begin.
            begun: when the steps before it began, at most four.
        """
        if self.run.device.type != "cpu" or not self.run.is_main or len(begun) == 4:
            return begun
        begun = [*begun, time.monotonic()]
        if len(begun) == 4:
            each = (begun[3] - begun[1]) / 2
            left = each * (self.options.steps - step)
            if left > _LONG_RUN:
                hours, minutes = divmod(round(left / 60), 60)
                logger.warning(
                    "on this CPU a step takes %.2g s, the %d steps that are left about %d h %d min; a smaller "
                    "batch_size, fewer steps or a GPU make it shorter",
                    each,
                    self.options.steps - step,
                    hours,
                    minutes,
                )
        return begun


def run_task(run: Run, task: Task) -> TrainResult:
    """Trains a task to its end or to the time limit, resuming from its newest checkpoint; see `Loop`."""
    folder = run.options.out
    check_folder_output(folder)
    with locked(folder) if run.is_main else contextlib.nullcontext(), fast_math(run.options.tf32):
        return Loop(run, task).train()
