"""Masked generator of continuous tokens: parity with MAR, seeds and batches, training, files of others, bad input."""

import dataclasses
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import visar
from visar.bench.acceptance import acceptance
from visar.bench.options import Acceptance, Bench
from visar.bench.run import bench
from visar.checkpoints.common import empty
from visar.checkpoints.mar import convert_generator, export_generator, export_kl
from visar.checkpoints.options import Convert
from visar.cli.convert import convert
from visar.cli.main import main
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.interface import Continuous, Masked
from visar.core.noise import Noise, Use
from visar.core.runtime import Session
from visar.data.images import as_float
from visar.generators.causal_continuous import CausalContinuous
from visar.generators.masked import MASKED_PRESETS, MaskedGenerator
from visar.layers.bidirectional import truncated_normal
from visar.pipelines.editing import edit_images
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.continuous import head_steps_of
from visar.samplers.index import SAMPLERS
from visar.samplers.masked import masked_after, run_steps, sample_masked, strengths
from visar.samplers.masked_editing import sample_masked_edit
from visar.tokenizers.kl import KLTokenizer
from visar.train.generator import train_generator
from visar.train.tokenizer import train_tokenizer

TRAINING = runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py"))
CLOSE: dict[str, Any] = dict(atol=1e-5, rtol=1e-5)


def tiny(seed: int = 0, **changes) -> MaskedGenerator:
    sizes: dict[str, Any] = dict(
        channels=2, grid=(2, 3), width=16, encoder_layers=1, decoder_layers=1, num_heads=2, buffer_size=2,
        head_arguments=dict(width=8, depth=1, prediction="velocity", steps=4), num_classes=3,
    )  # fmt: skip
    model = MaskedGenerator(**{**sizes, **changes})
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def classes(count: int) -> Condition:
    return Condition(labels_BA=torch.arange(count)[:, None] % 3)


def released(parity) -> tuple[dict, dict, MaskedGenerator]:
    folder = parity("mar")
    sizes = folder.config["constructor"]
    nested = {"model_ema": {key.removeprefix("model_ema."): value for key, value in folder.checkpoint().items()}}
    config, state = convert_generator(nested, num_heads=sizes["encoder_num_heads"])
    spacing = sizes["num_sampling_steps"]
    config["head_arguments"] |= dict(steps=int(spacing.removeprefix("ddim")), strided=spacing.startswith("ddim"))
    model = MaskedGenerator(**config).eval()
    model.load_state_dict(state)
    return folder.config, folder.io, model


# ------------------------------------------------------------------------------------------------------------ parity
@torch.no_grad()
def test_parity_of_passes(parity):
    _, io, model = released(parity)
    masked, count = io["fwd.mask"].bool(), int(io["fwd.num_masked"])
    visible = (~masked).nonzero()[:, 1].view(len(masked), -1)
    assert visible.shape[1] == model.num_tokens - count
    condition = Condition(labels_BA=io["labels"][:, None])
    vector = model.condition_vector(condition)
    torch.testing.assert_close(vector, io["fwd.class_embedding"], **CLOSE)
    encoded = model.encode(io["fwd.tokens"], visible, vector)
    torch.testing.assert_close(encoded, io["fwd.encoder_out"], **CLOSE)
    torch.testing.assert_close(model.decode(encoded, visible), io["fwd.z"], **CLOSE)
    null = model.condition_vector(model.null_condition(condition))
    torch.testing.assert_close(model.hidden(io["fwd.tokens"], visible, null), io["fwd_uncond.z"], **CLOSE)
    nothing = torch.zeros(len(masked), 0, dtype=torch.int64)
    torch.testing.assert_close(model.hidden(io["fwd.tokens"], nothing, vector), io["fwd_allmasked.z"], **CLOSE)


