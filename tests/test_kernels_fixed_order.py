"""Products and attention of a fixed order: right, and the same for any number of rows; GPU or TRITON_INTERPRET=1."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from visar.kernels.invariance import attention, batch_invariant
from visar.kernels.mode import active


def error(got, expected) -> float:
    """Largest difference over the largest value."""
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def limit(dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1.2e-2


# --------------------------------------------------------------------------------------------------------- correctness
@pytest.mark.parametrize("rows, outputs, width", [(1, 1, 1), (3, 70, 20), (17, 64, 300), (65, 130, 1100)])
@pytest.mark.parametrize("gelu", [False, True])
def test_product(device, dtype, rows, outputs, width, gelu):
    from visar.kernels.fixed_order import product

    torch.manual_seed(0)
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(outputs, width, device=device) * width**-0.5).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype)
    expected = functional.linear(x.double(), weight.double(), bias.double())
    expected = functional.gelu(expected, approximate="tanh") if gelu else expected
    for parts, apart in ((1, False), (3, False), (3, True)):
        got = product(x, weight, bias, gelu=gelu, parts=parts, apart=apart)
        assert got.dtype == dtype and error(got, expected) < limit(dtype)
    assert error(product(x, weight), functional.linear(x.double(), weight.double())) < limit(dtype)


def test_product_of_batches_and_strides(device, dtype):
    from visar.kernels.fixed_order import product

    torch.manual_seed(0)
    x = torch.randn(3, 40, 18, device=device).to(dtype).transpose(1, 2)
    weight = torch.randn(3, 40, 33, device=device).to(dtype).transpose(1, 2)
    assert error(product(x, weight), x.double() @ weight.double().mT) < limit(dtype)
    assert error(product(x, weight[0]), x.double() @ weight[0].double().mT) < limit(dtype)
    assert product(x[:, :0], weight).shape == (3, 0, 33)


@pytest.mark.parametrize("x, weight", [((2, 3), (4, 5)), ((2, 3), (2, 4, 3)), ((2, 4, 3), (3, 4, 3)), ((3,), (4, 3))])
def test_product_refuses_what_does_not_fit(device, x, weight):
    from visar.kernels.fixed_order import product

    with pytest.raises(ValueError, match="weight"):
        product(torch.zeros(x, device=device), torch.zeros(weight, device=device))


@pytest.mark.parametrize("length, keys, width", [(1, 1, 16), (5, 9, 20), (40, 70, 64)])
@pytest.mark.parametrize("kind", ["all", "mask", "causal"])
def test_attention(device, dtype, length, keys, width, kind):
    torch.manual_seed(0)
    query = torch.randn(2, length, 3, width, device=device).to(dtype).transpose(1, 2)
    key, value = (torch.randn(2, 3, keys, width, device=device).to(dtype) for _ in range(2))
    mask = torch.rand(2, 1, length, keys, device=device) < 0.7 if kind == "mask" else None
    if mask is not None:
        mask[..., 0] = True
    options = dict(mask=mask, causal=kind == "causal", scale=0.3)
    expected = functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, is_causal=kind == "causal", scale=0.3
    )
    assert error(attention(query, key, value, **options), expected) < limit(dtype)
    with batch_invariant():
        got = attention(query, key, value, **options)
    assert got.dtype == dtype and error(got, expected) < limit(dtype)
    assert got.transpose(1, 2).is_contiguous()


# ------------------------------------------------------------------------------------------------------------ the mode
def test_products_of_torch_are_replaced_inside_and_only_there(device, monkeypatch):
    from visar.kernels import fixed_order

    calls, product = [], fixed_order.product
    monkeypatch.setattr(fixed_order, "product", lambda *args, **named: calls.append(1) or product(*args, **named))
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, device=device)
    with_bias, without = nn.Linear(8, 5).to(device), nn.Linear(8, 5, bias=False).to(device)
    stack = torch.randn(2, 8, 4, device=device)

    def run():
        return [
            with_bias(x),
            without(x),
            x @ stack,
            torch.addmm(torch.zeros(3, 4, device=device), x[0], stack[0], beta=0.5, alpha=2.0),
            torch._addmm_activation(with_bias.bias, x[0], with_bias.weight.t(), use_gelu=True),
            torch._addmm_activation(with_bias.bias, x[0], with_bias.weight.t()),
            torch.baddbmm(torch.ones(2, 3, 4, device=device), x, stack),
        ]

    for grade in (torch.no_grad, torch.inference_mode):
        with grade():
            expected = run()
            assert not calls and not active()
            with batch_invariant(False):
                run()
            assert not calls
            with batch_invariant(), batch_invariant():
                assert active()
                got = run()
            assert len(calls) == len(expected) and not active()
            calls.clear()
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_other_tensors_keep_torchs_products(device):
    with torch.no_grad(), batch_invariant():
        whole = torch.arange(6, device="cpu").view(2, 3)
        assert torch.equal(whole @ whole.T, torch.tensor([[5, 14], [14, 50]]))
        double = torch.ones(2, 2, dtype=torch.float64, device=device)
        assert torch.equal(double @ double, 2 * double)


def test_an_error_inside_ends_the_mode(device):
    with pytest.raises(RuntimeError), batch_invariant():
        raise RuntimeError
    assert not active()


# --------------------------------------------------------------------------------------------------------- compilation
TILES = [1, 16, 17, 33, 65, 129, 2000, 40000]


def launch_product(rows: int, parts: int, apart: bool) -> None:
    from visar.kernels.fixed_order import product

    weight, bias = torch.zeros(1280, 1280).bfloat16(), torch.zeros(1280).bfloat16()
    product(torch.zeros(rows, 1280).bfloat16(), weight, bias, gelu=True, parts=parts, apart=apart)


@pytest.mark.parametrize("rows", TILES)
def test_one_kind_of_instruction_for_all_numbers_of_rows(hopper, rows):
    """On Hopper: 64 outputs and 16 inputs of every tensor-core instruction, whatever the tile."""
    for parts, apart in ((1, False), (4, False), (4, True)):
        made = hopper(launch_product, rows, parts, apart)
        assert [name for name, _ in made] == ["_product", "_add_parts"][: 1 + apart]
        shapes = set(re.findall(r"(wgmma\.mma_async\.sync\.aligned\.m64)n\d+(k\d+\.f32\.bf16\.bf16)", made[0][1]))
        assert shapes == {("wgmma.mma_async.sync.aligned.m64", "k16.f32.bf16.bf16")}
        assert "mma.sync" not in made[0][1]


def launch_attention(kind: str, length: int) -> None:
    from visar.kernels.fixed_order import attention

    query, key = (torch.zeros(2, 3, count, 64, dtype=getattr(torch, kind)) for count in (length, 300))
    attention(query, key, key, scale=1.0, mask=torch.ones(1, 1, length, 300, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 256])
def test_attention_compiles_for_a_gpu_that_is_not_here(hopper, kind, length):
    assert [name for name, _ in hopper(launch_attention, kind, length)] == ["_attention"]


# ------------------------------------------------------------------------------------------------------------- models
def raster(**sizes):
    from visar.generators.raster import RasterGPT

    torch.manual_seed(0)
    shape = dict(vocab_size=40, grid=(2, 3), width=64, num_layers=2, num_heads=2, hidden_width=96, num_classes=5)
    return RasterGPT(**(shape | sizes)).eval()


def over_scales(**sizes):
    from visar.bench.subjects import fill
    from visar.generators.next_scale import NextScaleTransformer

    torch.manual_seed(0)
    shape = dict(vocab_size=40, codebook_width=8, scales=(1, 2, 3), width=64, num_layers=2, num_heads=2, num_classes=5)
    model = NextScaleTransformer(**(shape | sizes)).eval()
    fill(model)
    return model


def all_logits(model, batch: int, rows: slice, blocks: int, device: torch.device) -> torch.Tensor:
    """Guided logits of some of `batch` images over the first blocks, with given tokens."""
    from visar.core.condition import Condition
    from visar.core.guidance import Guidance

    numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (batch, model.num_tokens), generator=numbers).to(device)[rows]
    labels = torch.randint(5, (batch, 1), generator=numbers).to(device)[rows]
    state = model.start(Condition(labels_BA=labels), Guidance(2.0))
    parts, done = [], 0
    for block, size in enumerate(model.block_sizes[:blocks]):
        state.block = block
        parts.append(model.predict(state))
        model.append(state, tokens[:, done : done + size])
        done += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("make", [raster, over_scales])
@torch.no_grad()
def test_decoding_in_the_mode_is_decoding(device, make):
    model, logits = make(), []
    model.to(device)
    for enabled in (False, True):
        with batch_invariant(enabled):
            logits.append(all_logits(model, 2, slice(None), 3, device))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_phi_of_maps_by_products_is_the_convolution(device):
    from visar.tokenizers.multiscale_quantizer import ScalePyramid

    torch.manual_seed(0)
    pyramid = ScalePyramid(16, 8, (1, 2, 3, 5)).to(device)
    pyramid.reset_parameters()
    for scale, size in enumerate(pyramid.sizes):
        codes = torch.randn(3, size, 8, device=device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = pyramid.contribution(scale, codes)
        with torch.no_grad():
            got = pyramid.contribution(scale, codes)
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- GPU
def same(name: str, reference: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same bits; says where not."""
    wrong = int((reference != other).sum())
    if wrong:
        print(f"{name}: {wrong} of {other.numel()} differ, by at most {float((reference - other).abs().max()):.3g}")
    return wrong == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("outputs, width", [(1280, 1280), (1280, 3584), (4096, 1024), (1024, 4096), (330, 200)])
