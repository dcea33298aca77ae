"""Distilled Decoding 1: a student learns the teacher's flow map from pairs of noise and tokens.

Source: arXiv 2412.17153 section 3; its training code was never released. Losses: cross-entropy of the codes and
squared error of the vectors, on the positions that are noise. Differs from the paper: pairs grow while the student
trains, the vectors' loss is in code space instead of a perceptual distance of images, and a share of every batch
starts from a later point.

B images, N tokens, V codes, C code width.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.noise import Noise
from visar.core.output import SampleOutput
from visar.distill.options import DistillDD1, DistillPairs
from visar.distill.pairs import Pairs, PairTable, pairs_folder
from visar.generators.one_step import OneStepGenerator, student_of
from visar.io.pictures import to_uint8
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.flow import code_scale, initial_noise, sample_flow
from visar.samplers.one_step import sample_one_step
from visar.train.building import in_dtype, load_initial
from visar.train.log import Sheet
from visar.train.loop import Task, TrainResult, run_task
from visar.train.randomness import Draw, step_seed
from visar.train.run import Run


def load_teacher(name: str, device: torch.device) -> ImagePipeline:
    """A pipeline to distil: frozen, in bfloat16 on a GPU."""
    pipeline = load(name, device=device)
    for part in (pipeline.tokenizer, pipeline.generator):
        part.requires_grad_(False)
    return pipeline


def default_starts(teacher: Any) -> tuple[int, ...]:
    """0, and the block before which three in ten blocks stand (the paper: token 80 of 256, scale 4 or 5 of ten)."""
    blocks = len(teacher.block_sizes)
    return (0, math.ceil(0.3 * blocks)) if blocks > 1 else (0,)


def save_student(student: OneStepGenerator, teacher: ImagePipeline, dtype: str, folder: Path) -> None:
    """Writes a student and its teacher's tokenizer as a pipeline; in bfloat16 and its matrices packed for "int8"."""
    vocabulary, defaults = teacher.config["vocabulary"], {"sampler": "one_step", "guidance_scale": 1.0}
    packed = dtype == "int8"
    tokenizer, generator = (in_dtype(part, "bfloat16" if packed else dtype) for part in (teacher.tokenizer, student))
    pipeline = ImagePipeline(tokenizer, generator, vocabulary=vocabulary, defaults=defaults)
    pipeline.save_pretrained(folder, storage="int8" if packed else "plain")


def made_up_rows(student: OneStepGenerator, rows: int, device: torch.device) -> tuple[Tensor, Condition, Noise]:
    """Ids, conditions and noise of images that nobody asked for, to measure what a pass keeps."""
    ids_BN = torch.zeros(rows, student.num_tokens, dtype=torch.int64, device=device)
    return ids_BN, student.example_condition(rows).to(device), Noise(list(range(rows)), device)


