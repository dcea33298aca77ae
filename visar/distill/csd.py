"""Distilled Decoding 2: conditional score distillation of an autoregressive teacher into a one-step generator.

Source: arXiv 2510.21003 sections 3 and 4; its code was never released. Two stages:

1. The score network is tuned to the teacher's exact score on sequences of the teacher ("ground-truth score").
2. It learns the score of what the generator makes, given the tokens before, while the generator moves to where that
   score and the teacher's agree; several updates of the network come before one of the generator.

The generator starts as a copy of the tuned network, fed with noise (the paper), or as a student of Distilled Decoding
1 (this project's, published nowhere). Differs from the paper: the form of the loss may be chosen, all weights are
tuned at once, and performance alignment is a run that starts from an earlier one's average and score network
(--initial, --score). A loss of pairs of noise and tokens may be added (--pair-weight), as in distribution matching
distillation, arXiv 2311.18828 section 3.3: it keeps the generator from giving up a part of the distribution.

B images, N tokens, K noisy vectors of a token, V codes, C code width. Vectors are in the scale of the noise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from visar.core.checks import COUNT, COUNT_OR_OFF, Range, check_ranges
from visar.core.condition import Condition
from visar.core.noise import Noise, Use
from visar.distill.dd1 import load_teacher, made_up_rows, save_student
from visar.distill.options import DistillDD2
from visar.distill.pairs import Pairs, PairTable, pairs_folder
from visar.distill.score import FORMS, ScoreNetwork, TeacherScore, between, fake_loss, tuning_loss
from visar.generators.one_step import OneStepGenerator, student_of
from visar.io.files import atomic_write, load_weights, tensors_only
from visar.io.pictures import to_uint8
from visar.pipelines.components import load_generator
from visar.pipelines.image import ImagePipeline
from visar.samplers.flow import code_scale, initial_noise, sample_flow
from visar.samplers.one_step import made_of, sample_one_step
from visar.tokenizers.quantizer import nearest_codes
from visar.train.log import Sheet
from visar.train.loop import Task, TrainResult, run_task
from visar.train.randomness import Draw, step_seed
from visar.train.run import Run

_TUNING_STEPS = 600
_FAKE_TIMES = (0.02, 1.0)
# Seeds of a run's images begin here: beyond those of pairs.
_FIRST_SEED = 2**50
_RANGES = {
    "num_pairs": COUNT,
    "pair_batch": COUNT,
    "held_out": COUNT,
    "tuning_steps": COUNT_OR_OFF,
    "tuning_learning_rate": Range(0, 1000, open_low=True),
    "fake_learning_rate": Range(0, 1000, open_low=True),
    "first_fake": COUNT,
    "fake_updates": COUNT,
    "noise_draws": Range(1, 1024),
    "pair_weight": Range(0, 1000),
    "times": Range(0, 1, open_low=True),
    "head_width": Range(1, 65_536),
    "head_depth": Range(1, 1024),
}
_VOCABULARY_HEADS = {"NextScaleTransformer": "head", "RasterGPT": "output"}
_SAME = ("vocab_size", "grid", "scales", "num_classes", "attributes", "word_vocab_size", "num_words", "words")


def load_student(name: Path, pipeline: ImagePipeline, output: str | None) -> OneStepGenerator:
    """A student to start from, float32 on the CPU.

    Args:
        name: folder of a pipeline, or an embedded name.
        pipeline: its teacher.
        output: what its images are made of; None = as it is.

    Raises:
        ValueError: no such pipeline, no one-step student, one of another teacher, or one without that output.
    """
    student = load_generator(name, device="cpu", dtype="float32")
    if not isinstance(student, OneStepGenerator):
        raise ValueError(f"initial {name} is a {type(student).__name__}; needed: a student of `visar distill dd1`")
    teacher, network = pipeline.generator.config, student.network
    differing = [key for key in _SAME if _plain(teacher.get(key)) != _plain(network.config.get(key))]
    codebook_VC = pipeline.tokenizer.codebook.float().cpu()
    if not differing and not torch.allclose(network.codes.float(), codebook_VC, rtol=0.02, atol=0.02):
        differing = ["codebook"]
    if differing:
        raise ValueError(f"initial {name} is no student of this teacher, it has another {', '.join(differing)}")
    if "token_input" in network.config:
        network.set_codebook(codebook_VC)  # saved in bfloat16
    output = student.config["output"] if output is None else output
    if output != "vectors" and student.config["velocity_head"] is not None:
        raise ValueError(f"initial {name} makes images of vectors, not of {output!r}: give a student of dd1")
    student.register_to_config(output=output, late=0)
    return student


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _freeze(network: Any, *unused: nn.Module) -> None:
    """Leaves out of the training what gets no gradient."""
    for module in (*unused, *(each for name, each in network.named_children() if name == "pyramid")):
        module.requires_grad_(False)


class DD2Task(Task):
    """Steps and measurements of `distill_dd2`.

    Args:
        run: this process.
        options: of the run.
        pipeline: the teacher, frozen, on the device.
    """

    # No held-out loss says which generator is best: the newest is kept.
    select, higher_is_better = "updates", True

    def __init__(self, run: Run, options: DistillDD2, pipeline: ImagePipeline) -> None:
        self.run, self.options, self.pipeline = run, options, pipeline
        self.tuning_steps = tuning_steps(options)
        codebook_VC = pipeline.tokenizer.codebook.float()
        seed = step_seed(options.seed, 0, Draw.INITIAL)
        self.published = options.initial is None
        student = None if options.initial is None else load_student(options.initial, pipeline, options.output)
        scale = code_scale(codebook_VC) if student is None else student.config["code_scale"]

        self.pairs = Pairs(
            pairs_folder(options.out, options.pairs), pipeline, block=options.pair_batch, steps=options.flow_steps
        )
        head, drawn_by = (options.head_width, options.head_depth), self.pairs.drawn_by(options.teacher)

        def untuned() -> OneStepGenerator:
            return student_of(pipeline.generator, scale, (0,), codebook_VC, seed, head, drawn_by=drawn_by)

        self.score, self.student = ScoreNetwork(untuned()), untuned() if student is None else student
        if options.score is not None:
            load_score(self.score, options.score)
            if self.published:
                self.score.copy_to(self.student)
        self._leave_out_unused()
        settings: dict[str, Any] = dict(betas=(0.9, 0.95), weight_decay=options.weight_decay)
        self.parts = {
            "model": run.add_part(self.student, options.learning_rate, optimizer=options.optimizer, **settings),
            "guidance": run.add_part(
                self.score, options.fake_learning_rate, optimizer=options.score_optimizer, **settings
            ),
        }
        if options.compile:
            self.score.compile()
        self.codes = self.student.codes
        self.teacher = TeacherScore(pipeline, self.codes, scale, options.history)
        self.blocks = -(-options.num_pairs // options.pair_batch)
        self.table = PairTable(self.pairs, run.device, self.blocks)
        self.position_1N = torch.arange(self.student.num_tokens, device=run.device)[None]
        self.unknown_N = torch.zeros(self.student.num_tokens, dtype=torch.bool, device=run.device)
        self.updates = 0
        self.start_images: Tensor | None = None
        self._teacher_images: Tensor | None = None

    def _leave_out_unused(self) -> None:
        student = self.student
        student.requires_grad_(True)
        name = _VOCABULARY_HEADS[student.config["network_class"]]
        vectors = student.config["output"] == "vectors"
        _freeze(student.network, getattr(student.network, name) if vectors else student.vector_head)
        _freeze(self.score.network, getattr(self.score.network, name))

    def _read_pairs(self) -> None:
        if self.table.count == 0:
            accelerator = self.run.accelerator
            place = (accelerator.process_index, accelerator.num_processes)
            self.pairs.ensure(self.blocks, *place, accelerator.wait_for_everyone)
            self.table.read(self.blocks)

    # -------------------------------------------------------------------------------------------------------- draws
    def _rows(self, step: int, update: int, part: int) -> tuple[Tensor, Condition, Noise, Noise]:
        """This process's rows of a micro-batch: ids, conditions and noise of pairs, and noise that no pair has."""
        options, device = self.options, self.run.device
        generator = self.run.random.generator(step, Draw.DATA, part=update, shared=True)
        size, most = (options.batch_size,), self.table.count * self.pairs.block
        index_B = torch.randint(options.held_out, most, size, generator=generator, device=device)
        seed_B = torch.randint(_FIRST_SEED, 2**62, size, generator=generator, device=device)
        return *self.table.rows(self.run.share(index_B, part)), Noise(self.run.share(seed_B, part), device)

    def _noisy(
        self, vectors_BNC: Tensor, noise: Noise, times: tuple[float, ...], draws: int, shared: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t and e [K, B, N, C], and t [K, B, N], of K draws.

        Args:
            vectors_BNC: q.
            noise: of the images.
            times: range of t.
            draws: K.
            shared: one time an image instead of one a token.
        """
        low, high = times
        position_BN = self.position_1N.expand(noise.batch, -1)
        place = position_BN[:, :1] if shared else position_BN
        noise_KBNC, time_KBN = (
            torch.stack(values)
            for values in zip(
                *(
                    (
                        noise.normal(Use.LATENT, position_BN, vectors_BNC.shape[2:], counter=2 * draw + 1),
                        noise.uniform(Use.LATENT, place, counter=2 * draw + 2).expand_as(position_BN),
                    )
                    for draw in range(draws)
                ),
                strict=True,
            )
        )
        time_KBN = low + (high - low) * time_KBN
        return between(vectors_BNC, noise_KBNC, time_KBN), noise_KBNC, time_KBN

    def _made(self, call: Any, student: OneStepGenerator, condition: Condition, noise: Noise) -> tuple[Tensor, Tensor]:
        """q, what the generator makes, float32 [B, N, C]; and its logits [B, N, V]."""
        noise_BNC = initial_noise(noise, self.position_1N, self.codes.shape[1])
        logits_BNV, vectors_BNC = call(noise_BNC, self.unknown_N, condition)
        output = student.config["output"]
        if output == "vectors":
            return vectors_BNC, logits_BNV
        with torch.autocast(noise_BNC.device.type, enabled=False):
            soft_BNC = made_of(student, logits_BNV, vectors_BNC, "soft", 0)
            if output == "codes":  # the codes themselves, with the gradient of mean codes
                return made_of(student, logits_BNV, vectors_BNC, "codes", 0) + soft_BNC - soft_BNC.detach(), logits_BNV
            return soft_BNC, logits_BNV

    def _pair_loss(self, made_BNC: Tensor, logits_BNV: Tensor, ids_BN: Tensor) -> Tensor:
        """How far the generator is from the teacher's flow map: the squared error of its vectors, else the
        cross-entropy of its codes."""
        if self.student.config["output"] == "vectors":
            return (made_BNC - self.codes[ids_BN]).square().mean()
        return functional.cross_entropy(logits_BNV.float().transpose(1, 2), ids_BN)

    def _histories(self, vectors_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """What the score network and the teacher read of the tokens before."""
        history = self.score.history(vectors_BNC)
        return history, self.teacher.history(vectors_BNC) if self.teacher.snapped else history

    # -------------------------------------------------------------------------------------------------------- steps
    def step(self, step: int) -> dict[str, Tensor]:
        self._read_pairs()
        guidance = self.parts["guidance"]
        if step < self.tuning_steps:
            guidance.learning_rate = self.options.tuning_learning_rate
            values = self.run.descend(guidance, step, self._tuning(step))
            if self.published:
                self.score.copy_to(self.student)
            return values
        if step == self.tuning_steps and self.run.is_main:
            self._begin()
        guidance.learning_rate = self.options.fake_learning_rate
        count = self.options.first_fake if step == self.tuning_steps else self.options.fake_updates
        for update in range(count):
            fake = self.run.descend(guidance, step, self._following(step, 1 + update))
        values = self.run.descend(self.parts["model"], step, self._moving(step))
        self.updates = step + 1 - self.tuning_steps
        return {**values, "fake_loss": fake["loss"], "fake_gradient_norm": fake["gradient_norm"]}

    def _begin(self) -> None:
        """Keeps what the second stage starts from: the tuned network, and images of the generator."""
        if self.tuning_steps:
            self._save_score("tuned")
        self.start_images = self._images(self.student)

    def _tuning(self, step: int) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            ids_BN, condition, _, noise = self._rows(step, 0, part)
            loss = self._tuning_loss(self.parts["guidance"].call, ids_BN, condition, noise)
            return loss, {"loss": loss}

        return losses

    def _tuning_loss(self, call: Any, ids_BN: Tensor, condition: Condition, noise: Noise) -> Tensor:
        codes_BNC = self.codes[ids_BN]
        history, told = self._histories(codes_BNC)
        noisy, _, time = self._noisy(codes_BNC, noise, _FAKE_TIMES, self.options.noise_draws)
        target = self.teacher.denoised(noisy, time, told, condition)
        return tuning_loss(call(noisy, time, history, condition), noisy, time, target)

    def _following(self, step: int, update: int) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
        """Losses of the score network on what the generator makes."""

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            _, condition, _, noise = self._rows(step, update, part)
            with torch.no_grad():
                made_BNC, _ = self._made(self.student, self.student, condition, noise)
            noisy, drawn, time = self._noisy(made_BNC, noise, _FAKE_TIMES, self.options.noise_draws)
            velocity = self.parts["guidance"].call(noisy, time, self.score.history(made_BNC), condition)
            loss = fake_loss(velocity, made_BNC, drawn, time)
            return loss, {"loss": loss}

        return losses

    def _moving(self, step: int) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
        """Losses of the generator. Tokens before are given as they are: no gradient passes through them."""
        weight = self.options.pair_weight

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            ids_BN, condition, of_pairs, noise = self._rows(step, 0, part)
            begin = of_pairs if weight else noise
            made_BNC, logits_BNV = self._made(self.parts["model"].call, self.student, condition, begin)
            through = self.options.form == "sid"
            noisy, _, time = self._noisy(
                made_BNC if through else made_BNC.detach(), noise, self.options.times, 1, self.options.shared_times
            )
            with torch.set_grad_enabled(through):
                call = self._frozen_score if through else self.score
                teacher_BNC, fake_BNC = self._scores(call, made_BNC.detach(), noisy, time, condition)
            loss = FORMS[self.options.form](made_BNC, teacher_BNC, fake_BNC)
            with torch.no_grad():
                gap, difference = (made_BNC - teacher_BNC).abs().mean(), (teacher_BNC - fake_BNC).abs().mean()
            scalars = {"loss": loss, "teacher_gap": gap, "score_gap": difference}
            if weight:
                scalars["pair_loss"] = self._pair_loss(made_BNC, logits_BNV, ids_BN)
                loss = loss + weight * scalars["pair_loss"]
            return loss, scalars

        return losses

    def _frozen_score(self, *arguments: Any) -> Tensor:
        """The score network, differentiable in what it is given but not in its weights."""
        frozen = {name: value.detach() for name, value in self.score.named_parameters()}
        return torch.func.functional_call(self.score, frozen, arguments)

    def _scores(
        self, call: Any, made_BNC: Tensor, noisy_1BNC: Tensor, time_1BN: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """What the teacher and the score network denoise, given the tokens before in `made_BNC`; [B, N, C] each."""
        history, told = self._histories(made_BNC)
        teacher_1BNC = self.teacher.denoised(noisy_1BNC, time_1BN, told, condition)
        fake_1BNC = noisy_1BNC - time_1BN[..., None] * call(noisy_1BNC, time_1BN, history, condition)
        return teacher_1BNC[0], fake_1BNC[0]

    def rehearse(self, rows: int) -> list[Callable[[], Tensor]]:
        _, condition, noise = made_up_rows(self.student, rows, self.run.device)
        vectors_BNC = initial_noise(noise, self.position_1N, self.codes.shape[1])
        history = self.score.history(vectors_BNC)
        noisy, _, time = self._noisy(vectors_BNC, noise, _FAKE_TIMES, self.options.noise_draws)
        return [
            lambda: self.score(noisy, time, history, condition),
            lambda: self._made(self.student, self.student, condition, noise)[0],
        ]

    # ------------------------------------------------------------------------------------------------- measurements
    def validate(self, model: Any) -> dict[str, float]:
        """On held-out conditions.

        energy: energy score of the generator's latents against the teacher's of other noise, E|x - y| - E|x - x'| / 2
        by root mean squares; the least of all generators has the teacher's distribution. diversity: E|x - x'| in it.
        map_distance: to the teacher's latents of the same noise. code_distance: from vectors to the nearest codes.
        While tuning, tuning_loss; then how far vectors are from what the teacher denoises (teacher_gap), both scores
        from each other (score_gap), and fake_loss.
        """
        totals: dict[str, Tensor] = {}
        held = torch.arange(self.options.held_out, device=self.run.device)
        for index_B in held.split(self.run.part_size):
            with self.run.autocast():
                scalars = self._measured(model, index_B)
            for name, value in scalars.items():
                totals[name] = totals.get(name, 0.0) + value.double() * len(index_B) / len(held)
        return {name: float(value) for name, value in totals.items()} | {"updates": float(self.updates)}

    def _measured(self, model: Any, index_B: Tensor) -> dict[str, Tensor]:
        ids_BN, condition, noise = self.table.rows(index_B)
        made_BNC, other_BNC = (
            self._made(model, model, condition, each)[0]
            for each in (noise, Noise(noise.seeds_B + _FIRST_SEED, self.run.device))
        )
        own, other, real = (model.latents(vectors).flatten(1) for vectors in (made_BNC, other_BNC, self.codes[ids_BN]))
        apart, error, diversity = (
            torch.sqrt((first - second).square().mean(1)).mean()
            for first, second in ((own, real), (other, real), (own, other))
        )
        nearest_M = nearest_codes(made_BNC.flatten(0, 1), self.codes)
        distance = (made_BNC.flatten(0, 1) - self.codes[nearest_M]).norm(dim=-1).mean()
        values = {"energy": error - diversity / 2, "diversity": diversity, "map_distance": apart}
        values["code_distance"] = distance
        if not self.updates:
            return values | {"tuning_loss": self._tuning_loss(self.score, ids_BN, condition, noise)}
        noisy, drawn, time = self._noisy(made_BNC, noise, self.options.times, 1)
        teacher_BNC, fake_BNC = self._scores(self.score, made_BNC, noisy, time, condition)
        velocity = (noisy - fake_BNC) / time[..., None]
        return values | {
            "teacher_gap": (made_BNC - teacher_BNC).abs().mean(),
            "score_gap": (teacher_BNC - fake_BNC).abs().mean(),
            "fake_loss": fake_loss(velocity, made_BNC, drawn, time),
        }

    def _images(self, model: Any, output: Any = None) -> Tensor:
        """Images uint8 of the sheet's seeds."""
        condition, noise = self._sheet_rows()
        with self.run.autocast():
            out = sample_one_step(model, condition, noise=noise, output=output)
        seeds = noise.seeds_B.tolist()
        return to_uint8(self.pipeline.decode(out.tokens if out.latent is None else out.latent, seeds))

    def _sheet_rows(self) -> tuple[Condition, Noise]:
        seeds = list(range(12))
        condition, _ = self.pipeline.prepare_condition(seeds)
        return condition.to(self.run.device), Noise(seeds, self.run.device)

    def sheets(self, model: Any) -> dict[str, Sheet]:
        """The same noise through the teacher's map, the generator that the second stage began with, the generator as
        it is, and its nearest codes."""
        if self._teacher_images is None:
            condition, noise = self._sheet_rows()
            settings = {name: self.pairs.settings[name] for name in ("guidance", "temperature", "top_k", "top_p")}
            codebook, steps = self.pipeline.tokenizer.codebook, self.options.flow_steps
            out = sample_flow(
                self.pipeline.generator, condition, noise=noise, codebook=codebook, steps=steps, **settings
            )
            self._teacher_images = to_uint8(self.pipeline.decode(out.tokens, noise.seeds_B.tolist()))
        rows = [self._teacher_images, self.start_images, self._images(model), self._images(model, "codes")]
        known = [row.cpu() for row in rows if row is not None]
        return {"same_noise": Sheet(torch.cat(known), len(known[0]))}

    def _save_score(self, name: str) -> None:
        state = {key: value.detach().cpu().contiguous() for key, value in self.score.state_dict().items()}
        with atomic_write(self.options.out / f"{name}.safetensors") as temporary:
            save_file(state, temporary)

    def save_model(self, model: Any, folder: Path) -> None:
        save_student(model, self.pipeline, self.options.save_dtype, folder)
        self._save_score("guidance")

    def state_dict(self) -> dict[str, Tensor]:
        images = {} if self.start_images is None else {"start_images": self.start_images.cpu()}
        return {"updates": torch.tensor(self.updates), **images}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.updates, self.start_images = int(state["updates"]), state.get("start_images")


def load_score(score: ScoreNetwork, path: Path) -> None:
    """Fills a score network with saved weights.

    Raises:
        ValueError: no such file, or a network of other sizes.
    """
    try:
        score.load_state_dict(tensors_only(load_weights(path), path))
    except RuntimeError as error:
        raise ValueError(f"score {path} is of another teacher, or has another head: {error}") from error


def tuning_steps(options: DistillDD2) -> int:
    """Steps that tune: as given, else 600, or none where the score network is given."""
    if options.tuning_steps is not None:
        return options.tuning_steps
    return _TUNING_STEPS if options.score is None else 0


def distill_dd2(options: DistillDD2) -> TrainResult:
    """Distils a student; see `DistillDD2`.

    Raises:
        ValueError: an option outside its range, a teacher that cannot be distilled, a student or a score network of
            another teacher, or a folder of another run.
        ImportError: a package is missing.
    """
    check_ranges(options, _RANGES)
    if options.form not in FORMS:
        raise ValueError(f"form {options.form!r}; choose one of {', '.join(FORMS)}")
    if len(options.times) != 2 or options.times[0] >= options.times[1]:
        raise ValueError(f"times {options.times}; needed: two numbers that rise, such as (0.05, 0.98)")
    if options.held_out >= options.num_pairs:
        raise ValueError(f"held_out {options.held_out}; it must be below num_pairs {options.num_pairs}")
    if not 0 <= tuning_steps(options) < options.steps:
        raise ValueError(f"tuning_steps {tuning_steps(options)}; they must be fewer than steps {options.steps}")
    if options.output is not None and options.initial is None:
        raise ValueError(f"output {options.output!r} is for a student that is given as initial")
    run = Run(options)
    return run_task(run, DD2Task(run, options, load_teacher(options.teacher, run.device)))
