"""Scoring a pipeline: seeds and labels in, uint8 images, figures and card out."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.output import SampleStatistics
from visar.data.images import SPLITS
from visar.evaluate.images import UINT8_RULES, image_set
from visar.evaluate.labels import Label, LabelTable
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
        """The settings as keyword arguments of the pipeline, but for the sampler's own options."""
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
        scored_size: side in pixels that images are resized to (bicubic, not antialiased) before they are rounded, as
            LlamaGen's figures need it; None leaves them.

    Raises:
        ValueError: an unknown rule.
    """

    def __init__(
        self, pipeline: ImagePipeline, sampling: Sampling, uint8_rule: str = "round", scored_size: int | None = None
    ) -> None:
        if uint8_rule not in UINT8_RULES:
            raise ValueError(f"uint8_rule {uint8_rule!r}; choose {', '.join(UINT8_RULES)}")
        self.pipeline, self.sampling, self.uint8_rule = pipeline, sampling, uint8_rule
        self.scored_size = scored_size
        self.asked: dict[str, str] = {}
        self.texts = () if pipeline.vocabulary is None else pipeline.vocabulary.texts

    def __call__(self, seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        """uint8 [B, 3, H, W], one image per seed."""
        result = self.pipeline(
            **self._conditions(labels),
            **self.sampling.call_settings(),
            sampler_options=self.sampling.sampler_options,
            seeds=seeds,
            output_type="pt",
            return_dict=True,
        )
        images_BCHW = result.images
        if self.scored_size is not None:
            size = (self.scored_size, self.scored_size)
            images_BCHW = F.interpolate(images_BCHW.float(), size, mode="bicubic").clamp(0.0, 1.0)
        return UINT8_RULES[self.uint8_rule](images_BCHW), result.statistics

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
        texts: list[str] = [str(self.texts[number]) if number >= 0 else "" for number in rows_BA[:, 0].tolist()]
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

    def ask_for(self, source: str, image_size: int | None = None) -> LabelTable:
        """Labels and captions of a split of an image set; the rows' captions are asked for from now on.

        Args:
            source: PLACE@val.
            image_size: for sets whose images may be of any size, see `load_image_set`.

        Raises:
            ValueError: no such split, labels of other names than the model's, or words that the model does not know.
        """
        place, at, split = source.rpartition("@")
        if not at or split not in SPLITS:
            raise ValueError(f"captions {source!r}; write PLACE@{' or PLACE@'.join(SPLITS)}, a split of an image set")
        found, vocabulary = image_set(place, image_size), self.pipeline.vocabulary
        chosen = found.indices(split)
        rows = found.labels_NA[torch.from_numpy(chosen)].tolist()
        if vocabulary is None:
            return LabelTable.of(rows).leading(self.label_columns)
        theirs = found.vocabulary.attributes
        if any(theirs.get(column) != names for column, names in vocabulary.attributes.items()):
            raise ValueError(f"{place} and the model do not have the same label columns and names")
        columns = [list(theirs).index(column) for column in vocabulary.attributes]
        captions = [found.captions[i] if found.captions is not None else "" for i in chosen.tolist()]
        self.texts = tuple(sorted(set(captions)))
        self.asked = {"captions": source, "captions_sha256": hashlib.sha256(repr(self.texts).encode()).hexdigest()}
        if self.pipeline.generator.config.get("word_vocab_size", 0):
            vocabulary.encode_texts(self.texts)
        number = {text: i for i, text in enumerate(self.texts)}
        asked = zip(captions, rows, strict=True)
        return LabelTable.of([(number[text], *(row[column] for column in columns)) for text, row in asked])

    @property
    def image_of(self) -> str:
        """What images are made of: "codes" of the tokenizer, or "soft" ones (means of several) or free "vectors"."""
        if self.sampling.sampler_options.get("smooth"):
            return "soft"
        return self.sampling.sampler_options.get("output") or self.pipeline.generator.config.get("output", "codes")

    @property
    def num_classes(self) -> int:
        """Classes of the model; 0 if it is not conditioned on one."""
        return self.pipeline.generator.config.get("num_classes", 0)

    @property
    def label_columns(self) -> int:
        """Label columns that the model reads: the class and its attributes."""
        return int(self.num_classes > 0) + len(self.pipeline.generator.config.get("attributes", ()))

    def settings(self) -> dict[str, Any]:
        """What its images depend on besides seeds and labels, defaults filled in."""
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
            **({} if self.image_of == "codes" else {"image_of": self.image_of}),
            **({} if self.scored_size is None else {"scored_size": self.scored_size}),
            **self.asked,
        }
