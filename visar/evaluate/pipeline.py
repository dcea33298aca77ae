"""Scoring a pipeline: seeds and labels in, uint8 pictures, figures and card out."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.output import SampleStatistics
from visar.evaluate.extractors import Extractor, load_extractor
from visar.evaluate.generation import KeepImages
from visar.evaluate.images import UINT8_RULES, ResizeChain
from visar.evaluate.labels import Label, LabelPolicy, LabelTable
from visar.evaluate.metrics import MetricOptions
from visar.layers.quantize import weights_digest
from visar.pipelines.image import ImagePipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How a pipeline samples; None takes the model's default.

    Attributes:
        sampler, sampler_options: see `visar samplers`.
        guidance: strength, convention and schedule; or the strength alone, 1.0 = off.
        temperature, top_k, top_p: as in the pipeline's call; samplers over scales also take one value a scale.
    """

    sampler: str | None = None
    sampler_options: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance | float | None = None
    temperature: float | Sequence[float] | None = None
    top_k: int | Sequence[int] | None = None
    top_p: float | Sequence[float] | None = None

    def call_settings(self) -> dict[str, Any]:
        """As keyword arguments of the pipeline, but for the sampler's own options."""
        return {
            "sampler": self.sampler,
            "guidance_scale": self.guidance,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    def check(self, pipeline: ImagePipeline) -> None:
        """Finds before any work that the pipeline cannot sample so; see `ImagePipeline.check_settings`.

        Raises:
            ValueError: the first setting that does not fit.
        """
        pipeline.check_settings(sampler_options=self.sampler_options, **self.call_settings())


class PipelineGenerator:
    """A pipeline as an `ImageGenerator`.

    Args:
        pipeline: the model.
        sampling: how it samples.
        uint8_rule: key of UINT8_RULES.

    Raises:
        ValueError: an unknown rule.
    """

    def __init__(self, pipeline: ImagePipeline, sampling: Sampling, uint8_rule: str = "round") -> None:
        if uint8_rule not in UINT8_RULES:
            raise ValueError(f"uint8_rule {uint8_rule!r}; choose {', '.join(UINT8_RULES)}")
        self.pipeline, self.sampling, self.uint8_rule = pipeline, sampling, uint8_rule

    def __call__(self, seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        """uint8 [B, 3, H, W], one image a seed."""
        result = self.pipeline(
            **self._conditions(labels),
            **self.sampling.call_settings(),
            sampler_options=self.sampling.sampler_options,
            seeds=seeds,
            output_type="pt",
        )
        return UINT8_RULES[self.uint8_rule](result.images), result.statistics

    def _conditions(self, labels: list[Label]) -> dict[str, Any]:
        if all(label is None for label in labels):
            return {"num_images": len(labels)}
        if all(isinstance(label, str) for label in labels):
            return {"prompt": labels}
        rows_BA = torch.tensor(labels, dtype=torch.int64)
        vocabulary, columns = self.pipeline.vocabulary, rows_BA.shape[1]
        if columns == 1 and self.num_classes:
            return {"class_labels": rows_BA[:, 0].tolist()}
        if vocabulary is None:
            return {"condition": Condition(labels_BA=rows_BA)}
        takes_words = bool(self.pipeline.generator.config.get("word_vocab_size", 0))
        texts = [vocabulary.texts[number] if number >= 0 else "" for number in rows_BA[:, 0].tolist()]
        if self.pipeline.generator.config.get("caption_width", 0):
            return {"prompt": texts}
        return {
            "condition": Condition(
                labels_BA=rows_BA[:, 1:] if self.num_classes else None,
                words_BT=vocabulary.encode_texts(texts) if takes_words else None,
            )
        }

    def training_table(self, reference: LabelTable | None) -> LabelTable | None:
        """Training labels: the rows (caption, labels) of the model's vocabulary, else the reference's labels.

        None, with a warning, where the reference's classes or columns are not the model's: labels are balanced then.
        """
        vocabulary = self.pipeline.vocabulary
        if vocabulary is not None and len(vocabulary.rows):
            return LabelTable.of(vocabulary.rows.tolist())
        if reference is None or not self.label_columns:
            return None
        try:
            names = None if vocabulary is None else vocabulary.attributes.get("class")
            table = reference.leading(self.label_columns)
            return table.in_classes(self.num_classes, names) if self.num_classes else table
        except ValueError as error:
            logger.warning("labels of the reference are not used, but every class alike: %s", error)
            return None

    @property
    def num_classes(self) -> int:
        """Classes of the model; 0 if it is not conditioned on one."""
        return self.pipeline.generator.config.get("num_classes", 0)

    @property
    def label_columns(self) -> int:
        """Label columns that the model reads: the class and its attributes."""
        return int(self.num_classes > 0) + len(self.pipeline.generator.config.get("attributes", ()))

    def settings(self) -> dict[str, Any]:
        """What its pictures depend on besides seeds and labels, defaults filled in."""
        settings = self.pipeline.sampling_settings(**self.sampling.call_settings())
        return settings | {
            "guidance": asdict(settings["guidance"]),
            "sampler_options": self.sampling.sampler_options,
            "uint8_rule": self.uint8_rule,
            "tokenizer_sha256": weights_digest(self.pipeline.tokenizer),
            "generator_sha256": weights_digest(self.pipeline.generator),
            "dtype": str(self.pipeline.generator.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "device_type": self.pipeline.device.type,
        }


@dataclass(frozen=True)
class RunOptions:
    """One evaluation run, whatever makes the pictures.

    Attributes:
        out: folder of the run: state, metrics.json, card.md, pictures.
        num_samples: pictures; 50,000 for ImageNet's published figures, 10,000 for the emoji set.
        batch_size: pictures at a time.
        seed: image i has seed + i.
        labels: "auto" (the training histogram where the model or the reference knows it, else balanced classes, else
            none) or a policy of LabelPlan.
        keep_images: "none", "png" or "npz".
        metrics: settings of the scores.

    Raises:
        ValueError: fewer pictures than precision and recall need.
    """

    out: Path
    num_samples: int = 10_000
    batch_size: int = 64
    seed: int = 0
    labels: LabelPolicy | Literal["auto"] = "auto"
    keep_images: KeepImages = "none"
    metrics: MetricOptions = field(default_factory=MetricOptions)

    def __post_init__(self) -> None:
        if self.num_samples <= self.metrics.neighbours:
            raise ValueError(
                f"num_samples {self.num_samples}: precision and recall with {self.metrics.neighbours} neighbours need "
                f"{self.metrics.neighbours + 1} pictures or more"
            )


@dataclass(frozen=True)
class ScoreOptions:
    """What pictures are scored with and against; shared by the commands.

    Attributes:
        reference: name of a shipped file, statistics file, ADM batch, .npz of images, or folder.
        extractor, extractor_weights, layer, spatial, extractor_dtype: see load_extractor.
        protocol: "generation" or "reconstruction".
        resize, image_size: how a folder's pictures get their size.
        train, held_out: folder or .npz of pictures for the copy rate and its null.
    """

    reference: str
    extractor: str = "efficientnet-lite0"
    extractor_weights: Path | None = None
    extractor_dtype: Literal["float32", "float64"] = "float32"
    layer: str | None = None
    spatial: bool = False
    protocol: Literal["generation", "reconstruction"] = "generation"
    resize: ResizeChain = "none"
    image_size: int | None = None
    train: str | None = None
    held_out: str | None = None

    def load_extractor(self, device: torch.device) -> Extractor:
        """The extractor on a device."""
        return load_extractor(
            self.extractor,
            device=device,
            dtype=self.extractor_dtype,
            weights=self.extractor_weights,
            layer=self.layer,
            spatial=self.spatial,
        )
