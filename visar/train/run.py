"""A process's place in a training run: device, random numbers, mixed precision, optimiser steps."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visar.train.options import OptimizerName, RunOptions, check_run_options
from visar.train.randomness import StepRandom
from visar.train.schedule import schedule_factor


@dataclass
class Part:
    """A trained module with its optimiser.

    Attributes:
        module: as it is saved.
        call: the same module behind gradient averaging over processes, if there are several; what a step calls.
        optimizers: optimizers of its parameters, each parameter in one of them.
        learning_rate: the peak learning rate.
    """

    module: Any
    call: Any
    optimizers: tuple[torch.optim.Optimizer, ...]
    learning_rate: float


def block_matrices(module: nn.Module) -> set[Tensor]:
    """Weights of the linear layers inside repeated blocks: what Muon is for, unlike embeddings and heads."""
    return {
        layer.weight
        for blocks in module.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear)
    }


class Averages:
    """Means of scalars since the last log line, each over the steps that gave it; summed on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Takes in the scalars of one step."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """Means by name, on the device."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """From a checkpoint."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])


class Run:
    """A process's place in a run: device, folder, random numbers, optimiser steps.

    Args:
        options: options of the run.

    Raises:
        ValueError: an option outside its range.
        ImportError: accelerate is not installed.
    """

    def __init__(self, options: RunOptions) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
        except ImportError as error:
            raise ImportError("training needs accelerate: pip install 'torch-visar[train]'") from error
        self.options = options
        # Autocast is ours (below), so that methods other than forward run in it too.
        self.accelerator = Accelerator(
            mixed_precision="no",
            cpu=options.device == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        check_run_options(options, self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        self.random = StepRandom(options.seed, self.accelerator.process_index, self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    @property
    def part_size(self) -> int:
        """Images of one micro-batch of this process."""
        return self.options.batch_size // (self.accelerator.num_processes * self.options.gradient_accumulation)

    def share(self, index: Tensor, part: int) -> Tensor:
        """This process's rows of a whole batch [batch_size, ...] for one micro-batch."""
        first = (self.accelerator.process_index * self.options.gradient_accumulation + part) * self.part_size
        return index[first : first + self.part_size]

    def own(self, index: Tensor) -> Tensor:
        """This process's rows of a whole batch: those of all its micro-batches, one after the other."""
        return torch.cat([self.share(index, part) for part in range(self.options.gradient_accumulation)])

    def autocast(self) -> torch.autocast:
        """The region of mixed precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.mixed_precision == "bf16")

    def add_part(
        self,
        module: nn.Module,
        learning_rate: float,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        optimizer: OptimizerName = "adamw",
    ) -> Part:
        """A module with its optimiser; weight decay on parameters of two axes and more (LlamaGen, arXiv 2406.06525).

        "muon": the matrices of the blocks by Muon (K. Jordan et al., 2024), with steps as large as AdamW's (arXiv
        2502.16982: 0.2 sqrt(longer side)), so that one learning rate serves both; everything else by AdamW.

        Raises:
            ValueError: no such optimiser.
        """
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer {optimizer!r}; choose adamw or muon")
        module.to(self.device)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        orthogonal = block_matrices(module) if optimizer == "muon" else set()
        matrices = [parameter for parameter in trained if parameter in orthogonal]
        others = [parameter for parameter in trained if parameter not in orthogonal]
        groups = [
            {"params": [parameter for parameter in others if parameter.ndim >= 2], "weight_decay": weight_decay},
            {"params": [parameter for parameter in others if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=betas,
            fused=self.device.type == "cuda",
        )
        if not matrices:
            return Part(module, module, (adamw,), learning_rate)
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return Part(module, module, (adamw, muon), learning_rate)

    def descend(
        self, part: Part, step: int, losses: Callable[[int], tuple[Tensor, dict[str, Tensor]]]
    ) -> dict[str, Tensor]:
        """One optimiser step on the mean loss of the micro-batches.

        Args:
            part: what is trained.
            step: number of the step.
            losses: function of a micro-batch's number that returns its loss, and scalars to be logged.

        Returns: means of the scalars, and the gradient's norm before clipping.
        """
        options, means = self.options, Averages()
        parts = options.gradient_accumulation
        for index in range(parts):
            last = index == parts - 1
            self.random.seed_layers(step, index)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(part.call):
                with self.autocast():
                    loss, scalars = losses(index)
                (loss / parts).backward()
            means.add(scalars)
        norm = nn.utils.clip_grad_norm_(part.module.parameters(), options.clip_norm or float("inf"), foreach=True)
        factor = self.learning_rate_factor(step)
        for optimizer in part.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = part.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {**means.means(), "gradient_norm": norm}

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the schedule in a step."""
        return schedule_factor(
            step,
            schedule=self.options.schedule,
            steps=self.options.steps,
            warmup_steps=self.options.warmup_steps,
            decay_steps=self.options.decay_steps,
            final_fraction=self.options.final_fraction,
        )


@contextlib.contextmanager
def fast_math(enabled: bool) -> Iterator[None]:
    """TF32 products and autotuned convolutions inside the region; flags are put back after it."""
    precision = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    before = (cudnn.allow_tf32, cudnn.benchmark)
    try:
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        cudnn.allow_tf32, cudnn.benchmark = enabled, True
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.benchmark = before
