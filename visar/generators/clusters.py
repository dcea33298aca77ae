"""Clusters of a tokenizer's codes: k-means on the code vectors, with clusters of any size or all of one size.

Sources: k-means++, Arthur and Vassilvitskii (SODA 2007); clusters of one size as in IAR, arXiv 2501.00880, which gives
room to the nearest pairs of code and centre first. Here codes ask for room and centres refuse (Gale and Shapley,
1962), which ends in the same assignment.

V codes, M clusters, C code width.
"""

import numpy as np
import torch
from torch import Tensor

from visar.core.noise import Noise, Use

ITERATIONS, BALANCED_ITERATIONS = 50, 10


def cluster_codes(
    codes_VC: Tensor, clusters: int, *, balanced: bool = True, seed: int = 0, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Cluster of every code, int64 [V], and its rank there, int64 [V]: 0 for the code nearest to the cluster's mean.

    No cluster is empty. The result depends on the arguments alone, not on threads or devices.

    Args:
        codes_VC: code vectors as looked up.
        clusters: M, 1 ... V.
        balanced: sizes differ by one at most.
        seed: of the first centres.
        iterations: most of k-means.

    Raises:
        ValueError: more clusters than codes, or none.
    """
    codes = codes_VC.detach().cpu().double().numpy()
    if not 1 <= clusters <= len(codes):
        raise ValueError(f"clusters {clusters}; allowed: 1 ... {len(codes)}, the number of codes")
    label = _improve(codes, _any_size(_distances(codes, codes[_first(codes, clusters, seed)])), clusters, iterations)
    if balanced:
        first = _one_size(_distances(codes, _means(codes, label, clusters)))
        label = _improve(codes, first, clusters, min(iterations, BALANCED_ITERATIONS), balanced=True)
    order, place = _grouped(label, ((codes - _means(codes, label, clusters)[label]) ** 2).sum(1), clusters)
    rank = np.empty_like(label)
    rank[order] = place
    return torch.from_numpy(label), torch.from_numpy(rank)


def inertia(codes_VC: Tensor, cluster_V: Tensor) -> float:
    """Sum of the squared distances of codes from the means of their clusters: what k-means makes small."""
    label = cluster_V.cpu().numpy()
    return _inertia(codes_VC.detach().cpu().double().numpy(), label, int(label.max()) + 1)


def _inertia(codes: np.ndarray, label: np.ndarray, clusters: int) -> float:
    return float(((codes - _means(codes, label, clusters)[label]) ** 2).sum(1).cumsum()[-1])


def _first(codes: np.ndarray, clusters: int, seed: int) -> list[int]:
    """Codes that are the first centres: each drawn by its squared distance from those before it (k-means++)."""
    uniform = Noise([seed]).uniform(Use.INITIAL, torch.arange(clusters)[None])[0].double().tolist()
    chosen = [int(uniform[0] * len(codes))]
    nearest = ((codes - codes[chosen[0]]) ** 2).sum(1)
    for number in uniform[1:]:
        weight = nearest
        if not weight.any():  # codes that are the same
            weight = np.ones(len(codes))
            weight[chosen] = 0.0
        total = weight.cumsum()
        chosen.append(int(np.searchsorted(total, number * total[-1], side="right")))
        nearest = np.minimum(nearest, ((codes - codes[chosen[-1]]) ** 2).sum(1))
    return chosen


def _improve(
    codes: np.ndarray, label: np.ndarray, clusters: int, iterations: int, balanced: bool = False
) -> np.ndarray:
    """Means and assignments in turn, until they gain nothing (Lloyd)."""
    assign = _one_size if balanced else _any_size
    lowest = _inertia(codes, label, clusters)
    for _ in range(iterations):
        moved = assign(_distances(codes, _means(codes, label, clusters)))
        value = _inertia(codes, moved, clusters)
        if value >= lowest:
            break
        label, lowest = moved, value
    return label


def _distances(codes: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances [V, M]; not by a product, whose sums depend on the number of threads."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(torch.from_numpy(codes), torch.from_numpy(centres), compute_mode=exact).square().numpy()


def _means(codes: np.ndarray, label: np.ndarray, clusters: int) -> np.ndarray:
    """Mean [M, C] of every cluster; none is empty."""
    sums = np.zeros((clusters, codes.shape[1]))
    np.add.at(sums, label, codes)
    return sums / np.bincount(label, minlength=clusters)[:, None]


def _any_size(distances: np.ndarray) -> np.ndarray:
    """The nearest centre of every code; a centre that is no code's gets the code that is farthest from its own."""
    clusters = distances.shape[1]
    label = distances.argmin(1)
    own = distances.min(1)
    sizes = np.bincount(label, minlength=clusters)
    for empty in np.flatnonzero(sizes == 0):
        farthest = int(np.where(sizes[label] > 1, own, -1.0).argmax())
        sizes[label[farthest]] -= 1
        sizes[empty], label[farthest], own[farthest] = 1, empty, 0.0
    return label


def _one_size(distances: np.ndarray) -> np.ndarray:
    """Centres with room for V / M codes each; where that is no whole number, the most wanted have one more."""
    codes, clusters = distances.shape
    room, more = divmod(codes, clusters)
    wanted = np.bincount(distances.argmin(1), minlength=clusters)
    rooms = np.full(clusters, room)
    rooms[np.argsort(-wanted, kind="stable")[:more]] += 1
    choices = distances.argsort(axis=1, kind="stable")
    label, asked, asking = np.empty(codes, np.int64), np.zeros(codes, np.int64), np.arange(codes)
    while len(asking):
        # All that were refused ask their next choice; a centre keeps the nearest of all that are or want to be there.
        label[asking] = choices[asking, asked[asking]]
        asked[asking] += 1
        full = np.flatnonzero((np.bincount(label, minlength=clusters) > rooms)[label])
        order, place = _grouped(label[full], distances[full, label[full]], clusters)
        asking = full[order[place >= rooms[label[full[order]]]]]
    return label


def _grouped(label: np.ndarray, distance: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [V] cluster by cluster, the nearest first, and the place of each of these in its cluster, from 0."""
    order = np.lexsort((distance, label))
    sizes = np.bincount(label, minlength=clusters)
    return order, np.arange(len(label)) - (sizes.cumsum() - sizes)[label[order]]