def test_parity_of_the_training_loss_and_gradients(parity):
    config, io, model = released(parity)
    tokens = io["train.latents"].flatten(2).transpose(1, 2)
    batch, count, _ = tokens.shape
    mask, repeats = io["train.mask"], config["constructor"]["diffusion_batch_mul"]
    masked = int(mask[0].sum())
    assert masked == math.ceil(count * float(io["train.mask_rate"]))
    visible = io["train.orders"][:, masked:].sort(dim=1).values
    hidden = model.hidden(tokens, visible, model.condition_vector(Condition(labels_BA=io["labels"][:, None])))
    rows = hidden.flatten(0, 1).repeat(repeats, 1), tokens.flatten(0, 1).repeat(repeats, 1)
    total, square, bits = model.token_head.loss_at(*rows, io["train.t"], io["train.noise"])
    for found, name in ((total, "loss_per_row"), (square, "mse"), (bits, "vb")):
        torch.testing.assert_close(found, io[f"train.{name}"], atol=1e-5, rtol=1e-4)
    weight = mask.flatten().repeat(repeats)
    loss = (total * weight).sum() / weight.sum()
    torch.testing.assert_close(loss, io["train.loss"], **CLOSE)
    loss.backward()
    names = {"diffloss.net.": "head_module.net."}
    parameters = dict(model.named_parameters())
    for key in (key for key in io if key.startswith("train.grad.")):
        name = key.removeprefix("train.grad.")
        if name == "class_emb.weight":
            found = parameters["condition_vector.class_emb.weight"].grad[:-1]
        else:
            found = parameters[name.replace(*next(iter(names.items())))].grad
        error = (found - io[key]).abs().max() / io[key].abs().max().clamp(min=1.0)
        assert float(error) < 1e-4, name


@torch.no_grad()
def test_parity_of_the_schedules(parity):
    _, io, _ = released(parity)
    for name in ("L256_T64", "L256_T256"):
        count, steps = (int(part[1:]) for part in name.split("_"))
        left = io[f"sched.{name}.mask_len_next"].tolist()
        assert masked_after(count, steps) == [*left[:-1], 0]
        sizes = [before - after for before, after in zip([count, *left], [*left[:-1], 0], strict=False)]
        assert sizes == io[f"sched.{name}.num_pred"].tolist()
        guidance = Guidance(float(io[f"sched.{name}.cfg"]), schedule="linear")
        torch.testing.assert_close(
            torch.tensor(strengths(guidance, count, steps), dtype=torch.float64), io[f"sched.{name}.cfg_iter"],
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip


@torch.no_grad()
def test_parity_of_whole_loops(parity):
    config, io, model = released(parity)
    for name, loop in config["loops"].items():
        steps, orders = loop["num_iter"], io[f"{name}.orders"]
        labels = io["labels"] if "labels" not in loop else torch.full((len(orders),), model.config["num_classes"])
        guided = loop["cfg"] != 1.0
        guidance = Guidance(loop["cfg"], schedule=loop.get("cfg_schedule", "constant"))
        session = Session(capture=False)
        session.state = model.start(Condition(labels_BA=labels[:, None]), Guidance(2.0 if guided else 1.0))

        def noise_of(step, places, number, name=name, channels=model.config["channels"]):
            index = io[f"{name}.s{step:02d}.index"]
            recorded = io[f"{name}.s{step:02d}.noise_{'init' if number == 0 else 'steps'}"]
            values = recorded if number == 0 else recorded[number - 1]
            assert torch.equal(index[:, 1].view(places.shape), places)
            return values.view(*places.shape, channels)

        scales = strengths(guidance, model.num_tokens, steps)
        torch.testing.assert_close(
            torch.tensor(scales, dtype=torch.float64), io[f"{name}.cfg_iter"], rtol=1e-6, atol=1e-6
        )
        chain = [model.token_head.steps] * steps
        assert run_steps(model, session, orders, noise_of, scales, chain, loop["temperature"], None) == steps
        rows, columns = model.config["grid"]
        final = session.state.tokens.transpose(1, 2).unflatten(2, (rows, columns))
        expected = io[f"{name}.final_latent"]
        assert float((final - expected).abs().max() / expected.abs().max().clamp(min=1.0)) < 1e-4, name


def test_parity_of_manifests(parity):
    seen = 0
    for path in parity("mar").manifests():
        manifest = json.loads(path.read_text())
        tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest["tensors"].items()}
        config, _ = convert_generator(tensors)
        preset = MASKED_PRESETS[path.stem.removeprefix("manifest-").replace("_", "-")]
        assert all(config[key] == value for key, value in preset.items() if key != "head_arguments")
        assert preset["head_arguments"].items() <= config["head_arguments"].items()
        model = empty(MaskedGenerator, config)
        assert sum(value.numel() for value in model.parameters()) == manifest["num_params"]
        seen += 1
    assert seen or not parity("mar").manifests()


