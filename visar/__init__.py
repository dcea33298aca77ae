"""visar: visual autoregressive image generation. Tokenizers, generators and samplers behind one small interface."""

from visar.condition import Condition
from visar.generators.raster import RasterGPT
from visar.guidance import Guidance
from visar.noise import Noise, image_seeds
from visar.output import SampleOutput, SampleStatistics, TokenLayout
from visar.pipelines.image import ImageOutput, ImagePipeline
from visar.pipelines.loading import load, load_tokenizer
from visar.runtime import Runtime
from visar.samplers.ancestral import sample_ancestral
from visar.tokenizers.vq import VQTokenizer

__all__ = [
    "Condition",
    "Guidance",
    "ImageOutput",
    "ImagePipeline",
    "Noise",
    "RasterGPT",
    "Runtime",
    "SampleOutput",
    "SampleStatistics",
    "TokenLayout",
    "VQTokenizer",
    "image_seeds",
    "load",
    "load_tokenizer",
    "sample_ancestral",
]
