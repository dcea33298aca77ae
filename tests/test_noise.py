"""Counter-based noise: known answers, independence of the batch, distributions."""

import importlib.util
import os

import pytest
import torch

from visar import kernels
from visar.core.noise import Noise, Use, image_seeds, philox


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == expected


def test_image_depends_on_its_seed_only():
    seeds = [5, 2**40 + 1, 0, 77, 5]
    batch = Noise(seeds).normal(Use.LATENT, 3, (7,))
    for row, seed in enumerate(seeds):
        assert torch.equal(Noise([seed]).normal(Use.LATENT, 3, (7,))[0], batch[row])
    assert torch.equal(batch[0], batch[4])
    assert torch.equal(Noise(seeds).rows(torch.tensor([3, 1])).normal(Use.LATENT, 3, (7,)), batch[[3, 1]])


def test_positions_as_tensor_equal_positions_as_int():
    noise = Noise([1, 2, 3])
    positions = torch.tensor([[4, 9], [9, 4], [0, 1]])
    ragged = noise.uniform(Use.ACCEPT, positions, (5,), counter=2)
    assert ragged.shape == (3, 2, 5)
    for row in range(3):
        for slot in range(2):
            alone = noise.uniform(Use.ACCEPT, int(positions[row, slot]), (5,), counter=2)[row]
            assert torch.equal(ragged[row, slot], alone)


def test_uses_counters_positions_and_seeds_give_unrelated_draws():
    seeds = image_seeds(0, 4000)
    first = Noise(seeds).uniform(Use.TOKEN, 0)
    others = [
        Noise(seeds).uniform(Use.DRAFT, 0),
        Noise(seeds).uniform(Use.TOKEN, 1),
        Noise(seeds).uniform(Use.TOKEN, 0, counter=1),
        Noise(image_seeds(4000, 4000)).uniform(Use.TOKEN, 0),
        Noise([seed + 2**32 for seed in seeds]).uniform(Use.TOKEN, 0),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
        assert abs(correlation) < 4.5 / 4000**0.5


def test_distributions():
    noise = Noise(image_seeds(123, 2000))
    uniform = noise.uniform(Use.TOKEN, 0, (50,)).flatten()
    assert 0.0 < uniform.min() and uniform.max() < 1.0
    histogram = torch.histc(uniform, bins=50, min=0, max=1)
    statistic = ((histogram - 2000.0) ** 2 / 2000.0).sum()
    assert statistic < 49 + 5 * (2 * 49) ** 0.5
    normal = noise.normal(Use.TOKEN, 1, (50,))
    assert normal.shape == (2000, 50)
    assert abs(normal.mean()) < 0.016 and abs(normal.std() - 1) < 0.012
    assert abs((normal**4).mean() - 3) < 0.2
    gumbel = noise.gumbel(Use.TOKEN, 2, (50,))
    assert abs(gumbel.mean() - 0.5772) < 0.02 and abs(gumbel.var() - 1.6449) < 0.06
    assert torch.isfinite(noise.exponential(Use.TOKEN, 3, (50,))).all()


def test_bad_seeds():
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=str(seed)):
            Noise([0, seed])


def test_kernel_gives_the_same_bits(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise = Noise([1, 2**62 + 2**40 + 3, 2**32 - 1], device)
    ragged = torch.arange(150, device=device) + torch.tensor([[0], [5], [9]], device=device)
    counters = torch.full((1, 1), 2**33 + 1, device=device)

    def draws():
        yield noise.bits(Use.DRAFT, ragged, (5,), counters)
        yield noise.bits(Use.TOKEN, ragged[:1, ::3], (2, 3), 1)
        yield noise.bits(Use.ORDER, 2**33, (9,), 2)
        yield noise.uniform(Use.DRAFT, ragged[:, :, None], (3,), counters[..., None])
        yield noise.uniform(Use.TOKEN, 3)
        yield noise.uniform(Use.DRAFT, ragged, (0,))

    assert kernels.available(device)
    by_kernel = list(draws())
    monkeypatch.setenv("VISAR_TRITON", "0")
    assert not kernels.available(device)
    for got, expected in zip(by_kernel, draws(), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.gpu
def test_gpu_gives_the_same_bits():
    seeds = image_seeds(9, 64)
    for draw in ("bits", "uniform"):
        cpu = getattr(Noise(seeds), draw)(Use.TOKEN, 5, (33,))
        gpu = getattr(Noise(seeds, "cuda"), draw)(Use.TOKEN, 5, (33,))
        assert torch.equal(cpu, gpu.cpu())
