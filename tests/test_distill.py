"""One-step students: what they see, steps and outputs, and a toy whose joint distribution is known."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.interface import Generator, OneStep
from visar.core.noise import Noise, image_seeds
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.one_step import student_of
from visar.generators.raster import RasterGPT
from visar.layers.quantize import fingerprint
from visar.samplers.filtering import filter_logits
from visar.samplers.flow import code_scale, flow_map, initial_noise, sample_flow
from visar.samplers.one_step import sample_one_step

TINY = runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py"))


def raster(**changed):
    torch.manual_seed(0)
    settings = dict(vocab_size=8, grid=(2, 3), width=16, num_layers=2, num_heads=2, hidden_width=32, num_classes=2)
    model = RasterGPT(**{**settings, "token_input": "codebook", "codebook_width": 4, **changed})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if model.config["token_input"] == "codebook":
        model.set_codebook(torch.randn_like(model.codebook))
    return model.eval()


def scales():
    torch.manual_seed(0)
    model = NextScaleTransformer(
        vocab_size=8, codebook_width=4, scales=(1, 2, 3), width=16, num_layers=2, num_heads=2, num_classes=2
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def student(teacher, starts=(0,)):
    codebook = teacher.codes if teacher.config["vocab_size"] == 8 else torch.randn(4, 4)
    made = student_of(teacher, code_scale(codebook), starts, codebook)
    torch.nn.init.normal_(made.kind.weight, std=0.5)
    return made.eval()


def conditions(count: int) -> Condition:
    return Condition(labels_BA=torch.arange(count)[:, None] % 2)


@torch.no_grad()
def changed(model, position: int) -> list[int]:
    """Positions whose predictions change with the input at one."""
    vectors = torch.randn(1, model.num_tokens, 4)
    known = torch.zeros(model.num_tokens, dtype=torch.bool)
    other = vectors.clone()
    other[:, position] += 1.0
    before, after = (model(each, known, conditions(1))[0] for each in (vectors, other))
    return torch.nonzero((before - after).abs().amax((0, 2)) > 1e-6).flatten().tolist()


def test_a_raster_student_sees_its_own_input_and_those_before():
    model = student(raster())
    for position in range(6):
        assert changed(model, position) == list(range(position, 6))


def test_a_student_over_scales_sees_coarser_scales_and_itself_alone():
    model = student(scales())
    for position, scale in ((0, range(1, 14)), (2, range(5, 14)), (7, [])):
        assert changed(model, position) == sorted({position, *scale})


@pytest.mark.parametrize("teacher", [raster, scales])
def test_known_tokens_stay_and_all_known_is_one_step(teacher):
    model = student(teacher(), (0, 1, 2))
    assert isinstance(model, OneStep) and not isinstance(model, Generator)
    noise = Noise([3, 4])
    with pytest.raises(ValueError, match=r"steps 4; this model takes 1 ... 3"):
        sample_one_step(model, conditions(2), noise=noise, steps=4)
    outs = [sample_one_step(model, conditions(2), noise=noise, steps=steps, output="codes") for steps in (1, 2, 3)]
    for before, after, block in ((outs[0], outs[1], 1), (outs[1], outs[2], 2)):
        first = model.first_token(block)
        assert torch.equal(before.tokens[:, :first], after.tokens[:, :first])
    assert outs[2].statistics.forward_passes == {"generator": 3}
    assert torch.allclose(outs[2].latent, model.latents(model.codes[outs[2].tokens]), atol=1e-5)
    alone = sample_one_step(model, conditions(2).rows(torch.tensor([1])), noise=Noise([4]), steps=3)
    assert torch.equal(alone.tokens[0], outs[2].tokens[1])


DRAWN_BY = dict(name="its teacher", guidance={"scale": 2.0}, temperature=1.0, top_k=6, top_p=1.0, flow_steps=6)


def mixable(teacher, starts=(0, 1)):
    made = student_of(teacher, code_scale(teacher.codes), starts, teacher.codes, drawn_by=DRAWN_BY)
    torch.nn.init.normal_(made.kind.weight, std=0.5)
    return made.eval()


@torch.no_grad()
def continued(teacher, given, first, last, noise) -> torch.Tensor:
    """Blocks drawn one by one by the flow map behind given ones, which are appended one by one."""
    state = teacher.start(conditions(len(given)), Guidance(2.0))
    scale, done = code_scale(teacher.codes), 0
    for block, size in enumerate(teacher.block_sizes[:last]):
        state.block = block
        logits, tokens = filter_logits(teacher.predict(state), top_k=6), given[:, done : done + size]
        if block >= first:
            tokens = flow_map(noise[:, done : done + size], logits, teacher.codes * scale, steps=6)
        teacher.append(state, tokens)
        done += size
    return teacher.result(state)


@pytest.mark.parametrize(("make", "blocks", "passes"), [(raster, (3, 5), 3), (scales, (1, 2), 1)])
def test_the_teacher_draws_a_range_from_the_same_noise(monkeypatch, make, blocks, passes):
    monkeypatch.setattr("visar.samplers.flow._READ", 4)
    teacher = make()
    model, noise = mixable(teacher), Noise([3, 4])
    vectors = initial_noise(noise, torch.arange(model.num_tokens)[None], 4)
    alone = sample_one_step(model, conditions(2), noise=noise, output="codes").tokens
    out = sample_one_step(model, conditions(2), noise=noise, output="codes", teacher=teacher, teacher_range=blocks)
    first, last = (model.first_token(block) for block in blocks)
    assert out.statistics.forward_passes == {"generator": 2, "teacher": passes}
    assert sum(size * count for size, count in out.statistics.tokens_per_pass.items()) == 2 * model.num_tokens
    assert torch.equal(out.tokens[:, :first], alone[:, :first])
    assert torch.equal(out.tokens[:, :last], continued(teacher, alone, *blocks, vectors)[:, :last])
    known = torch.arange(model.num_tokens) < last
    inputs = torch.where(known[:, None], model.codes[out.tokens], vectors)
    with torch.no_grad():
        logits, _ = model(inputs, known, conditions(2))
    assert torch.equal(out.tokens[:, last:], logits.argmax(-1)[:, last:])
    assert torch.allclose(out.latent, model.latents(model.codes[out.tokens]), atol=1e-5)
    # Over all blocks, and up to the last one.
    settings = dict(noise=noise, output="codes", teacher=teacher)
    count = len(teacher.block_sizes)
    whole = sample_one_step(model, conditions(2), teacher_range=(0, count), **settings)
    flow = sample_flow(
        teacher, conditions(2), noise=noise, codebook=teacher.codes, guidance=Guidance(2.0), top_k=6, steps=6
    )
    assert torch.equal(whole.tokens, flow.tokens)
    assert whole.statistics.forward_passes == {"generator": 0, "teacher": count}
    ended = sample_one_step(model, conditions(2), teacher_range=(count - 1, count), steps=2, **settings)
    assert ended.statistics.forward_passes["generator"] == 2


def test_mixing_needs_the_teacher_and_a_range_inside_the_sequence():
    teacher = raster()
    model, settings = mixable(teacher), dict(noise=Noise([0]))
    for given, message in (
        (dict(teacher_range=(0, 2)), "needs teacher, what this student was made from: its teacher"),
        (dict(teacher=teacher), "give both, or none"),
        (dict(teacher=raster(vocab_size=9), teacher_range=(0, 2)), r"not those .* distilled from \(its teacher"),
        (dict(teacher=teacher, teacher_range=(2, 2)), r"two rising numbers of blocks in 0 ... 6"),
        (dict(teacher=teacher, teacher_range=(2, 7)), r"teacher_range \(2, 7\)"),
        (dict(teacher=teacher, teacher_range=(2,)), r"teacher_range \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_one_step(model, conditions(1), **settings, **given)
    with pytest.raises(ValueError, match="does not say what it was distilled from"):
        sample_one_step(student(teacher), conditions(1), teacher=teacher, teacher_range=(0, 2), **settings)
    assert fingerprint(teacher.to(torch.bfloat16).float()) == model.config["teacher"]["fingerprint"]


def test_guidance_and_outputs_are_checked():
    model = student(raster())
    with pytest.raises(ValueError, match="has learned its teacher's"):
        sample_one_step(model, conditions(1), noise=Noise([0]), guidance=Guidance(2.0))
    with pytest.raises(ValueError, match="output 'hard'"):
        sample_one_step(model, conditions(1), noise=Noise([0]), output="hard")
    with pytest.raises(ValueError, match="a TabularGenerator cannot be distilled"):
        student_of(TINY["tabular"](), 1.0, (0,), torch.randn(4, 4))


def test_a_teacher_with_a_table_gets_a_map_of_vectors():
    teacher = raster(token_input="table", codebook_width=4)
    codebook = torch.randn(8, 4)
    made = student_of(teacher, 1.0, (0,), codebook)
    assert torch.equal(made.codes, codebook)
    assert torch.equal(made.network.output.weight, teacher.output.weight)
    again = type(made).from_config(json.loads(made.to_json_string()))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.codes, codebook)


def joint(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    cells = ids[:, 0] * vocab_size + ids[:, 1]
    return torch.bincount(cells, minlength=vocab_size**2).double() / len(ids)


def test_two_tokens_that_depend_on_each_other_are_learned():
    """The second token is a permutation of the first nine times out of ten: what independent draws cannot do."""
    torch.manual_seed(0)
    table = torch.full((4, 4), 0.03)
    table[torch.arange(4), torch.tensor([2, 0, 3, 1])] = 0.91
    first = torch.tensor([0.4, 0.3, 0.2, 0.1])
    codebook = torch.nn.functional.normalize(torch.randn(4, 4), dim=-1)
    made = raster(vocab_size=4, grid=(1, 2), width=32, hidden_width=64, codebook_width=4, num_classes=1)
    made.reset_parameters()
    made.set_codebook(codebook)
    made = student_of(made, code_scale(codebook), (0,), codebook)

    def pairs(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = initial_noise(Noise(image_seeds(seed, count)), torch.arange(2)[None], 4)
        one = flow_map(noise[:, 0], first.log().expand(count, -1), made.codes)
        return noise, torch.stack([one, flow_map(noise[:, 1], table[one].log(), made.codes)], 1)

    vectors, target = pairs(0, 8192)
    optimizer, known = torch.optim.Adam(made.parameters(), 5e-3), torch.zeros(2, dtype=torch.bool)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    condition = Condition(labels_BA=torch.zeros(512, 1, dtype=torch.int64))
    for _ in range(400):
        index = torch.randint(8192, (512,))
        logits, _ = made(vectors[index], known, condition)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    exact = (first[:, None] * table).flatten().double()
    many = Condition(labels_BA=torch.zeros(8192, 1, dtype=torch.int64))
    fresh = sample_one_step(made.eval(), many, noise=Noise(image_seeds(10**6, 8192)), output="codes").tokens
    apart = (first[:, None] * (first @ table)).flatten().double()
    distance, independent = (float((each - exact).abs().sum() / 2) for each in (joint(fresh, 4), apart))
    assert independent > 0.4
    assert distance < 0.05 and distance < independent / 10