def test_files_of_other_sizes_come_back(tmp_path):
    """A second size, through the command, with its tokenizer."""
    model = tiny(channels=4, grid=(3, 3), width=24, encoder_layers=2, num_heads=4, buffer_size=3,
                 head_arguments=dict(width=8, depth=2), num_classes=5)  # fmt: skip
    kl = KLTokenizer(image_size=6, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=4)
    torch.save(export_generator(model), tmp_path / "mar.pth")
    torch.save(export_kl(kl), tmp_path / "kl.ckpt")
    said = convert(
        Convert(file=tmp_path / "mar.pth", tokenizer=tmp_path / "kl.ckpt", num_heads=4, out=tmp_path / "m",
                dtype="float32")
    )  # fmt: skip
    assert "ema weights of mar.pth, which has both" in said
    pipe = load(tmp_path / "m", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    noise = Noise([3, 4])
    few: dict = dict(noise=noise, steps=3, head_steps=4)
    mine = sample_masked(model, classes(2), **few)
    torch.testing.assert_close(sample_masked(pipe.generator, classes(2), **few).tokens, mine.tokens)
    out = pipe(num_images=2, seed=3, output_type="pt", sampler_options=dict(head_steps=4))
    assert out.images.shape == (2, 3, 6, 6) and out.statistics.forward_passes == {"generator": 9}
    with pytest.raises(ValueError, match="width 24 is of no released size; give num_heads"):
        convert_generator(export_generator(model))


# ---------------------------------------------------------------------------------------------------------- sampling
def test_seeds_orders_and_counts():
    model = tiny()
    assert isinstance(model, Masked) and not isinstance(model, Continuous)
    assert {name for name, entry in SAMPLERS.items() if entry.fits(model)} == {
        "masked",
        "masked_edit",
        "masked_speculation",
    }
    guidance = Guidance(1.8, schedule="linear")
    out = sample_masked(model, classes(8), noise=Noise(list(range(8))), guidance=guidance, steps=4)
    assert out.statistics.counts == {"head_passes": 16} and out.statistics.forward_passes == {"generator": 4}
    assert sum(size * often for size, often in out.statistics.tokens_per_pass.items()) == 8 * 6
    for row in (0, 5):
        condition = Condition(labels_BA=torch.tensor([[row % 3]]))
        alone = sample_masked(model, condition, noise=Noise([row]), guidance=guidance, steps=4)
        torch.testing.assert_close(alone.tokens[0], out.tokens[row], **CLOSE)
    seen: list[int] = []
    ended = sample_masked(
        model, classes(8), noise=Noise(list(range(8))), guidance=guidance, steps=4,
        callback=lambda done, tokens: seen.append(done) or done >= 3,
    )  # fmt: skip
    known = (ended.tokens != 0).all(-1)
    assert known.sum(1).tolist() == [seen[-1]] * 8 and len({tuple(row.tolist()) for row in known}) > 1
    falling = sample_masked(model, classes(2), noise=Noise([0, 1]), steps=6, head_steps=4, last_head_steps=2)
    assert falling.statistics.counts["head_passes"] == sum(head_steps_of(step, 6, 4, 2) for step in range(6)) < 24


@pytest.mark.parametrize("schedule", ["linear", "cosine", "two_stage"])
def test_the_head_s_transitions_fall_by_a_schedule_and_with_another_solver(schedule):
    settings: dict = dict(noise=Noise([0, 1]), steps=6, head_steps=4, last_head_steps=1, head_solver="dpm")
    with pytest.raises(ValueError, match=r"head_steps 1; needed: 2 \.\.\. 1000"):
        sample_masked(tiny(), classes(2), **settings)
    out = sample_masked(tiny(), classes(2), **settings | dict(last_head_steps=2), head_schedule=schedule)
    assert out.statistics.counts["head_passes"] == sum(head_steps_of(step, 6, 4, 2, schedule) for step in range(6))


# ----------------------------------------------------------------------------------------------------------- editing
def test_an_edit_keeps_what_it_is_given_and_draws_the_rest_from_it():
    model, noise = tiny(), Noise([3, 4])
    given = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[[True, False, True], [False, True, True]]])
    settings: dict = dict(keep=keep, guidance=Guidance(1.8, schedule="linear"))
    out = sample_masked_edit(model, classes(2), given_tokens=given, noise=noise, steps=2, **settings)
    stays = keep.flatten()
    assert torch.equal(out.tokens[:, stays], given[:, stays])
    assert out.statistics.forward_passes == {"generator": 2} and out.statistics.tokens_per_pass == {1: 4}
    again = sample_masked_edit(model, classes(2), given_tokens=given + ~stays[:, None], noise=noise, **settings)
    assert torch.equal(again.tokens, out.tokens)  # what is drawn anew is not read
    moved = sample_masked_edit(model, classes(2), given_tokens=given + 0.5, noise=noise, **settings)
    assert not torch.equal(moved.tokens[:, ~stays], out.tokens[:, ~stays])
    for row in (0, 1):  # batch-free, and rows may keep other places, as many
        masks = torch.stack([keep[0], keep[0].flip(1)])
        both = sample_masked_edit(
            model, classes(2), given_tokens=given, noise=noise, **settings | dict(keep=masks)
        ).tokens
        condition = Condition(labels_BA=torch.tensor([[row]]))
        alone = sample_masked_edit(
            model, condition, given_tokens=given[row : row + 1], noise=Noise([3 + row]),
            **settings | dict(keep=masks[row : row + 1]),
        )  # fmt: skip
        torch.testing.assert_close(alone.tokens[0], both[row], **CLOSE)


