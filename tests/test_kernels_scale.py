"""Fused steps of transformers over scales against the plain modules; on a GPU, or a CPU with TRITON_INTERPRET=1."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.core.runtime import EAGER, Runtime
from visar.generators.next_scale import NextScaleTransformer
from visar.layers.scale_blocks import AdaLNBlock, AdaLNOutputNorm, run_blocks
from visar.samplers.next_scale import sample_next_scale


def error(got, expected) -> float:
    """Largest difference over the largest value."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def limit(dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1.6e-2


def plain(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setenv("VISAR_TRITON", "0")
        return call()


# ---------------------------------------------------------------------------------------------------------- kernels
@pytest.mark.parametrize("rows, length, width", [(1, 1, 64), (2, 5, 96), (3, 2, 1920)])
@pytest.mark.parametrize("with_branch", [True, False])
def test_modulated_norm(device, dtype, rows, length, width, with_branch):
    from visar.kernels.scales import modulated_norm

    torch.manual_seed(0)
    x, branch = (torch.randn(rows, length, width, device=device, dtype=dtype) + 2 for _ in range(2))
    modulation = torch.randn(rows, 6, width, device=device, dtype=dtype)
    gate, _, scale, _, shift, _ = modulation.unbind(1)
    added = dict(branch_RLD=branch, gate_RD=gate) if with_branch else {}
    out, normed = modulated_norm(x, scale, shift, 1e-6, **added)
    expected = (x.float() + gate.float()[:, None] * branch.float()).to(dtype) if with_branch else x
    assert error(out, expected) < limit(dtype)
    wide = functional.layer_norm(out.double(), (width,), eps=1e-6)
    wide = wide * (1 + scale.double()[:, None]) + shift.double()[:, None]
    assert error(normed, wide.to(dtype)) < limit(dtype)


@pytest.mark.parametrize("heads, width", [(1, 64), (3, 32), (30, 64), (2, 20)])
@pytest.mark.parametrize("rows, length, begin, qk_norm", [(1, 1, 0, True), (2, 4, 3, True), (2, 4, 0, False)])
def test_split_heads(device, dtype, heads, width, rows, length, begin, qk_norm):
    from visar.kernels.scales import split_heads

    torch.manual_seed(0)
    qkv = torch.randn(rows, length, 3 * heads * width, device=device, dtype=dtype)
    q_bias, v_bias = (torch.randn(heads * width, device=device, dtype=dtype) for _ in range(2))
    log_scale = (torch.randn(1, heads, 1, 1, device=device) * 3 + 3).to(dtype)
    cache = torch.randn(2, rows, heads, begin + length + 2, width, device=device, dtype=dtype)
    before = cache.clone()
    got = split_heads(qkv, q_bias, v_bias, log_scale if qk_norm else None, cache[0], cache[1], begin)

    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]).float()
    parts = (qkv.float() + bias).unflatten(-1, (3, heads, width)).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in parts)
    if qk_norm:
        query = functional.normalize(query, dim=-1) * log_scale.float().clamp(max=4.605170186).exp()
        key = functional.normalize(key, dim=-1)
    assert error(got, query.to(dtype)) < limit(dtype)
    new = slice(begin, begin + length)
    assert error(cache[0, :, :, new], key.to(dtype)) < limit(dtype)
    assert error(cache[1, :, :, new], value.to(dtype)) < limit(dtype)
    for rest in (slice(0, begin), slice(begin + length, None)):
        assert torch.equal(cache[:, :, :, rest], before[:, :, :, rest])


def launch(dtype: str, width: int, heads: int, normed: bool) -> None:
    """Normed: queries and keys of unit length, and a residual branch added before the norm."""
    from visar.kernels.scales import modulated_norm, split_heads

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    x, rows = zeros(2, 25, heads * width), zeros(3, 2, heads * width)
    branch = dict(branch_RLD=x, gate_RD=rows[2]) if normed else {}
    modulated_norm(x, rows[0], rows[1], 1e-6, **branch)
    cache, log_scale = zeros(2, 2, heads, 680, width), zeros(heads) if normed else None
    split_heads(zeros(2, 25, 3 * heads * width), rows[0, 0], rows[1, 0], log_scale, *cache, begin=30)


@pytest.mark.parametrize(("width", "heads"), [(64, 30), (20, 3)])
@pytest.mark.parametrize(("dtype_name", "normed"), [("bfloat16", True), ("float32", False)])
def test_kernels_compile_for_a_gpu_that_is_not_here(hopper, dtype_name, width, heads, normed):
    made = hopper(launch, dtype_name, width, heads, normed)
    assert [name for name, _ in made] == ["_modulated_norm", "_split_heads"]


