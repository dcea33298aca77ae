"""Caches of token ids."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visar.data.augment import DRAWINGS, Augmentation
from visar.data.images import ImageSet, as_float, load_image_set
from visar.layers.quantize import weights_digest
from visar.tokenizers.vq import VQTokenizer
from visar.train.token_cache import TokenCache, build_token_cache

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load_image_set(SAMPLE, 16)


def tiny_tokenizer(seed: int = 0, codebook_size: int = 64) -> VQTokenizer:
    torch.manual_seed(seed)
    settings = dict(image_size=16, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=8)
    return VQTokenizer(**settings, codebook_size=codebook_size, codebook_dim=4).eval()  # type: ignore[arg-type]


def test_first_variant_is_the_picture_itself(images: ImageSet) -> None:
    tokenizer = tiny_tokenizer()
    cache = build_token_cache(images, tokenizer, variants=3, augmentation=DRAWINGS, batch_size=64)
    assert cache.tokens_NKL.shape == (64, 3, 64) and cache.tokens_NKL.dtype == torch.int16 and cache.num_variants == 3
    with torch.no_grad():
        expected = tokenizer.encode(as_float(torch.from_numpy(images.images)))
    assert torch.equal(cache.tokens_NKL[:, 0].long(), expected)
    assert not torch.equal(cache.tokens_NKL[:, 1].long(), expected)


def test_neutral_augmentation_gives_equal_variants(images: ImageSet) -> None:
    cache = build_token_cache(images, tiny_tokenizer(), variants=2, augmentation=Augmentation(), batch_size=16)
    assert torch.equal(cache.tokens_NKL[:, 0], cache.tokens_NKL[:, 1])


def test_seed_decides_the_variants(images: ImageSet) -> None:
    settings = dict(variants=2, augmentation=DRAWINGS, batch_size=32)
    first, again, other = (build_token_cache(images, tiny_tokenizer(), seed=seed, **settings) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert torch.equal(first.tokens_NKL, again.tokens_NKL)
    assert not torch.equal(first.tokens_NKL, other.tokens_NKL)


def test_large_codebooks_take_wider_integers(images: ImageSet) -> None:
    cache = build_token_cache(images, tiny_tokenizer(codebook_size=2**15 + 1), batch_size=64)
    assert cache.tokens_NKL.dtype == torch.int32


def test_file_comes_back_and_is_used_again(images: ImageSet, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "ids.safetensors", tiny_tokenizer()
    settings = dict(variants=2, augmentation=DRAWINGS)
    cache = build_token_cache(images, tokenizer, path, **settings)  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["ids.safetensors"]
    loaded = TokenCache.load(path)
    assert torch.equal(loaded.tokens_NKL, cache.tokens_NKL) and loaded.facts == cache.facts
    before = path.stat().st_mtime_ns
    again = build_token_cache(images, tokenizer, path, **settings)  # type: ignore[arg-type]
    assert torch.equal(again.tokens_NKL, cache.tokens_NKL) and path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": tiny_tokenizer(1)}, "another tokenizer;"),
        ({"seed": 1}, "another seed;"),
        ({"variants": 1}, "another variants;"),
        ({"augmentation": Augmentation(mirror=0.5)}, "another augmentation;"),
        ({"image_set": load_image_set(SAMPLE, 8)}, "another images;"),
    ],
)
def test_file_made_from_something_else_is_refused(
    images: ImageSet, tmp_path: Path, change: dict, message: str
) -> None:
    path = tmp_path / "ids.safetensors"
    arguments = dict(image_set=images, tokenizer=tiny_tokenizer(), path=path, variants=2, augmentation=DRAWINGS)
    build_token_cache(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        build_token_cache(**arguments | change)  # type: ignore[arg-type]


def test_sets_that_differ_in_labels_share_ids(images: ImageSet) -> None:
    fewer = replace(images, labels_NA=images.labels_NA[:, :0])
    unmirrored = replace(images, mirror_allowed_N=torch.zeros(len(images), dtype=torch.bool))
    assert fewer.picture_digest() == images.picture_digest() != unmirrored.picture_digest()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    with pytest.raises(ValueError, match="not a token cache"):
        TokenCache.load(path)
    TokenCache(torch.zeros(4, 1, 8, dtype=torch.int16), {"seed": 0}).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        TokenCache.load(path)


@pytest.mark.parametrize("variants", [0, 2])
def test_variants_need_an_augmentation(images: ImageSet, variants: int) -> None:
    with pytest.raises(ValueError, match=f"variants {variants}"):
        build_token_cache(images, tiny_tokenizer(), variants=variants)


def test_digest_of_weights_sees_every_tensor() -> None:
    tokenizer = tiny_tokenizer()
    before = weights_digest(tokenizer)
    assert before == weights_digest(tiny_tokenizer()) != weights_digest(tiny_tokenizer(1))
    with torch.no_grad():
        next(iter(tokenizer.parameters())).view(-1)[0] += 1e-3
    assert weights_digest(tokenizer) != before
