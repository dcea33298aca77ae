"""Products for a few rows, and steps made of them; on a GPU, or on a CPU with TRITON_INTERPRET=1."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from visar.condition import Condition
from visar.generators.raster import RasterGPT
from visar.guidance import Guidance
from visar.layers import RMSNorm
from visar.noise import Noise, image_seeds
from visar.runtime import Runtime
from visar.samplers.ancestral import sample_ancestral


def close(got, expected) -> None:
    """Agreement relative to the largest value: rounding of bfloat16, or almost float32's."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < (1e-5 if got.dtype == torch.float32 else 1.6e-2), float(error)


@pytest.fixture
def few_in_float32(monkeypatch):
    """Few rows take the kernels of products in float32 too: the interpreter has no bfloat16."""
    from visar.kernels import decoder

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
    from visar.kernels.decoder import FEW_ROWS, are_few

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
    """5 launches a layer for one image, 8 for more; both are the plain path."""
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
VARIANTS = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from visar.kernels import attention, draw, elementwise, product

def check(kernel, constants, types, warps=4):
    constants = dict(constants, PDL=True)
    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*" + types.get(name, types["other"])
        return "fp32" if name in ("eps", "scale", "temperature", "top_p") else "i32"
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, launch_pdl=True))
    text = done.asm["ptx"]
    assert "griddepcontrol.launch_dependents" in text
    return text

for weight, rows in itertools.product(("i8", "fp8e4nv"), (16, 64)):
    types = dict(weight_ptr="*" + weight, scale_ptr="*fp32", x_ptr="*bf16", out_ptr="*bf16")
    constants = dict(BLOCK_M=rows, BLOCK_N=32, BLOCK_K=128)
    kernel = product._scaled_product
    types = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, types, constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=4))
for weight, name in itertools.product(("bf16", "i8", "fp8e4nv"), product.TILES):
    width = 3584 if name == "down" else 1280
    tile = (product.TILES if weight == "bf16" else product.TILES_8BIT)[name]
    count = -(-width // tile.inputs)
    constants = dict(ROWS=2, WIDTH=width, NORM=name in ("qkv", "gated"), GATED=name == "gated",
        ADD=name in ("wo", "down"), SCALED=weight != "bf16",
        BLOCK_N=tile.outputs, BLOCK_K=tile.inputs, TILES=count, EARLY=min(tile.early, count))
    types = dict(weight_ptr=weight, up_ptr=weight, scale_ptr="fp32", up_scale_ptr="fp32", other="bf16")
    early, late = check(product._product, constants, types, tile.warps).split("griddepcontrol.wait")
    assert "ld.global" in early and "st.global" not in early
one = dict(HEADS=20, WIDTH=64, WIDTH_POW2=64, RAGGED=False, MASKED=False, BLOCK=256)
types = dict(rope_ptr="fp32", length_ptr="i64", valid_ptr="u8", other="bf16")
early, late = check(attention._one_token, one, types, 8).split("griddepcontrol.wait")
assert "ld.global" in early and "st.global" not in early
check(elementwise._add_rms_norm, dict(ADD=False, BLOCK=2048), dict(other="bf16"))
types = dict(tokens_ptr="i64", draft_ptr="i64", length_ptr="i64", other="bf16")
check(elementwise._first_inputs, dict(RAGGED=False, BLOCK=2048), types)
types = dict(length_ptr="i64", logits_ptr="bf16", other="fp32")
check(elementwise._guide, dict(RAGGED=False, BLOCK=2048), types)
check(draw._draw, dict(ROWS=128, COLUMNS=128, TOP_K=True, TOP_P=False), dict(out_ptr="i64", other="fp32"), 32)
"""


def test_kernels_that_overlap_compile_for_a_gpu_that_is_not_here():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", VARIANTS], cwd=root, env=environment, check=True)


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
