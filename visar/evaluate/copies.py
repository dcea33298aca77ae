"""How close samples are to training images: the copy rate, and a sheet of nearest neighbours.

Distances are root mean square differences of images averaged to 16 x 16 RGB in [0, 1]. A sample closer than 0.029
to a training image is called a copy: among emoji64's held-out images 1% are that close.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visar.io.files import atomic_write
from visar.io.pictures import grid

THUMBNAIL = 16
COPY_DISTANCE = 0.029
SHIFTS = (-4, -2, 0, 2, 4)


@dataclass(frozen=True)
class Copies:
    """Copy rates of N samples.

    Attributes:
        copy_rate: share of samples closer than `threshold` to a training image.
        copy_rate_moved: the same, to a training image as it is, mirrored, or shifted by `SHIFTS` pixels of 64.
        held_out_rate, held_out_rate_moved: the same of real images that were not trained on, or None.
        threshold: the distance used.
        distance_N: float32 distance of each sample to its nearest training image as it is.
        nearest_N: int64 index of that image.
    """

    copy_rate: float
    copy_rate_moved: float
    held_out_rate: float | None
    held_out_rate_moved: float | None
    threshold: float
    distance_N: Tensor
    nearest_N: Tensor


def thumbnails(image_BCHW: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] averaged to float32 [B, 768] in [0, 1].

    Raises:
        ValueError: images smaller than 16 x 16, or clips.
    """
    if image_BCHW.dim() != 4 or min(image_BCHW.shape[-2:]) < THUMBNAIL:
        raise ValueError(f"{tuple(image_BCHW.shape)} has no 16x16 averages: images [B, 3, H, W] of 16x16 or more have")
    return F.adaptive_avg_pool2d(image_BCHW.float() / 255.0, THUMBNAIL).flatten(1)


def nearest(thumbnail_ND: Tensor, train_MD: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Distance (float32 [N], root mean square) and index (int64 [N]) of the nearest training thumbnail.

    The index comes from matrix products; the distance to it is computed from differences, so a copy has exactly 0.
    """
    indices = [_matrix_distance(part, train_MD).argmin(dim=1) for part in thumbnail_ND.split(block)]
    index_N = torch.cat(indices)
    return (thumbnail_ND - train_MD[index_N]).square().mean(dim=1).sqrt(), index_N


def _matrix_distance(first_ND: Tensor, second_MD: Tensor) -> Tensor:
    """Root mean square distances [N, M] by matrix products: fast, exact to about 1e-3 near zero, 1e-5 at 0.029."""
    return torch.cdist(first_ND, second_MD, compute_mode="use_mm_for_euclid_dist") / first_ND.shape[1] ** 0.5


def moved(image_BCHW: Tensor) -> list[Tensor]:
    """The images mirrored and shifted in every combination, edges repeated; shifts are in 64ths of the image."""
    unit = image_BCHW.shape[-1] / 64.0
    shifts = sorted({round(shift * unit) for shift in SHIFTS})
    reach = max(shifts)
    height, width = image_BCHW.shape[-2:]
    variants = []
    for picture in (image_BCHW, image_BCHW.flip(-1)):
        padded = F.pad(picture.float(), (reach, reach, reach, reach), mode="replicate")
        for down in shifts:
            for right in shifts:
                top, left = reach - down, reach - right
                variants.append(padded[..., top : top + height, left : left + width])
    return variants


def nearest_moved(thumbnail_ND: Tensor, train_BCHW: Tensor, block: int = 1024) -> Tensor:
    """Distance float32 [N] to the nearest training image among all its `moved` variants."""
    best_N = torch.full((len(thumbnail_ND),), float("inf"), device=thumbnail_ND.device)
    for images in train_BCHW.split(block):
        for variant in moved(images.to(thumbnail_ND.device)):
            train_MD = thumbnails(variant)
            found = [_matrix_distance(part, train_MD).amin(dim=1) for part in thumbnail_ND.split(block)]
            best_N = torch.minimum(best_N, torch.cat(found))
    return best_N


def copies(
    thumbnail_ND: Tensor,
    train_NHWC: Tensor,
    held_out_NHWC: Tensor | None = None,
    threshold: float = COPY_DISTANCE,
    device: torch.device | str = "cpu",
) -> Copies:
    """Copy rates of samples, with the same rates of held-out real images as their null.

    Args:
        thumbnail_ND: float32 [N, 768] thumbnails of the samples.
        train_NHWC: uint8 training images.
        held_out_NHWC: uint8 real images that were not trained on; None leaves the null out.
        threshold: below it a sample counts as a copy.
        device: where distances are computed.
    """
    train_BCHW = train_NHWC.movedim(-1, -3)
    train_MD = torch.cat([thumbnails(part) for part in train_BCHW.split(1024)]).to(device)
    samples = thumbnail_ND.to(device)
    distance_N, nearest_N = nearest(samples, train_MD)
    moved_N = torch.minimum(nearest_moved(samples, train_BCHW), distance_N)
    held_rate = held_rate_moved = None
    if held_out_NHWC is not None:
        held = thumbnails(held_out_NHWC.movedim(-1, -3)).to(device)
        held_N = nearest(held, train_MD)[0]
        held_rate = _share(held_N, threshold)
        held_rate_moved = _share(torch.minimum(nearest_moved(held, train_BCHW), held_N), threshold)
    return Copies(
        copy_rate=_share(distance_N, threshold),
        copy_rate_moved=_share(moved_N, threshold),
        held_out_rate=held_rate,
        held_out_rate_moved=held_rate_moved,
        threshold=threshold,
        distance_N=distance_N.cpu(),
        nearest_N=nearest_N.cpu(),
    )


def _share(distance_N: Tensor, threshold: float) -> float:
    return (distance_N < threshold).float().mean().item()


def neighbour_picture(sample_NHWC: Tensor, train_NHWC: Tensor, path: str | Path, neighbours: int = 4) -> Path:
    """Writes a PNG: each row a sample, then its nearest training images, nearest first.

    Args:
        sample_NHWC: uint8 samples, one per row.
        train_NHWC: uint8 training images of the same size.
        path: file to write, .png.
        neighbours: training images per row.

    Raises:
        ValueError: sizes differ, or the path is not a .png that can be written.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"the name of a sheet ends in .png, got {path}")
    if sample_NHWC.shape[1:] != train_NHWC.shape[1:]:
        raise ValueError(
            f"samples {tuple(sample_NHWC.shape[1:])} and images {tuple(train_NHWC.shape[1:])} differ in size"
        )
    train_MD = torch.cat([thumbnails(part.movedim(-1, -3)) for part in train_NHWC.split(1024)])
    distance_NM = torch.cdist(thumbnails(sample_NHWC.movedim(-1, -3)), train_MD)
    order = distance_NM.topk(min(neighbours, len(train_NHWC)), dim=1, largest=False).indices
    pictures = []
    for sample, indices in zip(sample_NHWC, order.tolist(), strict=True):
        pictures += [Image.fromarray(image.cpu().numpy()) for image in (sample, *(train_NHWC[i] for i in indices))]
    with atomic_write(path) as temporary:
        grid(pictures, columns=1 + order.shape[1]).save(temporary, format="PNG")
    return path
