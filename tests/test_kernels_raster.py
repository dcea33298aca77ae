"""Kernels of a decode step against the plain PyTorch they stand for; on a GPU, or on a CPU with TRITON_INTERPRET=1."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from visar import kernels
from visar.core.condition import Condition
from visar.core.guidance import Guidance, combine
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import Runtime, Session
from visar.generators.raster import RasterGPT
from visar.kernels import finite
from visar.layers.cache import KVCache, visible
from visar.layers.llama import RMSNorm, SwiGLU
from visar.layers.rope import rope_table, rotate
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.filtering import categorical, filter_logits, filtered_probs, sample_logits
from visar.samplers.jacobi import sample_jacobi


def close(got, expected, float32=1e-5) -> None:
    """Agreement relative to the largest value: rounding of bfloat16, or almost float32's."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < (float32 if got.dtype == torch.float32 else 1.6e-2), float(error)


def plain(model, monkeypatch, call):
    """The call's result with every kernel switched off."""
    with monkeypatch.context() as patch:
        patch.setenv("VISAR_TRITON", "0")
        assert not kernels.usable(model.output.weight)
        return call()


# ------------------------------------------------------------------------------------------------------ elementwise
@pytest.mark.parametrize("width", [96, 1280])
def test_add_rms_norm(device, dtype, width):
    from visar.kernels.elementwise import add_rms_norm_

    torch.manual_seed(0)
    norm = RMSNorm(width).to(device, dtype)
    nn.init.normal_(norm.weight)
    x, delta = (torch.randn(5, width, device=device, dtype=dtype) for _ in range(2))
    residual = x.clone()
    with torch.no_grad():
        close(add_rms_norm_(residual, None, norm.weight, norm.eps), norm(x))
        assert torch.equal(residual, x)
        close(add_rms_norm_(residual, delta, norm.weight, norm.eps), norm(x + delta))
    assert torch.equal(residual, x + delta)


@pytest.mark.parametrize("hidden", [40, 1500])
def test_silu_multiply(device, dtype, hidden):
    from visar.kernels.elementwise import silu_multiply

    both = torch.randn(3, 2 * hidden, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gate, up = both.chunk(2, dim=-1)
    close(silu_multiply(both), nn.functional.silu(gate) * up)


@pytest.mark.parametrize("ragged", [False, True])
def test_guide(device, dtype, ragged):
    from visar.kernels.elementwise import guide

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 300, generator=generator).to(device, dtype)
    scale = (1 + torch.rand(20, generator=generator)).to(device)
    length = torch.tensor([2, 0, 11] if ragged else [5], device=device)
    expected = combine(logits, scale[length[:, None] + torch.arange(4, device=device)][..., None])
    close(guide(logits, scale, length), expected)


# -------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("width", "positions"), [(32, 1), (64, 1), (100, 1), (32, 5), (100, 3), (64, 16), (32, 70)])
def test_cached_attention(device, dtype, width, positions, ragged, masked):
    from visar.kernels.attention import cached_attention

    generator = torch.Generator().manual_seed(width + positions)
    batch, rows, heads, prefix = 2, 4, 2, 3
    rope = rope_table("2d", prefix_length=prefix, grid=(3, 110), head_width=width, prefix_rotation="identity")
    slots = rope.shape[0] + 80
    # One row at the very start, one past the kernels' tiles, one at the end, whose last places are beyond the table.
    length = torch.tensor([0, 290] if ragged else [327])
    cache = KVCache(num_layers=1, rows=rows, num_heads=heads, num_slots=slots, head_width=width, ragged=ragged)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
    cache.values.copy_(torch.randn(cache.values.shape, generator=generator))
    qkv = torch.randn(rows, positions, 3 * heads * width, generator=generator).to(device, dtype)
    valid = None
    if masked:
        valid = torch.rand(rows, slots, generator=generator) < 0.7
        valid[:, prefix - 1 :] |= torch.arange(slots - prefix + 1) < 1
        valid = valid.to(device)
    keys, values = cache.keys[0].to(device, dtype), cache.values[0].to(device, dtype)
    length, rope = length.to(device), rope.to(device)
    position = length[:, None] + prefix - 1 + torch.arange(positions, device=device)
    query, key, value = qkv.unflatten(-1, (3, heads, width)).unbind(2)
    places = position.repeat(2, 1) if ragged else position
    table = rope[places.clamp(max=rope.shape[0] - 1)]
    query, key = rotate(query, table).transpose(1, 2), rotate(key, table).transpose(1, 2)
    target = KVCache(
        num_layers=1, rows=rows, num_heads=heads, num_slots=slots, head_width=width, ragged=ragged,
        device=device, dtype=dtype,
    )  # fmt: skip
    target.keys[0], target.values[0] = keys, values
    all_keys, all_values = target.update(0, key, value.transpose(1, 2), places)
    out = nn.functional.scaled_dot_product_attention(
        query, all_keys, all_values, attn_mask=visible(places, slots, valid)
    )
    got = cached_attention(qkv, keys, values, rope, length, ahead=prefix - 1, batch=batch, key_valid_RS=valid)
    close(got, out.transpose(1, 2).flatten(2))
    close(keys, all_keys)
    assert torch.equal(values, all_values)