def test_an_edit_that_keeps_nothing_is_plain_sampling_and_one_token_has_the_model_s_distribution():
    model, noise = tiny(), Noise([5, 6])
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    settings: dict = dict(noise=noise, guidance=Guidance(1.5, schedule="linear"), steps=3)
    plain = sample_masked(model, classes(2), **settings)
    edited = sample_masked_edit(model, classes(2), given_tokens=torch.zeros(2, 6, 2), keep=nothing, **settings)
    assert torch.equal(edited.tokens, plain.tokens)
    # The last token of a whole sampling one by one is the edit that keeps all others.
    full = sample_masked(model, classes(2), noise=noise, steps=6)
    order = noise.uniform(Use.ORDER, torch.arange(6).expand(2, -1)).argsort(1)
    keep = torch.ones(2, 6, dtype=torch.bool).scatter(1, order[:, :1], False).view(2, 2, 3)
    last = sample_masked_edit(model, classes(2), given_tokens=full.tokens, keep=keep, noise=noise)
    torch.testing.assert_close(last.tokens, full.tokens, **CLOSE)


def test_bad_edits():
    model, given = tiny(), torch.zeros(2, 6, 2)
    some = torch.tensor([[[True, False, True], [False, True, True]]])
    for changes, says in (
        (dict(given_tokens=torch.zeros(2, 5, 2)), r"given_tokens \(2, 5, 2\); needed: \[one per image, 6, 2\]"),
        (dict(given_tokens=torch.zeros(1, 6, 2)), "given_tokens of 1 images; the condition is of 2"),
        (dict(keep=torch.zeros(1, 3, 3, dtype=torch.bool)), r"keep \(1, 3, 3\); needed: \[1 or 2, height, width\]"),
        (dict(keep=torch.ones(1, 2, 3, dtype=torch.bool)), "keep leaves no token to draw"),
        (dict(keep=torch.cat([some, ~some])), r"draw as many tokens each; these draw \[2, 4\]: edit them one by one"),
        (dict(steps=3), r"steps 3; needed: 1 \.\.\. 2"),
        (dict(temperature=-1.0), "temperature -1"),
    ):
        with pytest.raises(ValueError, match=says):
            sample_masked_edit(model, classes(2), noise=Noise([0, 1]), **dict(given_tokens=given, keep=some) | changes)


