"""What images are scored by: networks, references and training images, loaded once for all runs of a comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.evaluate.copies import Copies, copies
from visar.evaluate.extractors import Extractor, load_extractor
from visar.evaluate.generation import Generated
from visar.evaluate.images import open_images
from visar.evaluate.metrics import Metrics, Scorer, compute_metrics
from visar.evaluate.options import MetricOptions, ScoreOptions
from visar.evaluate.references import load_reference
from visar.io.progress import Progress, counted


@dataclass(frozen=True)
class Scoring:
    """Networks, and what samples are compared with.

    Attributes:
        first: gives the figures that a run is called by.
        second: scores the same images too; None without one.
        train_NHWC: uint8 training images for the copy rate; None leaves it out. Given in every process or in none.
        held_out_NHWC: uint8 real images that were not trained on, for the copy rate's null.
    """

    first: Scorer
    second: Scorer | None = None
    train_NHWC: Tensor | None = None
    held_out_NHWC: Tensor | None = None

    @property
    def second_extractor(self) -> Extractor | None:
        """The network of the second scorer."""
        return None if self.second is None else self.second.extractor

    def metrics(self, generated: Generated, options: MetricOptions) -> tuple[Metrics, Metrics | None]:
        """Scores by the first and by the second network."""
        first = _scores(self.first, generated.features, options)
        return first, None if self.second is None else _scores(self.second, generated.second_features, options)

    def copies(self, generated: Generated, device: torch.device) -> Copies | None:
        """Copy rates; None without training images."""
        if self.train_NHWC is None or generated.thumbnails_ND is None:
            return None
        return copies(generated.thumbnails_ND, self.train_NHWC, self.held_out_NHWC, device=device)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Networks are on the CPU meanwhile: they are no memory of what is timed."""
        extractors = [scorer.extractor for scorer in (self.first, self.second) if scorer is not None]
        for extractor in extractors:
            extractor.module.to("cpu")
        try:
            yield
        finally:
            for extractor in extractors:
                extractor.module.to(extractor.device)


def _scores(scorer: Scorer, features: dict[str, Tensor], options: MetricOptions) -> Metrics:
    assert scorer.reference is not None
    extractor = scorer.extractor
    return compute_metrics(features, scorer.reference, extractor.kind, layer=extractor.layers[0], options=options)


def load_scoring(
    score: ScoreOptions,
    device: torch.device,
    *,
    rank: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Scoring:
    """What images are scored by.

    Args:
        score: reference and extractors.
        device: where the networks run.
        rank: of the process; only the first one has references.
        batch_size: images at a time, where references are images.
        progress: told (what, done, total).

    Raises:
        ValueError: see `load_extractor` and `load_reference`; a reference of a second extractor that there is not.
    """
    if score.second_extractor is None and score.second_reference is not None:
        raise ValueError(f"second_reference {score.second_reference!r} needs a second_extractor")
    extractor = load_extractor(
        score.extractor,
        device=device,
        dtype=score.extractor_dtype,
        weights=score.extractor_weights,
        layer=score.layer,
        spatial=score.spatial,
    )
    other = None
    if score.second_extractor is not None:
        other = load_extractor(score.second_extractor, device=device, dtype=score.extractor_dtype)
    settings: dict[str, Any] = {"batch_size": batch_size, "resize": score.resize, "image_size": score.image_size}
    settings["progress"] = counted(progress, "reference", 0)

    def scorer(network: Extractor, source: str) -> Scorer:
        return Scorer(network, load_reference(source, network, **settings) if rank == 0 else None)

    return Scoring(
        first=scorer(extractor, score.reference),
        second=None if other is None else scorer(other, score.second_reference or score.reference),
        train_NHWC=None if score.train is None else _stacked(score.train),
        held_out_NHWC=None if score.held_out is None else _stacked(score.held_out),
    )


def _stacked(source: str) -> Tensor:
    """All images of a set in memory, uint8 [N, H, W, 3]."""
    return torch.cat(list(open_images(source).batches(1024))).movedim(-3, -1).contiguous()
