"""Score distillation: exact scores, losses and what their gradients reach, two kinds of generator from the options."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visar.cli.main import parse
from visar.core.condition import Condition
from visar.core.noise import Noise
from visar.distill.csd import DD2Task, distill_dd2, load_student
from visar.distill.dd1 import save_student
from visar.distill.options import DistillDD2
from visar.distill.score import (
    ScoreNetwork,
    TeacherScore,
    between,
    denoised,
    dmd_loss,
    fake_loss,
    sid_loss,
    tuning_loss,
)
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.one_step import student_of
from visar.generators.raster import RasterGPT
from visar.layers.diffusion_head import DiffusionHead
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.flow import code_scale
from visar.samplers.one_step import sample_one_step
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.quantizer import nearest_codes
from visar.tokenizers.vq import VQTokenizer
from visar.train.run import Run

SMALL = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=16, codebook_dim=4)
KINDS = ("raster", "table", "scales")


def teacher(kind: str) -> ImagePipeline:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, codebook_width=4, width=16, num_layers=1, num_heads=2, num_classes=3)
    if kind == "scales":
        tokenizer = MultiScaleVQTokenizer(scales=(1, 2), **SMALL)
        generator = NextScaleTransformer(scales=(1, 2), **sizes)
    else:
        tokenizer = VQTokenizer(image_size=4, latent_channels=8, **SMALL)
        reads = "table" if kind == "table" else "codebook"
        generator = RasterGPT(grid=(2, 2), hidden_width=24, token_input=reads, **sizes)
    for parameter in [*tokenizer.parameters(), *generator.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    if kind == "scales":
        generator.set_tokenizer(tokenizer.quantizer)
    elif kind == "raster":
        generator.set_codebook(tokenizer.codebook)
    defaults = {"guidance_scale": 1.5, "top_k": 12}
    for module in (tokenizer, generator):
        module.eval().requires_grad_(False)
    return ImagePipeline(tokenizer, generator, defaults=defaults)


@pytest.fixture(scope="module")
def teachers() -> dict[str, ImagePipeline]:
    return {kind: teacher(kind) for kind in KINDS}


def conditions(count: int) -> Condition:
    return Condition(labels_BA=torch.arange(count)[:, None] % 3)


def student(pipeline: ImagePipeline, head: tuple[int, int] | None = (16, 1)):
    codebook = pipeline.tokenizer.codebook.detach()
    made = student_of(pipeline.generator, code_scale(codebook), (0,), codebook, 0, head)
    for module in made.children():
        if isinstance(module, DiffusionHead):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


# -------------------------------------------------------------------------------------------------- exact scores
def test_the_denoised_vector_gives_the_gradient_of_the_log_density():
    torch.manual_seed(0)
    codes, logits = torch.randn(6, 3).double(), torch.randn(2, 4, 6).double()
    logits[:, :, 2] = -torch.inf
    noisy, time = torch.randn(2, 4, 3).double().requires_grad_(), torch.rand(2, 4).double() * 0.9 + 0.1
    distance = noisy[:, :, None] - (1 - time[..., None, None]) * codes
    density = torch.log_softmax(logits, -1) - distance.square().sum(-1) / (2 * time[..., None] ** 2)
    expected = torch.autograd.grad(torch.logsumexp(density, -1).sum(), noisy)[0]
    exact = denoised(noisy.detach(), time.float(), logits.float(), codes.float())
    score = ((1 - time[..., None]) * exact - noisy) / time[..., None] ** 2
    assert torch.allclose(score, expected, atol=2e-3, rtol=1e-3)
    at_noise = denoised(noisy.detach(), torch.ones(2, 4), logits.float(), codes.float())
    assert torch.allclose(at_noise.double(), torch.softmax(logits, -1) @ codes, atol=1e-5)  # the score is then -x


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_guided_filtered_and_told_the_tokens_before(teachers, kind):
    pipeline = teachers[kind]
    model, codebook = pipeline.generator, pipeline.tokenizer.codebook
    scale = code_scale(codebook)
    codes = codebook * scale
    condition, ids = conditions(3), torch.randint(16, (3, model.num_tokens))
    for history in ("vectors", "codes"):
        score = TeacherScore(pipeline, codes, scale, history)
        logits = score.logits(score.history(codes[ids]), condition)
        both = model(ids, condition).float(), model(ids, model.null_condition(condition)).float()
        guided = both[1] + 1.5 * (both[0] - both[1])
        kept = logits > -torch.inf
        assert bool((kept.sum(-1) == 12).all())
        assert torch.allclose(logits[kept], guided[kept], atol=1e-4)
        shown, moved = codes[ids], codes[ids] + 0.3 * torch.randn(3, model.num_tokens, 4)
        same = torch.equal(score.history(shown), score.history(shown + 1e-6 * torch.randn_like(shown)))
        assert same == (history == "codes" or kind == "table")
        noisy, time = torch.randn(2, 3, model.num_tokens, 4), torch.rand(2, 3, model.num_tokens) * 0.9 + 0.1
        told = score.history(moved)
        out = score.denoised(noisy, time, told, condition)
        one = score.denoised(noisy[1:, 2:], time[1:, 2:], told[2:], condition.rows(slice(2, 3)))
        assert torch.allclose(out[1:, 2:], one, atol=1e-5)
    with pytest.raises(ValueError, match="history 'ids'; choose vectors or codes"):
        TeacherScore(pipeline, codes, scale, "ids")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_networks_see_the_tokens_before_and_generators_their_own_noise_too(teachers, kind):
    made = student(teachers[kind])
    network, count = ScoreNetwork(made), made.num_tokens
    history, noisy, time = (torch.randn(1, count, 4), torch.randn(1, 1, count, 4), torch.rand(1, 1, count))
    unknown = torch.zeros(count, dtype=torch.bool)
    block = [0, 1, 1, 1, 1] if kind == "scales" else list(range(count))
    for place in range(count):
        other = history.clone()
        other[:, place] += 1.0
        first, second = (network(noisy, time, network.history(each), conditions(1)) for each in (history, other))
        after = [token for token in range(count) if block[token] > block[place]]
        assert torch.nonzero((first - second).abs().amax((0, 1, 3)) > 1e-6).flatten().tolist() == after
        first, second = (made(each, unknown, conditions(1))[1] for each in (history, other))
        assert torch.nonzero((first - second).abs().amax((0, 2)) > 1e-6).flatten().tolist() == [place, *after]


@torch.no_grad()
def test_a_generator_with_a_velocity_head_is_a_sampler_s_student(teachers):
    made = student(teachers["scales"])
    out = sample_one_step(made, conditions(2), noise=Noise([3, 4]))
    assert out.statistics.forward_passes == {"generator": 1}
    alone = sample_one_step(made, conditions(2).rows(slice(1, 2)), noise=Noise([4]))
    assert torch.allclose(alone.latent[0], out.latent[1], atol=1e-5)
    assert torch.equal(alone.tokens[0], out.tokens[1])
    snapped = sample_one_step(made, conditions(2), noise=Noise([3, 4]), output="codes")
    assert torch.allclose(snapped.latent, made.latents(made.codes[out.tokens]), atol=1e-5)
    again = type(made).from_config(json.loads(made.to_json_string()))
    again.load_state_dict(made.state_dict())
    assert torch.equal(sample_one_step(again.eval(), conditions(2), noise=Noise([3, 4])).latent, out.latent)
    with pytest.raises(ValueError, match=r"starts \(0, 1\), output 'vectors'; a velocity head takes \(0,\)"):
        type(made).from_config({**json.loads(made.to_json_string()), "starts": [0, 1]})


# -------------------------------------------------------------------------------------------------- losses
def test_exact_targets_and_samples_have_one_regression():
    """The velocity that is best for samples of the teacher is that of its exact denoised vectors."""
    torch.manual_seed(0)
    codes, logits, time = torch.randn(5, 2), torch.randn(5), torch.full((40_000, 1), 0.6)
    ids = torch.multinomial(torch.softmax(logits, -1), 40_000, replacement=True)
    vectors, noise = codes[ids][:, None], torch.randn(40_000, 1, 2)
    noisy = between(vectors, noise, time)
    exact = denoised(noisy, time, logits.expand(40_000, 1, 5), codes)
    velocity = (noisy - exact) / time[..., None]
    assert tuning_loss(velocity, noisy, time, exact) < 1e-10
    features = torch.cat([noisy, velocity, torch.ones_like(time[..., None])], -1)[:, 0]
    difference = torch.linalg.lstsq(features, (noise - vectors - velocity)[:, 0]).solution
    assert difference.abs().max() < 0.06  # nothing of x_t or the velocity says where samples lie beside it
    better, worse = (fake_loss(each, vectors, noise, time) for each in (velocity, velocity + 0.3))
    assert better < worse


@pytest.mark.parametrize("form", [dmd_loss, sid_loss])
def test_a_generator_that_samples_the_teacher_is_not_moved(form):
    """Mean gradient in the parameters of a family that holds the teacher's distribution, with exact scores of both."""
    torch.manual_seed(0)
    codes, logits = torch.randn(4, 2), torch.randn(4)
    ids = torch.multinomial(torch.softmax(logits, -1), 20_000, replacement=True)

    def moved(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard error of the gradient in a shift of all vectors; the family's own score is exact too."""
        offset = torch.full((20_000, 1, 2), shift, requires_grad=True)
        vectors = codes[ids][:, None] + offset
        noise, time = torch.randn_like(vectors), torch.rand(20_000, 1) * 0.5 + 0.4
        noisy = between(vectors, noise, time)
        expanded = logits.expand(20_000, 1, 4)
        ours = denoised(noisy, time, expanded, codes + shift)
        form(vectors, denoised(noisy, time, expanded, codes), ours).backward()
        gradient = offset.grad[:, 0] * 40_000
        return gradient.mean(0), gradient.std(0) / 20_000**0.5

    mean, error = moved(0.0)
    assert bool((mean.abs() <= 3.5 * error).all())
    mean, error = moved(0.4)
    assert bool((mean > 5 * error).all())  # downhill is back


@pytest.mark.parametrize("form", ["dmd", "sid"])
@pytest.mark.parametrize("kind", ["raster", "scales"])
def test_gradients_reach_a_token_s_own_vector_alone_and_no_score(teachers, tmp_path, form, kind):
    options = settings(tmp_path, form=form)
    pipeline = teachers[kind]
    task = DD2Task(Run(options), options, pipeline)
    for parameter in task.score.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    vectors = torch.randn(2, task.student.num_tokens, 4, requires_grad=True)
    noisy, _, time = task._noisy(vectors, Noise([1, 2]), options.times, 1)
    scores = task._scores(task._frozen_score, vectors.detach(), noisy, time, conditions(2))
    loss = {"dmd": dmd_loss, "sid": sid_loss}[form]
    for place in range(vectors.shape[1]):
        one = slice(place, place + 1)
        value = loss(vectors[:, one], scores[0][:, one].detach(), scores[1][:, one].detach())
        through = loss(vectors[:, one], *(score[:, one] for score in scores))
        for each in (value, through):
            gradient = torch.autograd.grad(each, vectors, retain_graph=True)[0].abs().amax((0, 2)) > 0
            assert gradient.nonzero().flatten().tolist() == [place]
    through.backward()
    assert all(parameter.grad is None for parameter in task.score.parameters())


def test_a_generator_of_codes_moves_by_the_gradient_of_mean_codes(teachers, tmp_path):
    teachers["raster"].save_pretrained(tmp_path / "teacher")
    save_student(student(teachers["raster"], None), teachers["raster"], "float32", tmp_path / "student")
    made, gradients = {}, {}
    for output in ("soft", "codes"):
        options = settings(tmp_path, initial=tmp_path / "student", output=output)
        task = DD2Task(Run(options), options, teachers["raster"])
        made[output], logits = task._made(task.student, task.student, conditions(3), Noise([1, 2, 3]))
        probe = torch.randn(made[output].shape, generator=torch.Generator().manual_seed(0))
        (made[output] * probe).sum().backward()
        gradients[output] = task.student.network.output.weight.grad
    assert torch.allclose(made["codes"], task.codes[logits.argmax(-1)], atol=1e-5)
    assert not torch.allclose(made["codes"], made["soft"], atol=1e-2)
    assert torch.equal(gradients["codes"], gradients["soft"])


def test_two_tokens_that_depend_on_each_other_are_learned():
    """The second token is a permutation of the first nine times out of ten: what independent draws cannot do. The
    generator starts at mean codes, beyond independent draws."""
    torch.manual_seed(0)
    table = torch.full((4, 4), 0.03)
    table[torch.arange(4), torch.tensor([2, 0, 3, 1])] = 0.91
    first = torch.tensor([0.4, 0.3, 0.2, 0.1])
    codebook = torch.nn.functional.normalize(torch.randn(4, 4), dim=-1)
    sizes = dict(vocab_size=4, grid=(1, 2), width=16, num_layers=1, num_heads=2, hidden_width=32, num_classes=1)
    model = RasterGPT(**sizes, token_input="codebook", codebook_width=4)
    model.reset_parameters()
    model.set_codebook(codebook)
    made, fresh = (student_of(model, code_scale(codebook), (0,), codebook, 0, (32, 1)) for _ in range(2))
    score, codes, unknown = ScoreNetwork(fresh), made.codes, torch.zeros(2, dtype=torch.bool)
    condition = Condition(labels_BA=torch.zeros(128, 1, dtype=torch.int64))

    def exact(noisy: torch.Tensor, time: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        told = nearest_codes(before[:, 0], codes)
        return denoised(noisy, time, torch.stack([first.log().expand(128, -1), table[told].log()], 1), codes)

    def drawn(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise, time = torch.randn_like(vectors), torch.rand(128, 2) * 0.95 + 0.03
        return between(vectors, noise, time), noise, time

    def velocity(noisy: torch.Tensor, time: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return score(noisy, time, score.history(before), condition)

    def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def distance() -> float:
        vectors = [made(torch.randn(128, 2, 4), unknown, condition)[1] for _ in range(40)]
        one, two = nearest_codes(torch.cat(vectors).flatten(0, 1), codes).view(-1, 2).T
        law = torch.bincount(one * 4 + two, minlength=16) / len(one)
        return float((law - (first[:, None] * table).flatten()).abs().sum() / 2)

    following = torch.optim.Adam(score.parameters(), 6e-3, betas=(0.0, 0.95))
    moving = torch.optim.Adam(made.parameters(), 3e-3, betas=(0.0, 0.95))
    for _ in range(60):
        one = torch.multinomial(first, 128, replacement=True)
        vectors = codes[torch.stack([one, torch.multinomial(table[one], 1)[:, 0]], 1)]
        noisy, _, time = drawn(vectors)
        target = exact(noisy, time, vectors)
        descend(following, tuning_loss(velocity(noisy, time, vectors), noisy, time, target))
    score.copy_to(made)
    start, independent = distance(), 0.616
    for update in range(25):
        for _ in range(20 if update == 0 else 2):
            with torch.no_grad():
                vectors = made(torch.randn(128, 2, 4), unknown, condition)[1]
            noisy, noise, time = drawn(vectors)
            descend(following, fake_loss(velocity(noisy, time, vectors), vectors, noise, time))
        vectors = made(torch.randn(128, 2, 4), unknown, condition)[1]
        noisy, _, time = drawn(vectors.detach())
        fake = noisy - time[..., None] * velocity(noisy, time, vectors.detach())
        descend(moving, dmd_loss(vectors, exact(noisy, time, vectors.detach()), fake.detach()))
    assert start > independent
    assert distance() < 0.65 * independent


# -------------------------------------------------------------------------------------------------- the command
def settings(folder: Path, name: str = "run", **changed) -> DistillDD2:
    values = dict(
        teacher=str(folder / "teacher"), out=folder / name, num_pairs=64, pair_batch=32, flow_steps=4, held_out=16,
        tuning_steps=3, first_fake=2, fake_updates=1, head_width=16, head_depth=1, steps=6, batch_size=16,
        mixed_precision="no", tracker="none", log_every=1, save_every=2, validate_every=3, sample_every=0,
        device="cpu",
    )  # fmt: skip
    return DistillDD2(**{**values, **changed})


class Killed(Exception):
    pass


def lines(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.mark.parametrize(("kind", "combined"), [("raster", False), ("scales", True), ("table", True)])
def test_a_generator_is_distilled_resumed_saved_and_sampled(teachers, tmp_path, monkeypatch, kind, combined):
    teachers[kind].save_pretrained(tmp_path / "teacher")
    changed: dict = {
        "raster": {"noise_draws": 2},
        "scales": {"form": "sid", "score_optimizer": "muon", "save_dtype": "int8", "output": "codes"},
        "table": {"history": "codes", "output": "vectors", "pair_weight": 0.5},
    }[kind]
    if combined:
        save_student(student(teachers[kind], None), teachers[kind], "bfloat16", tmp_path / "student")
        changed["initial"] = tmp_path / "student"
    whole = distill_dd2(settings(tmp_path, **changed))
    assert whole.finished and whole.steps == 6 and whole.best == 3
    step = DD2Task.step

    def killed(self, number):
        if number == 5:
            raise Killed
        return step(self, number)

    monkeypatch.setattr(DD2Task, "step", killed)
    with pytest.raises(Killed):
        distill_dd2(settings(tmp_path, "again", **changed))
    monkeypatch.setattr(DD2Task, "step", step)
    distill_dd2(settings(tmp_path, "again", **changed))
    assert lines(tmp_path / "run") == lines(tmp_path / "again")
    values = lines(tmp_path / "run")
    assert "validation/tuning_loss" in values[3] and "validation/score_gap" in values[-1]
    assert {"train/loss", "train/fake_loss", "train/teacher_gap"} <= set(values[-2])
    assert ("train/pair_loss" in values[-2]) == (kind == "table")
    names = ("model/generator/diffusion_pytorch_model.safetensors", "guidance.safetensors", "tuned.safetensors")
    for name in names:
        first, second = (load_file(tmp_path / run / name) for run in ("run", "again"))
        assert first and first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "run" / "samples" / "same_noise-00000006.png").exists()
    pipe = load(tmp_path / "run" / "model", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(num_images=3, seed=5, output_type="pt")
    assert out.statistics.forward_passes == {"generator": 1}
    assert torch.equal(pipe(num_images=1, seed=6, output_type="pt").tokens[0], out.tokens[1])


def test_a_second_run_goes_on_from_the_first_ones_generator_and_score(teachers, tmp_path):
    """Without tuning; and a generator as published starts as the score network that is given."""
    teachers["raster"].save_pretrained(tmp_path / "teacher")
    distill_dd2(settings(tmp_path))
    common = dict(tuning_steps=None, steps=1, pairs=tmp_path / "run" / "pairs")
    model, score = tmp_path / "run" / "model", tmp_path / "run" / "guidance.safetensors"
    assert distill_dd2(settings(tmp_path, "more", initial=model, score=score, **common)).best == 1
    assert not (tmp_path / "more" / "tuned.safetensors").exists() and not (tmp_path / "more" / "pairs").exists()
    options = settings(tmp_path, "anew", score=score, **common)
    task = DD2Task(Run(options), options, teachers["raster"])
    given = load_file(score)
    assert torch.equal(task.student.velocity.final_layer.linear.weight, given["head.final_layer.linear.weight"])
    with pytest.raises(ValueError, match="is of another teacher, or has another head"):
        distill_dd2(settings(tmp_path, "bad", score=score, head_width=8, **common))


def test_bad_options_and_students_are_refused(teachers, tmp_path):
    teachers["raster"].save_pretrained(tmp_path / "teacher")
    for changed, message in (
        ({"form": "gan"}, "form 'gan'; choose one of dmd, sid"),
        ({"times": (0.5, 0.2)}, r"times \(0.5, 0.2\); needed: two numbers that rise"),
        ({"times": (0.0, 0.5)}, r"times \(0.0, 0.5\); allowed: above 0"),
        ({"tuning_steps": 6}, "tuning_steps 6; they must be fewer than steps 6"),
        ({"held_out": 64}, "held_out 64; it must be below num_pairs 64"),
        ({"fake_updates": 0}, "fake_updates 0; allowed"),
        ({"output": "soft"}, "output 'soft' is for a student that is given as initial"),
        ({"initial": tmp_path / "teacher"}, "is a RasterGPT; needed: a student of `visar distill dd1`"),
        ({"score": tmp_path / "none.safetensors"}, "no weights file at"),
    ):
        with pytest.raises(ValueError, match=message):
            distill_dd2(settings(tmp_path, "bad", **changed))
    save_student(student(teachers["scales"], None), teachers["scales"], "float32", tmp_path / "other")
    with pytest.raises(ValueError, match="is no student of this teacher, it has another grid, scales"):
        load_student(tmp_path / "other", teachers["raster"], None)
    save_student(student(teachers["raster"]), teachers["raster"], "float32", tmp_path / "velocity")
    with pytest.raises(ValueError, match="makes images of vectors, not of 'soft': give a student of dd1"):
        load_student(tmp_path / "velocity", teachers["raster"], "soft")
    with pytest.raises(ValueError, match="a OneStepGenerator cannot be distilled"):
        distill_dd2(settings(tmp_path, "bad", teacher=str(tmp_path / "velocity")))
    assert callable(parse(["distill", "dd2", "--teacher", "x", "--out", str(tmp_path / "y")]))