def test_a_pipeline_and_the_command_edit(tmp_path, capsys):
    kl = KLTokenizer(image_size=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=2)
    pipeline = ImagePipeline(kl.eval(), tiny(grid=(4, 4)))
    pipeline.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    given = [PIL.Image.fromarray(each) for each in pixels]
    out = edit_images(pipeline, given, box=(0, 0, 0.5, 1), class_labels=[0, 2], seed=3, guidance_scale=1.5)
    assert [np.asarray(image)[4:].tolist() for image in out.images] == pixels[:, 4:].tolist()
    assert out.tokens is not None
    with torch.no_grad():
        known = kl.encode(as_float(torch.from_numpy(pixels)))
    assert torch.equal(out.tokens[:, 8:], known[:, 8:]) and not torch.equal(out.tokens[:, :8], known[:, :8])
    assert out.statistics.forward_passes == {"generator": 8}
    outside = edit_images(pipeline, given[:1], box=(0, 0, 0.5, 1), keep="inside", unconditional=True, paste=False)
    assert torch.equal(outside.tokens[:, :8], known[:1, :8])
    with pytest.raises(ValueError, match="strategy 'codes' is of models over scales; this one is masked"):
        edit_images(pipeline, given, box=(0, 0, 0.5, 1), strategy="codes")
    with pytest.raises(ValueError, match="masked_edit has no top_k|top_k"):
        edit_images(pipeline, given, box=(0, 0, 0.5, 1), top_k=5)
    pipeline.save_pretrained(tmp_path / "model")
    given[0].save(tmp_path / "given.png")
    arguments = ["edit", str(tmp_path / "model"), str(tmp_path / "given.png"), "--out", str(tmp_path / "out.png")]
    assert main([*arguments, "--steps", "3", "--num-images", "2", "--class", "1", "--device", "cpu"]) == 0
    assert "seed 1: class 1" in capsys.readouterr().out
    assert main([*arguments, "--steps", "13", "--device", "cpu"]) == 1
    assert "steps 13; needed: 1 ... 4" in capsys.readouterr().err


def test_tokens_see_the_visible_ones_only():
    model, random = tiny(), torch.Generator().manual_seed(0)
    tokens, visible = torch.randn(1, 6, 2, generator=random), torch.tensor([[1, 4]])
    vector = model.condition_vector(classes(1))
    before = model.hidden(tokens, visible, vector)
    for place in range(6):
        moved = tokens.clone()
        moved[:, place] += 1.0
        same = torch.equal(model.hidden(moved, visible, vector), before)
        assert same == (place not in (1, 4))


def test_the_share_of_masked_tokens_has_its_distribution():
    random = torch.Generator().manual_seed(0)
    draws = torch.stack([truncated_normal(1.0, 0.25, 0.7, 1.0, random, torch.device("cpu")) for _ in range(4000)])
    assert float(draws.min()) >= 0.7 and float(draws.max()) <= 1.0
    inside = torch.special.ndtr(torch.tensor([(0.85 - 1) / 0.25, (0.7 - 1) / 0.25, 0.0], dtype=torch.float64))
    expected = float((inside[0] - inside[1]) / (inside[2] - inside[1]))
    assert float((draws < 0.85).double().mean()) == pytest.approx(expected, abs=0.03)


