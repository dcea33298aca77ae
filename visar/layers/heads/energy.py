"""A head trained by the energy score: a token in one pass of a network from noise, without a likelihood or a chain.

Source: EAR, arXiv 2505.07812, shaochenze/EAR@9256a9f. For a token y and two draws a and b the loss is

    |a - y| + |b - y| - tau |a - b|,

a strictly proper score at tau = 1: its least mean is at the distribution of y. The network is that of a diffusion
head with the roles changed: it reads the hidden vector, and noise is its condition.

Differs from the paper: the noise has as many dimensions as the token instead of 64, and the temperature scales it.
There is no density and no transition with noise, so exact speculation refuses this head.

B images, R rows (2B when guided), L tokens, C numbers of a token, D hidden size.
"""

import torch
from torch import Tensor, nn

from visar.layers.diffusion_head import DiffusionHead
from visar.layers.heads.chain import Head, NoiseSource, guided


class EnergyHead(Head):
    """Tokens from uniform noise in one pass. EAR, arXiv 2505.07812.

    Its chain is one transition without noise from the first point, which a temperature scales; guidance is linear in
    the hidden vectors.

    Args:
        channels: C.
        hidden_size: D of the transformer.
        width, depth: of the network, see `DiffusionHead`.
        tau: weight of the distance of two draws in the loss, in (0, 1] (EAR: 1.0, then 0.99); below 1 draws lie
            closer.

    Raises:
        ValueError: tau out of range.
    """

    steps = 1

    def __init__(self, channels: int, hidden_size: int, width: int = 1024, depth: int = 3, tau: float = 1.0) -> None:
        super().__init__()
        if not 0 < tau <= 1:
            raise ValueError(f"tau {tau}; needed: above 0, up to 1")
        self.channels, self.tau = channels, tau
        self.net = DiffusionHead(hidden_size, channels, width, depth, out_channels=channels)

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        """Weights of `DiffusionHead`, but with gates and an output that are not 0: there both draws of the loss would
        be one point, where the distance between them has no gradient."""
        self.net.reset_parameters(generator)
        for name, parameter in self.net.named_parameters():
            if name.endswith("weight") and ("adaLN_modulation" in name or name.startswith("final_layer.linear")):
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def check_steps(self, steps: int | None, solver: str | None = None) -> int:
        self.check_solver(solver)
        if steps not in (None, 1):
            raise ValueError(f"head_steps {steps}; an energy head draws a token in 1")
        return 1

    def deviations(self, steps: int) -> list[float] | None:
        return [0.0]

    def token(self, noise: Tensor, features: Tensor) -> Tensor:
        """Tokens float32 [..., C] of standard normal noise, which becomes uniform in (-0.5, 0.5)."""
        uniform = torch.special.ndtr(noise.float()) - 0.5
        time = torch.zeros((1,) * (noise.ndim - 1), device=noise.device)
        return self.net(features, time, uniform).float()

    def transition(
        self,
        x_BLC: Tensor,
        index: int,
        features_RLD: Tensor,
        *,
        steps: int | None = None,
        scale_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        return self.token(x_BLC, guided(features_RLD, scale_BL)), 0.0

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
        self.check_steps(steps, solver)
        return self.transition(temperature * self.start(noise(0)), 0, features_RLD, scale_BL=scale_BL)[0]

    def loss(self, features_LD: Tensor, tokens_LC: Tensor, random: torch.Generator) -> Tensor:
        """The energy score of two draws, float32 [...]; it may be negative."""
        shape, device = tokens_LC.shape, tokens_LC.device
        first, second = (
            self.token(torch.randn(shape, generator=random, device=device), features_LD) for _ in range(2)
        )
        first_far, second_far, apart = (
            torch.linalg.vector_norm(difference, dim=-1)
            for difference in (first - tokens_LC.float(), second - tokens_LC.float(), first - second)
        )
        return first_far + second_far - self.tau * apart
