"""Every folder opens everywhere: visar, pipelines of diffusers and AutoModel make the same images of it; and what such
front ends call with is honoured or refused."""

import hashlib
import inspect
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file

from visar.generators.raster import RasterGPT
from visar.io.formats import FORMAT
from visar.pipelines.components import load_generator, load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load

TINY = runpy.run_path(str(Path(__file__).parent / "fixtures" / "faults.py"))
tiny_pipeline, pyramid_pipeline = TINY["tiny_pipeline"], TINY["pyramid_pipeline"]
PROGRAM = """
import hashlib, sys
from diffusers import AutoModel, DiffusionPipeline
folder = sys.argv[1]
def digest(pipeline):
    images = pipeline(class_labels=1, seed=3, num_images=2).images
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
assert not any(name.split(".")[0] == "visar" for name in sys.modules)
whole = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
parts = {
    "tokenizer": AutoModel.from_pretrained(folder + "/tokenizer", trust_remote_code=True),
    "generator": AutoModel.from_pretrained(folder, subfolder="generator", trust_remote_code=True),
}
assert not any(part.training for part in parts.values())
whole.save_pretrained(folder + "-again")
print(digest(whole), digest(type(whole).from_pretrained(folder, **parts)))
"""


def digest(pipeline: ImagePipeline) -> str:
    images = pipeline(class_labels=1, seed=3, num_images=2).images
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The folder into which diffusers copies the code of folders, for this process and those it starts."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def test_three_loaders_make_the_same_images(pipeline, modules, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert "config attributes" not in run.stderr and "annotation" not in run.stderr
    loaded = load(tmp_path / "model", device="cpu")
    assert run.stdout.split() == [digest(loaded)] * 2 == [digest(pipeline)] * 2
    # What they save is read again here.
    assert digest(load(tmp_path / "model-again", device="cpu")) == digest(pipeline)


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_two_families_in_one_process(storage, modules, tmp_path):
    """Files of one name in several folders do not stand in for each other."""
    made = {"raster": tiny_pipeline(), "scales": pyramid_pipeline()}
    for name, pipeline in made.items():
        pipeline.save_pretrained(tmp_path / name, storage)
        whole = DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
        part = AutoModel.from_pretrained(f"{tmp_path / name}/generator", trust_remote_code=True)
        own = load(tmp_path / name, device="cpu")
        for generator in (whole.generator, part):
            assert type(generator) is type(pipeline.generator) and generator.dtype == torch.float32
            for key, weight in own.generator.state_dict().items():
                assert torch.equal(generator.state_dict()[key], weight), key
        assert digest(whole) == digest(own)


def test_dtype_variant_and_device_as_diffusers_passes_them(pipeline, modules, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    half = DiffusionPipeline.from_pretrained(
        tmp_path, trust_remote_code=True, torch_dtype=torch.bfloat16, variant="fp16", use_safetensors=True
    )
    assert half.generator.dtype == half.tokenizer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has no weights of variant None; it has 'fp16'"):
        AutoModel.from_pretrained(tmp_path / "generator", trust_remote_code=True)
    with pytest.raises(ValueError, match="models of visar do not take quantization_config='int4'"):
        AutoModel.from_pretrained(
            tmp_path / "generator", trust_remote_code=True, variant="fp16", quantization_config="int4"
        )


def test_weights_that_are_missing_are_an_error_there_too(pipeline, modules, tmp_path):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "generator" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    missing = sorted(state)[0]
    del state[missing]
    save_file(state, path)
    with pytest.raises(ValueError, match=missing):
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)


def test_without_trust_nothing_of_a_folder_runs(pipeline, modules, tmp_path):
    """diffusers refuses; visar reads the same folder without its code, whatever that is."""
    pipeline.save_pretrained(tmp_path / "model")
    for file in ("pipeline.py", "generator/visar_model.py", "tokenizer/visar_model.py"):
        (tmp_path / "model" / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    if "trust_remote_code" in inspect.getsource(DiffusionPipeline.from_pretrained):  # older versions run it anyway
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(tmp_path / "model" / "generator")
    assert digest(load(tmp_path / "model", device="cpu")) == digest(pipeline)
    assert digest(ImagePipeline.from_pretrained(tmp_path / "model")) == digest(pipeline)
    load_tokenizer(tmp_path / "model", device="cpu")
    load_generator(tmp_path / "model", device="cpu")
    RasterGPT.from_pretrained(tmp_path / "model" / "generator")
    assert not (tmp_path / "ran").exists()


def test_the_class_that_stands_for_all_is_read_from_the_table(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    config = tmp_path / "generator" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "VQTokenizer"}))
    with pytest.raises(ValueError, match="VQTokenizer is no class that may be loaded here; allowed: .*RasterGPT"):
        load(tmp_path, device="cpu")


