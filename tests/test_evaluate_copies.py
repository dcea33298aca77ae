"""Copy rates, neighbours, and the figures of reconstructions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visar.core.interface import TokenLayout
from visar.evaluate.copies import copies, moved, nearest, neighbour_picture, thumbnails
from visar.evaluate.extractors import load_extractor
from visar.evaluate.images import ArrayImages
from visar.evaluate.reconstruction import codebook_usage, evaluate_reconstruction, psnr, ssim
from visar.evaluate.references import measure

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


@pytest.fixture(scope="module")
def real_NHWC() -> Tensor:
    with np.load(SAMPLE) as file:
        return torch.from_numpy(file["images"])


def test_nearest_is_exact_for_copies(real_NHWC: Tensor) -> None:
    train = thumbnails(real_NHWC.movedim(-1, 1))
    distance, index = nearest(train[10:20], train, block=3)
    assert torch.equal(index, torch.arange(10, 20)) and distance.abs().max() == 0.0
    brute = ((train[:5, None] - train[None, 5:]) ** 2).mean(dim=-1).sqrt().min(dim=1)
    distance, index = nearest(train[:5], train[5:])
    torch.testing.assert_close(distance, brute.values)
    assert torch.equal(index, brute.indices)


def test_thumbnails_are_block_means(real_NHWC: Tensor) -> None:
    image = real_NHWC[:1].movedim(-1, 1)
    expected = image.double().view(1, 3, 16, 4, 16, 4).mean(dim=(3, 5)) / 255.0
    torch.testing.assert_close(thumbnails(image), expected.flatten(1).float())
    with pytest.raises(ValueError, match="16x16"):
        thumbnails(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_copy_rate_counts_copies_and_moved_copies(real_NHWC: Tensor) -> None:
    train, held_out = real_NHWC[:40], real_NHWC[40:]
    padded = F.pad(train[:4].movedim(-1, 1).float(), (4, 4, 4, 4), mode="replicate")
    shifted = padded[..., 2:66, 8:72]  # two pixels down, four to the left
    mirrored = train[4:8].movedim(-1, 1).flip(-1)
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    nearly = (train[8:12].movedim(-1, 1).float() + 2 * noise).clamp(0, 255)
    samples = torch.cat([shifted, mirrored.float(), nearly, held_out[:8].movedim(-1, 1).float()]).to(torch.uint8)
    found = copies(thumbnails(samples), train, held_out)
    assert found.held_out_rate is not None and found.held_out_rate_moved is not None
    strangers = round(found.held_out_rate * 24)
    assert strangers <= 3  # held-out pictures may be alike, seldom
    assert (found.distance_N[8:12] < found.threshold).all() and found.nearest_N[8:12].tolist() == [8, 9, 10, 11]
    assert 4 / 20 <= found.copy_rate <= 0.5
    assert found.copy_rate_moved >= 12 / 20
    assert found.copy_rate_moved >= found.copy_rate


def test_moved_holds_the_picture_its_mirror_and_every_shift() -> None:
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 30, 20] = 1.0
    variants = moved(picture)
    assert len(variants) == 50
    places = {tuple(int(axis) for axis in variant[0, 0].nonzero()[0]) for variant in variants}
    steps = (-4, -2, 0, 2, 4)
    assert places == {(30 + down, column + right) for column in (20, 43) for down in steps for right in steps}
    assert any(torch.equal(variant, picture) for variant in variants)


def test_neighbour_picture_shows_sample_then_nearest(tmp_path: Path, real_NHWC: Tensor) -> None:
    path = neighbour_picture(real_NHWC[3:5], real_NHWC, tmp_path / "n.png", neighbours=3)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 + 2 * 66, 2 + 4 * 66, 3)
    for row, index in enumerate((3, 4)):
        top = 2 + row * 66
        for left in (2, 68):  # the sample, and its nearest: itself
            assert np.array_equal(sheet[top : top + 64, left : left + 64], real_NHWC[index].numpy())
    with pytest.raises(ValueError, match="ends in .png"):
        neighbour_picture(real_NHWC[:1], real_NHWC, tmp_path / "n.gif")
    with pytest.raises(ValueError, match="differ in size"):
        neighbour_picture(real_NHWC[:1, :32], real_NHWC, tmp_path / "n.png")


# ------------------------------------------------------------------------------------------------- reconstructions
class GreyBlocks:
    """A tokenizer of 16 grey levels, one a block."""

    def __init__(self, block: int) -> None:
        self.block = block

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(((64 // self.block, 64 // self.block),), "grid", 16, 1)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        mean = F.avg_pool2d(image_BCHW.mean(dim=1, keepdim=True), self.block)
        return ((mean + 1.0) / 2.0 * 15.0).round().long().flatten(1)

    @property
    def downsampling(self) -> int:
        return self.block

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens.float().view(-1, 1, *grid) / 15.0 * 2.0 - 1.0

    def decode_latents(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent, scale_factor=self.block).expand(-1, 3, -1, -1)


def test_finer_tokens_keep_more(real_NHWC: Tensor) -> None:
    extractor = load_extractor()
    images = ArrayImages(real_NHWC[:24], "sample")
    with pytest.warns(UserWarning, match="24 reconstructions"):
        fine, coarse = (evaluate_reconstruction(GreyBlocks(b), images, extractor, batch_size=9) for b in (2, 16))
    assert fine.psnr > coarse.psnr + 1 and fine.ssim > coarse.ssim and fine.distance < coarse.distance
    assert fine.distance_name == "rFD-Lite0" and fine.protocol == "reconstruction" and fine.num_images == 24
    codes = GreyBlocks(2).encode(real_NHWC[:24].movedim(-1, 1).float() / 127.5 - 1.0)
    assert fine.codes_used == len(codes.unique()) / 16 and 1.0 < fine.code_perplexity < 16.0  # type: ignore[operator]
    assert fine.top_code_share is not None and fine.top_code_share > 0.3  # white
    generation = measure(images, extractor, protocol="generation", batch_size=24)
    with pytest.raises(ValueError, match="for generation, not for reconstruction"):
        evaluate_reconstruction(GreyBlocks(2), images, extractor, reference=generation)
    stored = measure(images, extractor, protocol="reconstruction", batch_size=24)
    with pytest.warns(UserWarning):
        again = evaluate_reconstruction(GreyBlocks(2), images, extractor, reference=stored)
    assert again.distance == pytest.approx(fine.distance, rel=1e-4) and again.reference == "sample"


def test_images_that_are_not_square_keep_their_shape() -> None:
    levels = torch.randint(16, (4, 8, 32, 1), generator=torch.Generator().manual_seed(0)) * 17
    pixels = levels.to(torch.uint8).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).expand(-1, -1, -1, 3)
    wide = ArrayImages(pixels[:, :32], "wide")  # 32 x 256: as many tokens as 64 x 128 have
    with pytest.warns(UserWarning, match="4 reconstructions"):
        assert evaluate_reconstruction(GreyBlocks(8), wide, load_extractor()).psnr == 100.0


def test_psnr_is_the_formula_and_a_mean_over_pictures() -> None:
    first = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    second = first.clone()
    second[1] = 110
    found = psnr(first, second)
    assert found.tolist() == pytest.approx([100.0, 20 * np.log10(255 / 10)])


def test_ssim_has_its_known_values(real_NHWC: Tensor) -> None:
    image = real_NHWC[:2].movedim(-1, 1)
    torch.testing.assert_close(ssim(image, image), torch.ones(2, dtype=torch.float64))
    flat = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    other = torch.full((1, 3, 16, 16), 150, dtype=torch.uint8)
    constant = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + constant) / (100**2 + 150**2 + constant)
    assert ssim(flat, other).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="11x11"):
        ssim(flat[..., :8], other[..., :8])


def test_codebook_usage() -> None:
    used, perplexity, top = codebook_usage(torch.tensor([2, 2, 0, 4]))
    assert used == 0.75 and top == 0.5
    assert perplexity == pytest.approx(2.0**1.5)
