"""Products for a few rows, and steps made of them; on a GPU, or on a CPU with TRITON_INTERPRET=1."""

import importlib.util
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import Runtime
from visar.generators.raster import RasterGPT
from visar.layers.llama import RMSNorm
from visar.layers.rope import rope_table
from visar.samplers.ancestral import sample_ancestral


def close(got, expected) -> None:
    """Agreement relative to the largest value: rounding of bfloat16, or almost float32's."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < (1e-5 if got.dtype == torch.float32 else 1.6e-2), float(error)


@pytest.fixture
def few_in_float32(monkeypatch):
    """Few rows take the kernels of products in float32 too: the interpreter has no bfloat16."""
    from visar.layers import llama_fused as decoder

    monkeypatch.setattr(decoder, "FEW_DTYPES", (*decoder.FEW_DTYPES, torch.float32))


@pytest.mark.parametrize("early", [0, 2, 9])
@pytest.mark.parametrize("shape", [(7, 33), (12, 300), (16, 128)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
@torch.no_grad()
def test_product(device, dtype, rows, shape, early):
    """All variants: with and without norm, second matrix and residual; shapes that tiles do not divide."""
    from visar.kernels.product import Tile, Weight, product

    outputs, width = shape
    torch.manual_seed(rows + width)
    norm = RMSNorm(width).to(device, dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(rows, width, device=device, dtype=dtype)
    matrix, second = (torch.randn(outputs, width, device=device, dtype=dtype) / width**0.5 for _ in range(2))
    residual = torch.randn(rows, outputs, device=device, dtype=dtype)
    for before in (None, norm):
        normed = x if before is None else norm(x)
        gate, up = functional.linear(normed, matrix), functional.linear(normed, second)
        for expected, other in ((gate, None), (functional.silu(gate) * up, Weight(second))):
            call = dict(norm=before, up=other, tile=Tile(outputs=4, inputs=64, warps=1, early=early))
            close(product(x, Weight(matrix), **call), expected)
            added = residual.clone()
            got = product(x, Weight(matrix), residual_MN=added, **call)
            close(got, residual + expected)
            assert got.data_ptr() == added.data_ptr()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@torch.no_grad()
def test_product_of_scaled_weights(device, dtype, kind):
    from visar.kernels.product import Tile, Weight, product

    if kind != "int8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no float8")
    torch.manual_seed(0)
    scale = (torch.rand(2, 9) + 0.5).to(device)
    values = (40 * torch.randn(2, 9, 70)).round().clamp(-100, 100).to(device, getattr(torch, kind))
    matrix, second = (Weight(*pair) for pair in zip(values, scale, strict=True))
    x = torch.randn(2, 70, device=device).to(dtype)
    tile = Tile(4, 64, 2, 1)
    gate, up = (((x.float() @ w.values.float().T) * w.scale_N).to(dtype) for w in (matrix, second))
    close(product(x, matrix, tile=tile), gate)
    small = Weight(second.values, second.scale_N / 1000)
    close(product(x / 1000, matrix, up=small, tile=tile), functional.silu(gate / 1000) * up / 1e6)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("rows", "outputs", "width"), [(9, 40, 70), (30, 2100, 64), (128, 16, 33)])
@torch.no_grad()
def test_scaled_product(device, dtype, kind, rows, outputs, width):
    from visar.kernels.product import Weight, scaled_product

    if kind != "int8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no float8")
    torch.manual_seed(0)
    values = (40 * torch.randn(outputs, width)).round().clamp(-100, 100).to(device, getattr(torch, kind))
    weight = Weight(values, (torch.rand(outputs) + 0.5).to(device))
    x = torch.randn(rows, width, device=device).to(dtype)
    expected = ((x.float() @ values.float().T) * weight.scale_N).to(dtype)
    close(scaled_product(x, weight), expected)
    both = torch.zeros(rows, 2 * outputs, device=device, dtype=dtype)
    scaled_product(x, weight, both[:, outputs:])
    close(both, torch.cat([torch.zeros_like(expected), expected], -1))


def test_products_refuse(device):
    from visar.kernels.product import Weight, product, scaled_product

    plain, scale = torch.zeros(4, 16, device=device), torch.ones(4, device=device)
    for rows, weight in ((129, Weight(plain, scale)), (2, Weight(plain))):
        with pytest.raises(ValueError, match="at most 128 rows, as many inputs, and a scale"):
            scaled_product(torch.zeros(rows, 16, device=device), weight)
    for rows, width in ((9, 16), (2, 17)):
        with pytest.raises(ValueError, match="at most 8 rows, as many inputs"):
            product(torch.zeros(rows, width, device=device), Weight(torch.zeros(4, 16, device=device)), tile="head")


def test_where_few_rows_go():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from visar.layers.llama_fused import FEW_ROWS, are_few

    layer = nn.Linear(8, 8).bfloat16()
    assert are_few(FEW_ROWS, layer) and not are_few(FEW_ROWS + 1, layer)
    assert not are_few(1, nn.Linear(8, 8)) and not are_few(1, nn.Sequential(layer))


# ------------------------------------------------------------------------------------------------------------ models
def make(**sizes) -> RasterGPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=40, grid=(3, 3), width=64, num_layers=2, num_heads=2, hidden_width=96, num_classes=5)
    model = RasterGPT(**(shape | sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_steps_and_windows(device, few_in_float32, guided):
    """5 launches per layer for one image, 8 for more; both are the plain path."""
    model = make().to(device)
    for batch, window in ((1, 0), (1, 2), (3, 0)):
        condition = Condition(labels_BA=torch.arange(batch, device=device)[:, None])
        draft = torch.tensor([[7, 3, 9]], device=device).expand(batch, -1)
        out = []
        for fused in ("auto", "off"):
            model.fused = fused
            state = model.start(condition, Guidance(2.0 if guided else 1.0), window=2)
            for step in range(2):
                state.block = step
                out.append(model.verify(state, draft[:, :window]) if window else model.predict(state))
                model.append(state, draft[:, step : step + 1])
        for got, expected in zip(out[:2], out[2:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_keep_their_layers(device, few_in_float32):
    model = make().to(device)
    condition, expected = Condition(labels_BA=torch.zeros(1, 1, dtype=torch.int64, device=device)), []
    for wrapped in (False, True):
        if wrapped:
            layer = model.layers[1].attention
            layer.wo = nn.Sequential(layer.wo)
        expected.append(model.predict(model.start(condition)))
    torch.testing.assert_close(*expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- compilation
def launch_product(place: str, kind: str) -> None:
    """At a place of a block of LlamaGen-XL (see TILES), for guidance of one image."""
    from visar.kernels.product import Weight, product

    def weight() -> Weight:
        values = torch.zeros(64, width, dtype=getattr(torch, kind))
        return Weight(values, torch.ones(64) if values.itemsize == 1 else None)

    width = 3584 if place == "down" else 1280
    residual = torch.zeros(2, 64, dtype=torch.bfloat16) if place in ("wo", "down") else None
    norm = RMSNorm(width).bfloat16() if place in ("qkv", "gated") else None
    up = weight() if place == "gated" else None
    x = torch.zeros(2, width, dtype=torch.bfloat16)
    product(x, weight(), norm=norm, up=up, residual_MN=residual, overlap=True, tile=place)


def launch_attention() -> None:
    from visar.kernels.attention import cached_attention

    rope, length = rope_table("2d", prefix_length=1, grid=(16, 16), head_width=64), torch.zeros(1, dtype=torch.int64)
    qkv, cache = torch.zeros(2, 1, 3 * 1280).bfloat16(), torch.zeros(2, 2, 20, 256, 64).bfloat16()
    cached_attention(qkv, *cache, rope, length, ahead=0, batch=1, key_valid_RS=None, overlap=True)


def launch_others() -> None:
    from visar.kernels import draw, elementwise

    x, weight, length = torch.zeros(2, 1280).bfloat16(), torch.ones(1280).bfloat16(), torch.zeros(1, dtype=torch.int64)
    elementwise.add_rms_norm_(x, None, weight, 1e-5, overlap=True)
    tokens = torch.zeros(1, 256, dtype=torch.int64)
    elementwise.first_inputs(tokens, None, length, torch.zeros(16, 1280).bfloat16(), x, overlap=True)
    elementwise.guide(torch.zeros(2, 1, 16384).bfloat16(), torch.zeros(256), length, overlap=True)
    with patch.object(draw, "overlaps", return_value=True):
        draw.draw_codes(torch.zeros(1, 16384), torch.zeros(1), 1.0, 100, 1.0)


PLACES = ["qkv", "wo", "gated", "down", "head"]
KINDS = ["bfloat16", "int8", "float8_e4m3fn"]
LAUNCHES = [
    *((launch_product, (place, kind), "_product") for place in PLACES for kind in KINDS),
    (launch_attention, (), "_one_token"),
    (launch_others, (), "_add_rms_norm _first_inputs _guide _draw"),
]


@pytest.mark.parametrize(("launch", "options", "kernels"), LAUNCHES)
def test_kernels_that_overlap_compile_for_a_gpu_that_is_not_here(hopper, launch, options, kernels):
    made = hopper(launch, *options)
    assert [name for name, _ in made] == kernels.split()
    for name, ptx in made:
        assert "griddepcontrol.launch_dependents" in ptx
        if name in ("_product", "_one_token"):
            early, _ = ptx.split("griddepcontrol.wait")
            assert "ld.global" in early and "st.global" not in early


def launch_scaled_product(rows: int, kind: str) -> None:
    from visar.kernels.product import Weight, scaled_product

    weight = Weight(torch.zeros(3840, 1280, dtype=getattr(torch, kind)), torch.ones(3840))
    scaled_product(torch.zeros(rows, 1280).bfloat16(), weight)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("rows", [16, 64])
def test_scaled_product_compiles_for_a_gpu_that_is_not_here(hopper, rows, kind):
    assert [name for name, _ in hopper(launch_scaled_product, rows, kind)] == ["_scaled_product"]


# --------------------------------------------------------------------------------------------------------------- GPU
@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_gpu_ids_do_not_depend_on_overlap_or_capture(monkeypatch, guidance):
    model = nn.Module.to(make(vocab_size=4096, grid=(16, 16), width=512, num_heads=8, hidden_width=1408), "cuda")
    model = nn.Module.to(model, torch.bfloat16)
    condition = Condition(labels_BA=torch.tensor([[3]], device="cuda"))
    call = dict(noise=Noise(image_seeds(1, 1), "cuda"), guidance=Guidance(guidance))
    tokens = []
    for overlap in ("0", "1"):
        monkeypatch.setenv("VISAR_PDL", overlap)
        tokens.append(sample_ancestral(model, condition, **call).tokens)
        runtime = Runtime()
        tokens += [sample_ancestral(model, condition, runtime=runtime, **call).tokens for _ in range(2)]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])