def captions(count: int) -> Condition:
    """Of one, two ... vectors at the end of three places."""
    random = torch.Generator().manual_seed(0)
    given = torch.arange(3) >= 2 - torch.arange(count)[:, None] % 3
    return Condition(text_BTC=torch.randn(count, 3, 5, generator=random), text_mask_BT=given)


def test_it_reads_captions():
    model = tiny(num_classes=0, caption_width=5, caption_length=3)
    condition, noise = captions(3), Noise([0, 1, 2])
    settings: dict = dict(steps=3, guidance=Guidance(1.7))
    out = sample_masked(model, condition, noise=noise, **settings)
    alone = sample_masked(model, condition.rows(slice(1, 2)), noise=Noise([1]), **settings)
    torch.testing.assert_close(alone.tokens[0], out.tokens[1], **CLOSE)
    assert condition.text_BTC is not None and condition.text_mask_BT is not None
    hidden = condition.text_BTC + 9.0 * ~condition.text_mask_BT[..., None]
    same = sample_masked(
        model, Condition(text_BTC=hidden, text_mask_BT=condition.text_mask_BT), noise=noise, **settings
    )
    assert torch.equal(same.tokens, out.tokens)  # behind its mask nothing is read
    other = Condition(text_BTC=condition.text_BTC + 1.0, text_mask_BT=condition.text_mask_BT)
    assert not torch.equal(sample_masked(model, other, noise=noise, **settings).tokens, out.tokens)
    assert not torch.equal(sample_masked(model, condition, noise=noise, steps=3).tokens, out.tokens)
    assert model.train()(out.tokens, condition, torch.Generator().manual_seed(0)).shape[0] == 3
    assert model.example_condition(2).text_BTC.shape == (2, 3, 5)
    with pytest.raises(ValueError, match="exclude classes"):
        tiny(caption_width=5)
    with pytest.raises(ValueError, match="no place for caption_width"):
        export_generator(model)


