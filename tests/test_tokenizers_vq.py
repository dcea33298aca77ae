"""VQ tokenizer: parity with LlamaGen, sizes and errors, quantiser under training, usage and revival of codes."""

import multiprocessing
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from visar.checkpoints.llamagen import convert_vq
from visar.data.crops import center_crop, image_tensor, ten_crop
from visar.io.pictures import to_uint8
from visar.tokenizers.quantizer import CodebookTrainer, CodebookUsage, VectorQuantizer, nearest_codes
from visar.tokenizers.vq import VQ_PRESETS, VQTokenizer

TOLERANCE: dict[str, Any] = dict(atol=3e-5, rtol=0)


def tiny(**changes) -> VQTokenizer:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        image_size=16,
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=16,
        codebook_size=24,
        codebook_dim=4,
    )
    return VQTokenizer(**settings | changes)


def pictures(count=2, height=16, width=16):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def released(parity):
    """Parity folder and our tokenizer with its weights."""
    folder = parity("llamagen_vq")
    config, state = convert_vq(folder.checkpoint(), normalize_codes=bool(_arguments(folder)["codebook_l2_norm"]))
    model = VQTokenizer(**config).eval()
    model.load_state_dict(state)
    return folder, model


def _arguments(folder):
    return folder.config["constructor"]["ModelArgs"]


# ------------------------------------------------------------------------------------------------------------ parity
@torch.no_grad()
def test_encode_parity(released):
    folder, model = released
    io = folder.io
    image = io["encode.image"]
    torch.testing.assert_close(model.encode_latents(image), io["encode.pre_quant"], **TOLERANCE)
    ids = model.encode(image)
    assert ids.dtype == torch.int64 and ids.shape[0] == len(image)
    assert torch.equal(ids.flatten(), io["encode.indices"])
    quantized = model.quantize(model.encode_latents(image))
    torch.testing.assert_close(quantized.quantized_BChw, io["encode.quant"], **TOLERANCE)
    output = model(image)
    torch.testing.assert_close(output.image_BCHW, io["roundtrip.image"], **TOLERANCE)
    assert torch.equal(output.ids_BN, ids)


@torch.no_grad()
def test_decode_parity(released):
    folder, model = released
    io = folder.io
    grid = tuple(folder.config["grid"])
    for layout, case in (("flat", "flat"), ("channels_last", "channel_last"), ("channels_first", "channel_first")):
        torch.testing.assert_close(model.lookup(io["lookup.indices"], layout, grid), io[f"lookup.{case}"], **TOLERANCE)
    image = model.decode(io["decode.indices"], grid)
    torch.testing.assert_close(image, io["decode.image"], **TOLERANCE)
    resized = functional.interpolate(image, size=io["decode.resized"].shape[2:], mode="bicubic")
    torch.testing.assert_close(resized, io["decode.resized"], **TOLERANCE)
    for float_image, case in ((image, "decode.uint8"), (resized, "decode.resized_uint8")):
        levels = to_uint8(float_image).permute(0, 2, 3, 1).int() - io[case].int()
        assert levels.abs().max() <= 1
        assert (levels != 0).float().mean() < 0.01


def test_crops_parity(parity):
    folder = parity("llamagen_vq")
    io, facts = folder.io, folder.config["dataprep"]
    picture = Image.fromarray(io["dataprep.image_uint8"].numpy())
    cropped = torch.from_numpy(np.array(center_crop(picture, facts["size"]))).int()
    assert (cropped - io["dataprep.center_crop_uint8"].int()).abs().max() <= 1
    for crop_range in facts["crop_ranges"]:
        expected = io[f"dataprep.ten_crop_{round(crop_range * 100)}"]
        # One level of 255 is 2 / 255 here.
        torch.testing.assert_close(ten_crop(picture, facts["size"], crop_range), expected, atol=2.01 / 255, rtol=0)


