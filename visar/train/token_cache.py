"""Tokens of an image set, computed once: several augmented variants of every image."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from diffusers.utils.logging import tqdm
from safetensors.torch import load_file, save_file
from torch import Tensor

from visar.data.augment import Augmentation, augment
from visar.data.decoding import in_batches
from visar.data.images import ImageSet, as_float
from visar.io.files import atomic_write, json_object
from visar.layers.quantize import weights_digest
from visar.tokenizers.checks import check_ids


@dataclass
class TokenCache:
    """Tokens of every image.

    Attributes:
        tokens_NKL: ids, int16 or int32 [N, variants, L], or of continuous tokens float16 [N, variants, L, 2 C], mean
            and standard deviation; variant 0 is the image itself, the others are augmented.
        facts: what they were made from: tokenizer and image set by hash, scale of continuous tokens, augmentation,
            seed.
    """

    tokens_NKL: Tensor
    facts: dict

    @property
    def num_variants(self) -> int:
        """Variants of an image, the plain one included."""
        return self.tokens_NKL.shape[1]

    @classmethod
    def load(cls, path: str | Path) -> "TokenCache":
        """Reads a cache.

        Raises:
            ValueError: no such file, or a damaged one.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} is not a token cache: no such file")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = json_object((file.metadata() or {})["facts"])
            content = load_file(path)
            return cls(content["moments" if "moments" in content else "ids"], facts)
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is not a token cache or is damaged ({error})") from error

    def save(self, path: str | Path) -> None:
        """Writes the cache, whole or not at all."""
        with atomic_write(path) as temporary:
            name = "moments" if self.tokens_NKL.is_floating_point() else "ids"
            save_file({name: self.tokens_NKL.cpu().contiguous()}, temporary, {"facts": json.dumps(self.facts)})


@torch.no_grad()
def build_token_cache(
    image_set: ImageSet,
    tokenizer: Any,
    path: str | Path | None = None,
    *,
    variants: int = 1,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> TokenCache:
    """Tokens of all images, read from `path` if they are there already, else computed and written to it.

    Args:
        image_set: the images, all splits.
        tokenizer: on the device, in evaluation mode.
        path: file of the cache; None keeps it in memory only.
        variants: variants of an image (32 in the embedded models' recipes); the first is the image itself.
        augmentation: augmentation of the other variants; without one, variants must be 1.
        seed: seed of the augmentation; batch_size changes it too.
        batch_size: images at a time; of clips as many as have so many frames, at least one.
        device: where to compute.

    Raises:
        ValueError: the file was made from something else (says what differs), or variants without augmentation.
    """
    if variants < 1 or (variants > 1 and augmentation is None):
        raise ValueError(f"variants {variants}; it must be >= 1, and 1 without an augmentation")
    batch_size = max(1, batch_size // max(1, image_set.num_frames))
    facts = {
        "tokenizer": weights_digest(tokenizer),
        "scale_factor": tokenizer.config.get("scale_factor"),
        "images": image_set.picture_digest(),
        "variants": variants,
        "augmentation": None if augmentation is None else asdict(augmentation),
        "seed": seed,
        "batch_size": batch_size,
    }
    layout = tokenizer.layout
    vocab_size, shape = layout.vocab_size, (layout.num_tokens, *(() if layout.vocab_size else (2 * layout.channels,)))
    if path is not None and Path(path).exists():
        cache = TokenCache.load(path)
        differing = [key for key, value in facts.items() if cache.facts.get(key) != value]
        if differing:
            raise ValueError(f"{path} was made with another {', '.join(differing)}; remove it or name another file")
        if vocab_size:
            check_ids(cache.tokens_NKL.flatten(1), vocab_size)
        if cache.tokens_NKL.shape != (len(image_set), variants, *shape):
            raise ValueError(f"{path} is damaged: its tokens are {tuple(cache.tokens_NKL.shape)}; remove it")
        return cache
    dtype = torch.float16 if not vocab_size else torch.int16 if vocab_size <= 2**15 else torch.int32
    tokens = torch.empty(len(image_set), variants, *shape, dtype=dtype)
    # Augmented variants of many images take minutes on a CPU.
    batches = tqdm(in_batches(image_set.images, batch_size), desc="tokens of images", unit="batch", disable=None)
    for number, pixels in enumerate(batches):
        first = number * batch_size
        part = slice(first, first + batch_size)
        image = as_float(torch.from_numpy(np.array(pixels)).to(device))
        allowed = image_set.mirror_allowed_N[part].to(device)
        for variant in range(variants):
            picture = image
            if variant:
                text = f"{seed}/{first}/{variant}"
                number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
                generator = torch.Generator(device).manual_seed(number)
                assert augmentation is not None
                picture = augment(image, augmentation, generator, allowed)
            made = tokenizer.encode(picture) if vocab_size else torch.cat(tokenizer.token_moments(picture), dim=-1)
            tokens[part, variant] = made.to(dtype).cpu()
    cache = TokenCache(tokens, facts)
    if path is not None:
        cache.save(path)
    return cache
