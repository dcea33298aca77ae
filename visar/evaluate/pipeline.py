"""Scoring a pipeline: seeds and labels in, uint8 pictures, figures and card out."""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visar.condition import Condition
from visar.data.tokens import weights_digest
from visar.evaluate.images import UINT8_RULES, open_images
from visar.evaluate.labels import Label, LabelTable
from visar.evaluate.references import load_reference
from visar.evaluate.report import Report, environment, load_report, save_report
from visar.evaluate.run import Progress, RunOptions, ScoreOptions, counted, evaluate_generator, label_plan, stacked
from visar.evaluate.sharding import World, join_world, leave_world
from visar.evaluate.speed import Speed, check_batches, measure_speed
from visar.guidance import Guidance
from visar.output import SampleStatistics
from visar.pipelines.image import ImagePipeline


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
        """Training labels: the rows (caption, labels) of the model's vocabulary, else the reference's labels."""
        vocabulary = self.pipeline.vocabulary
        if vocabulary is not None and len(vocabulary.rows):
            return LabelTable.of(vocabulary.rows.tolist())
        return reference.leading(self.label_columns) if reference is not None and self.label_columns else None

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


def evaluate_pipeline(
    pipeline: ImagePipeline,
    sampling: Sampling,
    score: ScoreOptions,
    options: RunOptions,
    *,
    name: str,
    uint8_rule: str = "round",
    prompts: tuple[str, ...] = (),
    speed_batches: tuple[int, ...] = (),
    world: World | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Scores a pipeline; the whole of `visar eval`. Run by every process of a torchrun or accelerate launch.

    Args:
        pipeline: on the device it shall run on.
        sampling: how it samples.
        score: reference and extractor.
        options: of the run.
        name: the model's name in tables and cards.
        uint8_rule: key of UINT8_RULES.
        prompts: for models conditioned on words; image i has prompt i mod their number.
        speed_batches: batch sizes at which the first process times whole calls, see `measure_speed`; what the folder's
            report of the same device says already is kept.
        world: the processes; None joins those of the launcher.
        progress: told (what, done, total).

    Returns: the report in the first process, None in the others.

    Raises:
        ValueError: settings, references or folders that do not fit.
    """
    if score.protocol != "generation":
        raise ValueError("samples are scored by the generation protocol; reconstructions by evaluate_reconstruction")
    check_batches(speed_batches)
    sampling.check(pipeline)
    joined = world or join_world(pipeline.device.type)
    generate = PipelineGenerator(pipeline, sampling, uint8_rule)
    if joined.device != pipeline.device:
        pipeline.to(joined.device)
    pipeline.set_progress_bar_config(disable=True)
    extractor = score.load_extractor(joined.device)
    reference = None
    if joined.rank == 0:
        reference = load_reference(
            score.reference,
            extractor,
            protocol=score.protocol,
            batch_size=options.batch_size,
            resize=score.resize,
            image_size=score.image_size,
            progress=counted(progress, "reference", 0),
        )
    known = _known_speed(options, joined) if joined.rank == 0 else {}
    table = joined.from_first(None if reference is None else reference.labels)
    plan = label_plan(
        options.labels,
        num_classes=generate.num_classes,
        table=generate.training_table(table if isinstance(table, LabelTable) else None),
        prompts=prompts,
    )
    report = evaluate_generator(
        generate,
        reference,
        extractor,
        plan,
        options,
        name=name,
        settings=generate.settings(),
        world=joined,
        train_NHWC=None if score.train is None else stacked(open_images(score.train)),
        held_out_NHWC=None if score.held_out is None else stacked(open_images(score.held_out)),
        progress=progress,
    )
    del extractor, reference  # what they hold is no memory of the pipeline
    if report is not None:
        batches = speed_batches or tuple(known)
        for number, batch in enumerate(batches, 1):
            if batch not in known:
                pipeline.runtime.clear()
                gc.collect()
                known[batch] = measure_speed(generate, plan, batch, seed=options.seed, device=joined.device)
            report = replace(report, speed=(*report.speed, known[batch]))
            save_report(report, options.out)
            if progress is not None:
                progress("timing", sum(batches[:number]), sum(batches))
    joined.barrier()  # the others leave the machine to the timing
    if world is None:
        leave_world(joined)
    return report


def _known_speed(options: RunOptions, world: World) -> dict[int, Speed]:
    """Speeds by batch size that the folder's report holds, if they were measured on such a device."""
    if not (options.out / "metrics.json").is_file():
        return {}
    report = load_report(options.out)
    same = report.protocol["device"] == environment(world.device)["device"]
    return {row.batch: row for row in report.speed} if same else {}
