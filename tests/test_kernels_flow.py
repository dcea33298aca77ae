"""The flow map's kernel against the plain PyTorch it stands for; on a GPU, or with TRITON_INTERPRET=1."""

import pytest
import torch

from visar import kernels
from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import Runtime
from visar.pipelines.loading import load
from visar.samplers.flow import code_scale, fits_kernel, flow_map, sample_flow


def inputs(rows: int, codes: int, width: int, device: torch.device | str = "cpu", excluded: bool = True) -> tuple:
    """Noise, logits of which a third is -inf, and codes."""
    generator = torch.Generator().manual_seed(codes + width)
    noise = torch.randn(rows, width, generator=generator)
    logits = 2 * torch.randn(rows, codes, generator=generator)
    if excluded:
        logits[:, :-1][torch.rand(rows, codes - 1, generator=generator) < 0.3] = float("-inf")
        logits[0, :-1] = float("-inf")
    vectors = torch.randn(codes, width, generator=generator)
    return noise.to(device), logits.to(device), (vectors * code_scale(vectors)).to(device)


def plain(monkeypatch, call):
    """The call's result with every kernel switched off."""
    with monkeypatch.context() as patch:
        patch.setenv("VISAR_TRITON", "0")
        return call()


@pytest.mark.parametrize(("codes", "width"), [(2, 1), (100, 3), (128, 8), (300, 32)])
def test_tokens_are_those_of_the_plain_map(device, monkeypatch, codes, width):
    """All of these rows: points so near a border that rounding decides are one in thousands."""
    noise, logits, vectors = inputs(12, codes, width, device)
    assert fits_kernel(noise, logits, vectors)
    got = flow_map(noise.view(3, 4, width), logits.view(3, 4, codes), vectors, steps=5)
    assert got.shape == (3, 4) and got[0, 0] == codes - 1
    assert torch.equal(got.flatten(), plain(monkeypatch, lambda: flow_map(noise, logits, vectors, steps=5)))
    assert torch.isfinite(logits.gather(1, got.view(-1, 1))).all()


def test_a_row_does_not_depend_on_the_others(device):
    noise, logits, vectors = inputs(9, 140, 8, device)
    whole = flow_map(noise, logits, vectors, steps=4)
    for first, last in ((1, 6), (8, 9)):
        part = flow_map(noise[first:last], logits[first:last], vectors, steps=4)
        assert torch.equal(part, whole[first:last])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(flow_map(noise[order], logits[order], vectors, steps=4), whole[order])


def test_wide_codes_take_the_plain_map(device):
    noise, logits, vectors = inputs(3, 10, kernels.MAX_CHANNELS + 1, device)
    assert not fits_kernel(noise, logits, vectors)
    assert not fits_kernel(noise[:, :8].double(), logits, vectors[:, :8])


def launch(codes: int, width: int, dtype: str) -> None:
    from visar.kernels.flow_map import map_codes

    noise, logits, vectors = inputs(9, codes, width)
    map_codes(noise, logits.to(getattr(torch, dtype)), vectors, 24)


@pytest.mark.parametrize(
    ("codes", "width", "dtype_name"), [(16384, 8, "float32"), (4096, 32, "float32"), (512, 64, "bfloat16")]
)
def test_kernel_compiles_for_a_gpu_that_is_not_here(hopper, codes, width, dtype_name):
    ((name, ptx),) = hopper(launch, codes, width, dtype_name)
    assert name == "_flow_map" and "mma" not in ptx


# ---------------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("codes", [1024, 4096, 16384])
def test_gpu_tokens_are_those_of_the_plain_map(monkeypatch, codes, width):
    noise, logits, vectors = inputs(8192, codes, width, "cuda")
    got = flow_map(noise, logits, vectors)
    expected = plain(monkeypatch, lambda: flow_map(noise, logits, vectors))
    assert (got == expected).float().mean() >= 0.999
    parts = [flow_map(*pair, vectors) for pair in zip(noise.split(1001), logits.split(1001), strict=True)]
    assert torch.equal(torch.cat(parts), got)


@pytest.mark.gpu
def test_gpu_memory_is_that_of_the_logits():
    """64 images of 256 tokens of 16,384 codes: logits of 1 GiB, and next to nothing beside them."""
    vectors = inputs(1, 16384, 8, "cuda", excluded=False)[2]
    noise, logits = torch.randn(64 * 256, 8, device="cuda"), torch.randn(64 * 256, 16384, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    flow_map(noise, logits, vectors)
    assert torch.cuda.max_memory_allocated() - before < 2**24


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["emoji-raster", "emoji-var"])
def test_gpu_captured_tokens_are_eager_tokens(name):
    pipe = load(name, device="cuda", dtype=torch.float32)
    seeds = image_seeds(3, 4)
    condition, _ = pipe.prepare_condition(seeds)
    settings = dict(guidance=Guidance(2.0), top_k=64, codebook=pipe.tokenizer.codebook, steps=8)
    condition, noise = condition.to("cuda"), Noise(seeds, torch.device("cuda"))
    eager = sample_flow(pipe.generator, condition, noise=noise, **settings)
    runtime = Runtime()
    for _ in range(3):
        captured = sample_flow(pipe.generator, condition, noise=noise, runtime=runtime, **settings)
        assert torch.equal(captured.tokens, eager.tokens)
