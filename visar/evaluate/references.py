"""What samples are compared with: images, a batch file of ADM's evaluator, or a statistics file of ours.

A statistics file is an .npz without pickles: `visar` (JSON: extractor, its weights, protocol, source and its sha256,
...), and for each layer L `mu_L` float64 [D], `sigma_upper_L` float64 [D (D + 1) / 2] (upper triangle, row by row),
optionally `features_L` float32 [N, D], and `label_rows` [R, A] with `label_counts` [R] and perhaps `label_classes`,
the names of the numbers in their first column.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from visar.evaluate.extractors import Extractor, extract
from visar.evaluate.images import (
    IMAGE_ARRAYS,
    ArrayImages,
    FolderImages,
    ImageSource,
    NpzImages,
    ResizeChain,
    SplitImages,
    open_images,
)
from visar.evaluate.labels import LabelTable
from visar.evaluate.statistics import FeatureStatistics, MeasuredStatistics
from visar.io.arrays import npz_arrays, read_arrays
from visar.io.files import atomic_write, check_file_output, json_object, sha256
from visar.io.progress import Progress, counted

Protocol = Literal["generation", "reconstruction"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
FORMAT = 1
SHIPPED = {"emoji64-lite0-f320": Path(__file__).with_name("emoji64-lite0-f320.npz")}


@dataclass(frozen=True)
class Reference:
    """Statistics of real images for one extractor.

    Attributes:
        name: file, folder or set.
        kind: "statistics file", "ADM batch", "npz of images", "folder" or "images".
        sha256: of the file, of the folder's names and bytes, or of the pixels.
        protocol: what it is for; figures of the two protocols never share a column.
        extractor: name of the extractor; None when the file does not say (ADM batches).
        weights: sha256 of the extractor's weights; None when not known.
        resize: how images got their size.
        statistics: by layer.
        features: float32 [N, D] by layer, for KID, precision and recall; empty when only statistics are known.
        labels: the images' labels; None when not known.
        notes: what a reader of a figure should know.
    """

    name: str
    kind: str
    sha256: str
    protocol: Protocol
    extractor: str | None
    weights: str | None
    resize: str
    statistics: dict[str, FeatureStatistics]
    features: dict[str, Tensor] = field(default_factory=dict)
    labels: LabelTable | None = None
    notes: tuple[str, ...] = ()


def check_protocol(protocol: str) -> Protocol:
    """The protocol, if there is one of that name.

    Raises:
        ValueError: there is none.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}; choose {' or '.join(PROTOCOLS)}")
    return protocol  # type: ignore[return-value]


