"""The VQ tokenizer of clips: its box, causality in time, images as clips of one frame, decoding, bad input."""

import pytest
import torch

from visar.pipelines.components import load_tokenizer
from visar.tokenizers.decoding import decode_tokens, image_sides
from visar.tokenizers.families import find_family
from visar.tokenizers.video_vq import FAMILY, VIDEO_VQ_PRESETS, CausalConv, VideoVQTokenizer

AREA = 16  # ids of a map of the tiny model


@pytest.fixture(scope="module")
def tokenizer() -> VideoVQTokenizer:
    torch.manual_seed(0)
    return VideoVQTokenizer(**FAMILY.tiny).eval()


def clips(count: int = 2, frames: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, frames, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", VIDEO_VQ_PRESETS)
def test_presets_are_boxes_of_sixteen_frames(name):
    family, preset = find_family(None, name)
    with torch.device("meta"):
        made = family.model(**family.arguments(family.presets[preset], {}, 64))
    side = 64 // made.downsampling
    assert made.layout.shapes == ((4, side, side),) and made.layout.arrangement == "box"
    assert image_sides(made) == (64, 64) and family.clips


def test_clips_become_ids_and_clips_again(tokenizer):
    made = tokenizer(clips(frames=3))
    ids = tokenizer.encode(clips(frames=3))
    assert ids.shape == (2, tokenizer.layout.num_tokens) == made.ids_BN.shape and torch.equal(ids, made.ids_BN)
    decoded = tokenizer.decode(ids)
    torch.testing.assert_close(decoded, made.clip_BTCHW, atol=1e-5, rtol=1e-5)
    assert decoded.shape == (2, 3, 3, 8, 8) and made.image_BCHW.shape == (6, 3, 8, 8)
    assert torch.equal(decode_tokens(tokenizer, ids), torch.cat([tokenizer.decode(one) for one in ids.split(1)]))
    assert decode_tokens(tokenizer, ids[:0]).shape == (0, 3, 3, 8, 8)


def test_codes_stand_at_their_places(tokenizer):
    ids = torch.arange(32)[None]
    box = tokenizer.latents(ids)
    assert box.shape == (1, 8, 2, 4, 4)
    assert torch.equal(box[0, :, 1, 2, 3], tokenizer.codebook[16 + 2 * 4 + 3])
    assert torch.equal(tokenizer.latents(ids, (2, 2, 8))[0, :, 0, 1, 5], tokenizer.codebook[8 + 5])


@pytest.mark.parametrize("changed", range(5))
def test_later_frames_change_no_earlier_codes_and_each_frame_reaches_its_own(tokenizer, changed):
    whole = clips()
    other = whole.clone()
    other[:, changed] = clips(seed=1)[:, changed]
    first = 0 if changed == 0 else 1 + (changed - 1) // 2  # the map that the frame is in: 0 | 1 2 | 3 4
    latent, moved = tokenizer.encode_latents(whole), tokenizer.encode_latents(other)
    assert torch.equal(latent[:, :, :first], moved[:, :, :first])
    assert all((latent[:, :, box] != moved[:, :, box]).any() for box in range(first, 3))
    short = tokenizer.encode_latents(whole[:, : 1 + 2 * first])
    torch.testing.assert_close(short, latent[:, :, : first + 1], atol=1e-5, rtol=1e-5)


def test_later_codes_change_no_earlier_frames(tokenizer):
    ids = torch.randint(128, (2, 3 * AREA), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 2 * AREA :] = (other[:, 2 * AREA :] + 1) % 128
    whole, changed = tokenizer.decode(ids), tokenizer.decode(other)
    assert torch.equal(whole[:, :3], changed[:, :3]) and (whole[:, 3:] != changed[:, 3:]).flatten(2).any(2).all()
    torch.testing.assert_close(tokenizer.decode(ids[:, : 2 * AREA]), whole[:, :3], atol=1e-5, rtol=1e-5)


def test_an_image_is_a_clip_of_one_frame(tokenizer):
    image = clips(frames=1)
    ids = tokenizer.encode(image)
    assert ids.shape == (2, AREA) and tokenizer.decode(ids).shape == image.shape
    assert torch.equal(tokenizer.encode(clips())[:, :AREA], tokenizer.encode(clips()[:, :1]))


def test_the_convolution_over_time_is_a_causal_convolution_in_three_dimensions():
    torch.manual_seed(0)
    ours = CausalConv(2, 3)
    weight = ours.conv.weight.unflatten(1, (3, 2)).transpose(1, 2)  # [out, in, time, rows, columns]
    x = torch.randn(2, 5, 2, 4, 4)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 2, 0))
    expected = torch.nn.functional.conv3d(padded, weight, ours.conv.bias, padding=(0, 1, 1)).transpose(1, 2)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_all_parts(tokenizer):
    model = VideoVQTokenizer(**FAMILY.tiny)
    made = model(clips(frames=3))
    (made.clip_BTCHW.square().mean() + made.commitment_loss + made.codebook_loss).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_saved_tokenizer_is_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, device="cpu", dtype="float32")
    assert type(again) is VideoVQTokenizer and torch.equal(again.encode(clips()), tokenizer.encode(clips()))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t.encode(clips(frames=4)), "4 frames; a clip has 1 . a multiple of 2: 1, 3, 5"),
        (lambda t: t.encode(clips()[:, 0]), "clip of shape .2, 3, 8, 8.; needed: .B, frames, 3, H, W."),
        (lambda t: t.encode(clips()[..., :7]), "frames of 8 x 7; both sides must be multiples of 2"),
        (lambda t: t.encode(clips() * 100), "clip|image with values"),
        (lambda t: t.encode(clips().long()), "clip of dtype torch.int64"),
        (lambda t: t.decode(torch.zeros(1, 17, dtype=torch.int64)), "17 ids are no whole maps of 4 x 4"),
        (lambda t: t.latents(torch.zeros(1, 16, dtype=torch.int64), (2, 4, 4)), "do not fill a box of 2 x 4 x 4"),
        (lambda t: t.decode(torch.full((1, 16), 128)), "outside the codebook; allowed: 0 ... 127"),
        (
            lambda t: decode_tokens(t, torch.zeros(1, 32, dtype=torch.int64), tile=2, overlap=1),
            "clips are decoded whole",
        ),
        (lambda t: VideoVQTokenizer(num_frames=15), "15 frames; a clip has 1 . a multiple of 5"),
        (lambda t: VideoVQTokenizer(frame_group=0), "frame_group 0"),
        (lambda t: VideoVQTokenizer(latent_channels=16), "latent_channels 16"),
    ],
)
def test_bad_input(tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)
