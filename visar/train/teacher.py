"""A larger generator's distributions as targets of small ones: drafters, and followers in collaborative decoding.

Source: Hinton et al., arXiv 1503.02531, at temperature 1; CoDe, arXiv 2411.17787, trains its refiner so.

B images, L positions, V codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.interface import Scales
from visar.pipelines.loading import load

_SHARED = ("vocab_size", "num_classes", "attributes", "word_vocab_size", "words", "num_words", "caption_width")


def load_teacher(name: str, student: Any, device: torch.device) -> nn.Module:
    """The frozen float32 generator of a pipeline by name or folder.

    Raises:
        ValueError: no such pipeline, or one whose distributions the student cannot learn: other tokens, other
            conditions.
    """
    teacher: Any = load(name, device=device, dtype="float32").generator
    ours, theirs = student.config, teacher.config
    differing = [key for key in _SHARED if _value(ours, key) != _value(theirs, key)]
    if teacher.block_sizes != student.block_sizes:
        differing.append("tokens of an image")
    if not differing and isinstance(student, Scales):
        same = torch.equal(teacher.pyramid.codebook, student.pyramid.codebook.to(device))
        differing += [] if same else ["codebook"]
    if differing:
        raise ValueError(f"teacher {name} does not fit, it has another {', '.join(differing)}")
    return teacher.requires_grad_(False)


def _value(config: Any, key: str) -> Any:
    value = config.get(key)
    return tuple(value) if isinstance(value, list) else value


@torch.no_grad()
def teacher_probs(teacher: nn.Module, tokens_BL: Tensor, condition: Condition) -> Tensor:
    """Teacher-forced conditionals of every token, as probabilities float32 [B, L, V]."""
    return torch.softmax(teacher(tokens_BL, condition).float(), dim=-1)
