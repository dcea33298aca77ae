"""Models over scales on a GPU: captured against eager steps, FlexAttention, half precision, memory of a refiner."""

import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.core.runtime import EAGER, Runtime
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.layers.scale_attention import scale_attention
from visar.samplers.collaborative import sample_collaborative
from visar.samplers.editing import box_mask, sample_edit
from visar.samplers.masked_refinement import sample_masked_refinement
from visar.samplers.next_scale import sample_next_scale

pytestmark = pytest.mark.gpu

SCALES = (1, 2, 3, 5, 8)


def make(model_class, seed=0, width=64, num_layers=3, **settings):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, codebook_width=8, scales=SCALES, width=width, num_heads=2, num_classes=5)
    model = model_class(num_layers=num_layers, **(sizes | settings)).eval()
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for head in (
            getattr(model, name) for name in ("head", "ns_head", "mask_head") if name in dict(model.named_children())
        ):
            head.weight.mul_(50)
    return model.cuda()


def samplers():
    """Every sampler as a function of (class labels, seeds, guidance, runtime, callback or nothing)."""
    model, small = make(NextScaleTransformer), make(NextScaleTransformer, 1, num_layers=2)
    small.set_tokenizer(model.pyramid)
    masked = make(HierarchicalMaskedTransformer, num_refinement_layers=1)
    given = torch.randint(64, (3, model.num_tokens), generator=torch.Generator().manual_seed(0)).cuda()
    keep = box_mask(model.scales[-1], (0.25, 0.25, 0.75, 0.75), keep="outside").cuda()

    def common(labels, seeds, scale, runtime, callback=None):
        condition = Condition(labels_BA=torch.tensor(labels, device="cuda")[:, None])
        guidance = Guidance(scale, "extrapolate", "linear")
        shared = dict(noise=Noise(seeds, "cuda"), guidance=guidance, runtime=runtime, callback=callback, top_p=0.9)
        return condition, shared

    def plain(*call):
        condition, settings = common(*call)
        return sample_next_scale(model, condition, **settings)

    def smooth(*call):
        condition, settings = common(*call)
        return sample_next_scale(model, condition, smooth=True, **settings)

    def prefixed(*call):
        condition, settings = common(*call)
        return sample_next_scale(model, condition, prefix_tokens=given[:, :5], num_scales=4, **settings)

    def collaborative(*call):
        condition, settings = common(*call)
        return sample_collaborative(model, condition, followers=[small], takes_over=[2], **settings)

    def refined(*call):
        condition, settings = common(*call)
        return sample_masked_refinement(masked, condition, schedule=[1, 2, 3, 4], **settings)

    def edited(strategy):
        def run(*call):
            condition, settings = common(*call)
            return sample_edit(model, condition, given_tokens=given, keep=keep, strategy=strategy, **settings)

        return run

    return dict(
        plain=plain,
        smooth=smooth,
        prefixed=prefixed,
        collaborative=collaborative,
        refined=refined,
        codes=edited("codes"),
        map=edited("map"),
    )


def test_captured_steps_give_the_tokens_of_eager_ones():
    runtime = Runtime(max_sessions=16)
    for name, sample in samplers().items():
        for labels, seeds, scale in (
            ([0, 1, 2], [1, 2, 3], 2.0),
            ([3, 4, 0], [4, 5, 6], 1.0),
            ([1, 1, 1], [7, 8, 9], 3.0),
        ):
            eager, captured = sample(labels, seeds, scale, EAGER), sample(labels, seeds, scale, runtime)
            assert torch.equal(eager.tokens, captured.tokens), name
            torch.testing.assert_close(eager.latent, captured.latent, atol=1e-4, rtol=0)