# ------------------------------------------------------------------------------------------------------------ models
def make(device, num_layers=2, **settings) -> NextScaleTransformer:
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, codebook_width=8, scales=(1, 2, 3), width=64, num_heads=2, num_classes=5)
    model = NextScaleTransformer(num_layers=num_layers, **(sizes | settings)).eval()
    model.reset_parameters(torch.Generator().manual_seed(0), gate=1.0)
    with torch.no_grad():
        model.head.weight.mul_(50)
        for block in model.blocks:
            for bias in (block.attn.q_bias, block.attn.v_bias, block.attn.proj.bias, block.ffn.fc1.bias):
                nn.init.normal_(bias)
    return model.to(device)


@torch.no_grad()
def logits_of_all_scales(model, tokens, condition, guidance, first_scale=0):
    """Guided logits of every scale from `first_scale` on, given the tokens of the coarser ones."""
    state = model.start(condition, guidance, first_scale=first_scale)
    logits = []
    for scale, part in enumerate(tokens.split(model.block_sizes, dim=1)):
        state.block = scale
        if scale >= first_scale:
            logits.append(model.predict(state))
        model.append(state, part)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("settings", [{}, dict(qk_norm=False), dict(shared_adaln=True)])
@pytest.mark.parametrize("first_scale", [0, 1])
def test_fused_steps_are_plain_ones(device, monkeypatch, settings, first_scale):
    model = make(device, **settings)
    tokens = torch.randint(32, (2, model.num_tokens), generator=torch.Generator().manual_seed(1)).to(device)
    condition = Condition(labels_BA=torch.tensor([[1], [2]], device=device))
    call = (model, tokens, condition, Guidance(2.0), first_scale)
    expected = plain(monkeypatch, lambda: logits_of_all_scales(*call))
    assert error(logits_of_all_scales(*call), expected) < 1e-4


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
@torch.no_grad()
def test_blocks_without_a_cache(device, monkeypatch, pattern):
    torch.manual_seed(0)
    blocks = [AdaLNBlock(64, 2, 96).eval().to(device) for _ in range(2)]
    norm = AdaLNOutputNorm(64).eval().to(device)
    x = torch.randn(3, 5, 64, device=device)
    modulations, last = torch.randn(2, 3, 6, 64, device=device), torch.randn(3, 2, 64, device=device)
    before = x.clone()

    def call():
        return run_blocks(blocks, modulations, x, norm, last, (1, 4), pattern)

    got = call()
    assert error(got, plain(monkeypatch, call)) < 1e-4 and torch.equal(x, before)


def test_training_takes_the_plain_modules(device):
    model = make(device)
    tokens = torch.randint(32, (2, model.num_tokens), device=device)
    condition = Condition(labels_BA=torch.tensor([[1], [2]], device=device))
    model(tokens, condition).sum().backward()
    assert all(block.attn.q_bias.grad is not None for block in model.blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("name, most", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_fused_logits_of_a_deeper_model(monkeypatch, name, most):
    model = make("cuda", num_layers=8, width=512, num_heads=8, vocab_size=4096, scales=(1, 2, 3, 4, 5, 6, 8))
    tokens = torch.randint(4096, (4, model.num_tokens), device="cuda")
    condition = Condition(labels_BA=torch.arange(4, device="cuda")[:, None])
    call = (tokens, condition, Guidance(1.5))
    expected = plain(monkeypatch, lambda: logits_of_all_scales(model, *call))
    model.to(getattr(torch, name))
    got = logits_of_all_scales(model, *call)
    difference = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert difference < most, float(difference)


@pytest.mark.gpu
def test_captured_fused_steps_give_the_tokens_of_eager_and_plain_ones(monkeypatch):
    model, runtime = make("cuda", num_layers=4, scales=(1, 2, 3, 5, 8)), Runtime()
    for seed in range(4):
        condition = Condition(labels_BA=torch.tensor([[seed], [1], [2]], device="cuda"))

        def sample(runtime, seed=seed, condition=condition):
            noise = Noise([3 * seed, 3 * seed + 1, 3 * seed + 2], "cuda")
            return sample_next_scale(model, condition, noise=noise, guidance=Guidance(2.0), runtime=runtime).tokens

        eager = sample(EAGER)
        assert torch.equal(sample(runtime), eager)
        assert (plain(monkeypatch, lambda: sample(EAGER)) == eager).float().mean() > 0.98
