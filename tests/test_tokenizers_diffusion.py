"""Diffusion tokenizer: parity with D-AR, streaming, what its images depend on, training, and bad input."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from visar.checkpoints.dar import convert_tokenizer
from visar.core.interface import Drawing, Streaming, Tokenizer
from visar.core.noise import Noise
from visar.evaluate.extractors import EXTRACTORS
from visar.evaluate.images import ArrayImages
from visar.evaluate.reconstruction import evaluate_reconstruction
from visar.io.pictures import to_uint8
from visar.pipelines.components import load_tokenizer
from visar.tokenizers.decoding import BatchStream, decode_tokens, decoder_noise, image_sides
from visar.tokenizers.diffusion import FAMILY, DiffusionTokenizer
from visar.tokenizers.vq import FAMILY as VQ
from visar.train.tokenizer import train_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TRAINING = SimpleNamespace(**runpy.run_path(str(FIXTURES / "training.py")))
REFERENCE = SimpleNamespace(**runpy.run_path(str(FIXTURES / "dar_reference.py")))
CLOSE: dict[str, Any] = dict(atol=3e-5, rtol=0)


def tiny(**changes) -> DiffusionTokenizer:
    """A model that is not at its first weights: all of them matter."""
    torch.manual_seed(0)
    model = DiffusionTokenizer(**{**FAMILY.tiny, **changes}).eval()
    for name, parameter in model.named_parameters():
        if "conv_out" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count=3, height=8, width=8):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def ids_of(model, count=3):
    shape = (count, model.config["num_tokens"])
    return torch.randint(model.config["codebook_size"], shape, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------------------------ parity
OTHER: dict[str, Any] = dict(
    encoder_patch_size=4, num_encoder_layers=1, num_decoder_layers=2, query_low_rank=True, encoder_dim=128,
    decoder_dim=64, vq_dim=5, vq_codebook_size=24, num_denoising_steps=3, num_query_groups=3, num_all_queries=12,
    queries_per_step=4, vq_enable=True,
    diff_decoder=dict(in_dim=3, out_dim=3, dim=128, cond_dim=64, patch_size=2, depth=1, data_std=0.5, time_shift=1.5),
)  # fmt: skip


def released(folder) -> DiffusionTokenizer:
    """The model of a parity folder; every size in config.json that a file tells is found in the file."""
    facts, net = folder.config["constructor"]["model"], folder.config["constructor"]["model"]["diff_decoder"]
    height, width = folder.config["image_hw"]
    config, state = convert_tokenizer(
        {"ema": folder.checkpoint(), "model": {"x": torch.zeros(1)}},
        num_tokens=facts["num_all_queries"],
        num_groups=facts["num_query_groups"],
        num_steps=facts["num_denoising_steps"],
        time_shift=net["time_shift"],
        data_std=net["data_std"],
    )
    names = dict(
        patch_size="encoder_patch_size", num_encoder_layers="num_encoder_layers", codebook_size="vq_codebook_size",
        num_condition_layers="num_decoder_layers", encoder_width="encoder_dim", condition_width="decoder_dim",
        codebook_dim="vq_dim",
    )  # fmt: skip
    assert {ours: facts[theirs] for ours, theirs in names.items()} == {ours: config[ours] for ours in names}
    assert [config[name] for name in ("pixel_width", "num_pixel_layers", "pixel_patch_size")] == [
        net[name] for name in ("dim", "depth", "patch_size")
    ]
    config["image_size"] = (height, width)
    model = DiffusionTokenizer(**config).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture(params=["released", "other", "more steps"])
def case(request, parity, tmp_path):
    if request.param == "released":
        return parity("dar_tokenizer")
    facts = OTHER if request.param == "other" else {**OTHER, "num_denoising_steps": 7}
    REFERENCE.make_folder(tmp_path / "made", facts, image_hw=(12, 8), batch=3)
    return type(parity("dar_tokenizer"))(tmp_path / "made")


@torch.no_grad()
def test_parity(case):
    model, io, facts = released(case), case.io, case.config
    pre_BQZ = model.encode_latents(io["encode.image"])[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(pre_BQZ, io["encode.pre_quant"], **CLOSE)
    assert torch.equal(model.encode(io["encode.image"]), io["encode.codes"])
    codes, noise = io["decode.codes"], io["decode.noise"]
    torch.testing.assert_close(model.conditions(model.latents(codes)), io["decode.cond"], **CLOSE)
    assert list(model.group_starts) == io["decode.group_starts"].tolist()
    torch.testing.assert_close(torch.tensor(model.times[:-1]), io["decode.step_t"], **CLOSE)

    made: list[torch.Tensor] = []
    hook = model.decoder.register_forward_hook(lambda *call: made.append(call[2]))
    image = model.decode(codes, noise=noise)
    hook.remove()
    torch.testing.assert_close(torch.stack(made), io["decode.step_velocity"], **CLOSE)
    torch.testing.assert_close(image, io["decode.image_full"], **CLOSE)
    torch.testing.assert_close(
        model.decode(codes, noise=noise, solver="euler"), io["decode.image_full_euler"], **CLOSE
    )
    torch.testing.assert_close(model.decode(io["encode.codes"], noise=noise), io["roundtrip.image"], **CLOSE)
    for k in facts["previews"]:
        part = model.decode(codes[:, : k * model.group_size], noise=noise)
        torch.testing.assert_close(part, io[f"decode.image_preview{k}"], **CLOSE)
    shown = to_uint8(image).permute(0, 2, 3, 1).int() - io["decode.uint8"].int()
    assert shown.abs().max() <= 1


@torch.no_grad()
def test_what_parity_would_not_forgive(parity):
    """Slips that such a decoder is prone to move the images."""
    folder = parity("dar_tokenizer")
    model, io = released(folder), folder.io

    def error():
        return float(
            (model.decode(io["decode.codes"], noise=io["decode.noise"]) - io["decode.image_full"]).abs().max()
        )

    assert error() < 3e-5
    times, starts = model.times, model.group_starts
    model.times = tuple(i / (len(times) - 1) for i in range(len(times)))
    assert error() > 0.1
    model.times, model.group_starts = times, (0,) * len(starts)
    assert error() > 0.1
    model.group_starts = starts
    model.decoder.blocks[0].attention.q_norm.eps = 1e-2
    assert error() > 1e-3


# --------------------------------------------------------------------------------------------------------- streaming
@pytest.mark.parametrize("solver", ["adams_bashforth", "euler"])
@pytest.mark.parametrize("pieces", [(4, 4, 4, 4), (1,) * 16, (3, 6, 1, 6), (16,)])
@torch.no_grad()
def test_a_stream_shows_what_decoding_of_the_same_tokens_gives(pieces, solver):
    model = tiny()
    ids, noise = ids_of(model), model.starting_noise(Noise([5, 6, 7]))
    calls: list[int] = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    stream, done = model.stream(noise, solver), 0
    for piece in pieces:
        shown = stream.feed(ids[:, done : done + piece])
        complete = (done + piece) // model.group_size
        # One step of the decoder a group, and nothing more for the images on the way.
        assert stream.steps == len(calls) == complete and stream.num_tokens == done + piece
        if complete > done // model.group_size:
            assert shown is not None
            before = len(calls)
            offline = model.decode(ids[:, : complete * model.group_size], noise=noise, solver=solver)
            assert torch.equal(shown, offline)
            del calls[before:]
        else:
            assert shown is None
        done += piece
    with pytest.raises(ValueError, match="1 tokens after 16; an image has 16"):
        stream.feed(ids[:, :1])


@torch.no_grad()
def test_reading_group_by_group_is_reading_all_at_once():
    model = tiny()
    ids = ids_of(model)
    whole = model.conditions(model.latents(ids))
    stream = model.stream(model.starting_noise(Noise([0, 1, 2])))
    stream.feed(ids)
    torch.testing.assert_close(torch.cat(stream._conditions, 1), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("steps", "starts"), [(2, (0, 8)), (8, (0, 4, 4, 8, 8, 12, 12, 12)), (1, (0,))])
@torch.no_grad()
def test_other_numbers_of_steps_take_the_nearest_group(steps, starts):
    model = tiny(num_steps=steps)
    assert model.group_starts == starts and model.times[0] == 0.0 and model.times[-1] == 1.0
    ids, noise = ids_of(model), model.starting_noise(Noise([0, 1, 2]))
    stream = model.stream(noise)
    for k in range(4):
        shown = stream.feed(ids[:, 4 * k : 4 * k + 4])
        assert stream.steps == sum(start <= 4 * k for start in starts)
        assert torch.equal(shown, model.decode(ids[:, : 4 * k + 4], noise=noise))


class Bands(nn.Module):
    """A decoder that knows what an image is made of: the step of group k learns the pattern of group k from its
    tokens, and finds those of the groups before in the noisy image."""

    def __init__(self, patterns_KVX, read) -> None:
        super().__init__()
        self.patterns_KVX, self.read = patterns_KVX, read

    def forward(self, x_BCHW, time_1, condition_BKD):
        group, code_B = self.read(condition_BKD)
        time = float(time_1)
        image = self.patterns_KVX[group][code_B]
        for earlier in range(group):
            patterns_VX = self.patterns_KVX[earlier]
            seen_BV = x_BCHW.flatten(1) @ patterns_VX.T
            image = image + patterns_VX[seen_BV.argmax(-1)]
        return (image.view_as(x_BCHW) - x_BCHW) / (1.0 - time)


@torch.no_grad()
def test_every_group_brings_the_image_nearer():
    """By a decoder that is made by hand: group k chooses one of 8 patterns, and patterns grow finer and weaker."""
    groups, codes, generator = 4, 8, torch.Generator().manual_seed(0)
    model = tiny(num_tokens=groups, max_tokens=groups, num_condition_layers=0, data_std=1.0, codebook_size=codes)
    basis = torch.linalg.qr(torch.randn(192, groups * codes, generator=generator))[0].T.view(groups, codes, 192)
    patterns_KVX = basis * torch.tensor([40.0, 30.0, 20.0, 10.0])[:, None, None]
    every = torch.arange(codes)[:, None].expand(-1, groups)
    table_VKD = model.conditions(model.latents(every))

    def read(condition_BKD):
        distance_BVK = (condition_BKD[:, 0][:, None, None] - table_VKD).norm(dim=-1)
        best_B = distance_BVK.flatten(1).argmin(-1)
        return int(best_B[0]) % groups, best_B // groups

    model.decoder = Bands(patterns_KVX, read)
    ids, noise = ids_of(model, 6), model.starting_noise(Noise(range(6)))
    image = sum(patterns_KVX[k][ids[:, k]] for k in range(groups)).view(6, 3, 8, 8)
    stream, errors = model.stream(noise, "euler"), []
    for k in range(groups):
        errors.append((stream.feed(ids[:, k : k + 1]) - image).square().mean(dim=(1, 2, 3)))
    falls = [bool((after < 0.7 * before).all()) for before, after in zip(errors, errors[1:], strict=False)]
    assert falls == [True] * 3 and errors[-1].max() < 1e-3, [each.tolist() for each in errors]
    other = model.stream(noise, "euler")  # tokens of another image do not
    wrong = [(other.feed(ids[[1, 2, 3, 4, 5, 0], k : k + 1]) - image).square().mean() for k in range(groups)]
    assert wrong[-1] > errors[0].mean()


# ------------------------------------------------------------------------------------ what images are functions of
@torch.no_grad()
def test_an_image_is_a_function_of_its_tokens_and_its_seed():
    model = tiny()
    assert all(isinstance(model, kind) for kind in (Tokenizer, Drawing, Streaming))
    assert not isinstance(VQ.model(**VQ.tiny), Drawing)
    ids, seeds = ids_of(model), [3, 2**40, 11]
    together = decode_tokens(model, ids, noise=decoder_noise(model, seeds, "cpu"))
    for row, seed in enumerate(seeds):
        alone = decode_tokens(model, ids[row : row + 1], noise=decoder_noise(model, [seed], "cpu"))
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together, decode_tokens(model, ids, noise=decoder_noise(model, [4, 5, 6], "cpu")))
    noise = decoder_noise(model, seeds, "cpu")
    stream = BatchStream(model, noise)
    shown = [stream.feed(part) for part in ids.split(4, 1)]
    assert torch.equal(shown[-1], together) and (stream.steps, stream.num_tokens) == (4, 16)
    vq = VQ.model(**VQ.tiny).eval()
    assert decoder_noise(vq, None, "cpu") is None
    for broken, message in (
        (lambda: decode_tokens(model, ids), "a DiffusionTokenizer needs noise: its decoder draws"),
        (lambda: decode_tokens(model, ids, noise=noise[:2]), "noise of 2 images for tokens of 3"),
        (lambda: decode_tokens(model, ids, noise=noise, tile=2), "tile 2; a decoder that draws makes whole images"),
        (lambda: decode_tokens(vq, ids, noise=noise), "a VQTokenizer takes no noise"),
        (lambda: decoder_noise(model, None, "cpu"), "give the seeds of the images"),
    ):
        with pytest.raises(ValueError, match=message):
            broken()


@torch.no_grad()
def test_layout_sizes_and_other_images():
    model = tiny()
    layout = model.layout
    assert (layout.arrangement, layout.num_tokens, layout.previews) == ("sequence", 16, (4, 8, 12, 16))
    assert (layout.vocab_size, layout.channels) == (128, 8) and image_sides(model) == (8, 8)
    wide = pictures(2, 6, 10)
    assert model.encode(wide).shape == (2, 16)
    noise = model.starting_noise(Noise([1, 2]), (6, 10))
    assert model.decode(model.encode(wide), noise=noise).shape == (2, 3, 6, 10)
    assert image_sides(tiny(image_size=(4, 12))) == (4, 12)
    assert torch.equal(model.starting_noise(Noise([9]))[0], model.starting_noise(Noise([8, 9]))[1])
    half = nn.Module.to(tiny(), torch.bfloat16)
    made = half.decode(ids_of(half, 1), noise=half.starting_noise(Noise([1])))
    assert made.dtype == torch.float32 and made.isfinite().all()


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = tiny(num_steps=8, solver="euler")
    model.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, device="cpu")
    ids, noise = ids_of(model), model.starting_noise(Noise([1, 2, 3]))
    assert (again.config["num_steps"], again.config["solver"], again.layout) == (8, "euler", model.layout)
    assert torch.equal(again.decode(ids, noise=noise), model.decode(ids, noise=noise))
    assert torch.equal(again.encode(pictures()), model.encode(pictures()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=9), "image size 9 x 9; both sides must be multiples of patch_size 2"),
        (dict(pixel_patch_size=3), "multiples of pixel_patch_size 3"),
        (dict(head_width=12), r"widths \(32, 32, 32\) must be multiples of head_width 12"),
        (dict(num_groups=3), "num_tokens 16 must be a multiple of num_groups 3"),
        (dict(max_tokens=8), "at most max_tokens 8"),
        (dict(num_steps=0), "num_steps 0; it must be >= 1"),
        (dict(time_shift=0.0), "time_shift 0.0, data_std 0.6; needed: both > 0"),
        (dict(data_std=-1.0), "data_std -1.0"),
        (dict(solver="heun"), "solver 'heun'; choose adams_bashforth or euler"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_refused_input():
    model = tiny()
    ids, noise = ids_of(model), model.starting_noise(Noise([1, 2, 3]))
    cases = [
        (lambda: model.decode(ids), "decoder draws: give noise"),
        (
            lambda: model.decode(ids[:, :5], noise=noise),
            "5 tokens are not a whole number of groups; allowed: 4, 8, 12",
        ),
        (lambda: model.decode(ids + 128, noise=noise), "is outside the codebook; allowed: 0 ... 127"),
        (lambda: model.decode(ids, noise=noise[:2]), "tokens of 3 images; the noise is of 2"),
        (lambda: model.decode(ids, noise=noise[:, :2]), r"needed: \[B, 3, H, W\]"),
        (lambda: model.decode(ids, noise=noise[..., :5]), "multiples of pixel_patch_size|multiples of patch_size"),
        (lambda: model.decode(ids, noise=noise, solver="heun"), "solver 'heun'"),
        (lambda: model.stream(noise).feed(ids[:2]), "tokens of 2 images; the noise is of 3"),
        (lambda: model.encode(pictures() * 3), "needed: in \\[-1, 1\\]"),
        (lambda: model.decode_latents(torch.zeros(3, 8, 16)), "needed: \\[B, Z, 1, tokens\\]"),
    ]
    for broken, message in cases:
        with pytest.raises(ValueError, match=message):
            broken()


# ---------------------------------------------------------------------------------------------------------- training
MODEL = {name: value for name, value in FAMILY.tiny.items() if name not in ("image_size", "codebook_size")}


def training(data: Path, out: Path, **changes):
    settings: dict[str, Any] = dict(kind="diffusion", codebook_size=16, model_options=json.dumps(MODEL))
    return TRAINING.tokenizer_options(data, out, **{**settings, **changes})


def test_a_run_learns_and_resumes_to_the_same_numbers(tmp_path):
    data = TRAINING.write_images(tmp_path / "bars.npz")
    own: dict[str, Any] = dict(steps=24, learning_rate=5e-3, validate_every=12, save_every=0)
    train_tokenizer(training(data, tmp_path / "whole", **own))
    lines = TRAINING.curves(tmp_path / "whole")
    flow = [line["train/flow"] for line in lines if "train/flow" in line]
    assert np.mean(flow[-8:]) < 0.75 * np.mean(flow[:4])
    assert {"train/commitment", "train/code_perplexity"} <= lines[0].keys()
    assert any("validation/psnr" in line and "validation/codes_used" in line for line in lines)
    train_tokenizer(training(data, tmp_path / "parts", **own, max_minutes=1e-9))
    train_tokenizer(training(data, tmp_path / "parts", **own))
    parts = [load_tokenizer(tmp_path / name / "model", device="cpu").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(value, parts[1][key]) for key, value in parts[0].items())

    train_tokenizer(
        training(data, tmp_path / "fine", steps=3, initial=tmp_path / "whole" / "model", decoder_only=True)
    )
    images = torch.from_numpy(np.load(data)["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    first, tuned = (load_tokenizer(tmp_path / name / "model", device="cpu") for name in ("whole", "fine"))
    assert torch.equal(first.encode(images), tuned.encode(images))
    noise = decoder_noise(first, range(24), "cpu")
    with torch.no_grad():
        assert not torch.equal(*(each.decode(each.encode(images), noise=noise) for each in (first, tuned)))


def test_training_reaches_all_weights_and_may_keep_no_activations():
    found = []
    for checkpointing in (False, True):
        model = tiny().train()
        for parameter in model.decoder.conv_out.parameters():
            nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(4)
        output = model(pictures(6))
        assert output.flow_loss is not None and output.image_BCHW.shape == (6, 3, 8, 8)
        (output.flow_loss + output.commitment_loss + output.codebook_loss).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])
    model.eval()
    with torch.no_grad():
        output = model(pictures(2))
    assert output.flow_loss is None
    noise = model.starting_noise(Noise([0, 0]))
    torch.testing.assert_close(output.image_BCHW, model.decode(output.ids_BN, noise=noise), atol=1e-4, rtol=1e-4)


def test_the_image_of_a_step_is_where_its_velocity_points(monkeypatch):
    """With a decoder that says the true velocity the loss is 0 and the image is the image."""
    model = tiny().train()
    image = pictures(5)
    seen: list[torch.Tensor] = []

    def decoder(x_BCHW, time_B, condition_BKD):
        time = time_B.view(-1, 1, 1, 1)
        clean = model.config["data_std"] * image
        seen.append(condition_BKD)
        return clean - (x_BCHW - time * clean) / (1 - time)

    monkeypatch.setattr(model.decoder, "forward", decoder)
    output = model(image)
    torch.testing.assert_close(output.image_BCHW, image, atol=1e-4, rtol=1e-4)
    assert float(output.flow_loss) < 1e-8 and seen[0].shape == (5, 4, 32)


class Means:
    """An extractor whose features are the means of the channels."""

    kind, layers = EXTRACTORS["efficientnet-lite0"], ("means",)

    def __call__(self, images):
        return {"means": images.float().mean((2, 3))}


def test_reconstruction_has_a_seed_an_image():
    images = np.random.default_rng(0).integers(0, 255, (6, 12, 12, 3), np.uint8)
    model, extractor = tiny(image_size=12), Means()
    figures = [
        evaluate_reconstruction(model, ArrayImages(images, "noise"), extractor, batch_size=size).psnr  # type: ignore[arg-type]
        for size in (6, 2)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)
    other = evaluate_reconstruction(model, ArrayImages(images[1:], "noise"), extractor)  # type: ignore[arg-type]
    assert other.psnr != pytest.approx(figures[0], abs=1e-4)