def test_gpu_product_is_invariant_to_the_rows(kind, outputs, width):
    """Every row count, tile, place among the rows, and parts together or apart."""
    from visar.kernels.fixed_order import Tile, parts_of, product

    torch.manual_seed(0)
    dtype = getattr(torch, kind)
    most = 4500 if kind == "float32" else 20000
    x = torch.randn(most, width, device="cuda").to(dtype)
    weight = (torch.randn(outputs, width, device="cuda") * width**-0.5).to(dtype)
    bias, good = torch.randn(outputs, device="cuda").to(dtype), True
    for parts in {1, parts_of(outputs, width)}:
        reference = product(x, weight, bias, gelu=True, parts=parts)
        exact = functional.gelu(functional.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
        assert error(reference, exact) < limit(dtype)
        for rows in (1, 2, 5, 16, 17, 32, 50, 64, 100, 128, 129, 512, 2000, 4400, most):
            for first in (0, 3, 77):
                part = x[first : first + rows]
                for apart in (False, True):
                    got = product(part, weight, bias, gelu=True, parts=parts, apart=apart)
                    good &= same(
                        f"rows {rows} from {first} parts {parts} apart {apart}", reference[first : first + rows], got
                    )
        for tile in (
            Tile(64, 16, 64, 4, 3),
            Tile(64, 256, 64, 8, 3),
            Tile(128, 64, 32, 4, 3),
            Tile(128, 16, 128, 8, 4),
        ):
            if kind != "float32":
                got = product(x[:300], weight, bias, gelu=True, parts=parts, tile=tile)
                good &= same(f"{tile} parts {parts}", reference[:300], got)
    assert good


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_gpu_attention_is_invariant_to_the_rows(kind):
    torch.manual_seed(0)
    good = True
    for length, keys, width in ((1, 1, 64), (16, 50, 64), (256, 680, 64), (100, 300, 48), (120, 120, 100)):
        query, key, value = (
            torch.randn(64, 4, count, width, device="cuda").to(getattr(torch, kind)) for count in (length, keys, keys)
        )
        expected = functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        with batch_invariant():
            reference = attention(query, key, value)
            assert error(reference, expected) < limit(reference.dtype)
            for rows in (1, 2, 5, 32):
                for first in (0, 7):
                    part = slice(first, first + rows)
                    good &= same(
                        f"{length} {keys} {rows}", reference[part], attention(query[part], key[part], value[part])
                    )
    assert good


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [raster, over_scales])
@torch.no_grad()
def test_gpu_logits_are_invariant_to_the_batch(kind, make):
    sizes = dict(width=512, num_layers=4, num_heads=8, vocab_size=4096)
    extra = (
        dict(grid=(16, 16), hidden_width=1408) if make is raster else dict(scales=(1, 2, 4, 8, 16), codebook_width=32)
    )
    model, device, good = make(**sizes, **extra), torch.device("cuda"), True
    nn.Module.to(model, device, getattr(torch, kind))
    with batch_invariant():
        reference = all_logits(model, 96, slice(None), 5, device)
        for rows in (1, 2, 5, 16, 64):
            part = slice(9, 9 + rows)
            good &= same(f"{rows} images", reference[part], all_logits(model, 96, part, 5, device))
    assert good


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["emoji-raster", "emoji-var", "emoji-hmar"])
def test_gpu_images_are_invariant_to_the_batch(name, kind):
    """The whole way: sampler, captured steps, decoder."""
    import visar

    pipe = visar.load(name, device="cuda", dtype=kind, deterministic="batch")
    pipe.set_progress_bar_config(disable=True)
    made = {size: pipe(num_images=37, seed=3, batch_size=size, output_type="pt") for size in (1, 5, 16, 37)}
    for size, out in made.items():
        assert torch.equal(out.tokens, made[37].tokens), size
        assert torch.equal(out.images, made[37].images), size
