"""Mean and covariance of features in float64, as running sums, and the Frechet distance between two of them."""

import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from visar.core.noise import Noise, Use


@dataclass(frozen=True)
class FeatureStatistics:
    """What a Frechet distance needs of a set.

    Attributes:
        mu_D: float64 mean.
        sigma_DD: float64 covariance, divided by count - 1.
        count: images behind it; None when the file does not say.
        null_constant: c of the distance c (1/n + 1/m) that two disjoint sets of n and m real images have; None if
            not measured. The bias of the Frechet distance is proportional to 1/n where n is above the width D.
    """

    mu_D: np.ndarray
    sigma_DD: np.ndarray
    count: int | None
    null_constant: float | None = None

    @property
    def width(self) -> int:
        """D, the number of features."""
        return self.mu_D.shape[0]

    def null_distance(self, num_samples: int) -> float | None:
        """The distance that num_samples real images, disjoint from these, would have to them; None if not known."""
        if self.null_constant is None or self.count is None:
            return None
        return self.null_constant * (1.0 / num_samples + 1.0 / self.count)


@dataclass
class RunningStatistics:
    """Sums over any number of batches; the order of images changes results by float64 rounding only."""

    count: int = 0
    sum_D: Tensor | None = field(default=None, repr=False)
    product_DD: Tensor | None = field(default=None, repr=False)

    def update(self, features_BD: Tensor) -> None:
        """Add a batch of features (any float dtype, any device)."""
        if not len(features_BD):
            return
        features = features_BD.double()
        total, product = features.sum(dim=0), features.T @ features
        self.sum_D = total if self.sum_D is None else self.sum_D + total
        self.product_DD = product if self.product_DD is None else self.product_DD + product
        self.count += len(features)

    def merged(self, other: "RunningStatistics") -> "RunningStatistics":
        """The sums of both sets."""
        if self.sum_D is None or self.product_DD is None:
            return other
        if other.sum_D is None or other.product_DD is None:
            return self
        return RunningStatistics(
            self.count + other.count, self.sum_D + other.sum_D, self.product_DD + other.product_DD
        )

    def finish(self) -> FeatureStatistics:
        """Mean and covariance.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2 or self.sum_D is None or self.product_DD is None:
            raise ValueError(f"{self.count} images have no covariance; at least 2 are needed")
        mean = self.sum_D / self.count
        sigma = (self.product_DD - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return FeatureStatistics(mean.cpu().numpy(), sigma.cpu().numpy(), self.count)


def features_statistics(features_ND: Tensor) -> FeatureStatistics:
    """Mean and covariance of features held in memory."""
    running = RunningStatistics()
    for block in features_ND.split(4096):
        running.update(block)
    return running.finish()


def halves(start: int, count: int) -> Tensor:
    """bool [count]: which of two fixed random halves the images start ... start + count - 1 of a set belong to."""
    position = torch.arange(start, start + count)[None]
    return Noise([0]).bits(Use.ORDER, position, (1,), counter=1)[0, :, 0] % 2 == 1


class MeasuredStatistics:
    """Running statistics that also measure the null constant, between two fixed random halves of the images."""

    def __init__(self) -> None:
        self.parts = (RunningStatistics(), RunningStatistics())

    def update(self, features_BD: Tensor) -> None:
        """Add the next batch; images must come in the set's order."""
        second_B = halves(sum(part.count for part in self.parts), len(features_BD))
        self.parts[0].update(features_BD[~second_B])
        self.parts[1].update(features_BD[second_B])

    def finish(self) -> FeatureStatistics:
        """Mean and covariance of all, with the null constant (None if a half has fewer than two images)."""
        whole = self.parts[0].merged(self.parts[1]).finish()
        if min(part.count for part in self.parts) < 2:
            return whole
        distance = frechet_distance(self.parts[0].finish(), self.parts[1].finish())
        return replace(whole, null_constant=distance / sum(1.0 / part.count for part in self.parts))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), by torch-fidelity.

    Source: Heusel et al., arXiv 1706.08500, equation 6. Both sides are float64 here: torch-fidelity 0.4 asserts that
    the dtypes are equal.

    Raises:
        ValueError: the widths differ.
    """
    if first.width != second.width:
        raise ValueError(
            f"statistics of {first.width} and of {second.width} features do not compare: another extractor or layer"
        )
    sides = [
        {"mu": side.mu_D.astype(np.float64), "sigma": side.sigma_DD.astype(np.float64)} for side in (first, second)
    ]
    return float(fid_statistics_to_metric(sides[0], sides[1], verbose=False)[KEY_METRIC_FID])


def singular_note(count: int, width: int, what: str) -> str | None:
    """Words for a covariance that cannot have full rank, and a warning; None when there are enough images."""
    if count > width:
        return None
    note = (
        f"{count} {what} give a singular covariance of {width} features; "
        f"at least {width + 1} are needed for one of full rank, and the distance is biased upwards"
    )
    warnings.warn(note, stacklevel=3)
    return note
