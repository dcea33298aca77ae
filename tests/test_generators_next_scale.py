"""Next-scale transformer: parity with VAR, cached against whole passes, settings per scale, prefixes, conditions."""

import pytest
import torch

from visar.checkpoints.common import build
from visar.checkpoints.var import convert_transformer, convert_vq
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise
from visar.generators.next_scale import NextScaleTransformer
from visar.layers.scale_attention import scale_attention
from visar.pipelines.components import load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.editing import box_mask, grid_mask, sample_edit
from visar.samplers.filtering import filter_logits
from visar.samplers.next_scale import sample_next_scale
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer

SYSTEMS = ["var", "var_saln"]


def from_parity(parity, system):
    """Tokenizer and transformer of a parity folder."""
    folder = parity(system)
    tiny = parity("var_vqvae").config["tiny"]
    scales = folder.config["patch_nums"]
    config, state = convert_vq(parity("var_vqvae").checkpoint(), scales=scales, phi_ratio=tiny["quant_resi"])
    tokenizer = build(MultiScaleVQTokenizer, config, state, "tokenizer", torch.float32)
    config, state = convert_transformer(folder.checkpoint(), tokenizer, num_heads=folder.config["num_heads"])
    return tokenizer, build(NextScaleTransformer, config, state, system, torch.float32)


