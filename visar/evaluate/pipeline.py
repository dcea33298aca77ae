"""A pipeline as the thing that evaluation scores: seeds and labels in, uint8 pictures out."""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visar.condition import Condition
from visar.evaluate.images import UINT8_RULES
from visar.evaluate.labels import Label
from visar.guidance import Guidance
from visar.output import SampleStatistics
from visar.pipelines.image import ImagePipeline


@dataclass(frozen=True)
class Sampling:
    """How a pipeline samples; None takes the model's default.

    Attributes:
        sampler, sampler_options: see `visar samplers`.
        guidance: strength, convention and schedule.
        temperature, top_k, top_p: as in the pipeline's call.
    """

    sampler: str = "ancestral"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


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
            sampler=self.sampling.sampler,
            sampler_options=self.sampling.sampler_options,
            guidance_scale=self.sampling.guidance,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seeds=seeds,
            output_type="pt",
        )
        return UINT8_RULES[self.uint8_rule](result.images), result.statistics

    def _conditions(self, labels: list[Label]) -> dict[str, Any]:
        if all(label is None for label in labels):
            return {"num_images": len(labels)}
        if all(isinstance(label, str) for label in labels):
            return {"prompt": labels}
        if self.label_columns == 1 or any(isinstance(label, tuple) and len(label) > 1 for label in labels):
            return {"condition": Condition(labels_BA=torch.tensor(labels, dtype=torch.int64))}
        return {"class_labels": [label[0] for label in labels if isinstance(label, tuple)]}

    @property
    def num_classes(self) -> int:
        """Classes of the model; 0 if it is not conditioned on one."""
        return self.pipeline.generator.config["num_classes"]

    @property
    def label_columns(self) -> int:
        """Label columns that the model reads: the class and its attributes."""
        return int(self.num_classes > 0) + len(self.pipeline.generator.config["attributes"])

    def settings(self) -> dict[str, Any]:
        """What its pictures depend on besides seeds and labels, defaults filled in."""
        defaults = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        defaults |= self.pipeline.config["defaults"]
        chosen = self.sampling
        guidance = chosen.guidance or Guidance(float(defaults["guidance_scale"]))
        return {
            "sampler": chosen.sampler,
            "sampler_options": chosen.sampler_options,
            "guidance": asdict(guidance),
            "temperature": defaults["temperature"] if chosen.temperature is None else chosen.temperature,
            "top_k": defaults["top_k"] if chosen.top_k is None else chosen.top_k,
            "top_p": defaults["top_p"] if chosen.top_p is None else chosen.top_p,
            "uint8_rule": self.uint8_rule,
            "weights_sha256": weights_digest(self.pipeline.tokenizer, self.pipeline.generator),
            "dtype": str(self.pipeline.generator.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "device_type": self.pipeline.device.type,
        }


def weights_digest(*modules: nn.Module) -> str:
    """sha256 over the names, dtypes and bytes of all parameters and buffers that are saved."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
