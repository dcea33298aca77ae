"""Hierarchical masked transformer: parity with HMAR, block-diagonal attention, refinement, phases of training."""

import pytest
import torch

from visar.checkpoints import hmar
from visar.checkpoints.common import build
from visar.checkpoints.var import convert_vq
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.hierarchical_masked import (
    HierarchicalMaskedTransformer,
    random_mask,
    refinement_loss,
    scale_weights,
)
from visar.generators.training import token_loss
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.editing import box_mask, sample_edit
from visar.samplers.masked_refinement import least_certain, refinement_schedule, sample_masked_refinement
from visar.samplers.next_scale import sample_next_scale
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer


class Recorder(HierarchicalMaskedTransformer):
    """Notes every refinement pass: scale, tokens before it, what is masked, logits."""

    def refine(self, state, tokens_BL, masked_BL, guidance_scale=1.0):
        logits = super().refine(state, tokens_BL, masked_BL, guidance_scale)
        self.passes.append((state.block, tokens_BL, masked_BL, logits))
        return logits


def from_parity(parity):
    """Tokenizer and transformer of the parity folder."""
    folder, tiny = parity("hmar"), parity("var_vqvae").config["tiny"]
    config, state = convert_vq(
        parity("var_vqvae").checkpoint(), scales=folder.config["patch_nums"], phi_ratio=tiny["quant_resi"]
    )
    tokenizer = build(MultiScaleVQTokenizer, config, state, "tokenizer", torch.float32)
    config, state = hmar.convert(folder.checkpoint(), tokenizer, num_heads=folder.config["num_heads"])
    model = build(Recorder, config, state, "hmar", torch.float32)
    model.passes = []
    return tokenizer, model


def tiny_model(scales=(1, 2, 3), **settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, codebook_width=4, scales=scales, width=16, num_heads=2, num_classes=3)
    model = Recorder(**(sizes | dict(num_layers=3, num_refinement_layers=2) | settings)).eval()
    model.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("pyramid."):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.passes = []
    return model


def per_scale(io, stem):
    found = []
    while f"{stem}{len(found)}" in io:
        found.append(io[f"{stem}{len(found)}"])
    assert found, stem
    return torch.cat(found, 1)


def ramp(cfg):
    return Guidance(float(cfg), "extrapolate", "linear")


