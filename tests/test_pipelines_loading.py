"""Pipelines as users of diffusers move, copy, save and fetch them; and tokenizers that are the wrong ones."""

import copy
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.hooks import apply_group_offloading

from visar.checkpoints import hub
from visar.data.vocabulary import build_vocabulary
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.pipelines.components import find_folder, load_generator, load_tokenizer
from visar.pipelines.editing import edit_images
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import VQTokenizer

LEVELS = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=16)
NAMES = build_vocabulary({"class": ("cat", "dog")}, np.array([[0], [1]]), None, np.arange(2)).to_dict()


def tokenizer(seed: int = 0) -> VQTokenizer:
    torch.manual_seed(seed)
    return VQTokenizer(image_size=8, latent_channels=8, **LEVELS).eval()


def make(token_input: str = "table") -> ImagePipeline:
    of_codes = dict(token_input="codebook", codebook_width=8) if token_input == "codebook" else {}
    sizes = dict(vocab_size=16, grid=(4, 4), width=16, num_layers=1, num_heads=2, hidden_width=24, num_classes=2)
    torch.manual_seed(1)
    generator = RasterGPT(**sizes, **of_codes).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if of_codes:
        generator.set_codebook(tokenizer().codebook.detach())
    return quiet(ImagePipeline(tokenizer(), generator, NAMES, {"guidance_scale": 1.5}))


def quiet(pipeline: ImagePipeline) -> ImagePipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same(ours: ImagePipeline, theirs: ImagePipeline) -> bool:
    """Whether both make the same image of a class that they know by name."""
    first, second = (quiet(each)("dog", seed=3, output_type="pt") for each in (ours, theirs))
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.images, second.images)


# ------------------------------------------------------------------------------------------------------------- offload
def test_model_offload_changes_no_image():
    pipeline, expected = make(), make()
    pipeline.enable_model_cpu_offload(device="cpu")
    assert pipeline.device.type == "cpu" and pipeline.offload
    assert same(pipeline, expected)
    pipeline.remove_all_hooks()
    assert not pipeline.offload and same(pipeline, expected)


def test_model_offload_moves_each_part_for_its_part_only(monkeypatch):
    pipeline, moved = make(), []
    pipeline.enable_model_cpu_offload(device="cpu")
    real = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *to, **named: moved.append(type(self).__name__) or real(self, *to, **named)
    )
    pipeline("dog", num_images=2, batch_size=1, seed=3)
    # Each is fetched and put back, in every batch.
    assert moved == ["RasterGPT", "RasterGPT", "VQTokenizer", "VQTokenizer"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is needed")
def test_model_offload_without_a_gpu():
    with pytest.raises(ValueError, match="moves parts to a GPU, and torch sees none"):
        make().enable_model_cpu_offload()
    with pytest.raises(ValueError, match="device 'cuda': this machine or this build of torch has no CUDA device"):
        make().enable_model_cpu_offload(device="cuda")


@pytest.mark.parametrize("kind", ["sequential_cpu", "group"])
def test_other_offload_of_a_pipeline_says_what_to_use(kind):
    pipeline = make()
    with pytest.raises(ValueError, match="is not for this pipeline: .*Use enable_model_cpu_offload"):
        getattr(pipeline, f"enable_{kind}_offload")(torch.device("cpu"))
    assert same(pipeline, make())


@pytest.mark.parametrize("part", ["generator", "tokenizer"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "disk", "model", "accelerate"])
def test_offload_of_a_part_makes_no_other_images(part, kind, tmp_path):
    pipeline, cpu = make(), torch.device("cpu")
    model = getattr(pipeline, part)
    if kind == "accelerate":
        cpu_offload(model, cpu)
    elif kind == "model":
        model.enable_group_offload(cpu, offload_type="leaf_level")
    else:
        level = dict(offload_type="leaf_level") if kind != "block_level" else dict(num_blocks_per_group=1)
        disk = dict(offload_to_disk_path=str(tmp_path)) if kind == "disk" else {}
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **level, **disk)
    with pytest.raises(ValueError, match=f"the {type(model).__name__}.*load the model again"):
        pipeline("dog", seed=3)


def test_an_edit_with_offload():
    torch.manual_seed(0)
    parts = MultiScaleVQTokenizer(scales=(1, 2, 4), codebook_dim=32, **LEVELS).eval()
    model = NextScaleTransformer(
        vocab_size=16, codebook_width=32, scales=(1, 2, 4), width=16, num_layers=1, num_heads=2, num_classes=2
    ).eval()
    model.set_tokenizer(parts.quantizer)
    pipeline = quiet(ImagePipeline(parts, model))
    pictures = pipeline(0, seed=1).images
    expected = edit_images(pipeline, pictures, box=(0, 0, 1, 0.5), seed=2)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(edit_images(pipeline, pictures, box=(0, 0, 1, 0.5), seed=2).tokens, expected.tokens)


