"""Images in one or a few passes of a one-step student.

Source: Distilled Decoding, arXiv 2412.17153 section 3 and figure 4; time points as in microsoft/distilled_decoding@
3b95d33f. Soft output is this project's.

B images, N tokens, V codes, C code width.
"""

import dataclasses
import functools
import time
import weakref
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Categorical, OneStep
from visar.core.noise import Noise
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import EAGER, Runtime, Session
from visar.kernels import finite
from visar.layers.quantize import fingerprint
from visar.samplers.flow import initial_noise, redraw_blocks

Output = Literal["soft", "codes", "vectors"]


def made_of(model: OneStep, logits_BNV: Tensor, vectors_BNC: Tensor, output: Output, late: int) -> Tensor:
    """What an image is made of, float32 [B, N, C] in the scale of the noise; see `sample_one_step`.

    Args:
        model: the student.
        logits_BNV, vectors_BNC: its predictions.
        output: kind.
        late: first token whose vector is used, for "vectors".
    """
    if output == "soft":
        return torch.softmax(model.config["sharpness"] * logits_BNV, dim=-1) @ model.codes
    codes_BNC = model.codes[logits_BNV.argmax(-1)]
    if output == "vectors":
        codes_BNC[:, late:] = vectors_BNC[:, late:]
    return codes_BNC


@dataclasses.dataclass(frozen=True)
class Stage:
    """Tokens first ... last - 1 are final after it; the student draws all from `first` on, the teacher these alone."""

    first: int
    last: int
    by_teacher: bool


def plan(model: OneStep, steps: int, teacher_range: tuple[int, int] | None) -> list[Stage]:
    """Who draws what, in order: the student from those of its first `steps` starting points that lie before the
    teacher's range, the teacher, and the student from where the teacher ends and from its later points."""
    starts = [model.first_token(block) for block in model.config["starts"][:steps]]
    low, high = (model.num_tokens,) * 2 if teacher_range is None else map(model.first_token, teacher_range)
    begins = [(first, False) for first in starts if first < low]
    if teacher_range is not None:
        later = sorted({high, *(first for first in starts if first > high)} - {model.num_tokens})
        begins += [(low, True), *((first, False) for first in later)]
    ends = [first for first, _ in begins[1:]] + [model.num_tokens]
    return [Stage(first, last, by_teacher) for (first, by_teacher), last in zip(begins, ends, strict=True)]


# The fingerprint of a teacher's weights as they were: taking it copies numbers from the device.
_FINGERPRINTS: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def _fingerprint(teacher: Any) -> str:
    """`fingerprint` of the weights, taken anew when one of them was moved or changed."""
    weights = list(teacher.state_dict(keep_vars=True).values())
    if any(type(weight) not in (Tensor, Parameter) or weight.is_inference() for weight in weights):
        # Quantised weights, and those that do not count their changes.
        return fingerprint(teacher)
    version = [(weight.data_ptr(), weight._version) for weight in weights]
    if _FINGERPRINTS.get(teacher, (None, ""))[0] != version:
        _FINGERPRINTS[teacher] = version, fingerprint(teacher)
    return _FINGERPRINTS[teacher][1]


def check_teacher(model: OneStep, teacher: Categorical | None, teacher_range: tuple[int, ...] | None) -> None:
    """Checks that a student can be mixed with a teacher over a range of its blocks.

    Raises:
        ValueError: one without the other, a teacher that is not the student's, or a range outside its blocks.
    """
    if teacher is None and teacher_range is None:
        return
    known = model.config["teacher"]
    if teacher_range is None:
        raise ValueError("a teacher draws the blocks of teacher_range: give both, or none")
    if known is None:
        raise ValueError("this student does not say what it was distilled from: it cannot be mixed with a teacher")
    if teacher is None:
        raise ValueError(
            f"teacher_range {teacher_range} needs teacher, what this student was made from: {known['name']}"
        )
    if (given := _fingerprint(teacher)) != known["fingerprint"]:
        raise ValueError(
            f"the teacher's weights ({given}) are not those that this student was distilled from "
            f"({known['name']}, {known['fingerprint']})"
        )
    blocks = len(teacher.block_sizes)
    if len(teacher_range) != 2 or not 0 <= teacher_range[0] < teacher_range[1] <= blocks:
        raise ValueError(f"teacher_range {teacher_range}; needed: two rising numbers of blocks in 0 ... {blocks}")


def check_one_step(
    model: OneStep,
    guidance: Guidance,
    steps: int,
    output: Output | None,
    teacher: Categorical | None,
    teacher_range: tuple[int, int] | None,
) -> None:
    """Checks the arguments of `sample_one_step`; errors as there."""
    starts = model.config["starts"]
    if guidance.active(1):
        raise ValueError(f"guidance_scale {guidance.scale}; a one-step model has learned its teacher's, leave it at 1")
    if not 1 <= steps <= len(starts):
        raise ValueError(f"steps {steps}; this model takes 1 ... {len(starts)}")
    if output not in (None, "soft", "codes", "vectors"):
        raise ValueError(f"output {output!r}; choose one of soft, codes, vectors")
    check_teacher(model, teacher, teacher_range)