def test_attention_that_sees_nothing_is_zero(device):
    from visar.kernels.attention import cached_attention

    rope = rope_table("1d", prefix_length=1, grid=(2, 4), head_width=32).to(device)
    keys, values = (torch.zeros(1, 2, 12, 32, device=device) for _ in range(2))
    valid = torch.zeros(1, 12, dtype=torch.bool, device=device)
    for positions in (1, 3):
        qkv = torch.randn(1, positions, 192, device=device)
        length = torch.tensor([4], device=device)
        got = cached_attention(qkv, keys, values, rope, length, ahead=0, batch=1, key_valid_RS=valid)
        assert torch.equal(got, torch.zeros_like(got))


# ------------------------------------------------------------------------------------------------------------- draw
FILTERS = [
    dict(),
    dict(temperature=0.7),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=100000),
    dict(top_p=0.9),
    dict(top_p=0.3),
    dict(temperature=1.3, top_k=40, top_p=0.95),
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 1024, 5000])
def test_draw(device, monkeypatch, vocab_size, settings):
    """The kernel's ids are those of filter_logits and categorical, but for uniforms at the border of two codes."""
    generator = torch.Generator().manual_seed(vocab_size)
    rows = 200 if device.type == "cuda" else 12
    logits = (3 * torch.randn(rows, vocab_size, generator=generator)).to(device)
    uniform = torch.rand(rows, generator=generator).clamp(1e-6, 1 - 1e-6).to(device)
    assert kernels.usable(logits)
    got = sample_logits(logits, uniform, **settings)
    by_kernel = filter_logits(logits, **settings)
    with monkeypatch.context() as patch:
        patch.setenv("VISAR_TRITON", "0")
        filtered = filter_logits(logits, **settings)
    assert (by_kernel.isfinite() == filtered.isfinite()).float().mean() > 1 - 1e-4
    kept = by_kernel.isfinite() & filtered.isfinite()
    torch.testing.assert_close(by_kernel[kept], filtered[kept])
    expected = categorical(filtered, uniform)
    assert torch.isfinite(filtered.gather(1, got[:, None])).all()
    assert (got == expected).float().mean() > 0.9
    # Where they differ, the uniform lies within rounding of the code's own interval.
    mass = torch.softmax(filtered.double(), -1)
    upper = mass.cumsum(-1).gather(1, got[:, None])[:, 0]
    lower = upper - mass.gather(1, got[:, None])[:, 0]
    assert ((uniform > lower - 1e-5) & (uniform < upper + 1e-5)).all()


