"""Augmentation: neutral settings, exact pixels, determinism, and what the settings say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from visar.data.augment import DRAWINGS, PHOTOGRAPHS, Augmentation, augment, random_background
from visar.data.images import as_float

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


@pytest.fixture(scope="module")
def image_BCHW() -> Tensor:
    with np.load(SAMPLE) as arrays:
        return as_float(torch.from_numpy(arrays["images"][:32]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_neutral_settings_change_nothing(image_BCHW: Tensor) -> None:
    for neutral in (Augmentation(), Augmentation(rescale_share=1.0), Augmentation(min_scale=0.5, max_scale=0.9)):
        assert torch.equal(augment(image_BCHW, neutral, seeded()), image_BCHW)


@pytest.mark.parametrize("augmentation", [DRAWINGS, PHOTOGRAPHS])
def test_the_generator_decides_everything(image_BCHW: Tensor, augmentation: Augmentation) -> None:
    first = augment(image_BCHW, augmentation, seeded())
    assert torch.equal(first, augment(image_BCHW, augmentation, seeded()))
    assert not torch.equal(first, augment(image_BCHW, augmentation, seeded(1)))
    assert first.shape == image_BCHW.shape and first.dtype == image_BCHW.dtype
    assert first.abs().max() <= 1.0


def test_mirroring_where_it_is_allowed_only(image_BCHW: Tensor) -> None:
    allowed_B = torch.arange(len(image_BCHW)) % 2 == 0
    out = augment(image_BCHW, Augmentation(mirror=1.0), seeded(), allowed_B)
    assert torch.equal(out[allowed_B], image_BCHW[allowed_B].flip(-1))
    assert torch.equal(out[~allowed_B], image_BCHW[~allowed_B])


def test_mirroring_has_its_share() -> None:
    ramp = torch.linspace(-1, 1, 4).expand(2000, 3, 4, 4)
    flipped = (augment(ramp, Augmentation(mirror=0.25), seeded())[:, 0, 0, 0] > 0).float().mean()
    assert abs(float(flipped) - 0.25) < 0.04


def test_shifts_move_whole_pixels_evenly_and_fill_with_white() -> None:
    dot = torch.full((4000, 3, 9, 9), 1.0)
    dot[:, :, 4, 4] = -1.0
    out = augment(dot, Augmentation(max_shift=2), seeded())
    assert set(out.unique().tolist()) == {-1.0, 1.0}
    place = (out[:, 0] < 0).flatten(1).float()
    assert (place.sum(1) == 1).all()
    count = torch.bincount(place.argmax(1), minlength=81).view(9, 9)
    assert count[2:7, 2:7].sum() == 4000 and (count[2:7, 2:7] > 100).all()


def test_shifts_fill_with_the_level_asked_for() -> None:
    out = augment(torch.zeros(50, 1, 4, 4), Augmentation(max_shift=3, fill=-0.5), seeded())
    assert set(out.unique().tolist()) == {-0.5, 0.0}


def test_rescaling_leaves_the_other_pictures_exact(image_BCHW: Tensor) -> None:
    many = image_BCHW.repeat(8, 1, 1, 1)
    out = augment(many, Augmentation(rescale_share=1 / 3, min_scale=0.85), seeded())
    changed = (out != many).flatten(1).any(1).float().mean()
    assert abs(float(changed) - 1 / 3) < 0.1


def test_rescaling_by_one_scale_shrinks_about_the_middle() -> None:
    square = torch.full((1, 3, 64, 64), 1.0)
    square[:, :, 16:48, 16:48] = -1.0
    out = augment(square, Augmentation(rescale_share=1.0, min_scale=0.75, max_scale=0.75), seeded())
    dark = out[0, 0] < 0
    rows, columns = dark.any(1).nonzero().flatten(), dark.any(0).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1])) == (int(columns[0]), int(columns[-1])) == (20, 43)
    assert (out[0, 0, :8] == 1.0).all()


def test_random_crops_of_a_plane_stay_a_plane() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-0.5, 0.5, 32), torch.linspace(-0.4, 0.4, 32), indexing="ij")
    out = augment((rows + columns).expand(16, 3, 32, 32), Augmentation(crop_min=0.5), seeded())[:, 0, 6:-6, 6:-6]
    down, right = out.diff(dim=1), out.diff(dim=2)
    assert (down.std((1, 2)) < 4e-3).all() and (right.std((1, 2)) < 4e-3).all()
    share = down.mean((1, 2)) * 31  # of the side that was kept
    assert 0.5 - 1e-2 <= share.min() and share.max() <= 1 + 1e-2 and share.std() > 0.05
    assert torch.allclose(right.mean((1, 2)) * 31 / 0.8, share, atol=1e-2)


def test_random_crops_of_a_plain_picture_have_no_border() -> None:
    plain = torch.full((8, 3, 16, 16), 0.75)
    assert torch.allclose(augment(plain, PHOTOGRAPHS, seeded()), plain, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_shift": -1},
        {"mirror": 1.5},
        {"rescale_share": -0.1},
        {"min_scale": 0.0},
        {"min_scale": 1.2, "max_scale": 1.0},
        {"crop_min": 0.0},
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} {next(iter(settings.values()))}"):
        Augmentation(**settings)  # type: ignore[arg-type]


def test_random_background_colours_the_outside_only() -> None:
    ring = torch.full((2, 3, 16, 16), 1.0)
    ring[:, :, 4:12, 4:12] = -1.0
    ring[:, :, 6:10, 6:10] = 1.0  # white inside the ring: not connected to the border
    out = random_background(ring, seeded())
    assert torch.equal(out[:, :, 4:12, 4:12], ring[:, :, 4:12, 4:12])
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[4:12, 4:12] = False
    colours = out[:, :, outside]
    assert torch.equal(colours, colours[:, :, :1].expand_as(colours)) and not torch.equal(colours[0], colours[1])
    assert torch.equal(out, random_background(ring, seeded()))
