"""Diffusion head: a token is the end of a denoising chain that a small network walks, given the hidden vector.

Source: MAR, arXiv 2406.11838 section 3.2, LTH14/mar@fe470ac (schedule, respacing, learned range of variances, loss);
v-prediction: MMAR, arXiv 2410.10798 (from notes), and arXiv 2202.00512 section 4. Fixed variances: arXiv 2006.11239
section 3.2; exact speculation needs them, because two heads then have the same deviation.

C numbers of a token, D hidden size.
"""

import math
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from visar.layers.diffusion_head import DiffusionHead
from visar.layers.heads.chain import Head, NoiseSource, doubled, guided
from visar.layers.heads.schedule import TRAIN_STEPS, Schedule, schedule, strided_times
from visar.layers.heads.solvers import FlowSolver, flow_scheduler

Prediction = Literal["noise", "velocity"]
Variance = Literal["learned", "large", "small"]


class GaussianDiffusionHead(Head):
    """Ancestral diffusion with the network `DiffusionHead`. MAR, arXiv 2406.11838.

    Args:
        channels: C.
        hidden_size: D.
        width, depth: of the network.
        prediction: what the network gives: "noise" (as released) or "velocity" (less sensitive to rounding at the
            noisy end: no division by the square root of alpha-bar).
        variance: "learned" (as released: a share between the two others, in the logarithm), "large" (beta) or "small"
            (the posterior's).
        steps: transitions of a draw (MAR: 100). A draw may take the solvers "ddim" and "dpm" instead of the ancestral
            chain: see visar/layers/heads/solvers.py.
        strided: levels of a whole stride, without the noisiest (MAR's "ddimN" spacing).

    Raises:
        ValueError: an unknown prediction or variance, or steps outside 2 ... 1000.
    """

    solvers = ("ancestral", "ddim", "dpm")
    silent_solvers = ("ddim", "dpm")

    def __init__(
        self,
        channels: int,
        hidden_size: int,
        width: int = 1024,
        depth: int = 6,
        prediction: Prediction = "noise",
        variance: Variance = "learned",
        steps: int = 100,
        strided: bool = False,
    ) -> None:
        super().__init__()
        if prediction not in ("noise", "velocity"):
            raise ValueError(f"prediction {prediction!r}; choose noise or velocity")
        if variance not in ("learned", "large", "small"):
            raise ValueError(f"variance {variance!r}; choose learned, large or small")
        self.channels, self.prediction, self.variance, self.strided = channels, prediction, variance, strided
        self.steps = steps
        self.check_steps(steps)
        # As released, nothing is added at the end of a learned chain.
        self.noisy_end = variance != "learned"
        out_channels = 2 * channels if variance == "learned" else channels
        self.net = DiffusionHead(channels, hidden_size, width, depth, out_channels)
        self._tables: dict[torch.device, dict[str, Tensor]] = {}

    def check_steps(self, steps: int | None, solver: str | None = None) -> int:
        self.check_solver(solver)
        count = self.steps if steps is None else steps
        if not 2 <= count <= TRAIN_STEPS:  # one step would take pure noise for the cleanest level
            raise ValueError(f"head_steps {count}; needed: 2 ... {TRAIN_STEPS}")
        if self.strided and solver not in self.silent_solvers:
            strided_times(count)
        return count

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        self.net.reset_parameters(generator)

    def deviations(self, steps: int) -> list[float] | None:
        if self.variance == "learned":
            return None
        chain = schedule(self.check_steps(steps), self.strided)
        return [self._deviation(chain, level) for level in reversed(range(len(chain.times)))]

    def _deviation(self, chain: Schedule, level: int) -> float:
        """Of a fixed variance; at the clean end the two are taken alike (arXiv 2102.09672)."""
        if self.variance == "small" or level == 0:
            return math.exp(0.5 * float(chain.posterior_log_variance[level]))
        return float(chain.betas[level]) ** 0.5

    # -------------------------------------------------------------------------------------------------- one transition
    def predict(
        self, x_BLC: Tensor, time: float, features_RLD: Tensor, scale_BL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the network says of points at a level 0 ... 999: the guided prediction float32 [B, L, C], and for
        learned variances the share [B, L, C], which is the conditional half's own."""
        time_L = torch.full((1,) * (features_RLD.ndim - 1), time, device=x_BLC.device)  # one embedding for all
        output_RLX = self.net(doubled(x_BLC, scale_BL), time_L, features_RLD).float()
        if self.variance != "learned":
            return guided(output_RLX, scale_BL), None
        predicted, share = output_RLX.split(self.channels, dim=-1)
        return guided(predicted, scale_BL), share[: len(x_BLC)]

    def clean(self, x_BLC: Tensor, predicted_BLC: Tensor, alpha_bar: float | Tensor) -> Tensor:
        """x_0 of a point and the network's prediction."""
        if self.prediction == "noise":
            return x_BLC * alpha_bar**-0.5 - predicted_BLC * (1.0 / alpha_bar - 1.0) ** 0.5
        return x_BLC * alpha_bar**0.5 - predicted_BLC * (1.0 - alpha_bar) ** 0.5

    def log_variance(self, share: Tensor | None, log_small: float | Tensor, log_large: float | Tensor) -> Tensor:
        """Logarithm of a learned variance."""
        assert share is not None
        part = (share + 1.0) / 2.0
        return part * log_large + (1.0 - part) * log_small

    def transition(
        self,
        x_BLC: Tensor,
        index: int,
        features_RLD: Tensor,
        *,
        steps: int | None = None,
        scale_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        chain = schedule(self.check_steps(steps), self.strided)
        level = len(chain.times) - 1 - index
        predicted, share = self.predict(x_BLC, float(chain.times[level]), features_RLD, scale_BL)
        clean_BLC = self.clean(x_BLC, predicted, float(chain.alphas_bar[level]))
        mean_BLC = float(chain.of_x0[level]) * clean_BLC + float(chain.of_xt[level]) * x_BLC
        if self.variance == "learned":
            small, large = float(chain.posterior_log_variance[level]), math.log(chain.betas[level])
            return mean_BLC, torch.exp(0.5 * self.log_variance(share, small, large))
        return mean_BLC, self._deviation(chain, level)

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
        if solver not in self.silent_solvers:
            return super().draw(
                features_RLD, noise, steps=steps, temperature=temperature, scale_BL=scale_BL, solver=solver
            )
        scheduler = flow_scheduler(cast(FlowSolver, solver), self.prediction, self.check_steps(steps, solver))
        x_BLC = self.start(noise(0))
        for time in scheduler.timesteps.tolist():
            predicted, _ = self.predict(x_BLC, float(time), features_RLD, scale_BL)
            x_BLC = scheduler.step(predicted, time, x_BLC, return_dict=False)[0]
        return x_BLC

    # ------------------------------------------------------------------------------------------------------------ loss
    def _table(self, device: torch.device) -> dict[str, Tensor]:
        """Float32 [1000] tables of the training chain."""
        if device not in self._tables:
            chain = schedule(TRAIN_STEPS)
            arrays = dict(
                alphas_bar=chain.alphas_bar, of_x0=chain.of_x0, of_xt=chain.of_xt,
                small=chain.posterior_log_variance, large=np.log(chain.betas),
            )  # fmt: skip
            self._tables[device] = {
                name: torch.tensor(values, dtype=torch.float32, device=device) for name, values in arrays.items()
            }
        return self._tables[device]

    def loss(self, features_LD: Tensor, tokens_LC: Tensor, random: torch.Generator) -> Tensor:
        shape, device = tokens_LC.shape, tokens_LC.device
        time_L = torch.randint(TRAIN_STEPS, shape[:-1], generator=random, device=device)
        noise_LC = torch.randn(shape, generator=random, device=device)
        return self.loss_at(features_LD, tokens_LC, time_L, noise_LC)[0]

    def loss_at(
        self, features_LD: Tensor, tokens_LC: Tensor, time_L: Tensor, noise_LC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss at given levels and noise, its squared error, and for learned variances its variational part in bits.

        Args:
            features_LD, tokens_LC: as of `loss`.
            time_L: int64 [...] in 0 ... 999.
            noise_LC: standard normal.
        """
        values = {name: table[time_L][..., None] for name, table in self._table(tokens_LC.device).items()}
        alpha_bar = values["alphas_bar"]
        noisy_LC = alpha_bar.sqrt() * tokens_LC + (1.0 - alpha_bar).sqrt() * noise_LC
        output = self.net(noisy_LC, time_L, features_LD).float()
        predicted, share = (output, None) if self.variance != "learned" else output.split(self.channels, dim=-1)
        target = noise_LC
        if self.prediction == "velocity":
            target = alpha_bar.sqrt() * noise_LC - (1.0 - alpha_bar).sqrt() * tokens_LC
        square_L = (target - predicted).square().mean(-1)
        if share is None:
            return square_L, square_L, None
        clean_LC = self.clean(noisy_LC, predicted.detach(), alpha_bar)
        means = [values["of_x0"] * each + values["of_xt"] * noisy_LC for each in (tokens_LC, clean_LC)]
        log_variance = self.log_variance(share, values["small"], values["large"])
        divergence_L = normal_kl(means[0], values["small"], means[1], log_variance).mean(-1)
        likelihood_L = discretized_log_likelihood(tokens_LC, means[1], 0.5 * log_variance).mean(-1)
        bits_L = torch.where(time_L == 0, -likelihood_L, divergence_L) / math.log(2.0)
        return square_L + bits_L, square_L, bits_L


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """Divergence of Gaussians 1 from 2 by element, nats."""
    ratio = torch.exp(log_variance_1 - log_variance_2)
    return 0.5 * (
        log_variance_2 - log_variance_1 - 1.0 + ratio + (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    )


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log-probability of the interval of width 2 / 255 around x, by element; -1 and 1 take all beyond them.

    Source: arXiv 2006.11239 section 3.3, with the tanh approximation of the normal distribution's integral that the
    released code trains with.
    """

    def integral(value: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))

    inverse = torch.exp(-log_deviation)
    above, below = integral(inverse * (x - mean + 1.0 / 255.0)), integral(inverse * (x - mean - 1.0 / 255.0))
    inside = (above - below).clamp(min=1e-12).log()
    low, high = above.clamp(min=1e-12).log(), (1.0 - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inside))
