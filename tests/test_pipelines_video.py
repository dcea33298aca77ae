"""Clips end to end: a tokenizer and generators trained on clips, the call, files, first frames, bad input."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

import visar
from visar.cli.main import main
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.families import find_family
from visar.generators.next_neighbor import NextNeighborTransformer
from visar.generators.raster import RasterGPT
from visar.io.video import read_video
from visar.layers.rope import rope_table
from visar.pipelines.components import load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.video import VideoPipeline
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.index import find_sampler
from visar.tokenizers.video_vq import FAMILY, VideoVQTokenizer
from visar.train.generator import train_generator
from visar.train.tokenizer import train_tokenizer

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py")))
FAULTS = runpy.run_path(str(Path(__file__).parent / "fixtures" / "faults.py"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_clips(path: Path, count: int = 24, frames: int = 5) -> Path:
    """Clips of 8 x 8 of four classes with captions: a coloured bar that falls."""
    draws = np.random.default_rng(0)
    clips = np.full((count, frames, 8, 8, 3), 255, np.uint8)
    labels = np.arange(count) % 4
    for number, label in enumerate(labels):
        row, blue = draws.integers(0, 3), draws.integers(0, 120)
        for time in range(frames):
            clips[number, time, row + time : row + time + 2] = (60 * label, 200 - 50 * label, blue)
    captions = np.array([f"bar {label}" for label in labels])
    np.savez(path, clips=clips, labels=labels, captions=captions)
    return path


def tokenizer_options(data: Path, out: Path, **changes):
    model = {name: value for name, value in FAMILY.tiny.items() if name not in ("image_size", "codebook_size")}
    options = dict(kind="video", model_options=json.dumps(model | dict(num_frames=5)), steps=8, learning_rate=2e-3)
    return TINY.tokenizer_options(data, out, **{**options, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A tokenizer of clips, and a generator of both families on its ids."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_clips(folder / "clips.npz")
    train_tokenizer(tokenizer_options(data, folder / "tokenizer"))
    for family in ("raster", "next_neighbor"):
        out, tokenizer = folder / family, folder / "tokenizer" / "model"
        train_generator(TINY.generator_options(data, tokenizer, out, family=family, steps=8, words="none"))
    return folder


@pytest.fixture(scope="module", params=["raster", "next_neighbor"])
def pipeline(request, runs):
    found = visar.load(runs / request.param / "model", device="cpu", dtype="float32")
    found.set_progress_bar_config(disable=True)
    return found


# ---------------------------------------------------------------------------------------------------------- training
def test_a_tokenizer_and_generators_learn_clips(runs):
    tokenizer = load_tokenizer(runs / "tokenizer" / "model", device="cpu", dtype="float32")
    assert type(tokenizer) is VideoVQTokenizer and tokenizer.layout.shapes == ((3, 4, 4),)
    for name in ("tokenizer", "raster", "next_neighbor"):
        found = TINY.losses(runs / name)
        assert sum(found[-3:]) < 0.9 * sum(found[:3]), (name, found)
    for folder, kind in (("raster", RasterGPT), ("next_neighbor", NextNeighborTransformer)):
        model = visar.load(runs / folder / "model", device="cpu", dtype="float32").generator
        assert type(model) is kind and tuple(model.config["grid"]) == (3, 4, 4)
    sheet = next((runs / "tokenizer" / "samples").glob("*.png"))
    with PIL.Image.open(sheet) as image:
        assert image.size[0] == 2 + 5 * 10  # a row has the five frames of a clip


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_options='{"num_frames": 6}'), "clips of 5 frames; the tokenizer's have 6"),
        (dict(model_options="{}"), "clips of 5 frames; the tokenizer's have 16"),
        (dict(model_options='{"num_frames": "many"}'), "num_frames 'many' of model_options"),
        (dict(kind="vq"), "images or arr_0 is needed"),
    ],
)
def test_data_that_does_not_fit(runs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(tokenizer_options(runs / "clips.npz", tmp_path, **changes))


def test_a_generator_of_clips_needs_clips(runs, tmp_path):
    images = TINY.write_images(tmp_path / "bars.npz")
    with pytest.raises(ValueError, match="clips, uint8 .N, T, H, W, 3., are needed"):
        train_generator(TINY.generator_options(images, runs / "tokenizer" / "model", tmp_path / "out"))


def test_families_that_fit_a_box():
    layout = VideoVQTokenizer(**FAMILY.tiny).layout
    assert find_family("auto", layout).model is RasterGPT
    assert find_family("next_neighbor", layout).model is NextNeighborTransformer
    with pytest.raises(ValueError, match="families that do: raster, next_neighbor"):
        find_family("region_parallel", layout)


# ---------------------------------------------------------------------------------------------------------- the call
def test_frames_of_all_output_types(pipeline):
    assert type(pipeline) is VideoPipeline and pipeline.num_frames == 5
    settings = dict(class_labels="1", num_clips=2, seed=3)
    frames = pipeline(**settings).frames
    assert [len(clip) for clip in frames] == [5, 5] and frames[0][0].size == (8, 8)
    tensor, array = pipeline(**settings, output_type="pt").frames, pipeline(**settings, output_type="np").frames
    assert tensor.shape == (2, 5, 3, 8, 8) and 0 <= tensor.min() and tensor.max() <= 1
    assert array.shape == (2, 5, 8, 8, 3) and np.array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    pixels = np.stack([[np.asarray(frame) for frame in clip] for clip in frames])
    assert np.array_equal(pixels, np.round(array * 255).astype(np.uint8))
    out = pipeline(**settings, output_type="latent")
    assert out.frames.shape == (2, 8, 3, 4, 4) and out.seeds == [3, 4] and len(out.descriptions) == 2
    assert torch.equal((pipeline.decode(out.frames) + 1) / 2, tensor)
    assert torch.equal(pipeline(**settings, output_type="pt", return_dict=False)[0], tensor)
    same = pipeline(class_labels="1", num_videos_per_prompt=2, num_frames=5, seed=3, output_type="pt").frames
    assert torch.equal(same, tensor)


def test_a_clip_depends_on_its_seed_alone(pipeline):
    whole = pipeline(class_labels="2", num_clips=3, seed=0, guidance_scale=2.0, output_type="pt")
    for number in (0, 2):
        alone = pipeline(class_labels="2", seed=number, guidance_scale=2.0, output_type="pt")
        assert torch.equal(alone.tokens[0], whole.tokens[number]) and torch.equal(
            alone.frames[0], whole.frames[number]
        )
    parts = pipeline(class_labels="2", num_clips=3, seed=0, guidance_scale=2.0, output_type="pt", batch_size=2)
    assert torch.equal(parts.frames, whole.frames) and len(torch.unique(whole.tokens, dim=0)) > 1


def test_passes(pipeline):
    expected = 48 if isinstance(pipeline.generator, RasterGPT) else 3 + 4 + 4 - 2
    assert pipeline(class_labels="1", seed=0).statistics.forward_passes == {"generator": expected}


def test_saved_pipelines_are_found_by_their_class(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "VideoPipeline"]
    tensor = pipeline(class_labels="1", seed=0, output_type="pt").frames
    for again in (
        visar.load(tmp_path / "saved", device="cpu", dtype="float32"),
        VideoPipeline.from_pretrained(tmp_path / "saved"),
        DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True),
    ):
        again.set_progress_bar_config(disable=True)
        assert isinstance(again, VideoPipeline)
        assert torch.equal(again(class_labels="1", seed=0, output_type="pt").frames, tensor)
    with pytest.raises(ValueError, match="holds a .*VideoPipeline.*; an ImagePipeline is needed"):
        ImagePipeline.from_pretrained(tmp_path / "saved")
    for name in ("os.system", "StableDiffusionPipeline"):
        (tmp_path / "saved" / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(ValueError, match="an ImagePipeline is needed"):
            visar.load(tmp_path / "saved", device="cpu")


def test_first_frames_stay_and_others_follow(runs):
    pipeline = visar.load(runs / "raster" / "model", device="cpu", dtype="float32")
    pipeline.set_progress_bar_config(disable=True)
    with np.load(runs / "clips.npz") as arrays:
        clip = torch.from_numpy(arrays["clips"][3]).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = pipeline.first_tokens_of(clip[:3])
    assert tokens.shape == (32,)
    out = pipeline(class_labels="3", num_clips=4, seed=0, first_tokens=tokens, output_type="pt")
    assert (out.tokens[:, :32] == tokens).all() and len(torch.unique(out.tokens, dim=0)) > 1
    expected = pipeline.tokenizer.decode(tokens[None])[0].clamp(-1, 1)
    for frames in out.frames:
        torch.testing.assert_close(frames[:3] * 2 - 1, expected, atol=1e-4, rtol=1e-4)
    for frames, message in (
        (clip, "with T below 5"),
        (clip[:2], "2 frames; a clip has"),
        (clip[0], "frames of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.first_tokens_of(frames)
    neighbors = visar.load(runs / "next_neighbor" / "model", device="cpu", dtype="float32")
    with pytest.raises(ValueError):
        neighbors(class_labels="3", first_tokens=tokens)


def test_what_a_call_refuses(pipeline):
    for settings, message in (
        (dict(num_frames=16), "num_frames 16; this model's clips have 5"),
        (dict(output_type="gif"), "output_type 'gif'; choose one of pil"),
        (dict(height=64), "height 64; this model's images are 8 x 8"),
        (dict(callback_on_preview=print), "for previews a model over scales"),
        (dict(num_clips=0), "num_images 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**settings)


def test_pipelines_of_images_and_of_clips_are_told_apart(pipeline):
    still = FAULTS["tiny_pipeline"]()
    with pytest.raises(ValueError, match="num_frames=16 is nothing .*: it makes still images, no clips"):
        still(num_frames=16)
    with pytest.raises(ValueError, match="in arrangement box, which needs a VideoPipeline"):
        ImagePipeline(pipeline.tokenizer, pipeline.generator)
    with pytest.raises(ValueError, match="in arrangement grid, which needs an ImagePipeline"):
        VideoPipeline(still.tokenizer, still.generator)


# ------------------------------------------------------------------------------------------------------- the command
def test_the_command_writes_clips(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    base = ["sample", str(tmp_path / "model"), "--class", "1", "--seed", "3", "--device", "cpu", "--num-images", "2"]
    frames = pipeline(class_labels="1", num_clips=2, seed=3).frames
    assert main([*base, "--out", str(tmp_path / "clips"), "--fps", "4"]) == 0
    found = read_video(tmp_path / "clips" / "000004.webp")
    assert np.array_equal(found, np.stack([np.asarray(frame) for frame in frames[1]]))
    assert (tmp_path / "clips" / "seeds.txt").read_text().count("\n") == 2
    for name in ("all.gif", "all.webp"):
        assert main([*base, "--out", str(tmp_path / name)]) == 0
        assert read_video(tmp_path / name).shape == (5, 12, 22, 3)
    assert main([*base, "--out", str(tmp_path / "sheet.png")]) == 0
    with PIL.Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (2 + 5 * 10, 2 + 2 * 10)
        assert image.crop((2, 12, 10, 20)).tobytes() == frames[1][0].tobytes()
    assert "2 clips in" in capsys.readouterr().out
    for more, message in (
        (["--out", str(tmp_path / "x.gif"), "--fps", "0"], "fps"),
        (["--out", str(tmp_path / "x.avi")], "x.avi"),
        (["--out", str(tmp_path / "x.png"), "--previews"], "for previews a model over scales"),
    ):
        assert main([*base, *more]) != 0
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_a_still_image_model_writes_no_clips(tmp_path, capsys):
    FAULTS["tiny_pipeline"]().save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--device", "cpu", "--out", str(tmp_path / "x.gif")]) == 1
    assert "makes still images, so " in capsys.readouterr().err and not (tmp_path / "x.gif").exists()
    assert main(["sample", str(tmp_path / "model"), "--device", "cpu", "--out", str(tmp_path / "x.webp")]) == 0


# ------------------------------------------------------------------------------------------------- raster on a box
def box_model() -> RasterGPT:
    torch.manual_seed(0)
    model = RasterGPT(
        vocab_size=5, grid=(3, 2, 2), width=32, num_layers=2, num_heads=2, hidden_width=32, num_classes=2, rope="3d",
        prefix_rotation="identity",
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_raster_decoding_on_a_box_is_teacher_forcing():
    model, condition = box_model(), Condition(labels_BA=torch.tensor([[0], [1]]))
    out = sample_ancestral(model, condition, noise=Noise([0, 1]))
    state = model.start(condition, Guidance(1.0))
    rows = []
    for place in range(12):
        rows.append(model.predict(state))
        model.append(state, out.tokens[:, place : place + 1])
        state.block += 1
    logits = model(out.tokens, condition)
    torch.testing.assert_close(torch.cat(rows, dim=1), logits, atol=1e-4, rtol=1e-4)
    changed = out.tokens.clone()
    changed[:, 4:8] = (changed[:, 4:8] + 1) % 5  # the second frame
    other = model(changed, condition)
    assert torch.equal(other[:, :5], logits[:, :5]) and (other[:, 8:] != logits[:, 8:]).any(-1).all()


def test_the_table_of_a_box_tells_all_places_apart():
    table = rope_table("3d", prefix_length=1, grid=(3, 2, 4), head_width=16, prefix_rotation="identity")
    assert table.shape == (25, 8, 2) and torch.equal(table[0], torch.tensor([1.0, 0.0]).expand(8, 2))
    box = table[1:].unflatten(0, (3, 2, 4))
    # Pairs 0 ... 3 follow the frame, 4 and 5 the row, 6 and 7 the column.
    for axis, pairs in ((0, slice(0, 4)), (1, slice(4, 6)), (2, slice(6, 8))):
        own = box[..., pairs, :].movedim(axis, 0).flatten(1, 2)
        assert torch.equal(own, own[:, :1].expand_as(own)) and len(torch.unique(own[:, 0], dim=0)) == len(own)
    flat = rope_table("2d", prefix_length=2, grid=(3, 4), head_width=16)
    angle = torch.arange(3.0)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).float() / 8)
    assert torch.equal(flat[2:].unflatten(0, (3, 4))[:, 1, :4, 0], angle.cos())
    for grid, kind, message in (((2, 2), "3d", "on a grid of 2 axes"), ((2, 2, 2), "2d", "on a grid of 3 axes")):
        with pytest.raises(ValueError, match=message):
            rope_table(kind, prefix_length=1, grid=grid, head_width=16)


def test_jacobi_decoding_runs_on_a_box():
    model, condition = box_model(), Condition(labels_BA=torch.tensor([[0], [1], [1]]))
    jacobi = find_sampler("jacobi").load()(model, condition, noise=Noise([4, 5, 6]), guidance=Guidance(2.0), window=4)
    assert jacobi.tokens.shape == (3, 12) and jacobi.tokens.max() < 5
    assert jacobi.statistics.forward_passes["generator"] <= 12
