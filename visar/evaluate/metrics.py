"""Scores of generated images from their features, by torch-fidelity's public pieces behind one typed function.

What torch-fidelity 0.4 leaves to its caller is settled here: keywords are checked (it ignores unknown ones), both
sides of a Frechet distance are float64 (it asserts equal dtypes), the generated set is its first input (precision is
the share of generated images inside the real manifold), KID's subsets are never larger than a set, precision and
recall use the same extractor as the distance (its own default is VGG16), and cached pickles are not read.
"""

from dataclasses import dataclass

from torch import Tensor
from torch_fidelity import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
)
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from visar.evaluate.extractors import Extractor, ExtractorKind
from visar.evaluate.options import MetricOptions
from visar.evaluate.references import Reference
from visar.evaluate.statistics import FeatureStatistics, features_statistics, frechet_distance, singular_note

SHUFFLE_SEED = 2020


@dataclass(frozen=True)
class Scorer:
    """A network and what it measured of real images.

    Attributes:
        extractor: the network.
        reference: None in processes other than the first.
    """

    extractor: Extractor
    reference: Reference | None


@dataclass(frozen=True)
class Metrics:
    """Scores; None where the extractor or the reference cannot give one (`notes` says why).

    Attributes:
        distance_name: what the Frechet distance is called: "FID" for Inception only.
        distance: Frechet distance to the reference.
        null_distance: what as many real images, disjoint from the reference, would score: extrapolated, see
            `null_distance`. None where it cannot be estimated.
        spatial_distance: sFID.
        inception_score, inception_score_std: mean and standard deviation over the splits.
        kid, kid_std: kernel distance, unbiased, over the subsets.
        precision: share of generated images inside the real manifold; recall: of real ones inside the generated.
        notes: what a reader of the figures should know.
    """

    distance_name: str
    distance: float
    null_distance: float | None = None
    spatial_distance: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    notes: tuple[str, ...] = ()


def inception_score(logits_NV: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp E KL(p(y|x) || p(y)), of shuffled images.

    Source: Salimans et al., arXiv 1606.03498. The shuffle is torch-fidelity's, with a fixed seed.
    """
    found = isc_features_to_metric(logits_NV, splits=splits, shuffle=True, rng_seed=SHUFFLE_SEED)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def kernel_distance(generated_ND: Tensor, real_MD: Tensor, subsets: int, subset_size: int) -> tuple[float, float]:
    """KID (Binkowski et al., arXiv 1801.01401), cubic polynomial kernel: mean and standard deviation over subsets."""
    size = min(subset_size, len(generated_ND), len(real_MD))
    found = kid_features_to_metric(
        generated_ND,
        real_MD,
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=SHUFFLE_SEED,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(generated_ND: Tensor, real_MD: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of k-nearest-neighbour manifolds (Kynkaanniemi et al., arXiv 1904.06991).

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    smallest = min(len(generated_ND), len(real_MD))
    if smallest <= neighbours:
        raise ValueError(f"{smallest} images have no {neighbours}-th neighbour; at least {neighbours + 1} are needed")
    found = prc_features_to_metric(
        generated_ND,
        real_MD,
        prc_neighborhood=neighbours,
        prc_batch_size=2500,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def compute_metrics(
    features: dict[str, Tensor],
    reference: Reference,
    kind: ExtractorKind,
    *,
    layer: str | None = None,
    options: MetricOptions | None = None,
) -> Metrics:
    """All scores that the features and the reference allow.

    Args:
        features: features of the generated images, float32 [N, D] by layer.
        reference: real images, measured with the same extractor.
        kind: the extractor's row in EXTRACTORS.
        layer: features of the distance, KID, precision and recall; None is the kind's own.
        options: None takes the defaults.

    Raises:
        ValueError: widths differ, the layer is missing on a side, or fewer than two images.
    """
    options, layer = options or MetricOptions(), layer or kind.layer
    for name, side in (("the samples", features), (reference.name, reference.statistics)):
        if layer not in side:
            raise ValueError(f"{name}: no layer {layer!r}, only {', '.join(side)}")
    generated = features[layer]
    statistics = features_statistics(generated)
    real = reference.statistics[layer]
    notes = [singular_note(len(generated), real.width, "samples")]
    if real.count is not None:
        notes.append(singular_note(real.count, real.width, "reference images"))
    null, null_note = null_distance(real, len(generated))
    notes.append(null_note)
    spatial = isc = isc_std = kid = kid_std = precision = recall = None
    if kind.spatial in features and kind.spatial in reference.statistics and kind.spatial is not None:
        spatial = frechet_distance(features_statistics(features[kind.spatial]), reference.statistics[kind.spatial])
    if kind.logits in features and kind.logits is not None:
        splits = min(options.inception_splits, len(generated))
        isc, isc_std = inception_score(features[kind.logits], splits)
        if splits < options.inception_splits:
            notes.append(f"inception score over {splits} splits: there are no more samples")
    if layer in reference.features:
        kid, kid_std = kernel_distance(
            generated, reference.features[layer], options.kid_subsets, options.kid_subset_size
        )
        smallest = min(len(generated), len(reference.features[layer]))
        notes.append(f"KID over {options.kid_subsets} subsets of {min(options.kid_subset_size, smallest)}")
        if smallest > options.neighbours:
            precision, recall = precision_recall(generated, reference.features[layer], options.neighbours)
        else:
            notes.append(f"no precision and recall: {smallest} images have no {options.neighbours}-th neighbour")
    else:
        notes.append("no KID, precision and recall: the reference holds statistics only, no features")
    return Metrics(
        distance_name=distance_name(kind, layer),
        distance=frechet_distance(statistics, real),
        null_distance=null,
        spatial_distance=spatial,
        inception_score=isc,
        inception_score_std=isc_std,
        kid=kid,
        kid_std=kid_std,
        precision=precision,
        recall=recall,
        notes=tuple(note for note in notes if note is not None),
    )


def null_estimable(real: FeatureStatistics) -> bool:
    """Whether the null constant of a reference means something: both halves have more images than features."""
    return real.null_constant is not None and real.count is not None and real.count > 2 * real.width


def null_distance(real: FeatureStatistics, num_samples: int) -> tuple[float | None, str | None]:
    """The distance that as many real images, disjoint from the reference, would have to it, and words about it.

    The distance of two halves of the reference, extrapolated in 1/n. That holds where all sets have more images than
    there are features: with 320 features, the truth is 0.26 of the extrapolation at n = 8, 0.8 at 64 and 0.95 at 100.
    None where it cannot be estimated, because a set is smaller than that or the reference does not say.
    """
    found = real.null_distance(num_samples)
    if found is None:
        return None, None
    if num_samples <= real.width or not null_estimable(real):
        return None, (
            f"no real null: {num_samples} samples and halves of {real.count} reference images; it can be estimated "
            f"only where all are more than the {real.width} features"
        )
    if num_samples < 1.6 * real.width:
        return found, (
            f"the real null is extrapolated and comes out 5 to 12 % low for {num_samples} samples: "
            f"{real.width} features need 1.6 times as many"
        )
    return found, None


def distance_name(kind: ExtractorKind, layer: str) -> str:
    """The name of a Frechet distance: the kind's, with the layer if it is not the kind's own."""
    return kind.distance if layer == kind.layer else f"{kind.distance} (layer {layer})"