class DD1Task(Task):
    """Steps and measurements of `distill_dd1`.

    Args:
        run: this process.
        options: of the run.
        pipeline: the teacher, frozen, on the device.
    """

    select, higher_is_better = "cross_entropy", False

    def __init__(self, run: Run, options: DistillDD1, pipeline: ImagePipeline) -> None:
        self.run, self.options, self.pipeline = run, options, pipeline
        block = options.pair_batch
        self.pairs = Pairs(pairs_folder(options.out, options.pairs), pipeline, block=block, steps=options.flow_steps)
        self.blocks = -(-options.num_pairs // block)
        self.first_blocks = min(self.blocks, max(2, -(-options.first_pairs // block)))
        self.held_out = max(1, min(round(options.held_out * options.num_pairs), 4096, block * (self.first_blocks - 1)))
        codebook_VC = pipeline.tokenizer.codebook.float()
        starts = tuple(options.starts) or default_starts(pipeline.generator)
        seed = step_seed(options.seed, 0, Draw.INITIAL)
        student = student_of(
            pipeline.generator,
            code_scale(codebook_VC),
            starts,
            codebook_VC,
            seed,
            drawn_by=self.pairs.drawn_by(options.teacher),
        )
        if options.initial is not None:
            load_initial(student, options.initial)
        student.network.requires_grad_(True)
        if hasattr(student.network, "pyramid"):
            student.network.pyramid.requires_grad_(False)
        part = run.add_part(
            student,
            options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            optimizer=options.optimizer,
        )
        self.parts = {"model": part}
        self.table = PairTable(self.pairs, run.device, self.blocks)
        self.position_N = torch.arange(student.num_tokens, device=run.device)
        self.first_N = torch.tensor([student.first_token(block) for block in starts], device=run.device)

    # -------------------------------------------------------------------------------------------------------- pairs
    def blocks_at(self, step: int) -> int:
        """Blocks known in a step: they grow evenly over the first 80 % of the steps, so that it is a function of the
        step and a resumed run trains on the same pairs."""
        share = min(1.0, step / max(1, 0.8 * self.options.steps))
        return self.first_blocks + int(share * (self.blocks - self.first_blocks))

    def _grow(self, step: int) -> None:
        needed = self.blocks_at(step)
        if needed > self.table.count:
            accelerator = self.run.accelerator
            self.pairs.ensure(
                needed, accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
            )
            self.table.read(needed)

    # -------------------------------------------------------------------------------------------------------- steps
    def step(self, step: int) -> dict[str, Tensor]:
        options, random, part_of = self.options, self.run.random, self.parts["model"]
        self._grow(step)
        generator = random.generator(step, Draw.DATA, shared=True)
        device, most = self.run.device, self.table.count * self.pairs.block
        index_B = torch.randint(self.held_out, most, (options.batch_size,), generator=generator, device=device)
        later_B = torch.rand(options.batch_size, generator=generator, device=device) < options.later_share
        which_B = torch.randint(max(1, len(self.first_N) - 1), later_B.shape, generator=generator, device=device)
        start_B = torch.where(later_B & (len(self.first_N) > 1), which_B + 1, 0)

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            own_B, own_start_B = self.run.share(index_B, part), self.run.share(start_B, part)
            return self._losses(part_of.call, part_of.module, own_B, own_start_B)

        return self.run.descend(part_of, step, losses)

    def _losses(
        self, call: Any, student: OneStepGenerator, index_B: Tensor, start_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of some pairs, and its parts."""
        return self._losses_of(call, student, *self.table.rows(index_B), start_B)

    def _losses_of(
        self, call: Any, student: OneStepGenerator, ids_BN: Tensor, condition: Condition, noise: Noise, start_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes_BNC = student.codes[ids_BN]
        known_BN = self.position_N < self.first_N[start_B][:, None]
        noise_BNC = initial_noise(noise, self.position_N[None], codes_BNC.shape[-1])
        inputs_BNC = torch.where(known_BN[..., None], codes_BNC, noise_BNC)
        logits_BNV, vectors_BNC = call(inputs_BNC, known_BN, condition)
        weight_BN = (~known_BN).float()
        weight_BN = weight_BN / weight_BN.sum()
        entropy_BN = functional.cross_entropy(logits_BNV.float().transpose(1, 2), ids_BN, reduction="none")
        entropy = (entropy_BN * weight_BN).sum()
        error = ((vectors_BNC.float() - codes_BNC).square().mean(-1) * weight_BN).sum()
        loss = entropy + self.options.vector_weight * error
        return loss, {"loss": loss, "cross_entropy": entropy, "vector_error": error}

    def rehearse(self, rows: int) -> list[Callable[[], Tensor]]:
        student, device = self.parts["model"].module, self.run.device
        made_up = made_up_rows(student, rows, device)
        start_B = torch.zeros(rows, dtype=torch.int64, device=device)
        return [lambda: self._losses_of(student, student, *made_up, start_B)[0]]

    # ------------------------------------------------------------------------------------------------- measurements
    def validate(self, model: Any) -> dict[str, float]:
        """On held-out pairs: cross-entropy in one step and from each later start, the vectors' error, and the share of
        tokens that are the map's."""
        self._grow(0)
        totals: dict[str, Tensor] = {}
        held = torch.arange(self.held_out, device=self.run.device)
        for start in range(len(self.first_N)):
            name = "" if start == 0 else f"_from_{int(self.first_N[start])}"
            for index_B in held.split(2 * self.run.part_size):
                start_B = torch.full_like(index_B, start)
                with self.run.autocast():
                    _, scalars = self._losses(model, model, index_B, start_B)
                    if start == 0:
                        scalars["same_tokens"] = self._agreement(model, index_B)
                for key, value in scalars.items():
                    key += name
                    totals[key] = totals.get(key, 0.0) + value.double() * len(index_B) / self.held_out
        return {key: float(value) for key, value in totals.items()}

    def _agreement(self, model: Any, index_B: Tensor) -> Tensor:
        ids_BN, condition, noise = self.table.rows(index_B)
        made = sample_one_step(model, condition, noise=noise, output="codes")
        return (made.tokens == ids_BN).float().mean()

    def sheets(self, model: Any) -> dict[str, Sheet]:
        """The same noise through the teacher's map and through the student in all its numbers of steps."""
        seeds = list(range(12))
        device = self.run.device
        condition, _ = self.pipeline.prepare_condition(seeds)
        condition, noise = condition.to(device), Noise(seeds, device)
        settings = {key: self.pairs.settings[key] for key in ("guidance", "temperature", "top_k", "top_p")}
        codebook = self.pipeline.tokenizer.codebook
        teacher = sample_flow(
            self.pipeline.generator,
            condition,
            noise=noise,
            codebook=codebook,
            steps=self.options.flow_steps,
            **settings,
        )
        made: list[SampleOutput] = [teacher]
        with self.run.autocast():
            for steps in range(len(self.first_N), 0, -1):
                made.append(sample_one_step(model, condition, noise=noise, steps=steps))
        images = [self.pipeline.decode(out.tokens if out.latent is None else out.latent, seeds) for out in made]
        return {"same_noise": Sheet(to_uint8(torch.cat(images)), len(seeds))}

    def save_model(self, model: Any, folder: Path) -> None:
        save_student(model, self.pipeline, self.options.save_dtype, folder)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state


def distill_dd1(options: DistillDD1) -> TrainResult:
    """Distils a student; see `DistillDD1`.

    Raises:
        ValueError: an option outside its range, a teacher that cannot be distilled, or a folder of another run.
        ImportError: a package is missing.
    """
    for name, low, high in (("held_out", 0.0, 0.5), ("later_share", 0.0, 1.0)):
        if not low <= getattr(options, name) <= high:
            raise ValueError(f"{name} {getattr(options, name)}; it must be in {low} ... {high}")
    if options.num_pairs < 2 * options.pair_batch:
        raise ValueError(
            f"num_pairs {options.num_pairs}; it must be at least 2 * pair_batch = {2 * options.pair_batch}"
        )
    run = Run(options)
    return run_task(run, DD1Task(run, options, load_teacher(options.teacher, run.device)))


def make_pairs(options: DistillPairs) -> str:
    """Makes pairs; see `DistillPairs`. Returns a line that says what is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = Pairs(
        options.out, load_teacher(options.teacher, device), block=options.pair_batch, steps=options.flow_steps
    )
    count = -(-options.num_pairs // options.pair_batch)
    pairs.ensure(count)
    return f"{count * options.pair_batch} pairs in {options.out}"
