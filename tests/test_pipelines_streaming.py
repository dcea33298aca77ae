"""Images while their tokens are drawn, first tokens of other images, a diffusion tokenizer through the commands."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from visar.cli.main import main
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import EAGER
from visar.evaluate.exactness import all_sequences, check_distribution, joint_distribution
from visar.generators.causal_continuous import FAMILY as VECTORS
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.io.pictures import to_pictures
from visar.pipelines.editing import first_tokens_of, scale_previews
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.pipelines.memory import memory_need
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.drafters.model import ModelDrafter
from visar.samplers.filtering import filter_logits
from visar.samplers.jacobi import sample_jacobi
from visar.samplers.speculative import sample_speculative
from visar.samplers.tree_speculation import sample_static_tree
from visar.tokenizers.diffusion import FAMILY, DiffusionTokenizer
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import FAMILY as VQ

FIXTURES = Path(__file__).parent / "fixtures"
TINY = SimpleNamespace(**runpy.run_path(str(FIXTURES / "tiny.py")))
TRAINING = SimpleNamespace(**runpy.run_path(str(FIXTURES / "training.py")))
EVERYTHING: dict[str, Any] = dict(guidance=Guidance(2.0), temperature=0.7, top_k=3, top_p=0.9)


def make(rope="1d", tokenizer_family=FAMILY, grid=(1, 16), **defaults) -> ImagePipeline:
    torch.manual_seed(0)
    tokenizer: Any = tokenizer_family.model(**tokenizer_family.tiny).eval()
    if isinstance(tokenizer, DiffusionTokenizer):
        nn.init.normal_(tokenizer.decoder.conv_out.weight, std=0.1)
    generator = RasterGPT(
        vocab_size=128, grid=grid, width=32, num_layers=2, num_heads=2, hidden_width=48, num_classes=4, rope=rope
    )
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.2)
    pipeline = ImagePipeline(tokenizer, generator.eval(), defaults=defaults)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def over_scales() -> ImagePipeline:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1)
    tokenizer = MultiScaleVQTokenizer(codebook_size=32, codebook_dim=8, scales=(1, 2, 4), **sizes).eval()
    generator = NextScaleTransformer(
        vocab_size=32, codebook_width=8, scales=(1, 2, 4), width=32, num_layers=1, num_heads=2, num_classes=3
    ).eval()
    generator.reset_parameters(torch.Generator().manual_seed(0))
    generator.set_tokenizer(tokenizer.quantizer)
    return ImagePipeline(tokenizer, generator)


# -------------------------------------------------------------------------------------------------------- previews
@pytest.mark.parametrize("sampler", ["ancestral", "jacobi"])
def test_images_sharpen_while_tokens_are_drawn_at_no_step_more(sampler):
    pipeline = make()
    settings: dict[str, Any] = dict(sampler=sampler, seed=5, output_type="pt", batch_size=2)
    if sampler == "jacobi":
        settings["sampler_options"] = {"check_every": 1, "window": 3}
    plain = pipeline([0, 1, 3], **settings)
    steps: list[int] = []
    hook = pipeline.tokenizer.decoder.register_forward_hook(lambda *_: steps.append(1))
    seen: list[tuple[int, int, torch.Tensor]] = []
    made = pipeline([0, 1, 3], **settings, callback_on_preview=lambda _, *call: seen.append(call))
    hook.remove()
    assert torch.equal(made.images, plain.images) and torch.equal(made.tokens, plain.tokens)
    assert len(steps) == 3 * 4  # a step for every group of every image, the last image of all included
    firsts = [first for first, _, _ in seen]
    assert sorted(set(firsts)) == [0, 2] and firsts == sorted(firsts)
    for first, size in ((0, 2), (2, 1)):
        ends = [count for begin, count, _ in seen if begin == first]
        assert ends == sorted(set(ends)) and set(ends) <= {4, 8, 12, 16} and ends[-1] == 16
        assert sampler == "jacobi" or ends == [4, 8, 12, 16]
        for begin, count, images in seen:
            if begin == first:
                rows = slice(first, first + size)
                tokens, seeds = made.tokens[rows, :count], made.seeds[rows]
                assert torch.equal(images, (pipeline.decode(tokens, seeds) + 1) / 2)


def test_previews_of_scales_are_decoded_anew():
    pipeline = over_scales()
    pipeline.set_progress_bar_config(disable=True)
    seen: list[tuple[int, int, list[PIL.Image.Image]]] = []
    made = pipeline([0, 2], seed=1, sampler="next_scale", callback_on_preview=lambda _, *call: seen.append(call))
    assert [(first, count) for first, count, _ in seen] == [(0, 1), (0, 5), (0, 21)]
    for _, count, images in seen:
        expected = to_pictures(pipeline.decode(made.tokens[:, :count]))
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    grid = make("2d", VQ, (4, 4))
    with pytest.raises(ValueError, match="for previews a model over scales is needed .* or one of a diffusion tok"):
        grid([0], callback_on_preview=lambda *_: None)


def test_sheets_of_previews_and_seeds():
    pipeline = make()
    out = pipeline([1, 2], seed=3)
    rows = scale_previews(pipeline, out.tokens, out.seeds)
    assert [len(row) for row in rows] == [4, 4]
    for row, image in zip(rows, out.images, strict=True):
        assert row[-1].tobytes() == image.tobytes() and row[0].tobytes() != image.tobytes()
    again = scale_previews(pipeline, out.tokens[:, :8], out.seeds)
    assert [[image.tobytes() for image in row] for row in again] == [[i.tobytes() for i in row[:2]] for row in rows]
    with pytest.raises(ValueError, match="7 tokens are not a whole number of groups; allowed: .4, 8, 12, 16."):
        scale_previews(pipeline, out.tokens[:, :7], out.seeds)
    for broken in (lambda: scale_previews(pipeline, out.tokens), lambda: pipeline.decode(out.tokens)):
        with pytest.raises(ValueError, match="give the seeds of the images that are decoded"):
            broken()


def test_an_image_is_the_same_in_every_batch():
    pipeline = make()
    together = pipeline([0, 1, 2, 3], seed=7, output_type="pt", guidance_scale=1.5)
    for i in range(4):
        alone = pipeline([i], seed=7 + i, output_type="pt", guidance_scale=1.5)
        assert torch.equal(alone.images[0], together.images[i]) and torch.equal(alone.tokens[0], together.tokens[i])
    assert pipeline.find_batch_size(8) in (1, 2, 4, 8)
    one, two = (memory_need(pipeline.generator, pipeline.tokenizer, batch, False).decoding for batch in (1, 2))
    assert two == 2 * one > 0


# ----------------------------------------------------------------------------------------------------- first tokens
def given(label, first, count):
    return Condition(labels_BA=torch.full((count, 1), label), first_BK=torch.tensor(first).expand(count, -1))


SAMPLERS: dict[str, Any] = {
    "ancestral": sample_ancestral,
    "jacobi": lambda *args, **settings: sample_jacobi(*args, window=3, coupling="maximal", **settings),
    "speculative": lambda model, *args, **settings: sample_speculative(
        model, *args, drafter=ModelDrafter(TINY.transformer(seed=1)), num_drafts=2, **settings
    ),
    "static_tree": lambda model, *args, **settings: sample_static_tree(
        model, *args, drafter=ModelDrafter(TINY.transformer(seed=1)), branches=(2, 1), **settings
    ),
}


def conditional(model, first, guidance=OFF, **filters):
    """Probability float64 of every sequence given its first tokens, enumerated; filters are of the others only."""
    sequences, count = all_sequences(4, 4), len(first)
    many = TINY.many(1, len(sequences))
    logits = model(sequences, many).float()
    null = model(sequences, model.null_condition(many)).float()
    logits = null + (logits - null) * torch.tensor(guidance.scales(4))[:, None]
    probs = torch.softmax(filter_logits(logits, **filters).double(), -1).gather(-1, sequences[..., None])[..., 0]
    return torch.where((sequences[:, :count] == torch.tensor(first)).all(1), probs[:, count:].prod(-1), 0.0)


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_other_tokens_are_drawn_given_the_first(sampler):
    """Where the filters would leave a given code out, too: code 3 of the first place is one."""
    model, count = TINY.transformer(), 3000
    assert joint_distribution(model, TINY.labels(1), **EVERYTHING).view(4, -1).sum(1)[3] == 0
    for first, settings in (((2,), {}), ((3, 0), EVERYTHING)):
        draws = SAMPLERS[sampler](model, given(1, first, count), noise=Noise(image_seeds(0, count)), **settings)
        assert torch.equal(draws.tokens[:, : len(first)], torch.tensor(first).expand(count, -1))
        assert check_distribution(draws.tokens, conditional(model, first, **settings), 4).passed, first


@torch.no_grad()
def test_tokens_that_are_only_written_over_are_found():
    """The planted bug: images whose first tokens are replaced after the others were drawn."""
    model, count = TINY.transformer(), 6000
    draws = sample_ancestral(model, TINY.many(1, count), noise=Noise(image_seeds(0, count))).tokens
    draws[:, 0] = 2
    assert not check_distribution(draws, conditional(model, (2,)), 4).passed


def test_buffers_serve_other_first_tokens_but_not_none():
    model, replays = TINY.transformer(), TINY.ReplayRuntime()
    for first in ((1,), (3, 2)):
        for sample in (sample_ancestral, sample_jacobi):
            condition, noise = given(0, first, 3), Noise(image_seeds(4, 3))
            eager = sample(model, condition, noise=noise, runtime=EAGER, guidance=Guidance(2.0)).tokens
            replayed = sample(model, condition, noise=noise, runtime=replays, guidance=Guidance(2.0)).tokens
            assert torch.equal(eager, replayed) and (eager[:, : len(first)] == torch.tensor(first)).all()
    with pytest.raises(ValueError, match="a state of images with first tokens, and one without"):
        sample_ancestral(model, TINY.many(0, 3), noise=Noise([1, 2, 3]), runtime=replays, guidance=Guidance(2.0))


def test_first_tokens_of_a_picture_and_of_another_sample():
    pipeline = make()
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 12, 3), np.uint8))
    first = first_tokens_of(pipeline, picture, 6)
    assert first.shape == (6,)
    made = pipeline([0, 1, 2], seed=1, first_tokens=first, sampler="jacobi", guidance_scale=2.0)
    assert (made.tokens[:, :6] == first).all() and len(set(map(tuple, made.tokens[:, 6:].tolist()))) == 3
    rows = made.tokens[:, [5, 7, 8]]
    each = pipeline([0, 1, 2], seed=1, first_tokens=rows, batch_size=2)
    assert torch.equal(each.tokens[:, :3], rows)
    alone = pipeline([2], seed=3, first_tokens=rows[2])
    assert torch.equal(alone.tokens[0], each.tokens[2])
    whole = pipeline([0], seed=9, first_tokens=made.tokens[0]).tokens
    assert torch.equal(whole[0], made.tokens[0])
    assert not (pipeline([0, 1, 2], seed=1).tokens[:, :6] == first).all()
    grid = make("2d", VQ, (4, 4))
    upper = first_tokens_of(grid, picture, 8)
    assert (grid([1], seed=0, first_tokens=upper).tokens[0, :8] == upper).all()

    for broken, message in (
        (lambda: pipeline([0], first_tokens=[1, 2]), "first_tokens of type list; needed: whole numbers"),
        (lambda: pipeline([0], first_tokens=torch.ones(3)), r"first_tokens of shape \(3,\), torch.float32"),
        (lambda: pipeline([0, 1], first_tokens=rows), r"first_tokens of shape \(3, 3\).*\[2, K\]"),
        (lambda: pipeline([0], first_tokens=torch.tensor([128])), "first token 128; allowed: 0 ... 127"),
        (lambda: pipeline([0], first_tokens=torch.zeros(17).long()), "needed: int64 .B, 1 ... 16."),
        (lambda: pipeline([0], first_tokens=first, sampler="grouped"), "grouped is lossy .* those that do: ancestral"),
        (lambda: first_tokens_of(pipeline, picture, 0), "num_first_tokens 0; allowed: 1 ... 16"),
        (lambda: first_tokens_of(over_scales(), picture, 1), "first tokens are for raster models.* in scales"),
        (
            lambda: over_scales()([0], sampler="next_scale", first_tokens=torch.tensor([1])),
            "this model takes no first tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            broken()
    condition = given(0, (1,), 2)
    for model in (TINY.tabular(), VECTORS.model(**VECTORS.tiny)):
        with pytest.raises(ValueError, match="this model takes no first tokens"):
            model.start(condition)


# ------------------------------------------------------------------------------------------------------ the commands
def test_from_training_to_a_sheet_of_previews(tmp_path, capsys):
    data = TRAINING.write_images(tmp_path / "bars.npz")
    settings = {name: value for name, value in FAMILY.tiny.items() if name not in ("image_size", "codebook_size")}
    common = ["--steps", "4", "--batch-size", "8", "--device", "cpu", "--mixed-precision", "no", "--tracker", "none"]
    common += ["--data", str(data), "--augment", "none", "--log-every", "1", "--sample-every", "0"]
    run = ["train", "tokenizer", "--kind", "diffusion", "--out", str(tmp_path / "tokenizer"), "--codebook-size", "16"]
    run += ["--model-options", json.dumps(settings), "--perceptual-weight", "0", *common]
    assert main(run) == 0
    run = ["train", "generator", "--tokenizer", str(tmp_path / "tokenizer" / "model"), "--variants", "1"]
    run += ["--out", str(tmp_path / "run"), "--width", "32", "--num-layers", "1", "--num-heads", "2"]
    run += ["--hidden-width", "32", "--sample-images", "2", "--words", "none", *common]
    assert main(run) == 0
    model = tmp_path / "run" / "model"
    pipeline = load(model, device="cpu")
    config = pipeline.generator.config
    assert (config["rope"], tuple(config["grid"])) == ("1d", (1, 16))
    assert isinstance(pipeline.tokenizer, DiffusionTokenizer)

    PIL.Image.fromarray(np.load(data)["images"][3]).resize((20, 20)).save(tmp_path / "given.png")
    sampled = ["sample", str(model), "--num-images", "2", "--device", "cpu", "--out", str(tmp_path / "made.png")]
    begun = ["--first-tokens-of", str(tmp_path / "given.png"), "--num-first-tokens", "5"]
    assert main([*sampled, "--previews", "--sampler", "jacobi", *begun]) == 0
    with PIL.Image.open(tmp_path / "made-scales.png") as sheet:
        assert sheet.size == (4 * 10 + 2, 2 * 10 + 2)
    capsys.readouterr()
    for wrong, message in (
        (begun[:2], "--first-tokens-of IMAGE and --num-first-tokens K go together"),
        (begun[2:], "go together; K is at least 1"),
        ([*begun[:3], "17"], "num_first_tokens 17; allowed: 1 ... 16"),
        (["--first-tokens-of", str(data), "--num-first-tokens", "1"], "bars.npz is not a readable image"),
    ):
        assert main([*sampled, *wrong]) == 1
        assert message in capsys.readouterr().err