def measure(
    source: ImageSource,
    extractor: Extractor,
    *,
    protocol: Protocol,
    batch_size: int,
    labels: LabelTable | None = None,
    kind: str = "images",
    resize: str = "none",
    keep_features: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """A reference made by running the extractor over images.

    Args:
        source: the images.
        extractor: its layers but the logits are measured.
        protocol: what the reference is for.
        batch_size: images at a time.
        labels: their labels, for samples that follow the training histogram; None takes those that the set brings.
        kind, resize: words for the report.
        keep_features: hold the features too; KID, precision and recall need them.
        progress: told the number of images done.
    """
    layers = [layer for layer in extractor.layers if layer != extractor.kind.logits]
    running = {layer: MeasuredStatistics() for layer in layers}
    gathered: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for features in extract(extractor, source, batch_size, progress):
        for layer in layers:
            running[layer].update(features[layer])
            if keep_features:
                gathered[layer].append(features[layer])
    return Reference(
        name=source.name,
        kind=kind,
        sha256=source.digest(),
        protocol=protocol,
        extractor=extractor.name,
        weights=extractor.weights,
        resize=resize,
        statistics={layer: sums.finish() for layer, sums in running.items()},
        features={layer: torch.cat(blocks) for layer, blocks in gathered.items() if blocks},
        labels=source.labels if labels is None and isinstance(source, ArrayImages | SplitImages) else labels,
    )


def load_reference(
    source: str | Path | np.ndarray | Tensor | ImageSource,
    extractor: Extractor,
    *,
    protocol: str = "generation",
    batch_size: int = 64,
    resize: ResizeChain = "none",
    image_size: int | None = None,
    labels: LabelTable | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """A reference from whatever holds one.

    Args:
        source: a name of `SHIPPED`; a statistics file of ours; an .npz with mu and sigma (ADM's reference batches:
            their mu and sigma are used for the distance, their 10,000 images for KID, precision and recall); an .npz
            of images; or what `open_images` takes.
        extractor: must be the one behind a file's statistics.
        protocol: "generation" or "reconstruction"; must be the file's, where the file records it.
        batch_size: images at a time, where images are read.
        resize, image_size: for folders, see FolderImages.
        labels: labels of the images, where they are given as images that do not bring their own.
        progress: told the number of images done.

    Raises:
        ValueError: the file is missing or broken, lacks arrays, or is for another extractor, layer or protocol.
    """
    protocol = check_protocol(protocol)
    text = str(source) if isinstance(source, str | Path) else ""
    if text in SHIPPED or text.endswith(".npz"):
        path = SHIPPED.get(text, Path(text))
        arrays = npz_arrays(path)
        if "visar" in arrays:
            return checked(load_statistics(path), extractor, protocol)
        if "mu" in arrays or "sigma" in arrays:
            return _adm_batch(path, arrays, extractor, protocol, batch_size, progress)
        if not set(IMAGE_ARRAYS) & set(arrays):
            raise ValueError(
                f"{path} holds {', '.join(arrays) or 'nothing'}; mu and sigma, or images "
                f"({' or '.join(IMAGE_ARRAYS)}), or a file of `visar stats` is needed"
            )
        images: ImageSource = NpzImages(path)
        kind, chain = "npz of images", "none"
    else:
        images = open_images(source, resize, image_size)
        kind = "folder" if isinstance(images, FolderImages) else "images"
        chain = "none" if image_size is None else f"{resize} to {image_size}"
    return measure(
        images,
        extractor,
        protocol=protocol,
        batch_size=batch_size,
        labels=labels,
        kind=kind,
        resize=chain,
        progress=progress,
    )


def checked(reference: Reference, extractor: Extractor, protocol: Protocol) -> Reference:
    """The reference, if it can be used with this extractor and protocol.

    Raises:
        ValueError: it is for another extractor, other weights, other layers or another protocol.
    """
    if reference.protocol != protocol:
        raise ValueError(
            f"{reference.name} is a reference for {reference.protocol}, not for {protocol}: figures of the two "
            "protocols do not compare (samples against the training set; reconstructions against their originals)"
        )
    if reference.extractor != extractor.name:
        raise ValueError(
            f"{reference.name} was made with {reference.extractor}, the samples' extractor is {extractor.name}"
        )
    if None not in (reference.weights, extractor.weights) and reference.weights != extractor.weights:
        raise ValueError(
            f"{reference.name} was made with other weights of {extractor.name}: sha256 {reference.weights}, "
            f"here {extractor.weights}"
        )
    missing = [name for name in extractor.layers if name not in (*reference.statistics, extractor.kind.logits)]
    if missing:
        raise ValueError(
            f"{reference.name} holds layer {', '.join(reference.statistics)}, "
            f"the extractor computes {', '.join(missing)}"
        )
    return reference


def _adm_batch(
    path: Path,
    arrays: list[str],
    extractor: Extractor,
    protocol: Protocol,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Reference:
    """A batch file of openai/guided-diffusion's evaluator: statistics of the training set, images of a part of it."""
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise ValueError(f"{path} holds {', '.join(arrays)} but not {', '.join(missing)}")
    layer, spatial = extractor.layers[0], extractor.kind.spatial
    pairs = [(layer, "mu", "sigma")]
    if spatial in extractor.layers and spatial is not None:
        if not {"mu_s", "sigma_s"} <= set(arrays):
            raise ValueError(f"{path} holds {', '.join(arrays)}; sFID needs mu_s and sigma_s")
        pairs.append((spatial, "mu_s", "sigma_s"))
    statistics = {}
    for name, mu, sigma in pairs:
        stored = read_arrays(path, [mu, sigma])
        statistics[name] = _statistics(stored[mu], stored[sigma], path, mu, sigma, extractor, name)
    notes = ["the reference file does not record its protocol or its extractor"]
    features: dict[str, Tensor] = {}
    if set(IMAGE_ARRAYS) & set(arrays):
        images = NpzImages(path)
        blocks = [block[layer] for block in extract(extractor, images, batch_size, progress)]
        features[layer] = torch.cat(blocks)
        notes.append(f"KID, precision and recall use the {len(images)} images of the reference file")
    return Reference(
        name=path.name,
        kind="ADM batch",
        sha256=sha256(path),
        protocol=protocol,
        extractor=None,
        weights=None,
        resize="as in the reference file",
        statistics=statistics,
        features=features,
        notes=tuple(notes),
    )


def _statistics(
    mu: np.ndarray, sigma: np.ndarray, path: Path, mu_name: str, sigma_name: str, extractor: Extractor, layer: str
) -> FeatureStatistics:
    width = extractor.width(layer)
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise ValueError(
            f"{path}: {mu_name} has shape {mu.shape} and its covariance {sigma.shape}; {extractor.name} layer {layer} "
            f"needs ({width},) and ({width}, {width})"
        )
    mean, covariance = _numbers(mu, path, mu_name), _numbers(sigma, path, sigma_name)
    if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6 * np.abs(covariance).max()):
        raise ValueError(f"{path}: {sigma_name} is not symmetric, so it is no covariance")
    return FeatureStatistics(mean, covariance, None)


def _numbers(array: np.ndarray, path: Path, name: str) -> np.ndarray:
    """The array in float64.

    Raises:
        ValueError: it holds something else than finite numbers.
    """
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {name} is {array.dtype}; real numbers are needed")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} has values that are not finite")
    return array.astype(np.float64)


def save_statistics(reference: Reference, path: str | Path) -> Path:
    """Writes a statistics file; features are stored where the reference holds them.

    Raises:
        ValueError: the reference lacks what the file must record (extractor, counts), or the path cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"a statistics file is named .npz, got {path}")
    counts = {layer: statistics.count for layer, statistics in reference.statistics.items()}
    if reference.extractor is None or None in counts.values():
        raise ValueError(f"{reference.name} does not say its extractor or its number of images: it is not copied")
    meta = {
        "format": FORMAT,
        "name": reference.name,
        "kind": reference.kind,
        "source_sha256": reference.sha256,
        "protocol": reference.protocol,
        "extractor": reference.extractor,
        "extractor_weights_sha256": reference.weights,
        "resize": reference.resize,
        "layers": {
            layer: {"count": statistics.count, "null_constant": statistics.null_constant}
            for layer, statistics in reference.statistics.items()
        },
        "notes": list(reference.notes),
    }
    arrays: dict[str, np.ndarray] = {"visar": np.array(json.dumps(meta, sort_keys=True))}
    for layer, statistics in reference.statistics.items():
        arrays[f"mu_{layer}"] = statistics.mu_D
        arrays[f"sigma_upper_{layer}"] = statistics.sigma_DD[np.triu_indices(statistics.width)]
    for layer, features in reference.features.items():
        arrays[f"features_{layer}"] = features.numpy()
    if reference.labels is not None:
        arrays["label_rows"] = np.array(reference.labels.rows, dtype=np.int32)
        arrays["label_counts"] = np.array(reference.labels.counts, dtype=np.int32)
        if reference.labels.classes is not None:
            arrays["label_classes"] = np.array(reference.labels.classes)
    with atomic_write(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    return path


def load_statistics(path: str | Path) -> Reference:
    """Reads a statistics file written by `save_statistics`.

    Raises:
        ValueError: missing, truncated, not such a file, or of a newer format.
    """
    path = Path(path)
    if "visar" not in npz_arrays(path):
        raise ValueError(f"{path} is not a statistics file: it holds {', '.join(npz_arrays(path))}")
    arrays = read_arrays(path)
    try:
        try:
            meta = json_object(str(arrays["visar"]))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: its array visar does not describe it ({error})") from error
        if meta.get("format") != FORMAT:
            raise ValueError(f"{path} has format {meta.get('format')}; this version reads {FORMAT}")
        if meta["protocol"] not in PROTOCOLS:
            raise ValueError(f"{path} is for the protocol {meta['protocol']!r}; {' or '.join(PROTOCOLS)} is needed")
        missing = [
            name for layer in meta["layers"] for name in (f"mu_{layer}", f"sigma_upper_{layer}") if name not in arrays
        ]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        statistics = {layer: _stored_statistics(arrays, layer, row, path) for layer, row in meta["layers"].items()}
        return Reference(
            name=path.name,
            kind="statistics file",
            sha256=sha256(path),
            protocol=check_protocol(meta["protocol"]),
            extractor=meta["extractor"],
            weights=meta["extractor_weights_sha256"],
            resize=meta["resize"],
            statistics=statistics,
            features={
                layer: _stored_features(arrays[key], path, key, found)
                for layer, found in statistics.items()
                if (key := f"features_{layer}") in arrays
            },
            labels=_stored_labels(arrays, path) if "label_rows" in arrays else None,
            notes=(f"made of {meta['name']} ({meta['kind']}), sha256 {meta['source_sha256']}", *meta["notes"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its array visar does not describe it ({error!r})") from error


def _stored_statistics(arrays: dict[str, np.ndarray], layer: str, row: dict, path: Path) -> FeatureStatistics:
    mu, packed = (_numbers(arrays[name], path, name) for name in (f"mu_{layer}", f"sigma_upper_{layer}"))
    if mu.ndim != 1 or packed.shape != (len(mu) * (len(mu) + 1) // 2,):
        raise ValueError(f"{path}: mu_{layer} has shape {mu.shape} and sigma_upper_{layer} {packed.shape}")
    upper = np.zeros((len(mu), len(mu)))
    upper[np.triu_indices(len(mu))] = packed
    count, constant = row["count"], row["null_constant"]
    if not (isinstance(count, int) and count >= 2 and isinstance(constant, float | int | None)):
        raise ValueError(f"{path}: layer {layer} has count {count} and null constant {constant}")
    return FeatureStatistics(mu, upper + np.triu(upper, 1).T, count, constant)


def _stored_features(array: np.ndarray, path: Path, name: str, statistics: FeatureStatistics) -> Tensor:
    if array.shape != (statistics.count, statistics.width):
        raise ValueError(f"{path}: {name} has shape {array.shape}; {statistics.count} x {statistics.width} is needed")
    return torch.from_numpy(_numbers(array, path, name).astype(np.float32))


def _stored_labels(arrays: dict[str, np.ndarray], path: Path) -> LabelTable:
    rows, counts = arrays["label_rows"], arrays.get("label_counts", np.zeros(0))
    classes = arrays.get("label_classes")
    whole = rows.dtype.kind in "iu" and counts.dtype.kind in "iu" and rows.ndim == 2 and counts.shape == rows.shape[:1]
    if not whole or (rows.size and rows.min() < 0) or (classes is not None and classes.dtype.kind != "U"):
        raise ValueError(
            f"{path}: label_rows is {rows.dtype} {rows.shape}, label_counts {counts.dtype} {counts.shape}"
        )
    names = None if classes is None else tuple(classes.tolist())
    if names is not None and rows.size and rows[:, 0].max() >= len(names):
        raise ValueError(f"{path}: label_rows has the class {rows[:, 0].max()}, label_classes {len(names)} names")
    try:
        return LabelTable(tuple(tuple(row) for row in rows.tolist()), tuple(counts.tolist()), names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_statistics(
    source: str | Path | ImageSource,
    extractor: Extractor,
    out: str | Path,
    *,
    protocol: Literal["generation", "reconstruction"] = "generation",
    batch_size: int = 64,
    resize: ResizeChain = "none",
    image_size: int | None = None,
    labels: LabelTable | None = None,
    keep_features: bool = False,
    progress: Progress | None = None,
) -> Reference:
    """Writes a statistics file of real images; the whole of `visar stats`.

    Args:
        source: folder, .npz of images, or an open set.
        extractor: whose features; the file can be used with this extractor and these weights only.
        out: file to write, .npz.
        protocol: what the file is a reference for.
        batch_size: images at a time.
        resize, image_size: how a folder's images get their size.
        labels: the images' labels, for samples that follow their histogram; None takes those that the set brings.
        keep_features: also store the features, which KID, precision and recall need; 4 bytes per image and feature.
        progress: told (what, done, total).

    Raises:
        ValueError: no images, unreadable ones, or a path that cannot be written.
    """
    check_file_output(out, (".npz",))
    images = open_images(source, resize, image_size)
    reference = measure(
        images,
        extractor,
        protocol=protocol,
        batch_size=batch_size,
        labels=labels,
        resize="none" if image_size is None else f"{resize} to {image_size}",
        keep_features=keep_features,
        progress=counted(progress, "images", len(images)),
    )
    save_statistics(reference, out)
    return reference