@torch.no_grad()
def sample_one_step(
    model: OneStep,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    steps: int = 1,
    output: Output | None = None,
    teacher: Categorical | None = None,
    teacher_range: tuple[int, int] | None = None,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws all tokens of an image from its noise in one pass, or in a few. Lossy.

    Distilled Decoding, arXiv 2412.17153 section 3. A further step keeps the tokens before its starting point, puts the
    same noise behind them and predicts the rest anew.

    Args:
        model: a one-step student.
        condition: of the B images.
        noise: one seed an image; a standard normal vector a token.
        guidance: must be off: the teacher's is part of what the student learned.
        steps: 1 ... number of the model's `starts`.
        output: what the image is made of: mean codes ("soft"), the likeliest codes ("codes"), or the vectors of the
            second head from the model's block `late` on ("vectors", the paper); None is the model's own choice. The
            tokens returned are the likeliest codes in any case.
        teacher: the generator that the student was distilled from, to draw a part of the image.
        teacher_range: its blocks a ... b - 1 (tokens of raster models, scales of others) are drawn by the teacher's
            flow map, from the same noise, behind what the student drew; what follows them is drawn by the student
            again. (60, 80) is the paper's "pre-trained 61-81"; with (0, b) the student draws nothing before, up to the
            last block nothing behind. None: the teacher draws nothing.
        callback: called after every step of the student, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs: a step is one graph.

    Returns: tokens int64 [B, N], what the tokenizer makes the image of, and statistics.

    Raises:
        ValueError: a setting out of range, or a condition that does not fit the model.
    """
    check_one_step(model, guidance, steps, output, teacher, teacher_range)
    model.check_condition(condition)
    config, device = model.config, noise.device
    kind: Output = output or config["output"]
    begun = time.perf_counter()
    session = runtime.session(model, device, ("one_step", condition.batch, kind))
    given = {name: value for name, value in vars(condition).items() if value is not None}
    held = dataclasses.replace(condition, **{name: session.static(name, value) for name, value in given.items()})
    position_N = torch.arange(model.num_tokens, device=device)
    channels = model.codes.shape[1]
    noise_BNC = session.static("noise", initial_noise(noise, position_N[None], channels))
    ids_BN = session.static("ids", torch.zeros(noise.batch, model.num_tokens, dtype=torch.int64, device=device))
    source_BNC = session.static("source", torch.zeros_like(noise_BNC))
    late = model.first_token(config["late"])

    def step(first: int) -> None:
        known_N = position_N < first
        inputs_BNC = torch.where(known_N[:, None], model.codes[ids_BN], noise_BNC)
        logits_BNV, vectors_BNC = model(inputs_BNC, known_N, held)
        finite.note(logits_BNV)
        made_BNC = made_of(model, logits_BNV, vectors_BNC, kind, late)
        source_BNC.copy_(torch.where(known_N[:, None], source_BNC, made_BNC))
        ids_BN.copy_(torch.where(known_N, ids_BN, logits_BNV.argmax(-1)))

    def teach(stage: Stage, teacher: Categorical, teacher_range: tuple[int, int]) -> tuple[int, Session]:
        facts = config["teacher"]
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in facts["guidance"].items()
        }
        tokens_BN, count, drawing = redraw_blocks(
            teacher,
            condition,
            ids_BN,
            *teacher_range,
            noise_BNC=noise_BNC,
            codes_VC=model.codes,
            guidance=Guidance(**fields),
            filters={name: facts[name] for name in ("temperature", "top_k", "top_p")},
            steps=facts["flow_steps"],
            runtime=runtime,
        )
        drawn = slice(stage.first, stage.last)
        ids_BN[:, drawn] = tokens_BN[:, drawn]
        source_BNC[:, drawn] = model.codes[ids_BN[:, drawn]]
        return count, drawing

    passes, committed, sessions = {"generator": 0}, Counter[int](), [session]
    for stage in plan(model, steps, teacher_range):
        if stage.by_teacher:
            assert teacher is not None and teacher_range is not None
            passes["teacher"], drawing = teach(stage, teacher, teacher_range)
            sessions.append(drawing)
            committed.update(teacher.block_sizes[slice(*teacher_range)])
            continue
        session.run(functools.partial(step, stage.first), ("from", stage.first))
        passes["generator"] += 1
        committed[stage.last - stage.first] += 1
        if callback is not None and callback(model.num_tokens, ids_BN):
            break
    latent_BChw = model.latents(source_BNC)
    for each in sessions:
        each.check_finite()  # waits for the device
    statistics = SampleStatistics(
        forward_passes=passes,
        tokens_per_pass={size: count * noise.batch for size, count in sorted(committed.items())},
        seconds=time.perf_counter() - begun,
    )
    return SampleOutput(ids_BN.clone(), statistics, latent_BChw)
