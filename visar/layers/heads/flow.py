"""Flow head: a token is where a learned velocity leads from noise, given the hidden vector, in few steps.

Source: rectified flow, arXiv 2209.03003, as heads of autoregressive models: NextStep-1, arXiv 2508.10711 (velocity,
Euler-Maruyama), BitDance, arXiv 2602.14041 (prediction of x). Time runs from 1 (noise) to 0 (token), as in
visar/samplers/flow.py: x_t = (1 - t) x + t e.

C numbers of a token, D hidden size.
"""

import itertools
import math
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from visar.layers.diffusion_head import DiffusionHead
from visar.layers.heads.chain import Head, NoiseSource, doubled, guided

Solver = Literal["euler", "heun", "sde"]

_TIME_UNITS = 1000.0
_SMALLEST_TIME = 0.05


class FlowHead(Head):
    """Rectified flow with the network `DiffusionHead`; a draw may take another solver than the head's own.

    Args:
        channels: C.
        hidden_size: D.
        width, depth: of the network.
        prediction: what the network gives: "velocity" e - x, or "token" x (its velocity divides by max(t, 0.05)).
        solver: "euler"; "heun", two passes a transition but for the last; or "sde", Euler-Maruyama of the diffusion
            that has the same marginals, which adds noise in every transition: what exact speculation needs.
        steps: transitions of a draw.
        power: times are (1 - k / steps)^power; above 1 the end is finer, and the "sde" ends with less noise.
        time_mean, time_deviation: training draws t = sigmoid(N(mean, deviation)).

    Raises:
        ValueError: an unknown prediction or solver, or a number outside its range.
    """

    silent_solvers = ("euler", "heun")

    def __init__(
        self,
        channels: int,
        hidden_size: int,
        width: int = 1024,
        depth: int = 6,
        prediction: Literal["velocity", "token"] = "velocity",
        solver: Solver = "euler",
        steps: int = 20,
        power: float = 1.0,
        time_mean: float = 0.0,
        time_deviation: float = 1.0,
    ) -> None:
        super().__init__()
        if prediction not in ("velocity", "token"):
            raise ValueError(f"prediction {prediction!r}; choose velocity or token")
        if solver not in get_args(Solver):
            raise ValueError(f"solver {solver!r}; choose euler, heun or sde")
        if power < 1 or time_deviation <= 0:
            raise ValueError(f"power {power}, time_deviation {time_deviation}; needed: >= 1 and > 0")
        self.channels, self.prediction, self.solver, self.power = channels, prediction, solver, power
        self.time_mean, self.time_deviation, self.steps = time_mean, time_deviation, steps
        self.solvers = (solver, *(each for each in get_args(Solver) if each != solver))
        self.check_steps(steps)
        self.net = DiffusionHead(channels, hidden_size, width, depth)

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        self.net.reset_parameters(generator)

    def deviations(self, steps: int) -> list[float] | None:
        if self.solver != "sde":
            return [0.0] * steps
        return [
            math.sqrt(2.0 * time * (time - following)) for time, following in itertools.pairwise(self.times(steps))
        ]

    def times(self, steps: int) -> list[float]:
        """Times 1 ... 0 that the chain visits, one more than transitions."""
        return [(1.0 - k / steps) ** self.power for k in range(steps + 1)]

    def velocity(self, x_BLC: Tensor, time: float, features_RLD: Tensor, scale_BL: Tensor | None) -> Tensor:
        """Guided velocity float32 [B, L, C] at a time in (0, 1]."""
        rows = doubled(x_BLC, scale_BL)
        time_L = torch.full((1,) * (features_RLD.ndim - 1), time * _TIME_UNITS, device=x_BLC.device)
        output = self.net(rows, time_L, features_RLD).float()
        if self.prediction == "token":
            output = (rows - output) / max(time, _SMALLEST_TIME)
        return guided(output, scale_BL)

    def transition(
        self,
        x_BLC: Tensor,
        index: int,
        features_RLD: Tensor,
        *,
        steps: int | None = None,
        scale_BL: Tensor | None = None,
        solver: str | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        solver = self.solver if solver is None else solver
        times = self.times(self.check_steps(steps))
        time, following = times[index : index + 2]
        span = time - following
        velocity = self.velocity(x_BLC, time, features_RLD, scale_BL)
        if solver == "sde":
            # Reverse-time diffusion: the flow's drift, and the score -(x + (1 - t) v) / t with its noise.
            drift = velocity + x_BLC + (1.0 - time) * velocity
            return x_BLC - span * drift, math.sqrt(2.0 * time * span)
        moved_BLC = x_BLC - span * velocity
        if solver == "heun" and following > 0.0:
            second = self.velocity(moved_BLC, following, features_RLD, scale_BL)
            moved_BLC = x_BLC - span * (velocity + second) / 2.0
        return moved_BLC, 0.0

    def draw(
        self,
        features_RLD: Tensor,
        noise: NoiseSource,
        *,
        steps: int | None = None,
        temperature: float = 1.0,
        scale_BL: Tensor | None = None,
        solver: str | None = None,
    ) -> Tensor:
        count = self.check_steps(steps, solver)
        move: Any = partial(self.transition, steps=steps, scale_BL=scale_BL, solver=solver)
        return self._walk(features_RLD, noise, count, temperature, move)

    def loss(self, features_LD: Tensor, tokens_LC: Tensor, random: torch.Generator) -> Tensor:
        shape, device = tokens_LC.shape, tokens_LC.device
        normal_L = torch.randn(shape[:-1], generator=random, device=device)
        time_L = torch.sigmoid(self.time_mean + self.time_deviation * normal_L)
        noise_LC = torch.randn(shape, generator=random, device=device)
        noisy_LC = tokens_LC + time_L[..., None] * (noise_LC - tokens_LC)
        output = self.net(noisy_LC, time_L * _TIME_UNITS, features_LD).float()
        if self.prediction == "token":
            output = (noisy_LC - output) / time_L[..., None].clamp(min=_SMALLEST_TIME)
        return (output - (noise_LC - tokens_LC)).square().mean(-1)
