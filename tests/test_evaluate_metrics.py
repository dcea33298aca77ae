"""Statistics and scores: against torch-fidelity's own, and the properties that a score must have."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from visar.evaluate.extractors import EXTRACTORS, Extractor, load_extractor
from visar.evaluate.images import ArrayImages
from visar.evaluate.metrics import (
    compute_metrics,
    inception_score,
    kernel_distance,
    null_distance,
    null_estimable,
    precision_recall,
)
from visar.evaluate.options import MetricOptions
from visar.evaluate.references import Reference, measure
from visar.evaluate.statistics import (
    FeatureStatistics,
    MeasuredStatistics,
    RunningStatistics,
    features_statistics,
    frechet_distance,
)

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [64, 3, 64, 64] real pictures."""
    with np.load(SAMPLE) as file:
        return torch.from_numpy(file["images"]).movedim(-1, 1).contiguous()


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor()


@pytest.fixture(scope="module")
def features(images: Tensor, extractor: Extractor) -> Tensor:
    return extractor(images)["320"]


def as_reference(images: Tensor, extractor: Extractor) -> Reference:
    return measure(ArrayImages(images.movedim(1, -1), "real"), extractor, protocol="generation", batch_size=32)


class TensorImages(Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_scores_agree_with_torch_fidelity(images: Tensor, extractor: Extractor) -> None:
    fake, real = images[:32].roll(5, dims=2), images[32:]
    theirs = torch_fidelity.calculate_metrics(
        input1=TensorImages(fake),
        input2=TensorImages(real),
        feature_extractor="visar-efficientnet-lite0",
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=20,
        isc_splits=4,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    with pytest.warns(UserWarning, match="singular"):
        ours = compute_metrics(
            extractor(fake),
            as_reference(real, extractor),
            extractor.kind,
            options=MetricOptions(inception_splits=4, kid_subset_size=20),
        )
    assert ours.distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.precision == pytest.approx(theirs["precision"])
    assert ours.recall == pytest.approx(theirs["recall"])
    assert ours.distance_name == "FD-Lite0"


def test_distance_of_a_set_to_itself_is_nothing(images: Tensor, features: Tensor, extractor: Extractor) -> None:
    statistics = features_statistics(features)
    assert abs(frechet_distance(statistics, statistics)) < 1e-3
    with pytest.warns(UserWarning):
        metrics = compute_metrics(extractor(images), as_reference(images, extractor), extractor.kind)
    assert abs(metrics.distance) < 1e-3
    assert metrics.precision == metrics.recall == 1.0


def test_distance_of_gaussians_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(2, 5, generator=generator, dtype=torch.float64).numpy()
    first, second = (
        FeatureStatistics(mu[i], np.diag(np.array([1.0, 2.0, 3.0, 4.0, 5.0]) * (i + 1) ** 2), 100) for i in range(2)
    )
    expected = ((mu[0] - mu[1]) ** 2).sum() + 15.0 * (1 - 2) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-10)
    with pytest.raises(ValueError, match="5 and of 4"):
        frechet_distance(first, FeatureStatistics(np.zeros(4), np.eye(4), 100))


def test_running_sums_are_mean_and_covariance_whatever_the_batches() -> None:
    values = 3.0 + torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    whole = RunningStatistics()
    for block in values.split([1, 7, 0, 42]):
        whole.update(block)
    left, right = RunningStatistics(), RunningStatistics()
    left.update(values[:20])
    right.update(values[20:])
    for statistics in (whole.finish(), left.merged(right).finish(), features_statistics(values)):
        np.testing.assert_allclose(statistics.mu_D, values.double().mean(dim=0).numpy(), rtol=1e-12)
        np.testing.assert_allclose(statistics.sigma_DD, np.cov(values.double().numpy(), rowvar=False), rtol=1e-10)
    with pytest.raises(ValueError, match="at least 2"):
        RunningStatistics().finish()


def test_two_real_halves_are_nearer_than_a_damaged_half(
    images: Tensor, features: Tensor, extractor: Extractor
) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    first, second = features[order[:32]], features[order[32:]]
    honest = frechet_distance(features_statistics(first), features_statistics(second))
    noise = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    damaged = (images[order[32:]].float() + 24.0 * noise).clamp(0, 255).to(torch.uint8)
    noisy = extractor(damaged)["320"]
    assert frechet_distance(features_statistics(first), features_statistics(noisy)) > 1.2 * honest


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_distance_grows_with_damage(images: Tensor, features: Tensor, extractor: Extractor, kind: str) -> None:
    images = images[:24]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for strength in (1, 2, 4):
        if kind == "noise":
            damaged = images.float() + 8.0 * strength * noise
        else:
            damaged = F.avg_pool2d(images.float(), 2 * strength + 1, 1, strength, count_include_pad=False)
        worse = extractor(damaged.clamp(0, 255).round().to(torch.uint8))["320"]
        found.append(frechet_distance(features_statistics(worse), features_statistics(features[:24])))
    assert 1.0 < found[0] < found[1] < found[2]


def test_order_of_classes_cannot_skew_the_inception_score() -> None:
    labels = torch.arange(400) % 10
    logits = 6.0 * F.one_hot(labels, 10).float() + torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    mixed, sorted_by_class = logits, logits[labels.argsort(stable=True)]
    expected, spread = inception_score(mixed, splits=4)
    assert expected > 5.0
    assert inception_score(sorted_by_class, splits=4)[0] == pytest.approx(expected, rel=0.03)
    in_order = torch_fidelity.metric_isc.isc_features_to_metric(sorted_by_class, splits=4, shuffle=False)
    assert in_order["inception_score_mean"] < 0.6 * expected
    assert spread < 0.5


def test_precision_is_of_the_generated_set_and_recall_of_the_real_one() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 4, generator=generator)
    collapsed = 0.05 * torch.randn(200, 4, generator=generator)
    precision, recall = precision_recall(collapsed, real)
    assert precision > 0.9 and recall < 0.1
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(real[:3], real)


