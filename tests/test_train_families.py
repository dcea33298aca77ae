"""Training of every family of models, of the adversarial part, and on a GPU."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional

from visar.generators.training import position_weights, token_loss
from visar.pipelines.components import load_tokenizer
from visar.pipelines.loading import load
from visar.tokenizers.families import find_family
from visar.tokenizers.multiscale_vq import pyramid_of
from visar.train.building import select_layers
from visar.train.generator import train_generator
from visar.train.self_correction import self_correction
from visar.train.tokenizer import build_tokenizer, train_tokenizer

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py")))
MULTISCALE = dict(
    preset="var-vq16",
    model_options=json.dumps(
        dict(
            base_channels=32, channel_multipliers=[1, 1], num_res_blocks=1, codebook_dim=8, scales=[1, 2, 4], num_phi=2
        )
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return TINY.write_images(tmp_path_factory.mktemp("data") / "bars.npz")


def test_scales_are_trained_end_to_end(data, tmp_path):
    tokenizer_out, generator_out = tmp_path / "tokenizer", tmp_path / "generator"
    train_tokenizer(TINY.tokenizer_options(data, tokenizer_out, steps=12, **MULTISCALE))
    layout = load_tokenizer(tokenizer_out / "model", device="cpu", dtype="float32").layout
    assert (layout.arrangement, layout.shapes, layout.vocab_size) == ("scales", ((1, 1), (2, 2), (4, 4)), 32)
    options = TINY.generator_options(
        data, tokenizer_out / "model", generator_out, steps=12, num_layers=2, scale_weights=(3.0, 2.0, 1.0)
    )
    train_generator(options)
    for out in (tokenizer_out, generator_out):
        found = TINY.losses(out)
        assert sum(found[-3:]) < 0.95 * sum(found[:3])
    pipeline = load(generator_out / "model", device="cpu", dtype="float32")
    assert pipeline(class_labels=["1"], seed=0, output_type="pt").images.shape == (1, 3, 8, 8)


def test_self_correction_replaces_codes_and_leads_back():
    quantizer = load_tokenizer("emoji-msvq", device="cpu", dtype="float32").quantizer
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(quantizer.vocab_size, (4, sum(quantizer.sizes)), generator=draws)
    tokens = quantizer.encode(quantizer.running_maps(tokens)[-1] * 0.5)[0]

    def corrected(largest):
        return self_correction(quantizer, tokens, largest, torch.Generator().manual_seed(1))

    assert all(torch.equal(found, tokens) for found in corrected(0.0))
    history, target = corrected(0.8)
    assert 0.1 < (history != target).float().mean() < 0.7
    first = quantizer.sizes[0]
    assert torch.equal(target[:, :first], tokens[:, :first])  # nothing is replaced before the first scale
    # The finest scale's targets make up for what was replaced before: with them the map ends nearer to the image's.
    coarse = history[:, : -quantizer.sizes[-1]]
    goal = quantizer.running_maps(tokens)[-1]
    led_back, astray = (
        (quantizer.running_maps(torch.cat([coarse, fine[:, coarse.shape[1] :]], dim=1))[-1] - goal).square().mean()
        for fine in (target, tokens)
    )
    assert led_back < 0.8 * astray


def test_next_scale_training_with_self_correction_and_muon(data, tmp_path):
    train_tokenizer(TINY.tokenizer_options(data, tmp_path / "tokenizer", steps=12, **MULTISCALE))
    options = dict(steps=12, num_layers=2, self_correction=0.3, optimizer="muon", learning_rate=2e-2)
    train_generator(TINY.generator_options(data, tmp_path / "tokenizer" / "model", tmp_path / "run", **options))
    found = TINY.losses(tmp_path / "run")
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    for wrong, message in (
        (dict(self_correction=1.5), "allowed: 0 ... 1"),
        (dict(optimizer="sgd"), "adamw or muon"),
    ):
        with pytest.raises(ValueError, match=message):
            train_generator(TINY.generator_options(data, tmp_path / "tokenizer" / "model", tmp_path / "no", **wrong))
    with pytest.raises(ValueError, match="self_correction is for a tokenizer over scales"):
        train_generator(TINY.generator_options(data, "emoji-vq", tmp_path / "no", self_correction=0.3))


def test_a_student_learns_its_teachers_distributions(data, tmp_path):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([1.0, 0.0, 3.0])
    probs = teacher.softmax(-1)
    loss = token_loss(logits, probs, weight)
    each = functional.cross_entropy(logits.flatten(0, 1), probs.flatten(0, 1), reduction="none")
    torch.testing.assert_close(loss, (each.view(2, 3).mean(0) * weight).sum() / 4)
    gradient = torch.autograd.grad(token_loss(logits, probs), logits)[0]
    torch.testing.assert_close(gradient, (logits.softmax(-1) - probs) / 6)

    train_tokenizer(TINY.tokenizer_options(data, tmp_path / "tokenizer", steps=12, **MULTISCALE))
    place = tmp_path / "tokenizer" / "model"
    train_generator(TINY.generator_options(data, place, tmp_path / "teacher", steps=12, num_layers=2))
    small = dict(steps=12, width=16, teacher=str(tmp_path / "teacher" / "model"))
    train_generator(TINY.generator_options(data, place, tmp_path / "student", **small))
    found = TINY.losses(tmp_path / "student")
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    with pytest.raises(ValueError, match="does not fit, it has another vocab_size"):
        train_generator(TINY.generator_options(data, place, tmp_path / "x", **dict(small, teacher="emoji-var")))


def test_a_student_starts_from_its_teachers_layers(data, tmp_path):
    train_tokenizer(TINY.tokenizer_options(data, tmp_path / "tokenizer", steps=4, **MULTISCALE))
    place, teacher = tmp_path / "tokenizer" / "model", tmp_path / "teacher" / "model"
    train_generator(TINY.generator_options(data, place, tmp_path / "teacher", steps=4, num_layers=3))
    small = dict(steps=1, learning_rate=1e-9, ema_decay=0.0, initial=teacher, initial_layers=(0, 2), num_layers=2)
    train_generator(TINY.generator_options(data, place, tmp_path / "student", **small))
    theirs, ours = (
        load(tmp_path / name / "model", device="cpu", dtype="float32").generator.state_dict()
        for name in ("teacher", "student")
    )
    assert {name.split(".")[1] for name in ours if name.startswith("blocks.")} == {"0", "1"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name.replace("blocks.1.", "blocks.2.")], rtol=0, atol=1e-4)
    for wrong, message in (
        (dict(initial_layers=(2, 0)), r"rising numbers of 0 ... 2"),
        (dict(initial_layers=(0, 3)), r"rising numbers of 0 ... 2"),
        (dict(initial_layers=(1,)), "another architecture"),
        (dict(initial_layers=()), "another architecture"),
        (dict(initial=None), "needs initial"),
    ):
        with pytest.raises(ValueError, match=message):
            train_generator(TINY.generator_options(data, place, tmp_path / "no", **{**small, **wrong}))
    with pytest.raises(ValueError, match="initial_layers is for raster and next-scale"):
        select_layers({"base_blocks.0.weight": torch.zeros(1)}, (0,))


def test_both_phases_of_a_hierarchical_masked_generator(data, tmp_path):
    train_tokenizer(TINY.tokenizer_options(data, tmp_path / "tokenizer", steps=4, **MULTISCALE))
    common = dict(family="hmar", num_layers=2, model_options='{"num_refinement_layers": 1}', steps=12)
    tokenizer = tmp_path / "tokenizer" / "model"
    first = TINY.generator_options(data, tokenizer, tmp_path / "first", **common)
    train_generator(first)
    second = dict(common, phase="refinement", initial=tmp_path / "first" / "model", self_correction=0.3)
    train_generator(TINY.generator_options(data, tokenizer, tmp_path / "second", **second))
    for out in (tmp_path / "first", tmp_path / "second"):
        found = TINY.losses(out)
        assert sum(found[-3:]) < 0.98 * sum(found[:3])
    models = [load(tmp_path / name / "model", device="cpu", dtype="float32").generator for name in ("first", "second")]
    assert all(model.config["hide_masked"] for model in models)
    before, after = (model.state_dict() for model in models)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mask_blocks", "mask_head_nm", "mask_head", "mask_embed"}
    assert torch.equal(before["mask_head.weight"], before["ns_head.weight"])
    with pytest.raises(ValueError, match="needs initial"):
        train_generator(TINY.generator_options(data, tokenizer, tmp_path / "third", **dict(second, initial=None)))


def test_a_decoder_alone_is_trained_and_ids_stay(data, tmp_path):
    train_tokenizer(TINY.tokenizer_options(data, tmp_path / "all", steps=6))
    options = TINY.tokenizer_options(
        data, tmp_path / "decoder", steps=12, decoder_only=True, initial=tmp_path / "all" / "model"
    )
    train_tokenizer(options)
    before, after = (
        load_tokenizer(tmp_path / name / "model", device="cpu", dtype="float32") for name in ("all", "decoder")
    )
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = before.encode(images)
    assert torch.equal(ids, after.encode(images))
    assert not torch.equal(before.decode(ids), after.decode(ids))
    with pytest.raises(ValueError, match="decoder_only needs initial"):
        train_tokenizer(TINY.tokenizer_options(data, tmp_path / "third", decoder_only=True))


def test_kinds_presets_and_pyramids():
    assert [find_family(kind, None)[1] for kind in (None, "vq", "multiscale")] == ["vq-4-64", "vq-4-64", "msvq-4-64"]
    assert find_family(None, "var-vq16")[0] is find_family("multiscale", None)[0]
    with pytest.raises(ValueError, match="choose vq-"):
        find_family("vq", "msvq-4-64")
    assert pyramid_of(16) == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    for side in (1, 2, 7, 8, 24, 32):
        sizes = pyramid_of(side)
        assert sizes[0] == 1 and sizes[-1] == side and list(sizes) == sorted(set(sizes))


def test_a_pyramid_fits_the_images(tmp_path):
    options = TINY.tokenizer_options(tmp_path, tmp_path, kind="multiscale", model_options='{"base_channels": 32}')
    found = [tuple(side for side, _ in build_tokenizer(options, size).layout.shapes) for size in (64, 32)]
    assert found == [(1, 2, 3, 4, 6, 8, 11, 16), (1, 2, 3, 4, 5, 6, 8)]
    with pytest.raises(ValueError, match="needs a multiple of 4"):
        build_tokenizer(options, 30)


def test_codebook_use_is_drawn_scale_by_scale(data, tmp_path):
    options = dict(json.loads(MULTISCALE["model_options"]), scales=[1, 4])
    train_tokenizer(
        TINY.tokenizer_options(
            data, tmp_path, steps=4, validate_every=2, preset="var-vq16", model_options=json.dumps(options)
        )
    )
    measured = [line for line in TINY.curves(tmp_path) if "validation/psnr" in line]
    assert all(
        1.0 <= line[f"validation/code_perplexity_{scale}"] <= 32 for line in measured for scale in ("1x1", "4x4")
    )
    with Image.open(tmp_path / "codebook-use.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 4


def test_losses_are_weighted_by_position():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(10).view(2, 5) % 7
    weights = position_weights((1, 4), (3.0, 0.5))
    assert weights is not None and weights.tolist() == [3.0, 0.5, 0.5, 0.5, 0.5]
    each = -functional.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    expected = (each.mean(0) * weights).sum() / 5.0
    assert token_loss(logits, ids, weights).item() == pytest.approx(expected.item(), rel=1e-6)
    assert token_loss(logits, ids).item() == pytest.approx(each.mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="needed: 2 numbers"):
        position_weights((1, 4), (1.0,))


def test_words_one_by_one_and_no_class(data, tmp_path):
    train_tokenizer(TINY.tokenizer_options(data, tmp_path / "tokenizer", steps=2))
    tokenizer = tmp_path / "tokenizer" / "model"
    options = TINY.generator_options(
        data, tokenizer, tmp_path / "generator", steps=2, class_condition=False, words="prefix", word_omission=0.2
    )
    train_generator(options)
    pipeline = load(tmp_path / "generator" / "model", device="cpu", dtype="float32")
    assert pipeline(prompt="bar 2", seed=0, output_type="pt").images.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="attribute 'style'; bars.npz has none"):
        train_generator(TINY.generator_options(data, tokenizer, tmp_path / "other", attributes=("style",)))


def test_discriminator_sets_in(data, tmp_path):
    changes = dict(steps=4, adversarial_weight=0.1, adversarial_start=2, adversarial_adaptive=True)
    with pytest.raises(ValueError, match="adversarial_layers 3 are too many for images of 8 pixels"):
        train_tokenizer(TINY.tokenizer_options(data, tmp_path, **changes))
    train_tokenizer(TINY.tokenizer_options(data, tmp_path, adversarial_layers=1, **changes))
    lines = [line for line in TINY.curves(tmp_path) if "train/loss" in line]
    assert ["train/discriminator" in line for line in lines] == [False, False, True, True]
    assert all(0.0 < line["train/adaptive_weight"] <= 10.0 for line in lines[2:])
    assert 1.0 < lines[2]["train/discriminator"] < 3.0


def test_curves_and_sheets_reach_tensorboard(data, tmp_path):
    pytest.importorskip("tensorboard", reason="the tracker is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tokenizer(TINY.tokenizer_options(data, tmp_path, steps=2, tracker="tensorboard"))
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(TINY.losses(tmp_path))
    assert [event.step for event in events.Scalars("validation/psnr")] == [2]
    assert [event.step for event in events.Images("reconstruction")] == [2]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["raster", "scales"])
def test_compiled_training_in_bf16_on_a_gpu(data, tmp_path, family):
    changes = dict(device="auto", mixed_precision="bf16", compile=True, steps=30)
    model = MULTISCALE if family == "scales" else {}
    tokenizer_options = TINY.tokenizer_options(data, tmp_path / "tokenizer", perceptual_weight=0.0, **changes, **model)
    train_tokenizer(tokenizer_options)
    train_generator(TINY.generator_options(data, tmp_path / "tokenizer" / "model", tmp_path / "generator", **changes))
    for out in (tmp_path / "tokenizer", tmp_path / "generator"):
        found = TINY.losses(out)
        assert sum(found[-4:]) < 0.9 * sum(found[:4])
    load(tmp_path / "generator" / "model", device="cuda")(class_labels=["1"], seed=0)