# ------------------------------------------------------------------------------------------------------------- formats
@pytest.mark.parametrize("file", ["model_index.json", "generator/config.json"])
def test_formats(pipeline, tmp_path, file):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / file
    content = json.loads(path.read_text())
    assert content.pop("_visar_format") == FORMAT == 1
    path.write_text(json.dumps(content))
    assert digest(load(tmp_path, device="cpu")) == digest(pipeline)
    for value, message in (
        (FORMAT + 1, f"has format 2; this version of visar reads formats up to {FORMAT}: install a newer one"),
        ("1", "_visar_format '1'; it must be a whole number >= 1"),
        (0, "_visar_format 0; it must be a whole number >= 1"),
    ):
        path.write_text(json.dumps(content | {"_visar_format": value}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path, device="cpu")


def test_folders_of_before_are_read(pipeline, tmp_path):
    """As `save_pretrained` of diffusers alone wrote them."""
    pipeline.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.py"):
        file.unlink()
    for path in (tmp_path / "model_index.json", *tmp_path.glob("*/config.json")):
        content = json.loads(path.read_text())
        del content["_visar_format"], content["auto_map"]
        if path.name == "model_index.json":
            content["_class_name"] = "ImagePipeline"
            for part in ("tokenizer", "generator"):
                kind = type(getattr(pipeline, part))
                content[part] = [kind.__module__, kind.__name__]
        path.write_text(json.dumps(content))
    assert digest(load(tmp_path, device="cpu")) == digest(pipeline)


# ----------------------------------------------------------------------------------------------------------- arguments
def test_images_per_prompt_and_an_empty_prompt(pipeline):
    plain = pipeline(class_labels=1, num_images=3, seed=5).tokens
    assert torch.equal(pipeline(class_labels=1, num_images_per_prompt=3, seed=5).tokens, plain)
    assert torch.equal(pipeline(class_labels=1, prompt="", num_images=3, seed=5).tokens, plain)
    drawn = pipeline(num_images=4, seed=5)
    for prompt, count in (("", 4), (["", " "], 2), ([""] * 4, 1)):
        found = pipeline(prompt=prompt, num_images_per_prompt=count, negative_prompt="", seed=5, height=None)
        assert torch.equal(found.tokens, drawn.tokens) and found.descriptions == drawn.descriptions
    with pytest.raises(ValueError, match="1 of 2 prompts are empty; give all of them, or none"):
        pipeline(prompt=["cat", ""])
    with pytest.raises(ValueError, match="num_images 2 and num_images_per_prompt 3: one"):
        pipeline(num_images=2, num_images_per_prompt=3)


def test_generators(pipeline):
    one = pipeline(num_images=3, generator=torch.Generator().manual_seed(5))
    each = pipeline(num_images=3, generator=[torch.Generator().manual_seed(5) for _ in range(3)])
    assert one.seeds[0] == each.seeds[0] == each.seeds[1] != one.seeds[1]


def test_plain_tuples_and_latents(pipeline):
    images = pipeline(num_images=2, seed=1, output_type="pt").images
    (found,) = pipeline(num_images=2, seed=1, output_type="pt", return_dict=False)
    assert torch.equal(found, images)
    (latent,) = pipeline(num_images=2, seed=1, output_type="latent", return_dict=False)
    assert latent.ndim == 4 and torch.equal((pipeline.decode(latent) + 1) / 2, images)


def test_a_callback_interrupts(pipeline):
    whole = pipeline(num_images=4, seed=1)
    calls = []

    def callback(pipe, step, timestep, given):
        calls.append(step)
        pipe._interrupt = step == 5
        return given

    settings = dict(num_images=4, seed=1, callback_on_step_end=callback, batch_size=2)
    out = pipeline(**settings, callback_on_step_end_tensor_inputs=["tokens"])
    assert calls == list(range(6)) and pipeline.interrupt
    # The first batch only, its first tokens only.
    assert len(out.images) == len(out.seeds) == len(out.descriptions) == 2
    assert torch.equal(out.tokens[:, :6], whole.tokens[:2, :6]) and not out.tokens[:, 6:].any()
    # The next call is whole again.
    assert torch.equal(pipeline(num_images=4, seed=1).tokens, whole.tokens) and not pipeline.interrupt


def test_an_interrupted_pyramid():
    pipeline = pyramid_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    whole = pipeline(num_images=2, seed=1).tokens

    def callback(pipe, step, timestep, given):
        pipe._interrupt = True

    out = pipeline(num_images=2, seed=1, callback_on_step_end=callback)
    assert out.tokens.shape == whole.shape and torch.equal(out.tokens[:, :1], whole[:, :1])
    assert not out.tokens[:, 1:].any() and whole[:, 1:].any()


def test_a_callback_cannot_replace_tokens(pipeline):
    with pytest.raises(ValueError, match="the callback returned other tokens; it may look at them and interrupt"):
        pipeline(seed=1, callback_on_step_end=lambda pipe, step, timestep, given: {"tokens": given["tokens"] + 1})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(negative_prompt="blurry"), ValueError, "negative_prompt='blurry' is nothing that this pipeline has"),
        (dict(num_inference_steps=20), ValueError, "num_inference_steps=20 .*: steps are settings of samplers"),
        (dict(latents=torch.zeros(1)), ValueError, "latents=.*: images are functions of seeds"),
        (dict(height=24), ValueError, r"height 24; this model's images are \d+ x \d+"),
        (dict(width=24), ValueError, "width 24; this model's"),
        (dict(callback_on_step_end_tensor_inputs=["latents"]), ValueError, r"\['latents'\]; allowed: \['tokens'\]"),
        (dict(num_image=2), TypeError, "has no argument 'num_image'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pipeline, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline(**arguments)
    height, width = pipeline.image_size
    assert pipeline(seed=0, height=height, width=width).images[0].size == (width, height)


@pytest.mark.parametrize("kind", [tiny_pipeline, pyramid_pipeline])
def test_a_pipeline_is_cast(kind, tmp_path):
    pipeline = kind()
    pipeline.save_pretrained(tmp_path)
    for moved in (pipeline.to(torch.bfloat16), kind().to("cpu", torch.bfloat16)):
        assert moved.generator.dtype == moved.tokenizer.dtype == torch.bfloat16
        assert digest(moved) == digest(load(tmp_path, device="cpu", dtype="bfloat16"))