@pytest.mark.parametrize("settings", [dict(top_k=3), dict(top_p=0.5), dict(top_k=5, top_p=0.4)], ids=str)
def test_draw_keeps_ties(device, settings):
    """Every code with a probability is drawn at some uniform number, no other; values tie, some are -0.0 or -inf."""
    row = torch.tensor([1.0, 2.0, 2.0, -0.0, 2.0, 0.0, 0.5, float("-inf"), 3.0, 1.0, 0.5, -1.0])
    draws = 400 if device.type == "cuda" else 40
    uniform = (torch.arange(draws) + 0.5) / draws
    logits = row.expand(draws, -1).contiguous().to(device)
    got = sample_logits(logits, uniform.to(device), **settings).cpu()
    filtered = filter_logits(row, **settings)  # of one dimension: never by the kernel
    assert torch.equal(filter_logits(logits[:2], **settings).cpu(), filtered.expand(2, -1))
    assert set(got.tolist()) == set(torch.isfinite(filtered).nonzero().flatten().tolist())
    counts = torch.bincount(got, minlength=len(row)) / draws
    torch.testing.assert_close(counts, torch.softmax(filtered, -1), atol=2.0 / draws, rtol=0)
    zeros = torch.tensor([-0.0, 0.0, -1.0, -2.0]).expand(6, -1).contiguous().to(device)
    got = sample_logits(zeros, ((torch.arange(6) + 0.5) / 6).to(device), top_k=1)
    assert set(got.tolist()) == {0, 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_logits_that_are_not_finite_set_the_flag(device, value):
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).to(device)
    logits[1, 5] = value
    uniform = torch.full((2,), 0.5, device=device)
    for draws in (
        lambda: sample_logits(logits, uniform, top_k=4, top_p=0.9),
        lambda: filtered_probs(logits, 1.3, 4, 0.9),
    ):
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        with finite.watched(flag):
            draws()
        assert bool(flag) == (value in (float("inf"),) or value != value)
        draws()  # nobody watches


# ------------------------------------------------------------------------------------------------------------ model
MODELS = {
    "class": dict(num_classes=5),
    "words": dict(num_classes=3, word_vocab_size=9, num_words=3, words="prefix", token_input="codebook"),
    "caption": dict(num_classes=0, caption_width=6, caption_length=4),
}


def make(name="class", seed=0, **sizes) -> tuple[RasterGPT, Condition]:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, grid=(3, 4), width=64, num_layers=2, num_heads=2, hidden_width=96) | sizes
    model = RasterGPT(**sizes, **MODELS[name]).eval()
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
        model.output.weight.normal_(std=0.5)
    if name == "caption":
        mask = torch.tensor([[False, False, True, True], [True] * 4])
        return model, Condition(text_BTC=torch.randn(2, 4, 6), text_mask_BT=mask)
    words = torch.tensor([[4, 0, 0], [2, 8, 7]]) if name == "words" else None
    return model, Condition(labels_BA=torch.tensor([[1], [2]]), words_BT=words)


def moved(condition: Condition, device) -> Condition:
    fields = ("labels_BA", "words_BT", "text_BTC", "text_mask_BT")
    values = {name: getattr(condition, name) for name in fields}
    return Condition(**{name: None if value is None else value.to(device) for name, value in values.items()})


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_by_kernels_is_decoding(device, monkeypatch, name, scale, ragged):
    """Single steps and windows, with lengths that move apart when ragged."""
    model, condition = make(name)
    model, condition = model.to(device), moved(condition, device)
    generator = torch.Generator().manual_seed(1)

    def decode():
        state = model.start(condition, Guidance(scale), ragged=ragged, window=5)
        tokens = torch.randint(40, (2, 6), generator=generator.manual_seed(1)).to(device)
        out = []
        for step in range(2):
            state.block = 0 if ragged else step * 3
            out += [model.predict(state), model.verify(state, tokens[:, :5])]
            if ragged:
                model.commit(state, tokens, torch.tensor([1, 4], device=device))
            else:
                model.append(state, tokens[:, :3])
        return torch.cat(out, dim=1)

    assert kernels.usable(model.output.weight)
    fused, expected = decode(), plain(model, monkeypatch, decode)
    close(fused, expected, 1e-4)
    model.fused = "off"
    close(decode(), expected, 1e-6)


@torch.no_grad()
def test_tokens_are_those_of_the_plain_path(device, monkeypatch):
    model, condition = make(grid=(2, 2))
    model, condition = model.to(device), moved(condition, device)

    def draw(sampler=sample_ancestral, **settings):
        noise = Noise(image_seeds(3, 2), device)
        return sampler(model, condition, noise=noise, guidance=Guidance(2.0), top_k=20, top_p=0.95, **settings).tokens

    assert torch.equal(draw(), plain(model, monkeypatch, draw))
    assert torch.equal(draw(sample_jacobi, window=4), plain(model, monkeypatch, lambda: draw(sample_jacobi, window=4)))