# -------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("method", ["mask", "per_scale"])
@torch.no_grad()
def test_teacher_forced_parity(parity, method):
    _, model = from_parity(parity)
    model.attention_method = method
    io = parity("hmar").io
    tokens, condition = per_scale(io, "teacher/in/tokens_s"), Condition(labels_BA=io["teacher/in/label"][:, None])
    close = dict(atol=1e-3, rtol=0)
    torch.testing.assert_close(model.pyramid.inputs(tokens), io["teacher/out/next_scale_input"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(tokens, condition), io["teacher/out/next_scale_logits"], **close)
    null = model.null_condition(condition)
    torch.testing.assert_close(model(tokens, null), io["teacher/out/next_scale_logits_uncond"], **close)
    masked = torch.zeros(1, model.num_tokens, dtype=torch.bool)
    masked[0, io["teacher/in/masked_positions"] + model.block_sizes[0]] = True
    torch.testing.assert_close(model.current_inputs(tokens, masked), io["teacher/out/mask_input"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(tokens, condition, masked), io["teacher/out/mask_logits"], **close)


@torch.no_grad()
def test_next_scale_parity(parity):
    tokenizer, model = from_parity(parity)
    io, cases = parity("hmar").io, parity("hmar").config["cases"]
    condition = Condition(labels_BA=io["generate/in/label"][:, None])
    plain = {name: case for name, case in cases.items() if name.startswith("nsp_greedy")}
    assert plain
    for name, case in plain.items():
        noise = Noise([0] * condition.batch)
        out = sample_next_scale(model, condition, noise=noise, guidance=ramp(case["cfg"]), top_k=1)
        assert torch.equal(out.tokens, per_scale(io, f"{name}/out/tokens_s"))
        torch.testing.assert_close(out.latent, io[f"{name}/out/fhat"], atol=2e-4, rtol=0)
        image = ((tokenizer.decode_latents(out.latent) + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(image, io[f"{name}/out/image"], atol=2e-4, rtol=0)
        if f"{name}/out/cfg_logits" in io:
            state, logits = model.start(condition, ramp(case["cfg"])), []
            for scale, part in enumerate(out.tokens.split(model.block_sizes, 1)):
                state.block = scale
                logits.append(model.predict(state))
                model.append(state, part)
            torch.testing.assert_close(torch.cat(logits, 1), io[f"{name}/out/cfg_logits"], atol=1e-3, rtol=0)


@torch.no_grad()
def test_refinement_parity(parity):
    _, model = from_parity(parity)
    io, cases = parity("hmar").io, parity("hmar").config["cases"]
    condition = Condition(labels_BA=io["generate/in/label"][:, None])
    refined = {name: case for name, case in cases.items() if name.startswith("masked_greedy")}
    assert refined
    for name, case in refined.items():
        model.passes = []
        out = sample_masked_refinement(
            model,
            condition,
            noise=Noise([0] * condition.batch),
            guidance=ramp(case["cfg"]),
            top_k=case["top_k"],
            top_p=case["top_p"] or 1.0,
            schedule=case["mask_schedule"],
            refinement_guidance=1 + case["mask_step_cfg_ratio"],
            greedy=True,
        )
        assert torch.equal(out.tokens, per_scale(io, f"{name}/out/tokens_s"))
        torch.testing.assert_close(out.latent, io[f"{name}/out/fhat"], atol=2e-4, rtol=0)
        step: dict[int, int] = {}
        for scale, _, masked, logits in model.passes:
            step[scale] = step.get(scale, 0) + 1
            ours = torch.stack([row.nonzero()[:, 0] for row in masked])
            assert torch.equal(ours, io[f"{name}/out/masked_before_s{scale}_step{step[scale]}"])
            if (key := f"{name}/out/logits_s{scale}_step{step[scale]}") in io:
                torch.testing.assert_close(logits, io[key], atol=1e-3, rtol=0)
        assert sum(step.values()) == sum(len(entry) - 1 for entry in case["mask_schedule"])
        without = sample_masked_refinement(
            model,
            condition,
            noise=Noise([0] * condition.batch),
            guidance=ramp(case["cfg"]),
            top_k=case["top_k"],
            top_p=case["top_p"] or 1.0,
            schedule=case["mask_schedule"],
            greedy=True,
        )
        assert torch.equal(without.tokens, out.tokens)


# -------------------------------------------------------------------------------------------------- equivalences
@torch.no_grad()
def test_block_diagonal_equals_dense_masked_attention():
    model = tiny_model(scales=(1, 2, 3, 5))
    tokens = torch.randint(16, (2, model.num_tokens), generator=torch.Generator().manual_seed(0))
    condition = Condition(labels_BA=torch.tensor([[0], [2]]))
    masked = torch.rand(2, model.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    for mask in (None, masked):
        model.attention_method = "mask"
        dense = model(tokens, condition, mask)
        model.attention_method = "per_scale"
        torch.testing.assert_close(model(tokens, condition, mask), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, dict(shared_adaln=True), dict(hide_masked=True)])
@torch.no_grad()
def test_decoding_equals_teacher_forcing(settings):
    model = tiny_model(**settings)
    tokens = torch.randint(16, (2, model.num_tokens), generator=torch.Generator().manual_seed(0))
    masked = torch.rand(2, model.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    condition = Condition(labels_BA=torch.tensor([[0], [2]]))
    whole, refined = model(tokens, condition), model(tokens, condition, masked)
    null = model(tokens, model.null_condition(condition), masked)
    others = tokens.roll(1, 0)
    corrected = model(tokens, condition, masked, others)
    state = model.start(condition, ramp(2))
    assert state.cache is None
    for scale, part in enumerate(tokens.split(model.block_sizes, 1)):
        state.block = scale
        here = slice(model.begin_of(scale), model.ends[scale])
        raw = model.raw_logits(state)[:2]
        torch.testing.assert_close(raw, whole[:, here], atol=2e-5, rtol=1e-4)
        if scale:
            got = model.refine(state, part, masked[:, here])
            torch.testing.assert_close(got, refined[:, here], atol=2e-5, rtol=1e-4)
            got = model.refine(state, others[:, here], masked[:, here])
            torch.testing.assert_close(got, corrected[:, here], atol=2e-5, rtol=1e-4)
            got = model.refine(state, part, masked[:, here], 3.0)
            expected = (null + 3 * (refined - null))[:, here]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        model.append(state, part)


@pytest.mark.parametrize("hide_masked", [False, True])
@torch.no_grad()
def test_whether_hidden_codes_reach_the_distribution(hide_masked):
    model = tiny_model(hide_masked=hide_masked)
    tokens = torch.randint(16, (2, model.num_tokens), generator=torch.Generator().manual_seed(0))
    masked = torch.rand(2, model.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    condition, visible = Condition(labels_BA=torch.tensor([[0], [2]])), ~masked
    probs = model(tokens, condition, masked)
    for changed, hidden in ((masked, True), (visible, False)):
        current = torch.where(changed, (tokens + 1) % 16, tokens)
        same = torch.equal(model(tokens, condition, masked, current), probs)
        assert same == (hidden and hide_masked)


@torch.no_grad()
def test_one_pass_a_scale_is_plain_sampling():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    settings = dict(noise=Noise([1, 2]), guidance=ramp(1.5), top_k=9, top_p=0.9)
    plain = sample_ancestral(model, condition, **settings)
    single = [[1]] * 3
    out = sample_masked_refinement(model, condition, schedule=single, **settings)
    assert torch.equal(out.tokens, plain.tokens) and not model.passes
    assert torch.equal(out.latent, sample_next_scale(model, condition, **settings).latent)
    assert out.statistics.forward_passes == {"generator": 3}
    refined = sample_masked_refinement(model, condition, **settings)
    assert not torch.equal(refined.tokens, plain.tokens)
    assert refined.statistics.forward_passes == {"generator": 1 + 2 + 4}


@pytest.mark.parametrize("settings", [dict(refinement_guidance=3.0), dict(refinement_guidance=-1.0)])
def test_guidance_of_masked_passes_that_makes_no_sense(settings):
    with pytest.raises(ValueError, match=f"refinement_guidance {settings['refinement_guidance']}"):
        sample_masked_refinement(tiny_model(), Condition(labels_BA=torch.tensor([[0]])), noise=Noise([1]), **settings)


@torch.no_grad()
def test_kept_tokens_never_change():
    model = tiny_model(scales=(1, 2, 3, 4))
    condition = Condition(labels_BA=torch.tensor([[0], [1], [2]]))
    out = sample_masked_refinement(
        model, condition, noise=Noise([1, 2, 3]), guidance=ramp(1.5), schedule=[1, (1, 3), 4, (1, 2, 13)]
    )
    final = dict(enumerate(out.tokens.split(model.block_sizes, 1)))
    assert len(model.passes) == 1 + 3 + 2
    previous = {}
    for scale, tokens, masked, _ in model.passes:
        assert torch.equal(tokens[~masked], final[scale][~masked])
        if scale in previous:
            assert not (masked & ~previous[scale]).any()
        previous[scale] = masked


@torch.no_grad()
def test_images_depend_on_their_own_seed_only():
    model = tiny_model()
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    together = sample_masked_refinement(model, condition, noise=Noise([3, 4]), guidance=ramp(1))
    for row in (0, 1):
        only = sample_masked_refinement(
            model, condition.rows(slice(row, row + 1)), noise=Noise([3 + row]), guidance=ramp(1)
        )
        assert torch.equal(only.tokens[0], together.tokens[row])


@torch.no_grad()
def test_editing_by_a_masked_pass_keeps_given_tokens():
    model = tiny_model(scales=(1, 2, 4))
    condition = Condition(labels_BA=torch.tensor([[0], [1]]))
    given = torch.randint(16, (2, model.num_tokens), generator=torch.Generator().manual_seed(0))
    keep = box_mask((4, 4), (0.25, 0.25, 1.0, 1.0), keep="outside")
    settings = dict(given_tokens=given, keep=keep, noise=Noise([1, 2]), guidance=ramp(1.5))
    refined = sample_edit(model, condition, strategy="refine", **settings)
    assert torch.equal(refined.tokens[:, -16:].view(2, 4, 4)[:, keep[0]], given[:, -16:].view(2, 4, 4)[:, keep[0]])
    assert not torch.equal(refined.tokens, sample_edit(model, condition, **settings).tokens)
    (_, coarse, coarse_mask, _), (_, fine, mask, _) = model.passes
    assert torch.equal(mask.view(-1, 4, 4), ~keep)
    assert torch.equal(fine[:, ~mask[0]], given[:, -16:][:, ~mask[0]])
    assert coarse.shape == (2, 4) and coarse_mask.any()
    assert refined.statistics.forward_passes == {"generator": 5}


def test_schedules_are_read_and_checked():
    sizes = (1, 4, 9, 16)
    assert refinement_schedule(sizes, None) == ((1,), (1, 3), (1, 1, 2, 5), (16,))
    assert refinement_schedule(sizes, [[1], [1], 2]) == ((1,), (4,), (4, 5), (16,))
    assert refinement_schedule(sizes, [1, 1, 3, (4, 12)]) == ((1,), (4,), (3, 3, 3), (4, 12))
    assert refinement_schedule(sizes, "1/1,3/2") == ((1,), (1, 3), (4, 5), (16,))
    for wrong in ("1/x", [1, (1, 2)], [1, 5], [1, (0, 4)], [(1, 1)], [1] * 5):
        with pytest.raises(ValueError):
            refinement_schedule(sizes, wrong)


def test_the_least_certain_candidates_are_chosen():
    confidence = torch.tensor([[0.5, 0.1, 0.1, 0.9], [0.2, 0.3, 0.4, 0.1]])
    candidate = torch.tensor([[True, True, True, False], [True, True, True, False]])
    assert least_certain(confidence, candidate, 2).tolist() == [[False, True, True, False], [True, True, False, False]]


# ------------------------------------------------------------------------------------------------------ training
def test_scale_weights_are_the_published_ones():
    sizes = tuple(side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    weights = [part.sum().item() for part in scale_weights(sizes).split(sizes)]
    expected = [0.025, 0.064, 0.115, 0.138, 0.140, 0.133, 0.121, 0.105, 0.088, 0.071]
    assert weights == pytest.approx(expected, abs=6e-4)


@torch.no_grad()
def test_a_shared_modulation_is_one_copy_of_a_layer_in_every_block():
    shared, apart = tiny_model(shared_adaln=True), tiny_model()
    state, layer = shared.state_dict(), shared.shared_ada_lin[1]
    for name in apart.state_dict():
        if name.endswith("ada_lin.1.weight") and "blocks" in name:
            state[name] = layer.weight
        elif name.endswith("ada_lin.1.bias") and "blocks" in name:
            state[name] = layer.bias + state[name.replace("ada_lin.1.bias", "ada_gss")].flatten()
    apart.load_state_dict({name: state[name] for name in apart.state_dict()})
    tokens = torch.randint(16, (2, shared.num_tokens), generator=torch.Generator().manual_seed(0))
    masked = torch.rand(2, shared.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    condition = Condition(labels_BA=torch.tensor([[0], [2]]))
    for hidden in (None, masked):
        torch.testing.assert_close(
            shared(tokens, condition, hidden), apart(tokens, condition, hidden), atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_phases_train_their_own_parts(shared_adaln):
    model = tiny_model(shared_adaln=shared_adaln).train()
    tokens = torch.randint(16, (2, model.num_tokens))
    condition = Condition(labels_BA=torch.tensor([[0], [3]]))
    refinement_parts = ("mask_blocks.", "mask_head.", "mask_head_nm.", "mask_embed.")
    model.set_phase("next_scale")
    token_loss(model(tokens, condition), tokens, scale_weights(model.block_sizes)).backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {
        name for name, _ in model.named_parameters() if not name.startswith((*refinement_parts, "pyramid."))
    }
    model.zero_grad(set_to_none=True)
    model.begin_refinement()
    assert torch.equal(model.mask_head.weight, model.ns_head.weight)
    model.set_phase("refinement")
    masked = random_mask(model.block_sizes, torch.Generator().manual_seed(0))
    refinement_loss(model(tokens, condition, masked), tokens, masked).backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith(refinement_parts)}
    with pytest.raises(ValueError, match="next_scale or refinement"):
        model.set_phase("both")


def test_masks_of_training_cover_one_share_of_every_scale():
    sizes = (1, 4, 9, 16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = [int(part.sum()) for part in random_mask(sizes, generator)[0].split(sizes)]
        assert counts[0] == 0 and all(counts[1:])
        low = max((count - 1) / size for count, size in zip(counts[1:], sizes[1:], strict=True))
        high = min(count / size for count, size in zip(counts[1:], sizes[1:], strict=True))
        assert low < high


def test_refinement_loss_reads_masked_positions_only():
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    masked = torch.tensor([[False, True, False, True, False]])
    other = logits.clone()
    other[:, [0, 2, 4]] += torch.randn(2, 3, 7)
    torch.testing.assert_close(refinement_loss(logits, tokens, masked), refinement_loss(other, tokens, masked))
