"""Distillation from the command line's options: pairs, training, an exact resume, and what is written."""

import json

import pytest
import torch
from safetensors.torch import load_file

from visar.cli.main import parse
from visar.core.interface import Categorical
from visar.distill.dd1 import DD1Task, default_starts, distill_dd1
from visar.distill.independent import distill_independent
from visar.distill.options import DistillDD1, DistillIndependent
from visar.distill.pairs import Pairs
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.one_step import student_of
from visar.generators.raster import RasterGPT
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import VQTokenizer

SMALL = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=16, codebook_dim=4)


def teacher(kind: str) -> ImagePipeline:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, codebook_width=4, width=16, num_layers=1, num_heads=2, num_classes=3)
    if kind == "scales":
        tokenizer = MultiScaleVQTokenizer(scales=(1, 2, 4), **SMALL)
        generator = NextScaleTransformer(scales=(1, 2, 4), **sizes)
    else:
        tokenizer = VQTokenizer(image_size=8, latent_channels=8, **SMALL)
        generator = RasterGPT(grid=(4, 4), hidden_width=24, token_input="codebook", **sizes)
    for parameter in [*tokenizer.parameters(), *generator.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    if kind == "scales":
        generator.set_tokenizer(tokenizer.quantizer)
    else:
        generator.set_codebook(tokenizer.codebook)
    defaults = {"guidance_scale": 1.5, "top_k": 12}
    return ImagePipeline(tokenizer.eval(), generator.eval(), defaults=defaults)


def options(folder, name="run", **changed) -> DistillDD1:
    settings = dict(
        teacher=str(folder / "teacher"), out=folder / name, num_pairs=256, first_pairs=64, pair_batch=32, flow_steps=4,
        steps=6, batch_size=16, mixed_precision="no", tracker="none", log_every=1, save_every=2, validate_every=3,
        sample_every=0, device="cpu",
    )  # fmt: skip
    return DistillDD1(**{**settings, **changed})


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["raster", "scales"])
def test_a_student_is_trained_resumed_saved_and_sampled(tmp_path, monkeypatch, kind):
    teacher(kind).save_pretrained(tmp_path / "teacher")
    saved = dict(save_dtype="int8" if kind == "scales" else "bfloat16")
    whole = distill_dd1(options(tmp_path, **saved))
    assert whole.finished and whole.steps == 6
    step = DD1Task.step

    def killed(self, number):
        if number == 5:
            raise Killed
        return step(self, number)

    monkeypatch.setattr(DD1Task, "step", killed)
    with pytest.raises(Killed):
        distill_dd1(options(tmp_path, "again", **saved))
    monkeypatch.setattr(DD1Task, "step", step)
    distill_dd1(options(tmp_path, "again", **saved))
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "again")
    ]
    values = [[{k: v for k, v in row.items() if "second" not in k} for row in each] for each in rows]
    assert values[0] == values[1]
    assert {"validation/cross_entropy", "validation/same_tokens"} <= set(values[0][-1])
    files = [
        tmp_path / run / "model" / "generator" / "diffusion_pytorch_model.safetensors" for run in ("run", "again")
    ]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    pipe = load(tmp_path / "run" / "model", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(num_images=3, seed=5, output_type="pt", sampler_options={"steps": 2})
    assert out.statistics.forward_passes == {"generator": 2}
    alone = pipe(num_images=1, seed=6, output_type="pt", sampler_options={"steps": 2})
    assert torch.equal(alone.tokens[0], out.tokens[1])
    mixed = {"teacher": str(tmp_path / "teacher"), "teacher_range": "1,2"}
    passes = pipe(num_images=2, seed=5, sampler_options=mixed).statistics.forward_passes
    assert passes == {"generator": 2, "teacher": 2 if kind == "raster" else 1}
    with pytest.raises(ValueError, match="has learned its teacher's"):
        pipe(num_images=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="sampler one_step has no top_k"):
        pipe(num_images=1, top_k=5)


def test_pairs_are_a_function_of_their_seed_and_of_one_teacher(tmp_path):
    pipeline = teacher("raster")
    pairs = Pairs(tmp_path / "pairs", pipeline, block=8, steps=4)
    pairs.ensure(3, process=1, processes=2)
    assert not pairs.path(0).exists() and pairs.path(1).exists() and not pairs.path(2).exists()
    pairs.ensure(3)
    before = pairs.load(2)["ids"]
    pairs.path(2).unlink()
    pairs.ensure(3)
    assert torch.equal(pairs.load(2)["ids"], before)
    assert set(pairs.seeds(0)).isdisjoint(pairs.seeds(1))
    pairs.path(2).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"block-000002.* is damaged.*it is made again"):
        pairs.load(2)
    with torch.no_grad():
        next(iter(pipeline.generator.parameters())).add_(1.0)
    with pytest.raises(ValueError, match="holds pairs of another teacher"):
        Pairs(tmp_path / "pairs", pipeline, block=8, steps=4)
    with pytest.raises(ValueError, match="holds pairs of another teacher|another block"):
        Pairs(tmp_path / "pairs", pipeline, block=16, steps=4)


