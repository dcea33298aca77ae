"""visar: visual autoregressive image generation. Tokenizers, generators and samplers behind one small interface.

Names are imported when they are first used, so that `visar --help` and `import visar` do not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from visar.core.condition import Condition
    from visar.core.guidance import Guidance
    from visar.core.interface import TokenLayout
    from visar.core.noise import Noise, image_seeds
    from visar.core.output import SampleOutput, SampleStatistics
    from visar.core.runtime import Runtime
    from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
    from visar.generators.next_scale import NextScaleTransformer
    from visar.generators.raster import RasterGPT
    from visar.pipelines.components import load_tokenizer
    from visar.pipelines.image import ImageOutput, ImagePipeline
    from visar.pipelines.loading import load
    from visar.pipelines.video import VideoOutput, VideoPipeline
    from visar.samplers.ancestral import sample_ancestral
    from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
    from visar.tokenizers.video_vq import VideoVQTokenizer
    from visar.tokenizers.vq import VQTokenizer

_MODULES = {
    "Condition": "visar.core.condition",
    "Guidance": "visar.core.guidance",
    "HierarchicalMaskedTransformer": "visar.generators.hierarchical_masked",
    "ImageOutput": "visar.pipelines.image",
    "ImagePipeline": "visar.pipelines.image",
    "MultiScaleVQTokenizer": "visar.tokenizers.multiscale_vq",
    "NextScaleTransformer": "visar.generators.next_scale",
    "Noise": "visar.core.noise",
    "RasterGPT": "visar.generators.raster",
    "Runtime": "visar.core.runtime",
    "SampleOutput": "visar.core.output",
    "SampleStatistics": "visar.core.output",
    "TokenLayout": "visar.core.interface",
    "VQTokenizer": "visar.tokenizers.vq",
    "VideoOutput": "visar.pipelines.video",
    "VideoPipeline": "visar.pipelines.video",
    "VideoVQTokenizer": "visar.tokenizers.video_vq",
    "image_seeds": "visar.core.noise",
    "load": "visar.pipelines.loading",
    "load_tokenizer": "visar.pipelines.components",
    "sample_ancestral": "visar.samplers.ancestral",
}

__all__ = [
    "Condition",
    "Guidance",
    "HierarchicalMaskedTransformer",
    "ImageOutput",
    "ImagePipeline",
    "MultiScaleVQTokenizer",
    "NextScaleTransformer",
    "Noise",
    "RasterGPT",
    "Runtime",
    "SampleOutput",
    "SampleStatistics",
    "TokenLayout",
    "VQTokenizer",
    "VideoOutput",
    "VideoPipeline",
    "VideoVQTokenizer",
    "image_seeds",
    "load",
    "load_tokenizer",
    "sample_ancestral",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'visar' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
