"""Feature extractors behind the scores: torch-fidelity's Inception, and networks that need no download.

Each is a `FeatureExtractorBase` of torch-fidelity, registered there as visar-<name>, so `calculate_metrics` takes the
same ones. The name of a Frechet distance belongs to its extractor: only Inception's is called FID.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from visar.evaluate import craft, efficientnet_lite
from visar.evaluate.craft import load_craft
from visar.evaluate.efficientnet_lite import load_efficientnet_lite0
from visar.evaluate.images import ImageSource
from visar.io.files import load_weights, sha256

INCEPTION_URL_SHA_PREFIX = "6726825d"


def check_images(image_BCHW: Tensor) -> None:
    """Checks what an extractor of single images is given.

    Raises:
        ValueError: not uint8 [B, 3, H, W].
    """
    if image_BCHW.dtype != torch.uint8 or image_BCHW.dim() != 4 or image_BCHW.shape[1] != 3:
        raise ValueError(f"images are {image_BCHW.dtype} {tuple(image_BCHW.shape)}; uint8 [B, 3, H, W] is needed")


def resampled(image_BCHW: Tensor, side: int) -> Tensor:
    """Images as squares of a side, bilinear: plain where they grow (pixel centres aligned), antialiased where not."""
    antialias = max(image_BCHW.shape[-2:]) > side
    return F.interpolate(image_BCHW, size=(side, side), mode="bilinear", antialias=antialias)


class OwnExtractor(FeatureExtractorBase):
    """What the networks without a download answer torch-fidelity.

    Attributes:
        FEATURES: what it can compute; the first are those of distances.
    """

    FEATURES: tuple[str, ...]

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return cls.FEATURES

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return "logits" if metric == "isc" else cls.FEATURES[0]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 64, 64, dtype=torch.uint8)


class FeatureExtractorLite0(OwnExtractor):
    """EfficientNet-Lite0: '320' and '1280' pooled features, 'logits'. Images go to 128 x 128, see `resampled`."""

    INPUT_IMAGE_SIZE = 128
    FEATURES: tuple[str, ...] = ("320", "1280", "logits")

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        feature_extractor_internal_dtype: str | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(name, features_list)
        dtypes = {None: torch.float32, "float32": torch.float32, "float64": torch.float64}
        if feature_extractor_internal_dtype not in dtypes:
            raise ValueError(f"internal dtype {feature_extractor_internal_dtype!r}; choose float32 or float64")
        dtype = dtypes[feature_extractor_internal_dtype]
        self.network = load_efficientnet_lite0(dtype=dtype, path=feature_extractor_weights_path)

    @property
    def feature_extractor_internal_dtype(self) -> torch.dtype:
        """dtype of the arithmetic inside."""
        return self.network.dtype

    def all_features(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """Every feature of uint8 [B, 3, H, W] images, float32 [B, D]."""
        image = image_BCHW.to(self.feature_extractor_internal_dtype) / 127.5 - 1.0
        last_BD, head_BD, logits_BD = self.network.pooled(resampled(image, self.INPUT_IMAGE_SIZE))
        return {"320": last_BD.float(), "1280": head_BD.float(), "logits": logits_BD.float()}

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, 3, H, W] to the requested features, in the order requested."""
        check_images(image_BCHW)
        features = self.all_features(image_BCHW)
        return tuple(features[name] for name in self.features_list)


