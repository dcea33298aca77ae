"""Memory of sampling on a GPU: batches found by measuring, offload, and what is said when memory runs out."""

import pytest
import torch

from visar import load
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
