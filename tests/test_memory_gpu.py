"""Memory of sampling on a GPU: batches found by measuring, offload, and what is said when memory runs out."""

import pytest
import torch

from visar import load
from visar.pipelines.editing import edit_images, scale_previews
from visar.pipelines.memory import OutOfMemory

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pipeline():
    return load("emoji-raster", device="cuda", dtype="float32")


def ids(pipeline, **settings) -> torch.Tensor:
    return pipeline(num_images=5, seed=3, output_type="np", **settings).tokens.cpu()


def test_a_batch_is_found_by_measuring(pipeline):
    bounds = [100, 4]
    found = [pipeline.find_batch_size(most) for most in bounds]
    assert found == [64, 4]
    torch.cuda.synchronize()
    small = pipeline.find_batch_size(1 << 20, limit_bytes=2 << 30)
    assert small & (small - 1) == 0 and 1 <= small < 1 << 16
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipeline(num_images=small, seed=0, batch_size=small, output_type="np")
    assert torch.cuda.max_memory_allocated() - before <= 2 << 30
    assert torch.equal(ids(pipeline, batch_size="auto"), ids(pipeline))


def test_offload_changes_no_image_and_frees_the_tokenizer(pipeline):
    expected = ids(pipeline)
    torch.cuda.empty_cache()
    away = load("emoji-raster", device="cuda", dtype="float32", offload=True)
    parameters = list(away.tokenizer.parameters())
    assert away.device.type == "cuda" and {parameter.device.type for parameter in parameters} == {"cpu"}
    assert torch.equal(ids(away), expected)
    assert {parameter.device.type for parameter in away.tokenizer.parameters()} == {"cpu"}


def test_running_out_of_memory_says_what_fits(pipeline):
    pipeline.runtime.clear()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 30)) / total)
    try:
        with pytest.raises(OutOfMemory, match="with 4096 images at a time") as caught:
            pipeline(num_images=4096, seed=0, batch_size=4096, output_type="np")
        assert 1 <= caught.value.fits < 1024
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ids(pipeline).shape == (5, 256)


@pytest.mark.parametrize("name", ["emoji-raster", "emoji-var"])
def test_model_offload_changes_no_image_and_frees_the_gpu(name):
    expected = ids(load(name, device="cuda", dtype="float32"))
    away = load(name, device="cpu", dtype="float32")
    parts = [*away.generator.parameters(), *away.tokenizer.parameters()]
    away.enable_model_cpu_offload()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    assert away.device.type == "cuda" and {parameter.device.type for parameter in parts} == {"cpu"}
    for _ in range(2):  # weights are elsewhere in every call: nothing captured before may be used
        assert torch.equal(ids(away, batch_size=3), expected)
        assert {parameter.device.type for parameter in parts} == {"cpu"}
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 32 << 20
    away.remove_all_hooks()
    assert torch.equal(ids(away.to("cuda")), expected)


def test_model_offload_of_what_a_call_moves_beside_the_models():
    settings = dict(sampler="speculative", sampler_options={"drafter": "eagle"})
    expected = ids(load("emoji-raster", device="cuda", dtype="float32"), **settings)
    away = load("emoji-raster", device="cpu", dtype="float32")
    away.enable_model_cpu_offload(gpu_id=0)
    assert torch.equal(ids(away, **settings), expected)
    with pytest.raises(ValueError, match="CUDA devices are 0"):
        away.enable_model_cpu_offload(gpu_id=torch.cuda.device_count())


@pytest.mark.parametrize("mode", ["offload", "model"])
def test_edits_and_previews_with_offload(mode):
    away = load("emoji-var", device="cpu" if mode == "model" else "cuda", dtype="float32", offload=mode == "offload")
    if mode == "model":
        away.enable_model_cpu_offload()
    plain = load("emoji-var", device="cuda", dtype="float32")
    pictures = plain(num_images=2, seed=1).images
    for pipeline in (plain, away):
        pipeline.set_progress_bar_config(disable=True)
    edits = [edit_images(each, pictures, box=(0, 0, 1, 0.5), seed=2).tokens.cpu() for each in (plain, away)]
    assert torch.equal(*edits)
    assert len(scale_previews(away, edits[0])) == 2


def test_group_offload_makes_no_other_images(pipeline, tmp_path):
    away = load("emoji-raster", device="cpu", dtype="float32")
    away.generator.enable_group_offload(
        torch.device("cuda"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(ValueError, match="hooks of diffusers .* are on the RasterGPT"):
        ids(away)
    with pytest.raises(ValueError, match="group offload is not for this pipeline"):
        pipeline.enable_group_offload(torch.device("cuda"))