class FeatureExtractorLite0Clip(FeatureExtractorLite0):
    """Clips by the frames' Lite0 features: their mean over time, and how much they change from frame to frame.

    'clip' has 640 numbers: 320 say what is seen, 320 how much it changes. It does not see the order of a motion beyond
    neighbouring frames, so a Frechet distance of it (FD-Lite0-clip) is not FVD.
    """

    FEATURES: tuple[str, ...] = ("clip",)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, T, 3, H, W], T >= 2, to ([B, 640],)."""
        clip_BTCHW = image_BCHW
        if clip_BTCHW.dtype != torch.uint8 or clip_BTCHW.dim() != 5 or clip_BTCHW.shape[1] < 2:
            raise ValueError(
                f"clips are {clip_BTCHW.dtype} {tuple(clip_BTCHW.shape)}; uint8 [B, T >= 2, 3, H, W] is needed"
            )
        frames_BTD = self.all_features(clip_BTCHW.flatten(0, 1))["320"].unflatten(0, clip_BTCHW.shape[:2])
        change_BD = (frames_BTD[:, 1:] - frames_BTD[:, :-1]).abs().mean(dim=1)
        return (torch.cat([frames_BTD.mean(dim=1), change_BD], dim=1),)

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8)


class FeatureExtractorCraft(OwnExtractor):
    """CRAFT's VGG-16: 'conv4_3', 512 features, means over positions, times 100 so that distances are not tiny numbers.

    Images go to 96 x 96, see `resampled`.
    """

    INPUT_IMAGE_SIZE = 96
    SCALE = 100.0
    FEATURES: tuple[str, ...] = ("conv4_3",)

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(name, features_list)
        self.network = load_craft(feature_extractor_weights_path)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, 3, H, W] to ([B, 512],)."""
        check_images(image_BCHW)
        image = resampled(image_BCHW.to(self.network.mean.dtype) / 255.0, self.INPUT_IMAGE_SIZE)
        return (self.SCALE * self.network(image).mean(dim=(2, 3)).float(),)