def test_replays_do_not_wait_for_the_device():
    """In a warm call nothing synchronises between the first scale and the last."""
    runtime, last = Runtime(max_sessions=16), sum(side * side for side in SCALES)
    for name, sample in samplers().items():
        if name == "prefixed":  # which stops before the last scale
            continue
        checked = []

        def callback(done, tokens, checked=checked):
            torch.cuda.set_sync_debug_mode("default" if done == last else "error")
            checked.append(done)

        for warm in (False, False, True):
            try:
                sample([0, 1, 2], [1, 2, 3], 2.0, runtime, callback if warm else None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(checked) == len(SCALES) and checked[-1] == last, name


def test_memory_is_constant_and_models_keep_apart():
    """Fifty calls of two models in turn: no growth, and every call gives what the model alone gives."""
    models = [make(NextScaleTransformer), make(HierarchicalMaskedTransformer, 1, num_refinement_layers=1)]
    condition, runtime = Condition(labels_BA=torch.tensor([[0], [1]], device="cuda")), Runtime()
    call = dict(noise=Noise([4, 5], "cuda"), guidance=Guidance(2.0), top_k=20)
    expected = [sample_next_scale(model, condition, **call).tokens for model in models]
    assert not torch.equal(*expected)
    used = []
    for turn in range(50):
        tokens = sample_next_scale(models[turn % 2], condition, runtime=runtime, **call).tokens
        assert torch.equal(tokens, expected[turn % 2]), turn
        used.append(torch.cuda.memory_allocated())
    assert max(used[4:]) == min(used[4:])


@pytest.mark.parametrize("model_class", [NextScaleTransformer, HierarchicalMaskedTransformer])
def test_a_model_that_was_made_on_the_gpu_is_captured(model_class):
    sizes = dict(vocab_size=64, codebook_width=8, scales=SCALES, width=64, num_layers=8, num_heads=2, num_classes=5)
    with torch.device("cuda"):
        model = model_class(**sizes).eval()
    model.reset_parameters(torch.Generator("cuda").manual_seed(0))
    condition = Condition(labels_BA=torch.tensor([[0], [1]], device="cuda"))
    runtime = Runtime()
    tokens = [
        sample_next_scale(model, condition, noise=Noise([1, 2], "cuda"), runtime=runtime).tokens for _ in range(3)
    ]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


def test_gpu_tokens_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = make(NextScaleTransformer)
    labels, guidance = torch.tensor([[0], [1]]), Guidance(2.0, "extrapolate", "linear")
    on_gpu = sample_next_scale(
        model, Condition(labels_BA=labels.cuda()), noise=Noise([1, 2], "cuda"), guidance=guidance
    )
    on_cpu = sample_next_scale(model.cpu(), Condition(labels_BA=labels), noise=Noise([1, 2]), guidance=guidance)
    assert (on_gpu.tokens.cpu() == on_cpu.tokens).float().mean() > 0.98


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_flex_attention_agrees_with_the_mask(pattern):
    torch.manual_seed(0)
    sizes = tuple(side**2 for side in (1, 2, 3, 4, 6, 9, 13, 18))
    inputs = [torch.randn(2, 3, sum(sizes), 64, device="cuda", requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, sum(sizes), 64, device="cuda")
    results = {}
    for method in ("mask", "flex", "per_scale"):
        out = scale_attention(*inputs, sizes, pattern, softmax_scale=0.125, method=method)
        results[method] = (out, *torch.autograd.grad((out * weight).sum(), inputs))
    for method in ("flex", "per_scale"):
        for ours, dense in zip(results[method], results["mask"], strict=True):
            torch.testing.assert_close(ours, dense, atol=5e-3, rtol=5e-3)


def test_bfloat16_keeps_the_quantiser_in_float32():
    model = make(NextScaleTransformer).to(torch.bfloat16)
    condition = Condition(labels_BA=torch.tensor([[0], [1]], device="cuda"))
    out = sample_next_scale(model, condition, noise=Noise([1, 2], "cuda"), guidance=Guidance(2.0), runtime=Runtime())
    assert model.pyramid.codebook.dtype == out.latent.dtype == torch.float32
    with torch.no_grad():  # with gradients phi is torch's convolution, which may round to TF32
        expected = model.pyramid.running_maps(out.tokens)[-1]
    torch.testing.assert_close(out.latent, expected, atol=1e-4, rtol=0)


def peak(run) -> int:
    """Most bytes that tensors take while it runs, beyond those that are there."""
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - base


def test_memory_of_a_markov_model_is_flat_in_the_number_of_scales():
    found = {}
    for model_class, settings in (
        (NextScaleTransformer, {}),
        (HierarchicalMaskedTransformer, dict(num_refinement_layers=1)),
    ):
        for count in (1, 2, 4, 8):
            model = make(model_class, 0, 512, 8, scales=(1, *(16,) * count), **settings)
            condition = Condition(labels_BA=torch.zeros(16, 1, dtype=torch.int64, device="cuda"))
            noise = Noise(list(range(16)), "cuda")
            call = lambda: sample_next_scale(model, condition, noise=noise, guidance=Guidance(2.0))  # noqa: B023, E731
            call()
            found[model_class, count] = peak(call)
    for (model_class, count), size in found.items():
        print(f"{model_class.__name__}, {count} maps of 16 x 16: {size / 2**20:.0f} MiB beyond the weights")
    assert found[HierarchicalMaskedTransformer, 8] < 1.1 * found[HierarchicalMaskedTransformer, 1]
    assert found[NextScaleTransformer, 8] > 2 * found[NextScaleTransformer, 1]


def test_a_refiner_phase_needs_no_more_than_the_refiner():
    large, small = make(NextScaleTransformer, 0, 512, 8), make(NextScaleTransformer, 1, 64, 2)
    small.set_tokenizer(large.pyramid)
    condition = Condition(labels_BA=torch.zeros(64, 1, dtype=torch.int64, device="cuda"))
    settings = dict(noise=Noise(list(range(64)), "cuda"), guidance=Guidance(2.0))

    drafting = peak(lambda: sample_next_scale(large, condition, num_scales=2, **settings))
    refining = peak(lambda: sample_next_scale(small, condition, **settings))
    both = peak(lambda: sample_collaborative(large, condition, followers=[small], takes_over=[2], **settings))
    alone = peak(lambda: sample_next_scale(large, condition, **settings))
    assert both < 1.1 * max(drafting, refining) < alone