def test_ten_crop_is_five_views_and_their_mirror_images():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    views, whole = ten_crop(picture, 10, 2.0), image_tensor(picture)
    assert torch.equal(views[1], whole[:, :10, 10:])
    assert torch.equal(views[4], whole[:, 5:15, 5:15])
    # Mirrored whole first, then cut: its top left is the top right, seen in a mirror.
    assert torch.equal(views[5], views[1].flip(2))
    assert views.amin() >= -1.0 and views.amax() <= 1.0
    with pytest.raises(ValueError, match="crop_range 0.9"):
        ten_crop(picture, 10, 0.9)
    with pytest.raises(ValueError, match="crop size 0"):
        center_crop(picture, 0)


# ------------------------------------------------------------------------------------------------ sizes and settings
PARAMETERS = {"vq-16": 71_883_403, "vq-8": 70_109_835}


@pytest.mark.parametrize("name", VQ_PRESETS)
def test_presets(name):
    with torch.device("meta"):
        model = VQTokenizer(**VQ_PRESETS[name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if name in PARAMETERS:
        assert parameters == PARAMETERS[name]
        assert model.layout.num_tokens == (256 // model.factor) ** 2
    else:
        assert parameters * 2 < 12 * 2**20
        assert model.layout.shapes == ((16, 16),)
    assert tuple(model.codebook.shape) == (model.layout.vocab_size, model.layout.channels)


@torch.no_grad()
def test_other_sizes_than_the_configured_one():
    model = tiny().eval()
    assert model.layout.shapes == ((8, 8),) and model.layout.arrangement == "grid"
    ids = model.encode(pictures(2, 8, 24))
    assert ids.shape == (2, 4 * 12)
    assert model.decode(ids, (4, 12)).shape == (2, 3, 8, 24)
    assert model.decode(ids[:, :16]).shape == (2, 3, 8, 8)
    wide = tiny(image_size=(8, 16)).eval()
    assert wide.layout.shapes == ((4, 8),)
    assert wide.decode(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 3, 4, 8)
    with pytest.raises(ValueError, match=r"16 ids make no grid shaped as \(4, 8\)"):
        wide.decode(torch.zeros(1, 16, dtype=torch.int64))
    assert wide.decode(ids[:, :32]).shape == (2, 3, 8, 16)
    # Raster order: the first row of ids is the top of the image.
    top = model.lookup(ids, "channels_first", (4, 12))[:, :, 0]
    assert torch.equal(top, model.lookup(ids)[:, :12].transpose(1, 2))


@torch.no_grad()
def test_batch_does_not_matter():
    model, image = tiny().eval(), pictures(3)
    ids = model.encode(image)
    assert torch.equal(torch.cat([model.encode(one[None]) for one in image]), ids)
    together, alone = model.decode(ids), torch.cat([model.decode(one[None]) for one in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_codes_are_their_own_nearest_codes():
    for normalize in (True, False):
        model = tiny(normalize_codes=normalize).eval()
        model.quantize.embedding.weight.normal_()
        ids = torch.arange(24).expand(2, -1)
        assert torch.equal(model.quantize.nearest(model.lookup(ids, "channels_first", (4, 6))), ids)
        length = model.codebook.norm(dim=-1)
        assert torch.allclose(length, torch.ones(24)) == normalize


@torch.no_grad()
def test_encode_decode_encode_is_stable_on_a_fitted_tokenizer():
    model, image = tiny(), pictures()
    _fit(model, image, steps=60)
    model.eval()
    ids = model.encode(image)
    again = model.encode(model.decode(ids).clamp(-1, 1))
    assert (again == ids).float().mean() > 0.9
    assert torch.equal(model.decode(ids), model.decode(model.encode(image)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(pictures()[:, :1]), r"\(2, 1, 16, 16\); needed: \[B, 3, H, W\]"),
        (lambda model: model.encode(pictures(1, 16, 15)), "image size 16 x 15; both sides must be multiples of 2"),
        (lambda model: model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "dtype torch.uint8"),
        (lambda model: model.encode(torch.full((1, 3, 16, 16), 255.0)), r"needed: in \[-1, 1\]"),
        (lambda model: model.encode([0.0]), "image of type list"),
        (lambda model: model.decode([0]), "ids of type list"),
        (lambda model: model.decode(torch.zeros(1, 64, dtype=torch.bool)), "torch.bool; needed: integers"),
        (
            lambda model: model.decode(torch.tensor([[0, 1, 2, 24]])),
            "id 24 is outside the codebook; allowed: 0 ... 23",
        ),
        (lambda model: model.decode(torch.tensor([[0, -1, 2, 3]])), "id -1 is outside"),
        (lambda model: model.decode(torch.zeros(1, 7, dtype=torch.int64)), "7 ids make no square; say grid="),
        (lambda model: model.decode(torch.zeros(1, 0, dtype=torch.int64)), "0 ids"),
        (
            lambda model: model.decode(torch.zeros(1, 7, dtype=torch.int64), (2, 4)),
            "7 ids do not fill a grid of 2 x 4",
        ),
        (lambda model: model.decode(torch.zeros(1, 4)), "needed: integers"),
        (lambda model: model.lookup(torch.zeros(1, 4, dtype=torch.int64), "columns"), "layout 'columns'"),
        (lambda _: tiny(image_size=15), "image size 15 x 15"),
        (lambda _: tiny(base_channels=48), "width 48 .* multiples of 32"),
        (lambda _: tiny(channel_multipliers=()), "channel_multipliers is empty"),
        (lambda _: tiny(decoder_channel_multipliers=(1,)), "as many levels"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


@torch.no_grad()
def test_saved_folder_gives_the_same_model(tmp_path):
    model = tiny(image_size=(8, 16), decoder_channel_multipliers=(2, 2)).eval()
    model.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.iterdir() if file.suffix not in (".json", ".py")] == [".safetensors"]
    again = VQTokenizer.from_pretrained(tmp_path)
    image = pictures(2, 8, 16)
    assert torch.equal(again.encode(image), model.encode(image)) and again.layout == model.layout
    half = VQTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ids = half.encode(image)
    assert ids.dtype == torch.int64 and half.codebook.dtype == torch.float32
    assert half.decode(ids).dtype == torch.bfloat16
    assert (half.decode(ids).float() - again.decode(ids)).abs().max() < 0.05


# --------------------------------------------------------------------------------------------------------- quantiser
def test_nearest_codes_are_those_of_the_full_distance():
    latent, codebook = torch.randn(50, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    assert torch.equal(nearest_codes(latent, codebook), torch.cdist(latent, codebook).argmin(1))
    whole = torch.arange(4.0)[None]  # without rounding, which differs between columns of a product
    assert nearest_codes(whole, whole.expand(5, 4)).item() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(latent, codebook), torch.cdist(latent, codebook).argmin(1))


def test_quantiser_losses_and_straight_through_gradient():
    quantizer = VectorQuantizer(6, 3)
    latent = torch.randn(2, 3, 2, 2, requires_grad=True)
    out = quantizer(latent)
    unit = functional.normalize(latent, dim=1)
    codes = quantizer.codebook[out.ids_BN].transpose(1, 2).unflatten(2, (2, 2))
    torch.testing.assert_close(out.quantized_BChw, codes)
    torch.testing.assert_close(out.commitment_loss, (unit - codes).square().mean())
    weight = torch.randn_like(latent)
    (gradient,) = torch.autograd.grad((out.quantized_BChw * weight).sum(), latent, retain_graph=True)
    (expected,) = torch.autograd.grad((unit * weight).sum(), latent)
    torch.testing.assert_close(gradient, expected)
    # Each loss trains its own side only.
    parts = (latent, quantizer.embedding.weight)
    commitment = torch.autograd.grad(out.commitment_loss, parts, allow_unused=True, retain_graph=True)
    codebook = torch.autograd.grad(out.codebook_loss, parts, allow_unused=True)
    assert commitment[0].abs().max() > 0 and commitment[1] is None
    assert codebook[0] is None and codebook[1].abs().max() > 0


def _loss(output, image):
    return functional.mse_loss(output.image_BCHW.float(), image) + 0.25 * output.commitment_loss + output.codebook_loss


@torch.enable_grad()
def _fit(model, image, steps, update: Literal["gradient", "ema"] = "gradient", call=None):
    codebook = CodebookTrainer(model.quantize, update=update, decay=0.8, revive_below=0.01)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(steps):
        output = (call or model)(image)
        loss = _loss(output, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        codebook.step(output.latent_BChw, output.ids_BN)
        if step % 10 == 9:
            codebook.revive(output.latent_BChw, torch.Generator().manual_seed(step))
        losses.append(float(functional.mse_loss(output.image_BCHW.detach().float(), image)))
    return losses


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_training_on_two_images_reduces_the_loss(update):
    model = tiny()
    losses = _fit(model, pictures(), 12, update)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    frozen = {"quantize.embedding.weight"} if update == "ema" else set()
    # A key's bias shifts every score of a query alike, so its gradient vanishes but for rounding.
    assert {name for name, _ in model.named_parameters()} - used - frozen <= {
        name for name, _ in model.named_parameters() if name.endswith(".k.bias") or name.endswith("mid.1.k.bias")
    }


def test_training_under_autocast_keeps_the_quantiser_in_float32():
    model, image = tiny(), pictures()

    def call(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    output = call(image)
    assert output.image_BCHW.dtype == torch.bfloat16
    assert output.commitment_loss.dtype == output.codebook_loss.dtype == torch.float32
    unit = functional.normalize(output.latent_BChw.float().flatten(2).transpose(1, 2), dim=-1)
    distance = torch.cdist(unit.double(), model.codebook.double())
    assert torch.equal(output.ids_BN, distance.argmin(-1))
    losses = _fit(model, image, 6, call=call)
    assert losses[-1] < losses[0]


def test_compiled_graph_is_whole_and_equal():
    model, image = tiny(), pictures()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
    eager = model(image)
    assert torch.equal(compiled.ids_BN, eager.ids_BN)
    torch.testing.assert_close(compiled.image_BCHW, eager.image_BCHW, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(_loss(compiled, image), model.encoder.conv_in.weight)
    (expected,) = torch.autograd.grad(_loss(eager, image), model.encoder.conv_in.weight)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradient():
    model, image = tiny(), pictures()
    (expected,) = torch.autograd.grad(_loss(model(image), image), model.encoder.conv_in.weight)
    model.enable_gradient_checkpointing()
    assert model.encoder.gradient_checkpointing
    (gradient,) = torch.autograd.grad(_loss(model(image), image), model.encoder.conv_in.weight)
    torch.testing.assert_close(gradient, expected)


# ------------------------------------------------------------------------------------------------ codebook training
def _latents(count, seed=0):
    """Latents [1, 3, 1, count]."""
    return torch.randn(1, 3, 1, count, generator=torch.Generator().manual_seed(seed))


def test_moving_average_codes_go_to_the_mean_of_their_latents():
    quantizer = VectorQuantizer(4, 3, normalize=False)
    quantizer.embedding.weight.data.copy_(torch.eye(4, 3))
    trainer = CodebookTrainer(quantizer, update="ema", decay=0.5, revive_below=0)
    assert not quantizer.embedding.weight.requires_grad
    latent, ids = _latents(6), torch.tensor([[0, 0, 1, 1, 1, 0]])
    for _ in range(40):
        trainer.step(latent, ids)
    means = [latent[0, :, 0, ids[0] == code].mean(1) for code in (0, 1)]
    torch.testing.assert_close(quantizer.codebook[:2], torch.stack(means), atol=1e-5, rtol=0)
    assert torch.equal(quantizer.codebook[2:], torch.eye(4, 3)[2:])
    assert trainer.revive(latent, torch.Generator()) == 0


def test_unused_codes_are_replaced_by_latents_of_the_batch():
    quantizer = VectorQuantizer(5, 3)
    trainer = CodebookTrainer(quantizer, decay=0.5, revive_below=0.1)
    latent, ids = _latents(4), torch.tensor([[0, 0, 3, 3]])
    assert trainer.revive(latent, torch.Generator()) == 0
    for _ in range(6):
        trainer.step(latent, ids)
    before = quantizer.codebook.detach().clone()
    assert trainer.revive(latent, torch.Generator().manual_seed(0)) == 3
    after, unit = quantizer.codebook.detach(), functional.normalize(latent[0, :, 0].t(), dim=-1)
    assert torch.equal(after[[0, 3]], before[[0, 3]])
    chosen = torch.cdist(after[[1, 2, 4]], unit).argmin(1)
    torch.testing.assert_close(after[[1, 2, 4]], unit[chosen])
    assert len(set(chosen.tolist())) == 3
    # Revived codes get their time: they are not unused at once.
    assert trainer.revive(latent, torch.Generator()) == 0
    # Fewer latents than codes: drawn again.
    for _ in range(8):
        trainer.step(_latents(2), torch.tensor([[0, 0]]))
    assert trainer.revive(_latents(2), torch.Generator()) == 4


def _train_one_rank(rank, rendezvous, results):
    """One of two processes, each with its own half of the latents."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = VectorQuantizer(12, 3)
    trainer = CodebookTrainer(quantizer, update="ema", decay=0.5, revive_below=0.3)
    revived = 0
    for step in range(5):
        latent = _latents(16, seed=step)[..., rank * 8 : (rank + 1) * 8]
        trainer.step(latent, quantizer.nearest(latent))
        revived += trainer.revive(latent, torch.Generator().manual_seed(step))
    torch.save((quantizer.codebook.detach(), trainer.count_V, revived), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_processes_hold_the_same_codes(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_train_one_rank, args=(rank, tmp_path / "rendezvous", tmp_path), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    (codes, count, revived), (other_codes, other_count, other_revived) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert torch.equal(codes, other_codes) and torch.equal(count, other_count)
    assert revived == other_revived > 0
    # Uses of both halves are counted: 16 latents a step.
    assert 12 < count.sum() < 20


def test_resumed_codebook_training_is_exact():
    def run(quantizer, trainer, steps):
        for step in steps:
            latent = _latents(30, seed=step)
            trainer.step(latent, quantizer.nearest(latent))
            trainer.revive(latent, torch.Generator().manual_seed(step))

    def fresh():
        torch.manual_seed(0)
        quantizer = VectorQuantizer(40, 3)
        return quantizer, CodebookTrainer(quantizer, update="ema", decay=0.7, revive_below=0.3)

    straight, trainer = fresh()
    run(straight, trainer, range(8))
    first, half = fresh()
    run(first, half, range(4))
    saved = {key: value.clone() for key, value in half.state_dict().items()}
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved)
    run(second, resumed, range(4, 8))
    assert torch.equal(second.embedding.weight, straight.embedding.weight)
    assert torch.equal(resumed.count_V, trainer.count_V)
    with pytest.raises(ValueError, match="state of a codebook trainer"):
        resumed.load_state_dict({"count": saved["count"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(update="adam"), "'adam'; choose"), (dict(decay=1.0), "decay 1.0"), (dict(revive_below=-1), "below -1")],
)
def test_codebook_trainer_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        CodebookTrainer(VectorQuantizer(4, 3), **settings)


def test_usage():
    usage = CodebookUsage(8)
    assert (usage.fraction, usage.perplexity) == (0.0, 0.0)
    usage.update(torch.arange(4).expand(3, 4))
    assert usage.fraction == 0.5
    assert usage.perplexity == pytest.approx(4.0)
    usage.update(torch.zeros(1000, dtype=torch.int64))
    assert usage.fraction == 0.5
    assert usage.perplexity < 1.2