class FeatureExtractorInceptionSpatial(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with one feature more: 'spatial', the input of sFID.

    7 channels of the first 1x1 branch of the 17 x 17 block that TensorFlow's graph calls mixed_6, flattened as
    (row, column, channel) to 2023 numbers: openai/guided-diffusion evaluations/evaluator.py. A stored mu_s/sigma_s of
    ADM's reference batches has that layout.
    """

    features_list: list[str]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if "spatial" not in self.features_list:
            return super().forward(x)
        wanted: list[str] = self.features_list
        kept: list[Any] = []
        hook = self.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            # Inception's own forward stops at the last feature asked for; "2048" lies behind the block of the hook.
            self.features_list = [name for name in wanted if name != "spatial"] or ["2048"]
            found = dict(zip(self.features_list, super().forward(x), strict=True))
        finally:
            hook.remove()
            self.features_list = wanted
        found["spatial"] = kept[0][:, :7].permute(0, 2, 3, 1).flatten(1).float()
        return tuple(found[name] for name in wanted)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return *FeatureExtractorInceptionV3.get_provided_features_list(), "spatial"


@dataclass(frozen=True)
class ExtractorKind:
    """A row of `EXTRACTORS`.

    Attributes:
        network: the torch-fidelity class.
        distance: what its Frechet distance is called, everywhere.
        layer: features of the Frechet distance, KID, precision and recall.
        logits: features of the inception score; None if it has no classes.
        spatial: features of sFID; None if it has none.
        resize: how an image of any size reaches the network's size.
        weights: sha256 of the only weights that it takes, see its module; None if it takes any.
    """

    network: type[FeatureExtractorBase]
    distance: str
    layer: str
    logits: str | None
    spatial: str | None
    resize: str
    weights: str | None = None


EXTRACTORS: dict[str, ExtractorKind] = {
    "efficientnet-lite0": ExtractorKind(
        FeatureExtractorLite0,
        "FD-Lite0",
        "320",
        "logits",
        None,
        "bilinear to 128 x 128, antialiased if shrinking",
        efficientnet_lite.WEIGHTS_SHA256,
    ),
    "efficientnet-lite0-clip": ExtractorKind(
        FeatureExtractorLite0Clip,
        "FD-Lite0-clip",
        "clip",
        None,
        None,
        "frames bilinear to 128 x 128",
        efficientnet_lite.WEIGHTS_SHA256,
    ),
    "craft": ExtractorKind(
        FeatureExtractorCraft,
        "FD-CRAFT",
        "conv4_3",
        None,
        None,
        "bilinear to 96 x 96, antialiased if shrinking",
        craft.WEIGHTS_SHA256,
    ),
    "inception-v3": ExtractorKind(
        FeatureExtractorInceptionSpatial,
        "FID",
        "2048",
        "logits_unbiased",
        "spatial",
        "bilinear to 299 x 299 as in TensorFlow 1 (torch-fidelity)",
    ),
}


@dataclass(frozen=True)
class Extractor:
    """A loaded extractor.

    Attributes:
        name: key of its kind.
        kind: the row of `EXTRACTORS`.
        module: the network; calling it on uint8 images gives the features of `layers`, in that order.
        layers: names of the features it computes.
        device: where it is.
        dtype: "float32" or "float64", of its arithmetic.
        weights: sha256 of its weights; None when torch-fidelity fetched them itself.
    """

    name: str
    kind: ExtractorKind
    module: FeatureExtractorBase
    layers: tuple[str, ...]
    device: torch.device
    dtype: str
    weights: str | None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] (clips [B, T, 3, H, W]) to float32 [B, D] a layer, on the CPU."""
        features = self.module(images.to(self.device))
        return {name: value.float().cpu() for name, value in zip(self.layers, features, strict=True)}

    def width(self, layer: str) -> int:
        """Number of features of a layer."""
        return self(self.kind.network.get_dummy_input_for_compile())[layer].shape[1]


def load_extractor(
    name: str = "efficientnet-lite0",
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    weights: str | Path | None = None,
    layer: str | None = None,
    spatial: bool = False,
) -> Extractor:
    """An extractor by name.

    Args:
        name: key of `EXTRACTORS`.
        device: where it runs.
        dtype: "float32", or "float64" (torch-fidelity 0.4 takes the word but computes in float32; here it is meant).
        weights: file of weights; None takes the installed package's (Lite0, CRAFT) or lets torch-fidelity download
            them (Inception). A PyTorch file must hold tensors only.
        layer: features of the Frechet distance; None is the kind's own.
        spatial: also compute sFID's features.

    Raises:
        ValueError: an unknown name, layer or dtype, a file that is not the network's, no sFID features, or weights
            that had to be downloaded and could not be.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"feature extractor {name!r}; choose {', '.join(EXTRACTORS)}")
    kind = EXTRACTORS[name]
    if dtype not in ("float32", "float64"):
        raise ValueError(f"extractor dtype {dtype!r}; choose float32 or float64")
    provided = kind.network.get_provided_features_list()
    if layer is not None and layer not in provided:
        raise ValueError(f"{name} has no layer {layer!r}; choose {', '.join(provided)}")
    if spatial and kind.spatial is None:
        raise ValueError(f"{name} has no features for sFID; inception-v3 has")
    layers = tuple(dict.fromkeys(filter(None, (layer or kind.layer, kind.logits, kind.spatial if spatial else None))))
    digest = kind.weights
    if digest is None and weights is not None:
        load_weights(weights)  # refuses files whose pickle runs code: torch-fidelity would run it
        digest = sha256(weights)
    registered = FEATURE_EXTRACTORS_REGISTRY.get(f"visar-{name}")
    if registered is None:
        register_feature_extractor(f"visar-{name}", kind.network)
    try:
        module = create_feature_extractor(
            f"visar-{name}",
            list(layers),
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
    except OSError as error:
        raise ValueError(
            f"{name}'s weights could not be downloaded ({error}); fetch weights-inception-2015-12-05-"
            f"{INCEPTION_URL_SHA_PREFIX}.pth from torch-fidelity's releases and give its path, "
            "or use efficientnet-lite0"
        ) from error
    module = module.to(device=torch.device(device), dtype=getattr(torch, dtype))
    if isinstance(module, FeatureExtractorInceptionV3):
        module.feature_extractor_internal_dtype = getattr(torch, dtype)
    return Extractor(name, kind, module, layers, torch.device(device), dtype, digest)


def extract(
    extractor: Extractor, source: ImageSource, batch_size: int, progress: Callable[[int], None] | None = None
) -> Iterable[dict[str, Tensor]]:
    """Features of a set of images, a batch at a time, in order; `progress` is told the number of images done."""
    done = 0
    for images in source.batches(batch_size):
        yield extractor(images)
        done += len(images)
        if progress is not None:
            progress(done)
