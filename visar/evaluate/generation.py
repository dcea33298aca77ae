"""Making the images of an evaluation: sharded over processes, resumable, the same whatever the number of processes.

Image i has seed base + i and a label that is a function of i (visar/evaluate/labels.py). Batches, processes and
restarts decide only who makes it and when.
"""

import hashlib
import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visar.core.noise import image_seeds
from visar.core.output import SampleStatistics
from visar.evaluate.copies import thumbnails
from visar.evaluate.extractors import Extractor
from visar.evaluate.images import ImageSource
from visar.evaluate.labels import Label, LabelPlan
from visar.evaluate.options import KeepImages
from visar.evaluate.parts import Part, image_digests, parts_in_order, save_part
from visar.io.files import atomic_write, json_object
from visar.io.shards import World, finished, missing_ranges, remove_unfinished

SECOND = "second."  # before the names of a second extractor's layers: both may call one "logits"
KEEP_IMAGES: tuple[KeepImages, ...] = ("none", "png", "npz")


class ImageGenerator(Protocol):
    """Makes images from seeds and labels; image b depends on seeds[b] and labels[b] only."""

    def __call__(self, seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        """uint8 [B, 3, H, W] (clips [B, T, 3, H, W]) and the sampler's counts."""
        ...


@dataclass(frozen=True)
class Generated:
    """The images of a finished run, as features.

    Attributes:
        num_samples: N.
        features: float32 [N, D] by layer, in the order of the images.
        second_features: features of a second extractor.
        thumbnails_ND: float32 [N, 768], or None.
        images_sha256: sha256 over the images' own sha256, in order: equal for equal images.
        duplicates: images that have the same bytes as an earlier one.
        statistics: statistics of all sampler calls together.
        calls: how many there were.
        forward_passes_per_image: model calls that an image needed (of its batch), by model, averaged over images.
        images_per_second: of one process, decoding included; its first batch left out where there are others. None if
            they were not made here.
    """

    num_samples: int
    features: dict[str, Tensor]
    second_features: dict[str, Tensor]
    thumbnails_ND: Tensor | None
    images_sha256: str
    duplicates: int
    statistics: SampleStatistics
    calls: int
    forward_passes_per_image: dict[str, float]
    images_per_second: float | None


def _check_identity(folder: Path, identity: dict[str, object]) -> None:
    """Stores what the run's images depend on, or compares it with what is stored.

    Raises:
        ValueError: the folder holds images of another run (the message names what differs), or a damaged file.
    """
    path = folder / "run.json"
    wanted = json.loads(json.dumps(identity, sort_keys=True))
    if path.exists():
        try:
            stored = json_object(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}). Choose another folder, or delete it") from error
        differing = [
            f"{key} ({stored.get(key)!r} there, {wanted.get(key)!r} now)"
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key)
        ]
        if differing:
            raise ValueError(
                f"{folder} holds images of another run: {'; '.join(differing)}. Choose another folder, or delete it"
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n")


def all_features(images: Tensor, extractor: Extractor, second: Extractor | None) -> dict[str, Tensor]:
    """Features by layer; the names of a second extractor's layers begin with `SECOND`."""
    others = {} if second is None else second(images)
    return extractor(images) | {SECOND + layer: value for layer, value in others.items()}


def split_features(blocks: dict[str, list[Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Blocks of `all_features` put together and told apart, as two arguments of `Generated`."""
    whole = {layer: torch.cat(values) for layer, values in blocks.items()}
    return {
        "features": {layer: value for layer, value in whole.items() if not layer.startswith(SECOND)},
        "second_features": {
            layer.removeprefix(SECOND): value for layer, value in whole.items() if layer.startswith(SECOND)
        },
    }


def _digest(extractor: Extractor) -> list[str | None]:
    return [extractor.name, *extractor.layers, extractor.dtype, extractor.weights]


def generate_images(
    generate: ImageGenerator,
    extractor: Extractor,
    plan: LabelPlan,
    folder: str | Path,
    *,
    num_samples: int,
    batch_size: int,
    seed: int,
    world: World,
    identity: dict[str, object],
    keep_images: KeepImages = "none",
    keep_thumbnails: bool = False,
    second: Extractor | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Makes the images that a run's folder lacks, and their features. Every process of the run calls it.

    A killed run resumes after its last finished batch. num_samples may be raised later, and the number of processes
    and the batch size may change; anything else that changes images belongs into `identity`.

    Args:
        generate: makes a batch.
        extractor: whose features are stored.
        plan: label of image i.
        folder: state of the run; parts in `parts/`, images in `images/` when stored as PNG.
        num_samples: images in all.
        batch_size: images of one call.
        seed: image i has seed + i.
        world: the processes.
        identity: what the images depend on besides the seed and labels, as JSON values; when a run resumes it must
            be the stored one.
        keep_images: "none", "png" (one file per image) or "npz" (one file, arr_0, as ADM's evaluator reads it).
        keep_thumbnails: store what the copy rate needs.
        second: whose features are stored too.
        progress: told the images done by this process.

    Raises:
        ValueError: a count below 1, another run's folder, or images that are not uint8 [B, 3, H, W].
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples {num_samples} and batch_size {batch_size} must be >= 1")
    if keep_images not in KEEP_IMAGES:
        raise ValueError(f"keep_images {keep_images!r}; choose {', '.join(KEEP_IMAGES)}")
    folder = Path(folder)
    parts = folder / "parts"
    todo: object = None
    if world.rank == 0:
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {parts}: {error.strerror or error}") from error
        settings: dict[str, object] = {
            "seed": seed,
            "labels": plan.digest(),
            "extractor": _digest(extractor),
            "keep_images": keep_images,
            "keep_thumbnails": keep_thumbnails,
        }
        if second is not None:
            settings["second_extractor"] = _digest(second)
        _check_identity(folder, {**identity, **settings})
        remove_unfinished(folder)
        todo = missing_ranges(finished(parts), num_samples, batch_size)
    ranges = world.from_first(todo)
    assert isinstance(ranges, list)
    done = 0
    for number, (first, stop) in enumerate(ranges[world.rank :: world.size]):
        seeds = image_seeds(seed + first, stop - first)
        started = time.perf_counter()
        images, statistics = generate(seeds, plan.labels(range(first, stop), seeds))
        images = images.cpu()
        seconds = time.perf_counter() - started
        _check_images(images, stop - first)
        if keep_images == "png":
            _save_pngs(images, first, folder / "images")
        part = Part(
            first=first,
            features=all_features(images, extractor, second),
            digests_B32=image_digests(images),
            thumbnails_BD=thumbnails(images) if keep_thumbnails else None,
            images=images.movedim(-3, -1).contiguous() if keep_images == "npz" else None,
            statistics=statistics,
            seconds=seconds,
            warm=number > 0,
        )
        save_part(parts, part)
        done += stop - first
        if progress is not None:
            progress(done)
    world.barrier()


def read_pictures(
    source: ImageSource,
    extractor: Extractor,
    batch_size: int,
    keep_thumbnails: bool = False,
    second: Extractor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Generated:
    """Images made elsewhere, as features: so that they can be scored like a run's.

    Raises:
        ValueError: an image that cannot be read.
    """
    features: dict[str, list[Tensor]] = {}
    small: list[Tensor] = []
    digests: list[Tensor] = []
    for images in source.batches(batch_size):
        for layer, value in all_features(images, extractor, second).items():
            features.setdefault(layer, []).append(value)
        digests.append(image_digests(images))
        if keep_thumbnails:
            small.append(thumbnails(images))
        if progress is not None:
            progress(sum(len(block) for block in digests))
    digest_N32 = torch.cat(digests)
    return Generated(
        num_samples=len(digest_N32),
        **split_features(features),
        thumbnails_ND=torch.cat(small) if small else None,
        images_sha256=hashlib.sha256(digest_N32.numpy().tobytes()).hexdigest(),
        duplicates=len(digest_N32) - len(digest_N32.unique(dim=0)),
        statistics=SampleStatistics(),
        calls=0,
        forward_passes_per_image={},
        images_per_second=None,
    )


def _check_images(images: Tensor, count: int) -> None:
    if images.dtype != torch.uint8 or images.dim() not in (4, 5) or images.shape[-3] != 3 or len(images) != count:
        raise ValueError(
            f"the generator gave {images.dtype} {tuple(images.shape)} for {count} seeds; "
            "uint8 [B, 3, H, W] (clips [B, T, 3, H, W]) is needed"
        )


def _save_pngs(images: Tensor, first: int, folder: Path) -> None:
    """Each image as a PNG named by its index; a clip as a strip of its frames from left to right."""
    folder.mkdir(parents=True, exist_ok=True)
    for offset, image in enumerate(images):
        pixels = image if image.dim() == 3 else torch.cat(list(image), dim=-1)
        with atomic_write(folder / f"{first + offset:08d}.png") as temporary:
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")


def collect(folder: str | Path, num_samples: int, progress: Callable[[int], None] | None = None) -> Generated:
    """Puts the parts of a finished run together; only one process needs to.

    Raises:
        ValueError: images are missing, or a part is broken.
    """
    features: dict[str, list[Tensor]] = {}
    small: list[Tensor] = []
    digests: list[Tensor] = []
    statistics = SampleStatistics()
    passes: dict[str, float] = {}
    rates: dict[bool, list[float]] = {True: [0, 0.0], False: [0, 0.0]}
    calls = 0
    for part in parts_in_order(Path(folder) / "parts", num_samples):
        count = len(part.digests_B32)
        for layer, value in part.features.items():
            features.setdefault(layer, []).append(value)
        if part.thumbnails_BD is not None:
            small.append(part.thumbnails_BD)
        digests.append(part.digests_B32)
        statistics, calls = statistics + part.statistics, calls + 1
        for model, number in part.statistics.forward_passes.items():
            passes[model] = passes.get(model, 0.0) + number * count
        rates[part.warm][0] += count
        rates[part.warm][1] += part.seconds
        if progress is not None:
            progress(part.stop)
    digest_N32 = torch.cat(digests)
    made, seconds = rates[True] if rates[True][0] else rates[False]
    return Generated(
        num_samples=num_samples,
        **split_features(features),
        thumbnails_ND=torch.cat(small) if small else None,
        images_sha256=hashlib.sha256(digest_N32.numpy().tobytes()).hexdigest(),
        duplicates=num_samples - len(digest_N32.unique(dim=0)),
        statistics=statistics,
        calls=calls,
        forward_passes_per_image={model: total / num_samples for model, total in passes.items()},
        images_per_second=made / seconds if seconds > 0 else None,
    )


def write_npz(folder: str | Path, num_samples: int, path: str | Path) -> Path:
    """Writes the stored images of a run as one .npz, arr_0 uint8 [N, H, W, 3], streamed: the file of ADM's evaluator.

    Raises:
        ValueError: the run did not keep its images as npz, or is not finished.
    """
    path = Path(path)
    parts = parts_in_order(Path(folder) / "parts", num_samples, with_images=True)
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            started = False
            for part in parts:
                if part.images is None:
                    raise ValueError(f"the images of {folder} were not stored; run with keep_images='npz'")
                if not started:
                    shape = (num_samples, *part.images.shape[1:])
                    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
                    started = True
                file.write(part.images.contiguous().numpy().tobytes())
    return path


def remake_images(indices: list[int], generate: ImageGenerator, plan: LabelPlan, seed: int) -> Tensor:
    """Some images of a run made again, uint8 [B, H, W, 3]: from their seeds, so nothing need have been stored."""
    seeds = [seed + index for index in indices]
    images, _ = generate(seeds, plan.labels(indices, seeds))
    return images.cpu().movedim(-3, -1).contiguous()