# ---------------------------------------------------------------------------------------------------------- training
def test_it_is_trained_with_its_tokenizer_and_makes_images(tmp_path):
    data = TRAINING["write_images"](tmp_path / "data.npz")
    sizes = dict(base_channels=32, channel_multipliers=[1, 1], num_res_blocks=1, latent_channels=3)
    train_tokenizer(
        TRAINING["tokenizer_options"](
            data, tmp_path / "kl", kind="kl", preset="kl-4-64", codebook_size=None, model_options=json.dumps(sizes),
            steps=6, validate_every=6, save_every=0,
        )
    )  # fmt: skip
    more = dict(head_arguments=dict(width=16, depth=1, prediction="velocity", steps=4), buffer_size=2, head_draws=2)
    result = train_generator(
        TRAINING["generator_options"](
            data, tmp_path / "kl" / "model", tmp_path / "run", family="masked", steps=20, validate_every=10,
            save_every=0, num_layers=2, sample_guidance=1.5, model_options=json.dumps(more),
        )
    )  # fmt: skip
    assert result.finished
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5])
    pipe = visar.load(tmp_path / "run" / "model", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(num_images=2, seed=1, output_type="pt")
    assert out.images.shape == (2, 3, 8, 8) and out.statistics.forward_passes == {"generator": 16}


def test_bad_input():
    model, two = tiny(), classes(2)
    run = SimpleNamespace(noise=Noise([0, 1]))
    for call, says in (
        (lambda: sample_masked(model, two, noise=run.noise, steps=7), r"steps 7; needed: 1 \.\.\. 6"),
        (lambda: sample_masked(model, two, noise=run.noise, steps=0), "steps 0"),
        (lambda: sample_masked(model, two, noise=run.noise, head_steps=0), r"head_steps 0; needed: 2 \.\.\. 1000"),
        (lambda: sample_masked(model, two, noise=run.noise, head_steps=2, last_head_steps=3), "last_head_steps 3"),
        (lambda: sample_masked(model, two, noise=run.noise, temperature=-1.0), "temperature -1"),
        (
            lambda: sample_masked(
                tiny(head_arguments=dict(width=8, depth=1, steps=50, strided=True)),
                two,
                noise=run.noise,
                steps=6,
                last_head_steps=5,
            ),
            "no whole stride over 1000 levels",
        ),
        (lambda: export_generator(tiny(attributes=(2,))), "no place for attributes"),
        (
            lambda: sample_masked(model, Condition(labels_BA=torch.zeros(2, 3, dtype=torch.int64)), noise=run.noise),
            "this model is conditioned on labels",
        ),
        (lambda: tiny(width=15), "width 15"),
        (lambda: tiny(mask_floor=1.0), "mask_floor 1.0"),
        (lambda: tiny(head="x"), "head 'x'; choose one of diffusion, flow, mixture, energy"),
        (lambda: tiny(head_arguments={"colour": 1}), "head diffusion does not take these head_arguments"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_the_benchmark_says_what_it_takes(tmp_path):
    kl = KLTokenizer(image_size=4, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=2)
    ImagePipeline(kl, tiny(grid=(2, 2))).save_pretrained(tmp_path / "model")
    lines: list[str] = []
    options = Bench(
        model=str(tmp_path / "model"), batch=(2,), sampler="masked", dtype="float32", device="cpu", runs=1,
        paths=("eager",), guidance_scale=1.5,
    )  # fmt: skip
    (row,) = bench(options, {"steps": 3, "head_steps": 4, "last_head_steps": 2}, lines.append)
    assert (row["steps"], row["head_passes"]) == (3, 9) and row["images_per_s"] > 0
    text = "\n".join(lines)
    assert "hidden vectors of decoding in float32" in text and "in a batch equal those of it alone" in text
    assert "9 passes of the head" in text
    with pytest.raises(ValueError, match="sampler ancestral does not fit a MaskedGenerator"):
        bench(dataclasses.replace(options, sampler="ancestral"), {}, lines.append)


def test_the_table_of_samplers_of_continuous_tokens(tmp_path):
    kl = KLTokenizer(image_size=4, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=2)
    small: dict = dict(width=8, num_layers=1, num_heads=2, hidden_width=12, num_classes=3, grid=(2, 2), channels=2)
    small |= dict(head="mixture", head_arguments=dict(components=2))
    models = {"masked": tiny(grid=(2, 2)), "causal": CausalContinuous(**small), "draft": CausalContinuous(**small)}
    for name, model in models.items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        ImagePipeline(kl, model.eval()).save_pretrained(tmp_path / name)
    for name, sampler, passes in (
        ("masked", "masked:steps=2,head_steps=3", (2, 6)),
        ("causal", f"continuous_speculation:num_drafts=2,drafter={tmp_path / 'draft'}", None),
    ):
        shared: dict = dict(batch_sizes=(2,), calls=1, device="cpu")
        rows = acceptance(
            Acceptance(str(tmp_path / name), out=tmp_path / "out", samplers=(sampler,), **shared), lambda lines: None
        )
        plain, other = rows
        assert plain.sampler == ("masked" if name == "masked" else "continuous") and plain.speedup == 1.0
        assert plain.passes == plain.tokens_per_pass * 4 == 4 and plain.top1 is None
        assert other.exact == (name == "causal") and other.head_passes is not None
        if passes:
            assert (other.passes, other.head_passes) == passes
        else:
            assert 0 <= other.acceptance <= 1 and other.drafter_head_passes == 2 * other.passes
        assert "| head passes |" in (tmp_path / "out" / "acceptance.md").read_text()
        with pytest.raises(ValueError, match="continuous tokens have no list of usual samplers: give --samplers"):
            acceptance(Acceptance(str(tmp_path / name), out=tmp_path / "out", **shared), lambda lines: None)
