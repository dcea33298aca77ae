"""Train, validation and test images of the emoji set, split by look as well as by concept.

Keys alone leak: of the images that a split by (style, concept) puts aside, 2.6 % of 650 for validation and 15.5 % of
399 for the test are near-copies (error <= 6.0) of training images: clock faces, arrows, one drawing under two code
points. Here images that look alike never part: 12476 train, 791 validation, 394 test, no near-copy between them.

Test: concepts unseen in every style. Validation: (style, concept) pairs unseen, while the concept is seen in other
styles. The assignment ships as emoji_splits.json; `split_emoji` is what made it.
"""

import hashlib
import json
import re
from collections import defaultdict
from importlib import resources

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SPLITS = ("train", "val", "test")
NEAR_COPY_RMSE = 6.0
MAX_SHIFT = 3


def concept_key(code: str) -> str:
    """Key shared by all tone and gender variants of one idea, from its code points."""
    parts = [part for part in code.split("-") if not re.fullmatch(r"1f3f[b-f]", part)]
    parts = ["1f9d1" if part in ("1f468", "1f469") else part for part in parts]
    return re.sub(r"-200d-264[02]$", "", "-".join(parts))


def unit_hash(text: str) -> float:
    """Stable hash in [0, 1)."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
        / 2.0**64
    )


def _variants(image_BCHW: Tensor) -> Tensor:
    """All mirror images and shifts of up to 3 pixels on white: [B, 98, C, H, W]."""
    height, width = image_BCHW.shape[-2:]
    out = []
    for side in (image_BCHW, image_BCHW.flip(-1)):
        padded = functional.pad(side, (MAX_SHIFT,) * 4, value=255.0)
        for dy in range(2 * MAX_SHIFT + 1):
            for dx in range(2 * MAX_SHIFT + 1):
                out.append(padded[..., dy : dy + height, dx : dx + width])
    return torch.stack(out, 1)


def near_copies(
    images_NHWC: np.ndarray, others_MHWC: np.ndarray, threshold: float = NEAR_COPY_RMSE, cells: int = 8
) -> list[tuple[int, int, float]]:
    """Pairs of images that are the same up to mirroring, shifts of at most 3 pixels and an error.

    Averages over cells can only lessen the error, so pairs that differ there are never looked at whole.

    Args:
        images_NHWC, others_MHWC: uint8 images of one size.
        threshold: root-mean-square error, in levels of 0 ... 255.
        cells: cells a side of the first comparison.

    Returns: (index in images, index in others, least error over the variants), error <= threshold.
    """
    others = torch.from_numpy(others_MHWC).permute(0, 3, 1, 2).float()
    coarse_MD = functional.adaptive_avg_pool2d(others, cells).flatten(1)
    square_M = coarse_MD.square().sum(1)
    pairs = []
    for first in range(0, len(images_NHWC), 64):
        image = torch.from_numpy(images_NHWC[first : first + 64]).permute(0, 3, 1, 2).float()
        variant = _variants(image)
        coarse = functional.adaptive_avg_pool2d(variant.flatten(0, 1), cells).flatten(1)
        distance = (coarse.square().sum(1)[:, None] + square_M - 2 * coarse @ coarse_MD.T) / coarse.shape[1]
        close = distance.view(*variant.shape[:2], -1) <= threshold**2 + 1.0
        found = close.any(1).nonzero()
        for row, other in found.tolist():
            which = close[row, :, other]
            error = (variant[row, which] - others[other]).square().mean((1, 2, 3)).min().sqrt()
            if error <= threshold:
                pairs.append((first + row, other, float(error)))
    return pairs


class _Components:
    """Union-find."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        a, b = self.find(i), self.find(j)
        self.parent[max(a, b)] = min(a, b)


def split_emoji(
    codes: list[str],
    styles: list[str],
    copies: list[tuple[int, int, float]],
    test_share: float = 0.05,
    val_share: float = 0.06,
    largest: int = 24,
) -> list[int]:
    """Splits of all images: 0 train, 1 val, 2 test.

    Args:
        codes, styles: code points and drawing style of every image.
        copies: pairs of images that look alike (`near_copies` of the set with itself).
        test_share, val_share: shares that hashes are compared with; somewhat more than what is left after the rules.
        largest: components of more images stay in training.
    """
    concepts = [concept_key(code) for code in codes]
    components = _Components(len(codes))
    first_of: dict[tuple[str, str], int] = {}
    for i, pair in enumerate(zip(styles, concepts, strict=True)):
        components.join(first_of.setdefault(pair, i), i)
    for i, j, _ in copies:
        components.join(i, j)
    members = defaultdict(list)
    for i in range(len(codes)):
        members[components.find(i)].append(i)

    # A concept is for the test if its hash says so and nothing that looks like it is of another concept.
    wanted = {concept for concept in concepts if unit_hash(f"concept:{concept}") < test_share}
    while True:
        leaking = set()
        for group in members.values():
            inside = {concepts[i] for i in group}
            if inside & wanted and not inside <= wanted:
                leaking |= inside & wanted
        if not leaking:
            break
        wanted -= leaking
    split = [2 if concept in wanted else 0 for concept in concepts]
    for root in sorted(members):
        group = members[root]
        key = min(f"{styles[i]}:{concepts[i]}" for i in group)
        if split[group[0]] == 0 and len(group) <= largest and unit_hash(f"pair:{key}") < val_share:
            for i in group:
                split[i] = 1
    # Validation is for concepts that training shows in another style.
    trained = {concepts[i] for i in range(len(codes)) if split[i] == 0}
    for group in members.values():
        if split[group[0]] == 1 and not {concepts[i] for i in group} <= trained:
            for i in group:
                split[i] = 0
    return split


def shipped_splits(pixels_sha256: str, count: int) -> np.ndarray:
    """Split of every image in file order, int8 [N], from the file that ships with the package.

    Raises:
        ValueError: the images are others than those that were split.
    """
    record = json.loads(resources.files("visar.data").joinpath("emoji_splits.json").read_text(encoding="utf-8"))
    if record["pixels_sha256"] != pixels_sha256 or len(record["split"]) != count:
        raise ValueError(
            f"the emoji set has pixels {pixels_sha256[:12]} ({count} images); splits are known for "
            f"{record['pixels_sha256'][:12]} ({len(record['split'])} images)"
        )
    return np.array([int(digit) for digit in record["split"]], np.int8)
