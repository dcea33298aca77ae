"""Noise levels of a diffusion head: the cosine schedule of 1000 levels, and chains of fewer.

Source: arXiv 2102.09672; respacing as in MAR, LTH14/mar@fe470ac.
"""

import itertools
import math
from functools import lru_cache

import numpy as np

TRAIN_STEPS = 1000
_LARGEST_BETA = 0.999


class Schedule:
    """A respaced chain: float64 arrays [T] by the index of the noise level, 0 the cleanest.

    Attributes:
        times: which of the 1000 training levels they are; the network is told these.
        betas, alphas_bar: of the respaced chain.
        posterior_variance, posterior_log_variance: of q(x_{t-1} | x_t, x_0); the first logarithm is the second one's,
            because that variance is 0.
        of_x0, of_xt: coefficients of the posterior's mean.
    """

    def __init__(self, times: list[int]) -> None:
        bar = [math.cos((i / TRAIN_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(TRAIN_STEPS + 1)]
        betas = np.array([min(1 - end / begin, _LARGEST_BETA) for begin, end in itertools.pairwise(bar)])
        self.times = times
        self.alphas_bar = np.cumprod(1.0 - betas)[times]
        before = np.append(1.0, self.alphas_bar[:-1])
        self.betas = 1.0 - self.alphas_bar / before
        self.posterior_variance = self.betas * (1.0 - before) / (1.0 - self.alphas_bar)
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1:2], self.posterior_variance[1:]))
        self.of_x0 = self.betas * np.sqrt(before) / (1.0 - self.alphas_bar)
        self.of_xt = (1.0 - before) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_bar)


def spread_times(count: int) -> list[int]:
    """`count` of the 1000 training levels, both ends among them, as evenly as whole numbers allow (MAR's "100")."""
    stride = (TRAIN_STEPS - 1) / (count - 1)
    return [round(stride * i) for i in range(count)]


def strided_times(count: int) -> list[int]:
    """Levels 0, n, 2 n ... of a whole stride n; the last one is left out (MAR's "ddimN").

    Raises:
        ValueError: no stride gives as many.
    """
    for stride in range(1, TRAIN_STEPS):
        if len(range(0, TRAIN_STEPS, stride)) == count:
            return list(range(0, TRAIN_STEPS, stride))
    raise ValueError(f"head_steps {count}; no whole stride over {TRAIN_STEPS} levels gives as many")


@lru_cache(maxsize=32)
def schedule(count: int, strided: bool = False) -> Schedule:
    """The respaced chain of so many levels."""
    return Schedule(strided_times(count) if strided else spread_times(count))