@pytest.mark.parametrize("kind", ["raster", "scales"])
def test_the_baseline_draws_frequencies_in_one_pass(tmp_path, kind):
    teacher(kind).save_pretrained(tmp_path / "teacher")
    settings = dict(teacher=str(tmp_path / "teacher"), out=tmp_path / "run", num_pairs=64, pair_batch=32, flow_steps=4)
    line = distill_independent(DistillIndependent(**settings))
    assert line == f"frequencies of 64 sequences: {tmp_path / 'run' / 'model'}"
    pipe = load(tmp_path / "run" / "model", device="cpu")
    ids = torch.cat([load_file(path)["ids"] for path in sorted((tmp_path / "run" / "pairs").glob("block*"))]).long()
    expected = torch.nn.functional.one_hot(ids, 16).double().mean(0)
    torch.testing.assert_close(pipe.generator.log_probs.exp().double(), expected, atol=1e-6, rtol=1e-5)
    assert isinstance(pipe.generator, Categorical)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(num_images=400, seed=3, output_type="pt")
    assert set(out.statistics.tokens_per_pass) == {pipe.generator.num_tokens}
    seen = torch.nn.functional.one_hot(out.tokens, 16).double().mean(0)
    assert float((seen - expected).abs().sum(1).mean()) / 2 < 0.15
    alone = pipe(num_images=1, seed=9, output_type="pt")
    assert torch.equal(alone.tokens[0], out.tokens[6])
    with pytest.raises(ValueError, match="guidance_scale 2.0; tokens that no condition changes"):
        pipe(num_images=1, guidance_scale=2.0)


def test_teachers_and_pairs_that_do_not_go_together(tmp_path):
    pipeline = teacher("raster")
    Pairs(tmp_path / "pairs", pipeline, block=8, steps=4)
    with pytest.raises(ValueError, match="holds pairs of another steps"):
        Pairs(tmp_path / "pairs", pipeline, block=8, steps=5)
    pipeline.register_to_config(defaults={"guidance_scale": 2.0, "top_k": 12})
    with pytest.raises(ValueError, match=r"holds pairs of another settings .*scale=1.5.* now .*scale=2.0"):
        Pairs(tmp_path / "pairs", pipeline, block=8, steps=4)
    codebook = pipeline.tokenizer.codebook
    student = ImagePipeline(pipeline.tokenizer, student_of(pipeline.generator, 1.0, (0,), codebook))
    with pytest.raises(ValueError, match="a OneStepGenerator cannot be distilled into one step; teachers: "):
        Pairs(tmp_path / "new", student, block=8, steps=4)
    assert not (tmp_path / "new").exists()


def test_starts_and_bad_options(tmp_path):
    assert default_starts(teacher("raster").generator) == (0, 5)
    assert default_starts(teacher("scales").generator) == (0, 1)
    teacher("raster").save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="held_out 0.7; it must be in 0.0 ... 0.5"):
        distill_dd1(options(tmp_path, held_out=0.7))
    with pytest.raises(ValueError, match="num_pairs 40; it must be at least"):
        distill_dd1(options(tmp_path, num_pairs=40))
    with pytest.raises(ValueError, match=r"starts \(0, 99\)"):
        distill_dd1(options(tmp_path, "other", starts=(0, 99)))
    assert callable(parse(["distill", "dd1", "--teacher", "x", "--out", str(tmp_path / "y")]))
