"""The contract of heads that draw continuous tokens: a chain of Gaussian transitions from noise to a token.

A head reads a transformer's hidden vector of a token and knows the distribution of that token. Its draw is a chain
x_0 -> x_1 ... -> x_T, the first point standard normal, every other one Gaussian around a mean that the point before
gives: ancestral diffusion has hundreds of transitions, an ODE solver has transitions without noise, a mixture has one.
Samplers that compare two heads (speculation) walk the chains themselves.

B images, R rows (2B when guided, conditional ones first), L tokens, C numbers of a token, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

NoiseSource = Callable[[int], Tensor]
"""Standard normal float32 [B, L, C] number k of the tokens of a call: 0 starts the chain, k moves it the k-th time."""


class Head(nn.Module, ABC):
    """Draws tokens given hidden vectors, and knows their loss.

    Attributes:
        channels: C.
        steps: transitions of a draw where a call does not say.
        solvers: names of the ways to walk its chain, of which a draw may choose one; the first is its own.
        silent_solvers: those of them that add no noise.
        noisy_end: whether a draw's last transition adds its noise. Exact speculation needs it.
    """

    channels: int
    steps: int
    solvers: tuple[str, ...] = ()
    silent_solvers: tuple[str, ...] = ()
    noisy_end = True

    def check_solver(self, solver: str | None) -> None:
        """Checks that a chain can be walked by this solver; None is the head's own.

        Raises:
            ValueError: it is not defined for the head.
        """
        if solver is not None and solver not in self.solvers:
            allowed = (
                f"choose {', '.join(self.solvers)}" if self.solvers else "it draws a token in one way: leave it out"
            )
            raise ValueError(f"head_solver {solver!r} is not defined for a {type(self).__name__}; {allowed}")

    def check_steps(self, steps: int | None, solver: str | None = None) -> int:
        """Transitions of a chain that a solver walks.

        Raises:
            ValueError: fewer than 1, a number that the head does not have, or another head's solver.
        """
        self.check_solver(solver)
        count = self.steps if steps is None else steps
        if count < 1:
            raise ValueError(f"head_steps {count}; needed: >= 1")
        return count

    def deviations(self, steps: int) -> list[float] | None:
        """Standard deviation of every transition where it is the head's alone; None where it depends on weights."""
        return None

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None) -> None:
        """Weights to train from."""

    def start(self, noise_BLC: Tensor) -> Tensor:
        """First point of the chain."""
        return noise_BLC

    @abstractmethod
    def transition(
        self,
        x_BLC: Tensor,
        index: int,
        features_RLD: Tensor,
        *,
        steps: int | None = None,
        scale_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        """Mean float32 [B, L, C] and standard deviation of the next point.

        Args:
            x_BLC: float32, the chain so far.
            index: 0 ... steps - 1, the number of the transition.
            features_RLD: hidden vectors.
            steps: transitions of the chain; None = `steps`.
            scale_BL: float32 guidance of every token in the "interpolate" convention, for a doubled batch.

        Returns: the deviation as one number where it is the head's alone, the same whatever the weights are.
        """

    @abstractmethod
    def loss(self, features_LD: Tensor, tokens_LC: Tensor, random: torch.Generator) -> Tensor:
        """Loss of every token, float32 [...].

        Args:
            features_LD: hidden vectors [..., D].
            tokens_LC: float32 [..., C].
            random: on the device; what is drawn for it comes from it.
        """

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
        """Tokens float32 [B, L, C].

        Args:
            features_RLD: hidden vectors.
            noise: see `NoiseSource`.
            steps, scale_BL: see `transition`.
            temperature: factor of the noise of the transitions, not of the first point.
            solver: one of `solvers`; None = the head's own.
        """
        count = self.check_steps(steps, solver)
        move = partial(self.transition, steps=steps, scale_BL=scale_BL)
        return self._walk(features_RLD, noise, count, temperature, move)

    def _walk(
        self, features_RLD: Tensor, noise: NoiseSource, count: int, temperature: float, move: Callable[..., Any]
    ) -> Tensor:
        """The end of a chain whose transitions are `move(point, index, features) -> mean, deviation`."""
        x_BLC = self.start(noise(0))
        for index in range(count):
            x_BLC, deviation = move(x_BLC, index, features_RLD)
            silent = isinstance(deviation, float) and deviation == 0.0
            if not silent and (self.noisy_end or index < count - 1):
                x_BLC = x_BLC + temperature * deviation * noise(index + 1)
        return x_BLC


def guided(output_RLX: Tensor, scale_BL: Tensor | None) -> Tensor:
    """Output float32 [B, L, X] of the doubled batch's, or of the plain one's where nothing is guided."""
    if scale_BL is None:
        return output_RLX.float()
    conditional, null = output_RLX.float().chunk(2)
    return null + (conditional - null) * scale_BL[..., None]


def doubled(x_BLC: Tensor, scale_BL: Tensor | None) -> Tensor:
    """Points for a network that reads R rows."""
    return x_BLC if scale_BL is None else torch.cat([x_BLC, x_BLC])