# -------------------------------------------------------------------------------------------------------------- copies
def test_components_and_from_pipe_make_the_same_pipeline():
    pipeline = make()
    pipeline.deterministic = "off"
    for made in (ImagePipeline(**pipeline.components), ImagePipeline.from_pipe(pipeline)):
        assert made.generator is pipeline.generator and made.tokenizer is pipeline.tokenizer
        assert made.config["defaults"] == pipeline.config["defaults"] and same(made, pipeline)
    assert ImagePipeline.from_pipe(pipeline).deterministic == "off"
    changed = ImagePipeline.from_pipe(pipeline, defaults={"guidance_scale": 4.0})
    assert changed.sampling_settings()["guidance"].scale == 4.0 and changed.vocabulary is not None
    assert pipeline.generator.dtype == torch.float32
    cast = ImagePipeline.from_pipe(pipeline, torch_dtype=torch.bfloat16)
    assert cast.generator.dtype == cast.tokenizer.dtype == pipeline.generator.dtype == torch.bfloat16


def test_from_pipe_keeps_offloading():
    pipeline = make()
    pipeline.enable_model_cpu_offload(device="cpu")
    made = ImagePipeline.from_pipe(pipeline)
    assert made.offload and made.device == pipeline.device and same(made, make())


def test_from_pipe_refuses_what_does_not_fit():
    class Other(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(ValueError, match="from_pipe of a Other; needed: one of a tokenizer and a generator"):
        ImagePipeline.from_pipe(Other(DDPMScheduler()))
    with pytest.raises(ValueError, match="does not take scheduler; choose from tokenizer, generator, vocabulary, def"):
        ImagePipeline.from_pipe(make(), scheduler=None)


# ------------------------------------------------------------------------------------------------------------ variants
def test_variants_are_saved_and_loaded(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    half = ImagePipeline.from_pipe(copy.deepcopy(pipeline), dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    half.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="4KB")
    assert list((tmp_path / "half" / "generator").glob("*.fp16-*-of-*.safetensors"))
    assert same(load(tmp_path, device="cpu"), pipeline) and not same(half, pipeline)
    # Images of float16 weights in float32: of the same values, computed exactly.
    rounded = ImagePipeline.from_pipe(copy.deepcopy(half), dtype=torch.float32)
    for folder in (tmp_path, tmp_path / "half"):
        assert same(load(folder, device="cpu", variant="fp16"), rounded)
        assert same(ImagePipeline.from_pretrained(folder, variant="fp16"), rounded)
        weights = load_tokenizer(folder, device="cpu", variant="fp16").state_dict()
        assert all(torch.equal(value, rounded.tokenizer.state_dict()[key]) for key, value in weights.items())
    for folder, variant, message in (
        (tmp_path / "half", None, "has no weights of variant None; it has 'fp16'"),
        (tmp_path, "ema", "has no weights of variant 'ema'; it has None, 'fp16'"),
        (tmp_path, "../fp16", r"variant '\.\./fp16'; give a word"),
        ("emoji-raster", "fp16", "has no weights of variant 'fp16'; it has None"),
        ("var-d16", "fp16", "official weights have none"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, device="cpu", variant=variant)


# ------------------------------------------------------------------------------------------------------------- the hub
@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache with the repository someone/cats as fetched before, of a pipeline in float32 and in float16."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--someone--cats"
    (repository / "refs").mkdir(parents=True)
    for name, digit in (("main", "0"), ("old", "1")):
        (repository / "refs" / name).write_text(digit * 40)
        pipeline = make()
        with torch.no_grad():
            pipeline.generator.output.weight.mul_(1 + int(digit))
        pipeline.save_pretrained(repository / "snapshots" / (digit * 40))
        pipeline.save_pretrained(repository / "snapshots" / (digit * 40), variant="fp16")
    return tmp_path / "cache"


def test_a_repository_is_loaded(cache):
    assert same(load("someone/cats", device="cpu"), make())
    assert same(load("someone/cats", device="cpu", variant="fp16"), make())
    assert same(ImagePipeline.from_pretrained("someone/cats"), make())
    assert same(ImagePipeline.from_pretrained("someone/cats", cache_dir=cache, local_files_only=True), make())
    ids = torch.randint(16, (1, 16))
    with torch.no_grad():
        assert torch.equal(load_tokenizer("someone/cats", device="cpu").decode(ids), tokenizer().decode(ids))
    weight = make().generator.output.weight
    assert torch.equal(load_generator("someone/cats", device="cpu").output.weight, weight)
    assert torch.equal(load("someone/cats", device="cpu", revision="old").generator.output.weight, 2 * weight)
    assert torch.equal(
        ImagePipeline.from_pretrained("someone/cats", revision="old").generator.output.weight, 2 * weight
    )


def test_only_what_is_read_is_fetched(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or "x"
    )
    held = ["model_index.json", "README.md", "evil.py", "generator/evil.bin"]
    for name in ("diffusion_pytorch_model", "diffusion_pytorch_model-00001-of-00002"):
        held += [f"generator/{name}.safetensors", f"generator/{name.replace('model', 'model.fp16')}.safetensors"]
    held += [f"{part}/config.json" for part in ("generator", "tokenizer")]
    held += [f"tokenizer/diffusion_pytorch_model.safetensors.index{end}" for end in (".json", ".fp16.json")]
    for variant, number in ((None, 6), ("fp16", 6)):
        find_folder("someone/cats", variant)
        fetched = list(huggingface_hub.utils.filter_repo_objects(held, allow_patterns=asked["allow_patterns"]))
        assert len(fetched) == number and not any("evil" in name or "README" in name for name in fetched)
        assert all(("fp16" in name) == (variant == "fp16") for name in fetched if "diffusion" in name)


def test_repositories_that_cannot_be_had(cache):
    for call in (load, load_tokenizer, load_generator, ImagePipeline.from_pretrained):
        with pytest.raises(
            ValueError, match="someone/dogs is no folder here, and could not be fetched from the Hugging"
        ):
            call("someone/dogs")
    with pytest.raises(ValueError, match="could not be fetched at revision new"):
        load("someone/cats", device="cpu", revision="new")
    with pytest.raises(ValueError, match="revision 'old': emoji-raster is no repository"):
        load("emoji-raster", device="cpu", revision="old")


def test_a_missing_folder_is_not_asked_for_on_the_hub(cache, monkeypatch):
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: pytest.fail("the hub was asked"))
    Path("runs").mkdir()
    for name in ("runs/generator", "./cats/dogs", "../someone/cats", "a/b/c", "/someone/cats", Path("someone/cats")):
        with pytest.raises(ValueError, match="unknown model"):
            load(name, device="cpu")
        with pytest.raises(ValueError, match="is no folder"):
            ImagePipeline.from_pretrained(str(name) if name != Path("someone/cats") else "runs/generator")


# ---------------------------------------------------------------------------------------------------- wrong tokenizers
@pytest.mark.parametrize("token_input", ["table", "codebook"])
def test_a_wrong_tokenizer_is_found_before_sampling(token_input, tmp_path, monkeypatch):
    pipeline, wrong = make(token_input), tokenizer(seed=5)
    pipeline.save_pretrained(tmp_path / "right")
    message = "the tokenizer is not the one that the generator was trained with"
    with pytest.raises(ValueError, match=message):
        ImagePipeline.from_pretrained(tmp_path / "right", tokenizer=wrong)
    with pytest.raises(ValueError, match=message):
        ImagePipeline.from_pipe(pipeline, tokenizer=wrong)
    if token_input == "codebook":
        with pytest.raises(ValueError, match=message):
            ImagePipeline(wrong, pipeline.generator)
    shutil.rmtree(tmp_path / "right" / "tokenizer")
    wrong.save_pretrained(tmp_path / "right" / "tokenizer")
    with pytest.raises(ValueError, match=f"right: {message}"):
        load(tmp_path / "right", device="cpu")
    monkeypatch.setattr(RasterGPT, "start", lambda *_, **__: pytest.fail("something was drawn"))
    pipeline.tokenizer = wrong
    with pytest.raises(ValueError, match=message):
        pipeline("dog", seed=3)


def test_a_tokenizer_with_another_decoder_is_taken(tmp_path):
    pipeline = make("codebook")
    tuned = copy.deepcopy(pipeline.tokenizer)
    with torch.no_grad():
        tuned.decoder.conv_out.bias.add_(0.5)
    assert ImagePipeline.from_pipe(pipeline, tokenizer=tuned).tokenizer is tuned
    for dtype in (torch.bfloat16, torch.float16):
        rounded = ImagePipeline.from_pipe(copy.deepcopy(pipeline), dtype=dtype)
        rounded.save_pretrained(tmp_path / str(dtype))
        assert load(tmp_path / str(dtype), device="cpu", dtype=dtype).tokenizer.dtype == dtype


@pytest.mark.parametrize("codes", ["0.1", [1.0, "a"], [[1.0]], {"a": 1.0}])
def test_damaged_codes(codes):
    with pytest.raises(ValueError, match="needed: a list of numbers"):
        ImagePipeline(**{**make().components, "codes": codes})
