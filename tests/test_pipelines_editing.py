"""Edits of pictures and previews of scales, by a tiny pipeline over scales and by the command."""

import subprocess
import sys
from typing import get_args, get_type_hints

import numpy as np
import PIL.Image
import pytest
import torch

from visar.cli.edit import Edit
from visar.cli.main import main
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.pipelines.editing import edit_images, scale_previews, to_images
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.editing import Strategy
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer


def make(model_class=NextScaleTransformer, **settings) -> ImagePipeline:
    torch.manual_seed(0)
    scales = (1, 2, 4, 8)
    tokenizer = MultiScaleVQTokenizer(
        codebook_size=32, codebook_dim=8, scales=scales, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1
    ).eval()
    generator = model_class(
        vocab_size=32, codebook_width=8, scales=scales, width=32, num_layers=2, num_heads=2, num_classes=3, **settings
    ).eval()
    generator.reset_parameters(torch.Generator().manual_seed(0))
    generator.set_tokenizer(tokenizer.quantizer)
    return ImagePipeline(tokenizer, generator)


def pictures(count: int, side: int = 16) -> list[PIL.Image.Image]:
    draws = np.random.default_rng(0)
    return [PIL.Image.fromarray(draws.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def pipeline() -> ImagePipeline:
    return make()


def test_what_is_kept_keeps_its_tokens(pipeline):
    given = pictures(2)
    out = edit_images(pipeline, given, box=(0, 0, 0.5, 1), class_labels=[0, 2], seed=3)
    assert [image.size for image in out.images] == [(16, 16)] * 2 and out.seeds == [3, 4]
    tensor = torch.from_numpy(np.stack([np.asarray(each) for each in given])).permute(0, 3, 1, 2) / 127.5 - 1
    finest = pipeline.tokenizer.split(pipeline.tokenizer.encode(tensor))[-1]
    made = pipeline.tokenizer.split(out.tokens)[-1]
    assert torch.equal(made[:, 4:], finest[:, 4:]) and not torch.equal(made[:, :4], finest[:, :4])
    other_way = edit_images(pipeline, given, box=(0, 0, 0.5, 1), keep="inside", class_labels=[0, 2], seed=3)
    made = pipeline.tokenizer.split(other_way.tokens)[-1]
    assert torch.equal(made[:, :4], finest[:, :4]) and not torch.equal(made[:, 4:], finest[:, 4:])


def test_settings_one_a_scale(pipeline):
    greedy = dict(class_labels=1, seed=0, sampler="next_scale", output_type="pt")
    mixed = pipeline(**greedy, top_k=[1, 1, 1, 0], temperature=[1.0, 1.0, 1.0, 0.5]).tokens
    assert torch.equal(mixed[:, :21], pipeline(**greedy, top_k=1).tokens[:, :21])
    assert torch.equal(pipeline(**greedy, top_p=[0.7] * 4).tokens, pipeline(**greedy, top_p=0.7).tokens)
    for wrong, message in (
        (dict(temperature="hot"), "temperature 'hot'; allowed: a number, or several as in 4,2,1"),
        (dict(top_p=[0.7, 0.7, 0.7, "a"]), "'a'\\]; allowed: a number, or several"),
        (dict(top_k=[1, 1, 1, 1.5]), "1.5\\]; allowed: a whole number, or several"),
        (dict(temperature=[1.0, 1.0, 0.0, 1.0]), "temperature 0.0"),
        (dict(top_p=[0.7, 0.5]), "top_p has 2 values; the model has 4 scales"),
    ):
        for refuses in (pipeline, lambda **given: pipeline.check_settings(sampler="next_scale", **given)):
            with pytest.raises(ValueError, match=message):
                refuses(**(greedy if refuses is pipeline else {}), **wrong)
    with pytest.raises(ValueError, match="sampler collaborative needs followers and takes_over"):
        pipeline(sampler="collaborative")


def test_a_mask_says_what_a_box_says(pipeline):
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    mask[:, :8] = False
    by_mask, by_box = (
        edit_images(pipeline, pictures(1), unconditional=True, **where)
        for where in (dict(mask=mask), dict(box=(0, 0, 0.5, 1)))
    )
    assert torch.equal(by_mask.tokens, by_box.tokens)


def test_transparency_is_white_and_the_middle_is_taken(pipeline):
    clear = PIL.Image.new("RGBA", (40, 30), (10, 200, 30, 0))
    white = PIL.Image.new("RGB", (16, 16), "white")
    first, second = (edit_images(pipeline, [each], box=(0, 0, 1, 0.5), class_labels=[1]) for each in (clear, white))
    assert torch.equal(first.tokens, second.tokens)
    middle = pictures(1)[0]
    wide = PIL.Image.new("RGB", (30, 16), "red")
    wide.paste(middle, (7, 0))
    assert torch.equal(to_images([wide], 16), to_images([middle], 16))


@pytest.mark.parametrize("keep", ["outside", "inside"])
def test_what_stays_keeps_its_pixels(pipeline, keep):
    box = (0.25, 0.25, 0.8, 0.75)  # an edge that is none of the grid's
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:13, 4:12] = True
    stays = (inside if keep == "inside" else ~inside).numpy()
    given = pictures(2)
    settings = dict(class_labels=[0, 2], seed=3)
    pasted, plain = (
        edit_images(pipeline, given, box=box, keep=keep, paste=paste, **settings) for paste in (True, False)
    )
    masked = edit_images(pipeline, given, mask=torch.from_numpy(stays)[None], **settings)
    assert torch.equal(pasted.tokens, plain.tokens)
    for before, after, without, by_mask in zip(given, pasted.images, plain.images, masked.images, strict=True):
        before, after, without, by_mask = (np.asarray(each) for each in (before, after, without, by_mask))
        assert np.array_equal(after[stays], before[stays]) and np.array_equal(by_mask[stays], before[stays])
        assert np.array_equal(after[~stays], without[~stays]) and not np.array_equal(without[stays], before[stays])


def test_previews_end_with_the_picture(pipeline):
    out = pipeline(class_labels=[1, 2], seed=0)
    rows = scale_previews(pipeline, out.tokens)
    assert [len(row) for row in rows] == [4, 4]
    for row, image in zip(rows, out.images, strict=True):
        assert np.array_equal(np.asarray(row[-1]), np.asarray(image))
        assert not np.array_equal(np.asarray(row[0]), np.asarray(image))
    assert [len(row) for row in scale_previews(pipeline, out.tokens[:, :5])] == [2, 2]
    with pytest.raises(ValueError, match="whole number of scales"):
        scale_previews(pipeline, out.tokens[:, :4])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(), "give a box or a mask"),
        (dict(box=(0.5, 0, 0.5, 1)), "top, left, bottom, right"),
        (dict(box=(0, 0, 1, 0.5), strategy="refine"), "needs a model with masked passes"),
        (dict(box=(0, 0, 1, 0.5), unconditional=True, class_labels=[0]), "unconditional excludes"),
        (dict(box=(0, 0, 1, 0.5), class_labels=[7]), "class 7"),
    ],
)
def test_what_cannot_be_edited(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        edit_images(pipeline, pictures(1), **settings)


def test_raster_models_cannot_edit():
    with pytest.raises(ValueError, match=r"a model over scales .VAR, HMAR. or a masked one .MAR. is needed"):
        edit_images(load("emoji-raster", device="cpu"), pictures(1), box=(0, 0, 1, 0.5))


def test_the_command_edits_a_file(tmp_path, capsys):
    make(HierarchicalMaskedTransformer, num_refinement_layers=1).save_pretrained(tmp_path / "model")
    pictures(1, 20)[0].save(tmp_path / "given.png")
    common = ["edit", str(tmp_path / "model"), str(tmp_path / "given.png"), "--out", str(tmp_path / "out.png")]
    choices = ["--strategy", "refine", "--class", "2", "--num-images", "3", "--device", "cpu"]
    assert main([*common, *choices]) == 0
    assert "seed 2: class 2" in capsys.readouterr().out
    with PIL.Image.open(tmp_path / "out.png") as sheet:
        assert sheet.size == (4 * 18 + 2, 20)
    assert main([*common[:-1], str(tmp_path / "out.jpg"), *choices]) == 0
    with PIL.Image.open(tmp_path / "out.jpg") as sheet:
        assert sheet.format == "JPEG"
    for _ in range(2):  # into a new folder, and into one that is there
        assert main([*common[:-1], str(tmp_path / "out"), *choices, "--no-paste"]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("000000.png", "000001.png", "000002.png", "given.png"),
    ]
    with PIL.Image.open(tmp_path / "out" / "000001.png") as image:
        assert image.size == (16, 16)
    assert main([*common[:-1], str(tmp_path / "out.txt"), *choices]) == 1
    assert "an image's name ends in .png, .jpg" in capsys.readouterr().err
    assert main(["edit", str(tmp_path / "model"), str(tmp_path), "--device", "cpu"]) == 1
    assert "is not a readable image" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    assert main(["edit", str(tmp_path / "model"), str(tmp_path / "text.png"), "--device", "cpu"]) == 1
    assert "is not a readable image" in capsys.readouterr().err
    sampled = ["sample", str(tmp_path / "model"), "--num-images", "2", "--previews", "--device", "cpu"]
    assert main([*sampled, "--out", str(tmp_path / "made.png")]) == 0
    with PIL.Image.open(tmp_path / "made-scales.png") as sheet:
        assert sheet.size == (4 * 18 + 2, 2 * 18 + 2)


@pytest.mark.parametrize("arguments", [["--help"], ["model", "picture.png", "--strategy", "none"]], ids=str)
def test_help_and_wrong_options_do_not_wait_for_models(arguments):
    code = (
        f"import sys; from visar.cli.main import main; main({['edit', *arguments]}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert get_args(get_args(get_type_hints(Edit)["strategy"])[0]) == get_args(Strategy)


def test_models_that_take_over_are_named(tmp_path):
    make().save_pretrained(tmp_path / "drafter")
    pipeline = load(tmp_path / "drafter", device="cpu")
    plain = pipeline(class_labels=[0, 1], seed=0, sampler="next_scale").tokens
    options = dict(followers=str(tmp_path / "drafter"), takes_over="2")
    out = pipeline(class_labels=[0, 1], seed=0, sampler="collaborative", sampler_options=options)
    assert torch.equal(out.tokens, plain) and out.statistics.forward_passes == {"drafter": 2, "refiner": 2}
    with pytest.raises(ValueError, match="takes_over 'x'; allowed: a whole number"):
        pipeline(sampler="collaborative", sampler_options=dict(options, takes_over="x"))