# ---------------------------------------------------------------------------------------------------------- weights
def test_joined_weights(tmp_path):
    """Joining changes neither values, names, files nor training, is undone by a cast, and leaves adapters alone."""
    torch.manual_seed(0)
    layer, x = SwiGLU(12, 20), torch.randn(3, 12)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = layer(x)
    apart = layer.gate_and_up(x)
    layer.join()
    place = layer.w1.weight.data_ptr()
    layer.join()
    assert layer.w1.weight.data_ptr() == place
    assert layer.w3.weight.data_ptr() == place + layer.w1.weight.nbytes
    assert layer.w1.weight.untyped_storage().nbytes() == 2 * layer.w1.weight.nbytes
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    torch.testing.assert_close(layer.gate_and_up(x), apart)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer.gate_and_up(x), torch.cat([layer.w1(x), layer.w3(x)], -1))
    assert not torch.equal(layer(x), expected)
    wide = layer.double()
    assert wide.gate_and_up(x.double()).dtype == torch.float64
    wide.w1 = nn.Sequential(wide.w1)
    wide.join()
    assert wide.gate_and_up(x.double()).shape == (3, 40)


def test_model_with_joined_weights_is_saved_and_loaded(tmp_path):
    model = make()[0].to("cuda" if torch.cuda.is_available() else "cpu")
    expected = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    for layer in model.layers:
        layer.feed_forward.join()
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    again = RasterGPT.from_pretrained(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_session_serves_a_model_until_its_weights_move():
    """Weights joined by `start`, before the first step, do not cost a session; a cast does."""
    model, _ = make()
    session = Session(capture=False, model=model)
    assert not session.serves(model)
    for layer in model.layers:
        layer.feed_forward.join()
    session.run(lambda: None)
    assert session.serves(model) and not session.serves(make()[0])
    model.layers[0].feed_forward.join()
    assert session.serves(model)
    assert not session.serves(model.double())


# ------------------------------------------------------------------------------------------------------ compilation
def launch_elementwise() -> None:
    from visar.kernels import elementwise

    x, length = torch.zeros(4, 1280).bfloat16(), torch.zeros(2, dtype=torch.int64)
    elementwise.add_rms_norm_(x, x, x[0], 1e-5)
    elementwise.silu_multiply(torch.zeros(4, 2 * 3584).bfloat16())
    elementwise.guide(torch.zeros(4, 16, 16384).bfloat16(), torch.zeros(256), length)
    elementwise.first_inputs(torch.zeros(2, 256, dtype=torch.int64), None, length[:1], x, x)


def launch_draw() -> None:
    from visar.kernels import draw

    logits, uniform = torch.zeros(2, 16384), torch.zeros(2)
    for call in (draw.filter_codes, draw.probs_of):
        call(logits, 0.9, 100, 0.95)
    draw.draw_codes(logits, uniform, 0.9, 100, 0.95)
    draw.draw_mass(logits, uniform)


def launch_attention(positions: int, dtype: str, masked: bool) -> None:
    """Masked: ragged too."""
    from visar.kernels.attention import cached_attention

    rope, slots = rope_table("2d", prefix_length=1, grid=(16, 16), head_width=64), 272
    cache = torch.zeros(2, 4, 20, slots, 64, dtype=getattr(torch, dtype))
    qkv = torch.zeros(4, positions, 3 * 1280, dtype=cache.dtype)
    length = torch.zeros(2 if masked else 1, dtype=torch.int64)
    valid = torch.ones(4, slots, dtype=torch.bool) if masked else None
    cached_attention(qkv, *cache, rope, length, ahead=0, batch=2, key_valid_RS=valid)


LAUNCHES = [
    (launch_elementwise, (), "_add_rms_norm _silu_multiply _guide _first_inputs"),
    (launch_draw, (), "_filter _probs _draw _draw_mass"),
    *((launch_attention, (1, *how), "_one_token") for how in (("bfloat16", True), ("float32", False))),
    *((launch_attention, (16, *how), "_window") for how in (("bfloat16", True), ("float32", False))),
]


@pytest.mark.parametrize(("launch", "options", "kernels"), LAUNCHES)
def test_kernels_compile_for_a_gpu_that_is_not_here(hopper, launch, options, kernels):
    assert [name for name, _ in hopper(launch, *options)] == kernels.split()


# -------------------------------------------------------------------------------------------------------------- GPU
def released(dtype, seed=0, **sizes) -> RasterGPT:
    """A model of released proportions with weights of usual size."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=4096, grid=(16, 16), width=512, num_layers=6, num_heads=8, hidden_width=1408) | sizes
    model = RasterGPT(**sizes, num_classes=10).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return nn.Module.to(model, "cuda", dtype)


def classes(batch: int) -> Condition:
    return Condition(labels_BA=(torch.arange(batch, device="cuda") % 10)[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype_name", "most"), [("bfloat16", 2e-2), ("float32", 1e-4)])
@pytest.mark.parametrize("sizes", [dict(), dict(width=800, num_heads=8)], ids=["width 64", "width 100"])
@torch.no_grad()
def test_gpu_logits(sizes, dtype_name, most):
    """Against the float32 reference: the stated error, or half as much again as the plain path at the same place."""
    model = released(torch.float32, **sizes)
    tokens = torch.randint(4096, (3, 256), device="cuda")
    reference = model(tokens, classes(3))
    model = nn.Module.to(model, getattr(torch, dtype_name))
    plain: dict[tuple[int, int], float] = {}
    for fused in ("off", "auto"):
        model.fused = fused
        state = model.start(classes(3), window=40)
        for position in range(0, 200, 40):
            state.block = position
            for width in (0, 7, 40):
                got = model.verify(state, tokens[:, position : position + width])
                expected = reference[:, position : position + width + 1]
                error = float((got - expected).norm() / expected.norm())
                bound = max(most, 1.5 * plain.setdefault((position, width), error))
                assert error < min(bound, 2 * most), (fused, position, width, error)
            model.append(state, tokens[:, position : position + 40])


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [dict(), dict(top_k=50, top_p=0.9)], ids=["off", "filtered"])
def test_gpu_captured_ids_are_eager_ids(settings):
    model, runtime = released(torch.float32), Runtime()
    for batch in (1, 5):
        call = dict(noise=Noise(image_seeds(1, batch), "cuda"), guidance=Guidance(2.0), **settings)
        eager = sample_ancestral(model, classes(batch), **call).tokens
        for _ in range(2):
            assert torch.equal(sample_ancestral(model, classes(batch), runtime=runtime, **call).tokens, eager)


@pytest.mark.gpu
def test_gpu_replays_do_not_wait_for_the_device():
    """From the third step on, when the step has been warmed up and captured, nothing in the loop synchronises."""
    model, noise, checked = released(torch.bfloat16), Noise(image_seeds(1, 2), "cuda"), []

    def callback(done, tokens):
        if done == 2:
            torch.cuda.set_sync_debug_mode("error")
        checked.append(done)
        if done == model.num_tokens:
            torch.cuda.set_sync_debug_mode("default")

    try:
        sample_ancestral(model, classes(2), noise=noise, callback=callback, runtime=Runtime(), top_k=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(checked) == model.num_tokens


@pytest.mark.gpu
def test_gpu_memory_is_constant_and_models_keep_apart():
    """Fifty calls of two models in turn: no growth, and every call gives what the model alone gives."""
    models = [released(torch.float32, seed, num_layers=2, width=128, num_heads=2) for seed in (0, 1)]
    noise, runtime = Noise(image_seeds(4, 2), "cuda"), Runtime()
    expected = [sample_ancestral(model, classes(2), noise=noise).tokens for model in models]
    assert not torch.equal(*expected)
    used = []
    for turn in range(50):
        tokens = sample_ancestral(models[turn % 2], classes(2), noise=noise, runtime=runtime).tokens
        assert torch.equal(tokens, expected[turn % 2]), turn
        used.append(torch.cuda.memory_allocated())
    assert max(used[4:]) == min(used[4:])
    assert len(runtime._sessions) == 2


@pytest.mark.gpu
def test_gpu_windows_are_captured_too():
    model = released(torch.float32, num_layers=2)
    call = dict(noise=Noise(image_seeds(2, 3), "cuda"), guidance=Guidance(2.0), window=8)
    eager = sample_jacobi(model, classes(3), **call).tokens
    runtime = Runtime()
    for _ in range(2):
        assert torch.equal(sample_jacobi(model, classes(3), runtime=runtime, **call).tokens, eager)