def test_kid_is_near_zero_for_one_distribution_and_not_for_two() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 150, 8, generator=generator)
    same, spread = kernel_distance(first, second, subsets=20, subset_size=1000)
    assert abs(same) < 0.2 and spread < 1e-5  # every subset is the whole set: 150 pictures
    assert kernel_distance(first + 1.0, second, subsets=20, subset_size=100)[0] > 10 * abs(same)


def test_real_null_scales_with_the_number_of_samples() -> None:
    values = torch.randn(4000, 6, generator=torch.Generator().manual_seed(2))
    running = MeasuredStatistics()
    for block in values[:2000].split(300):
        running.update(block)
    statistics = running.finish()
    np.testing.assert_allclose(statistics.mu_D, values[:2000].double().mean(dim=0).numpy(), rtol=1e-10)
    predicted = statistics.null_distance(500)
    assert predicted is not None
    measured = [
        frechet_distance(features_statistics(values[2000 + 500 * i : 2500 + 500 * i]), statistics) for i in range(4)
    ]
    assert predicted == pytest.approx(sum(measured) / 4, rel=0.5)
    assert statistics.null_distance(250) > predicted  # type: ignore[operator]
    assert features_statistics(values).null_distance(10) is None


def test_too_few_samples_are_named(images: Tensor, extractor: Extractor) -> None:
    reference = as_reference(images, extractor)
    with pytest.warns(UserWarning, match="give a singular covariance of 320 features; at least 321") as caught:
        metrics = compute_metrics(extractor(images[:8]), reference, extractor.kind)
    assert [str(each.message).split(" give")[0] for each in caught] == ["8 samples", "64 reference images"]
    assert any("at least 321" in note for note in metrics.notes)
    assert any("64 reference images" in note for note in metrics.notes)
    assert any("8 splits" in note for note in metrics.notes)
    assert any("KID over 100 subsets of 8" in note for note in metrics.notes)


@pytest.mark.filterwarnings("ignore:.*singular covariance")
def test_precision_and_recall_are_left_out_where_there_are_no_neighbours(images: Tensor, extractor: Extractor) -> None:
    metrics = compute_metrics(extractor(images[:8]), as_reference(images[:3], extractor), extractor.kind)
    assert metrics.precision is None and metrics.recall is None and metrics.kid is not None
    assert any("3 images have no 3-th neighbour" in note for note in metrics.notes)


def test_enough_samples_do_not_warn() -> None:
    values = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    reference = Reference("r", "images", "0", "generation", None, None, "none", {"320": features_statistics(values)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics({"320": values}, reference, EXTRACTORS["efficientnet-lite0"])
    assert metrics.kid is None and metrics.inception_score is None
    assert any("statistics only" in note for note in metrics.notes)
    with pytest.raises(ValueError, match="no layer '1280'"):
        compute_metrics({"320": values}, reference, EXTRACTORS["efficientnet-lite0"], layer="1280")


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="kid_subsets 0"):
        MetricOptions(kid_subsets=0)
    with pytest.raises(TypeError, match="fid_statistics_file"):
        compute_metrics({}, None, None, fid_statistics_file="x.npz")  # type: ignore[call-arg,arg-type]


def test_a_real_null_is_given_only_where_it_can_be_estimated() -> None:
    def real(count: int) -> FeatureStatistics:
        return FeatureStatistics(np.zeros(10), np.eye(10), count, null_constant=100.0)

    for count, num_samples in ((1000, 10), (1000, 3), (20, 100)):
        found, note = null_distance(real(count), num_samples)
        assert found is None and note is not None and f"{num_samples} samples" in note and "10 features" in note
    found, note = null_distance(real(1000), 12)
    assert found == pytest.approx(100.0 * (1 / 12 + 1 / 1000)) and note is not None and "5 to 12 % low" in note
    assert null_distance(real(1000), 100) == (pytest.approx(100.0 * (1 / 100 + 1 / 1000)), None)
    unknown = FeatureStatistics(np.zeros(10), np.eye(10), 1000)
    assert null_distance(unknown, 100) == (None, None) and not null_estimable(unknown)