def tiny_model(scales=(1, 2, 3), seed=0, **settings):
    """A small model with weights that make its parts matter."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=16, codebook_width=4, scales=scales, width=16, num_layers=2, num_heads=2, num_classes=3)
    model = NextScaleTransformer(**(sizes | settings)).eval()
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("pyramid."):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model


def per_scale(io, stem):
    found = []
    while f"{stem}{len(found)}" in io:
        found.append(io[f"{stem}{len(found)}"])
    assert found, stem
    return found


def ramp(cfg):
    return Guidance(float(cfg), "extrapolate", "linear")


def labels(model, value, batch=1):
    """A condition from labels [B], a class, or -1 for none."""
    if isinstance(value, torch.Tensor):
        return Condition(labels_BA=value[:, None])
    label = model.config["num_classes"] if value < 0 else value
    return Condition(labels_BA=torch.full((batch, 1), label))


def image_of(tokenizer, out):
    return ((tokenizer.decode_latents(out.latent) + 1) / 2).clamp(0, 1)


# -------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_teacher_forced_parity(parity, system):
    _, model = from_parity(parity, system)
    io = parity(system).io
    tokens, condition = torch.cat(per_scale(io, "teacher/in/tokens_s"), 1), labels(model, io["teacher/in/label"])
    torch.testing.assert_close(model.pyramid.inputs(tokens), io["teacher/in/var_input"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(tokens, condition), io["teacher/out/logits"], atol=1e-3, rtol=0)
    null = model(tokens, model.null_condition(condition))
    torch.testing.assert_close(null, io["teacher/out/logits_uncond"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_greedy_parity(parity, system):
    tokenizer, model = from_parity(parity, system)
    io, cases = parity(system).io, parity(system).config["cases"]
    greedy = {name: case for name, case in cases.items() if name.startswith("greedy")}
    assert greedy
    for name, case in greedy.items():
        expected = torch.cat(per_scale(io, f"{name}/out/tokens_s"), 1)
        condition = labels(model, io.get(f"{name}/in/label", case.get("label", -1)), len(expected))
        noise = Noise([5] * condition.batch)
        out = sample_next_scale(model, condition, noise=noise, guidance=ramp(case["cfg"]), top_k=1)
        assert torch.equal(out.tokens, expected)
        if f"{name}/out/fhat" in io:
            torch.testing.assert_close(out.latent, io[f"{name}/out/fhat"], atol=2e-4, rtol=0)
            torch.testing.assert_close(image_of(tokenizer, out), io[f"{name}/out/image"], atol=2e-4, rtol=0)
        plain = sample_ancestral(model, condition, noise=noise, guidance=ramp(case["cfg"]), top_k=1)
        assert torch.equal(plain.tokens, expected)
        if f"{name}/out/cfg_logits" in io:
            state, logits = model.start(condition, ramp(case["cfg"])), []
            for scale, part in enumerate(expected.split(model.block_sizes, 1)):
                state.block = scale
                logits.append(model.predict(state))
                model.append(state, part)
            torch.testing.assert_close(torch.cat(logits, 1), io[f"{name}/out/cfg_logits"], atol=1e-3, rtol=0)


class RecordedGumbel(Noise):
    """Exponential draws from a recording, by position; the recordings stand for the random source of the release."""

    def __init__(self, recorded_BNV):
        super().__init__([0] * recorded_BNV.shape[0])
        self.recorded_BNV = recorded_BNV

    def exponential(self, use, position, size=(), counter=0):
        return self.recorded_BNV[:, position[0]]


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_smoothed_parity(parity, system):
    tokenizer, model = from_parity(parity, system)
    io, case = parity(system).io, parity(system).config["cases"]["smooth"]
    recorded = RecordedGumbel(torch.cat(per_scale(io, "smooth/in/exponential_noise_s"), 1))
    out = sample_next_scale(
        model,
        labels(model, io["smooth/in/label"]),
        noise=recorded,
        guidance=ramp(case["cfg"]),
        top_k=case["top_k"],
        top_p=case["top_p"],
        smooth=True,
    )
    torch.testing.assert_close(out.latent, io["smooth/out/fhat"], atol=5e-3, rtol=0)
    torch.testing.assert_close(image_of(tokenizer, out), io["smooth/out/image"], atol=5e-3, rtol=0)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_editing_parity(parity, system):
    tokenizer, model = from_parity(parity, system)
    io, case = parity(system).io, parity(system).config["cases"]["edit"]
    given = torch.cat(per_scale(io, "edit/in/tokens_s"), 1)
    top, left, bottom, right = case["box_y0x0y1x1"]
    for name, keep in (("inpaint", "outside"), ("outpaint", "inside")):
        mask = box_mask(model.scales[-1], (top, left, bottom, right), keep=keep)
        assert torch.equal(mask[0].float(), io[f"edit/out/{name}_mask"])
        out = sample_edit(
            model,
            labels(model, io["edit/in/label"]),
            given_tokens=given,
            keep=mask,
            noise=Noise([0] * given.shape[0]),
            guidance=ramp(case["cfg"]),
            top_k=case["top_k"],
        )
        torch.testing.assert_close(out.latent, io[f"edit/out/{name}_fhat"], atol=2e-4, rtol=0)
        torch.testing.assert_close(image_of(tokenizer, out), io[f"edit/out/{name}_image"], atol=2e-4, rtol=0)
        predicted = torch.cat(per_scale(io, f"edit/out/{name}_predicted_tokens_s"), 1)
        assert ((out.tokens == predicted) | (out.tokens == given)).all()


@torch.no_grad()
def test_filter_parity(parity):
    io, case = parity("var").io, parity("var").config["cases"]["filter"]
    for top_k, top_p in case["combos_top_k_top_p"]:
        filtered = filter_logits(io["filter/in/logits"], top_k=top_k, top_p=top_p or 1.0)
        expected = io[f"filter/out/probs_k{top_k}_p{top_p or 0:g}"]
        torch.testing.assert_close(filtered.softmax(-1), expected, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------- equivalences
@pytest.mark.parametrize("settings", [{}, {"shared_adaln": True}, {"qk_norm": False}, {"scales": (2, (2, 3), 4)}])
@torch.no_grad()
def test_cached_equals_teacher_forced(settings):
    model = tiny_model(**settings)
    tokens = torch.randint(16, (2, model.num_tokens), generator=torch.Generator().manual_seed(0))
    condition = Condition(labels_BA=torch.tensor([[0], [2]]))
    whole = model(tokens, condition)
    for first in range(len(model.scales)):
        state = model.start(condition, first_scale=first)
        for scale, part in enumerate(tokens.split(model.block_sizes, 1)):
            state.block = scale
            if scale >= first:
                begin, end = model.begin_of(scale), model.ends[scale]
                torch.testing.assert_close(model.predict(state), whole[:, begin:end], atol=2e-5, rtol=1e-4)
            model.append(state, part)


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_attention_methods_agree(pattern):
    torch.manual_seed(0)
    sizes = (1, 4, 9)
    query, key, value = torch.randn(3, 2, 2, 14, 8).unbind(0)
    masked = scale_attention(query, key, value, sizes, pattern, softmax_scale=0.3, method="mask")
    separate = scale_attention(query, key, value, sizes, pattern, softmax_scale=0.3, method="per_scale")
    torch.testing.assert_close(masked, separate, atol=1e-5, rtol=0)
    alone = scale_attention(query[:, :, :1], key[:, :, :1], value[:, :, :1], (1,), pattern, softmax_scale=0.3)
    torch.testing.assert_close(masked[:, :, :1], alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="attention method"):
        scale_attention(query, key, value, sizes, pattern, softmax_scale=0.3, method="dense")


@torch.no_grad()
def test_a_scale_does_not_see_finer_ones():
    model = tiny_model()
    tokens = torch.zeros(1, model.num_tokens, dtype=torch.int64)
    other = tokens.clone()
    other[:, 5:] = 7
    condition = Condition(labels_BA=torch.tensor([[1]]))
    assert torch.equal(model(tokens, condition), model(other, condition))
    other[:, 1:5] = 7
    changed = (model(tokens, condition) - model(other, condition)).abs().amax(-1)[0]
    assert (changed[:5] == 0).all() and (changed[5:] > 0).all()


@torch.no_grad()
def test_images_depend_on_their_own_seed_only():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0], [1], [2]]))
    together = sample_next_scale(model, condition, noise=Noise([3, 4, 5]), guidance=ramp(2), smooth=True)
    for row, seed in enumerate((3, 4, 5)):
        only = sample_next_scale(
            model, condition.rows(slice(row, row + 1)), noise=Noise([seed]), guidance=ramp(2), smooth=True
        )
        assert torch.equal(only.tokens[0], together.tokens[row])
        torch.testing.assert_close(only.latent[0], together.latent[row], atol=1e-5, rtol=0)


@torch.no_grad()
def test_plain_settings_are_ancestral_sampling():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    settings = dict(noise=Noise([1, 2]), guidance=ramp(1.5), temperature=0.9, top_k=9, top_p=0.9)
    ours, plain = sample_next_scale(model, condition, **settings), sample_ancestral(model, condition, **settings)
    assert torch.equal(ours.tokens, plain.tokens)
    torch.testing.assert_close(ours.latent, model.pyramid.running_maps(ours.tokens)[-1])
    settings |= dict(temperature=[0.9] * 3, top_k=[9] * 3, top_p=[0.9] * 3)
    assert torch.equal(sample_next_scale(model, condition, **settings).tokens, ours.tokens)
    assert ours.statistics.forward_passes == {"generator": 3}
    assert ours.statistics.tokens_per_pass == {1: 2, 4: 2, 9: 2}


@torch.no_grad()
def test_settings_of_one_scale_change_that_scale():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0]] * 8))
    noise = Noise(list(range(8)))
    base = sample_next_scale(model, condition, noise=noise).tokens
    greedy_last = sample_next_scale(model, condition, noise=noise, top_k=[0, 0, 1]).tokens
    assert torch.equal(base[:, :5], greedy_last[:, :5]) and not torch.equal(base, greedy_last)
    hot = sample_next_scale(model, condition, noise=noise, temperature=[1.0, 9.0, 1.0]).tokens
    assert torch.equal(base[:, :1], hot[:, :1]) and not torch.equal(base[:, 1:5], hot[:, 1:5])
    flat = dict(temperature=50.0, top_p=0.3)
    before, after = (
        sample_next_scale(model, condition, noise=noise, temperature_after_filter=place, **flat).tokens
        for place in (False, True)
    )
    assert not torch.equal(before, after)


@torch.no_grad()
def test_early_exit_and_given_prefix():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    settings = dict(noise=Noise([1, 2]), guidance=ramp(1.5))
    whole = sample_next_scale(model, condition, **settings)
    for scales in (1, 2):
        early = sample_next_scale(model, condition, num_scales=scales, **settings)
        assert torch.equal(early.tokens, whole.tokens[:, : model.ends[scales - 1]])
        rest = sample_next_scale(model, condition, prefix_tokens=early.tokens, **settings)
        assert torch.equal(rest.tokens, whole.tokens)
        assert rest.statistics.forward_passes == {"generator": 3 - scales}
    with pytest.raises(ValueError, match="num_scales 1 with a prefix of 1"):
        sample_next_scale(model, condition, num_scales=1, prefix_tokens=whole.tokens[:, :1], **settings)
    with pytest.raises(ValueError, match="not a whole number of scales"):
        sample_next_scale(model, condition, prefix_tokens=whole.tokens[:, :3], **settings)
    with pytest.raises(ValueError, match="top_k has 2 values; the model has 3 scales"):
        sample_next_scale(model, condition, top_k=[1, 2], **settings)


@torch.no_grad()
def test_guidance_off_runs_no_null_rows():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    assert model.start(condition, OFF).condition_RD.shape[0] == 2
    assert model.start(condition, ramp(0.0)).condition_RD.shape[0] == 2
    assert model.start(condition, ramp(1.5)).condition_RD.shape[0] == 4


@torch.no_grad()
def test_conditions_matter_and_are_checked():
    model = tiny_model(attributes=(2,), word_vocab_size=5)
    tokens = torch.zeros(1, model.num_tokens, dtype=torch.int64)

    def logits(label, attribute, words):
        return model(tokens, Condition(labels_BA=torch.tensor([[label, attribute]]), words_BT=torch.tensor([words])))

    base = logits(0, 0, [2, 3])
    assert torch.equal(base, logits(0, 0, [2, 3, 0]))  # padding says nothing
    for other in (logits(1, 0, [2, 3]), logits(0, 1, [2, 3]), logits(0, 0, [2, 4])):
        assert not torch.allclose(base, other)
    null = model.null_condition(Condition(labels_BA=torch.tensor([[0, 0]]), words_BT=torch.tensor([[2, 3]])))
    assert null.labels_BA.tolist() == [[3, 2]] and null.words_BT.tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="label 4 in column 0"):
        model.start(Condition(labels_BA=torch.tensor([[4, 0]]), words_BT=torch.tensor([[2]])))
    with pytest.raises(ValueError, match="word ids"):
        model.start(Condition(labels_BA=torch.tensor([[0, 0]])))
    words_only = tiny_model(num_classes=0, word_vocab_size=5)
    out = sample_next_scale(words_only, Condition(words_BT=torch.tensor([[2, 3]])), noise=Noise([0]), guidance=ramp(1))
    assert out.tokens.shape == (1, 14)
    with pytest.raises(ValueError, match="are needed"):
        tiny_model(num_classes=0)


@torch.no_grad()
def test_a_folder_holds_the_whole_model(tmp_path):
    model = tiny_model(scales=(1, (1, 2), (2, 4)))
    model.save_pretrained(tmp_path)
    again = NextScaleTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.head.weight.dtype == torch.bfloat16 and torch.equal(again.pyramid.codebook, model.pyramid.codebook)
    again.float()
    condition = Condition(labels_BA=torch.tensor([[1]]))
    assert sample_next_scale(again, condition, noise=Noise([0])).tokens.shape == (1, 11)
    tokenizer = MultiScaleVQTokenizer(16, 4, (1, 2, 3), base_channels=32, channel_multipliers=(1,), num_res_blocks=1)
    other = tiny_model()
    other.set_tokenizer(tokenizer.quantizer)
    assert torch.equal(other.pyramid.codebook, tokenizer.codebook)
    with pytest.raises(ValueError, match="the tokenizer has scales"):
        model.set_tokenizer(tokenizer.quantizer)


@torch.no_grad()
def test_a_state_is_used_again():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    state = model.start(condition, ramp(2))
    first = model.predict(state)
    model.append(state, first.argmax(-1))
    other = Condition(labels_BA=torch.tensor([[2], [1]]))
    again = model.start(other, ramp(2), state=state)
    assert again is state and again.map_BChw.abs().sum() == 0
    torch.testing.assert_close(model.predict(again), model.predict(model.start(other, ramp(2))), atol=0, rtol=0)


def test_training_moves_everything_but_the_tokenizer():
    model = tiny_model(drop_path=0.5).train()
    tokens = torch.randint(16, (4, model.num_tokens))
    condition = Condition(labels_BA=torch.tensor([[0], [1], [2], [3]]))
    torch.nn.functional.cross_entropy(model(tokens, condition).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert name.startswith("pyramid.") == (parameter.grad is None), name


# ------------------------------------------------------------------------------------------------------- editing
@torch.no_grad()
def test_strategies_keep_what_they_promise():
    model = tiny_model(scales=(1, 2, 4, 8))
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    given = torch.randint(16, (2, model.num_tokens), generator=torch.Generator().manual_seed(0))
    keep = box_mask((8, 8), (0.25, 0.25, 0.75, 0.75), keep="outside")
    settings = dict(given_tokens=given, noise=Noise([1, 2]))
    codes = sample_edit(model, condition, keep=keep, **settings)
    last_codes, last_given = codes.tokens[:, -64:].view(2, 8, 8), given[:, -64:].view(2, 8, 8)
    assert torch.equal(last_codes[:, keep[0]], last_given[:, keep[0]])
    assert not torch.equal(last_codes[:, ~keep[0]], last_given[:, ~keep[0]])
    assert torch.equal(codes.tokens[:, :1], given[:, :1])
    torch.testing.assert_close(codes.latent, model.pyramid.running_maps(codes.tokens)[-1])
    maps = sample_edit(model, condition, keep=keep, strategy="map", **settings)
    given_map = model.pyramid.running_maps(given)[-1]
    assert torch.equal(maps.latent[:, :, keep[0]], given_map[:, :, keep[0]])
    assert not torch.equal(maps.latent[:, :, ~keep[0]], given_map[:, :, ~keep[0]])
    everything = torch.ones_like(keep)
    for strategy in ("codes", "map"):
        out = sample_edit(model, condition, keep=everything, strategy=strategy, **settings)
        torch.testing.assert_close(out.latent, given_map, atol=1e-5, rtol=0)
    nothing = sample_edit(model, condition, keep=~everything, always_keep=0, **settings)
    assert torch.equal(nothing.tokens, sample_next_scale(model, condition, noise=Noise([1, 2])).tokens)


@torch.no_grad()
def test_a_pipeline_decodes_the_map_of_a_smoothed_sample(tmp_path):
    torch.manual_seed(0)
    tokenizer = MultiScaleVQTokenizer(16, 4, (1, 2, 3), base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1)
    model = tiny_model()
    model.set_tokenizer(tokenizer.quantizer)
    ImagePipeline(tokenizer.eval(), model).save_pretrained(tmp_path)
    pipeline = load(tmp_path, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(class_labels=1, seed=3, output_type="pt", sampler="next_scale", guidance_scale=2.0)
    plain, smooth = (pipeline(sampler_options={"smooth": on}, **settings) for on in (False, True))
    assert torch.equal(plain.tokens[:, :1], smooth.tokens[:, :1])
    torch.testing.assert_close(plain.images, (pipeline.decode(plain.tokens) + 1) / 2)
    assert not torch.allclose(smooth.images, (pipeline.decode(smooth.tokens) + 1) / 2, atol=1e-3)
    early = pipeline(sampler_options={"num_scales": 2}, **settings)
    assert early.tokens.shape == (1, 5) and early.images.shape == (1, 3, 6, 6)
    again = load_tokenizer(tmp_path / "tokenizer", device="cpu")
    assert torch.equal(again.decode(early.tokens), tokenizer.decode(early.tokens))


def test_masks_in_pixels_keep_whole_positions():
    pixels = torch.ones(1, 8, 8, dtype=torch.bool)
    pixels[0, 3, 3] = False
    assert grid_mask(pixels, (4, 4))[0].long().tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_bad_edits_are_refused():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0]]))
    given, keep = torch.zeros(1, 14, dtype=torch.int64), torch.ones(1, 3, 3, dtype=torch.bool)
    settings = dict(given_tokens=given, keep=keep, noise=Noise([0]))
    with pytest.raises(ValueError, match="choose codes, map or refine"):
        sample_edit(model, condition, **(settings | {"strategy": "pixels"}))
    with pytest.raises(ValueError, match="NextScaleTransformer has none"):
        sample_edit(model, condition, **(settings | {"strategy": "refine"}))
    with pytest.raises(ValueError, match="given_tokens"):
        sample_edit(model, condition, **(settings | {"given_tokens": given[:, :5]}))
    with pytest.raises(ValueError, match="keep"):
        sample_edit(model, condition, **(settings | {"keep": keep[:, :2]}))
    with pytest.raises(ValueError, match="box"):
        box_mask((4, 4), (0.5, 0.0, 0.5, 1.0), keep="inside")
