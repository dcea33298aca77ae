"""The protocols of models: which classes have which capability, and what every model of a capability does."""

import inspect

import pytest
import torch

from visar.core import interface
from visar.core.interface import (
    Categorical,
    Continuous,
    DensityHead,
    Drawing,
    Features,
    Generator,
    Masked,
    OneStep,
    Refining,
    Scales,
    Staged,
    Stream,
    Streaming,
    TokenHead,
    Tokenizer,
    Trees,
    Windowed,
)
from visar.generators.causal_continuous import CausalContinuous
from visar.generators.coarse_to_fine import CoarseToFine
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.masked import MaskedGenerator
from visar.generators.next_neighbor import NextNeighborTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.generators.region_parallel import RegionParallelTransformer
from visar.generators.tabular import TabularGenerator
from visar.samplers.drafters.heads import SpatialHeads
from visar.samplers.drafters.interface import Drafter
from visar.samplers.drafters.ngram import NgramDrafter
from visar.samplers.index import SAMPLERS
from visar.tokenizers.kl import KLTokenizer
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import VQTokenizer

RASTER = dict(vocab_size=16, grid=(2, 2), width=16, num_layers=1, num_heads=2, hidden_width=32)
PYRAMID = dict(vocab_size=16, codebook_width=4, scales=(1, 2), width=16, num_layers=2, num_heads=2)
VECTORS = dict(channels=2, grid=(2, 2), width=16, num_heads=2, num_classes=3, head_arguments=dict(width=8, depth=1))
STAGES = dict(clusters=4, fine_width=16, fine_layers=1, fine_heads=2, fine_hidden_width=32)
MODELS = {
    "raster": lambda: RasterGPT(**RASTER, num_classes=3, attributes=(2, 5)),
    "words": lambda: RasterGPT(**RASTER, num_classes=0, word_vocab_size=9, num_words=3),
    "captions": lambda: RasterGPT(**RASTER, num_classes=0, caption_width=8, caption_length=4),
    "stages": lambda: CoarseToFine(**RASTER, **STAGES, num_classes=3, attributes=(2,)),
    "table": lambda: TabularGenerator(vocab_size=3),
    "scales": lambda: NextScaleTransformer(**PYRAMID, num_classes=3),
    "masked": lambda: HierarchicalMaskedTransformer(**PYRAMID, num_classes=3, num_refinement_layers=1),
    "causal vectors": lambda: CausalContinuous(**VECTORS, hidden_width=32, num_layers=1),
    "masked vectors": lambda: MaskedGenerator(**VECTORS, encoder_layers=1, decoder_layers=1, buffer_size=2),
    "neighbors": lambda: NextNeighborTransformer(**RASTER, num_classes=3, attributes=(2, 5)),
    "box of neighbors": lambda: NextNeighborTransformer(**{**RASTER, "grid": (2, 2, 3)}, positions="learned"),
    "regions": lambda: RegionParallelTransformer(**RASTER, num_classes=0, word_vocab_size=9, num_words=3),
}
CAPABILITIES = {
    "raster": {Generator, Categorical, Windowed, Trees, Features},
    "words": {Generator, Categorical, Windowed, Trees, Features},
    "captions": {Generator, Categorical, Windowed, Trees, Features},
    "stages": {Generator, Staged},
    "table": {Generator, Categorical, Windowed, Trees},
    "scales": {Generator, Categorical, Scales},
    "masked": {Generator, Categorical, Scales, Refining},
    "causal vectors": {Generator, Continuous},
    "masked vectors": {Generator, Masked},
    "neighbors": {Generator, Categorical},
    "box of neighbors": {Generator, Categorical},
    "regions": {Generator, Categorical},
}
GENERATORS = set.union(*CAPABILITIES.values())


def test_every_protocol_is_asked_for_here():
    found = {value for value in vars(interface).values() if getattr(value, "_is_protocol", False)}
    # students: tests/test_distill.py; decoders that draw: tests/test_tokenizers_diffusion.py
    others = {OneStep, Tokenizer, TokenHead, DensityHead, Drawing, Stream, Streaming}
    assert {value for value in found if value.__module__ == interface.__name__} == GENERATORS | others
    assert {entry.needs for entry in SAMPLERS.values()} <= {*GENERATORS, OneStep}


def typing_members(protocol: type) -> set[str]:
    """Names that a protocol asks for."""
    known = {name for each in protocol.__mro__ for name in vars(each) if getattr(each, "_is_protocol", False)}
    return {name for name in known if not name.startswith("_")}


def arguments(function) -> tuple[int, set[str]]:
    """Number of arguments by place, and the names of those by keyword alone."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
    keywords = {name for name, kind in kinds.items() if kind == inspect.Parameter.KEYWORD_ONLY}
    return len(kinds) - len(keywords), keywords


@pytest.mark.parametrize("name", MODELS)
def test_capabilities_of_generators(name):
    model = MODELS[name]()
    assert {protocol for protocol in GENERATORS if isinstance(model, protocol)} == CAPABILITIES[name]
    assert not isinstance(model, Tokenizer) and not isinstance(model, Drafter)
    for protocol in CAPABILITIES[name]:
        for member in typing_members(protocol):
            inspect.getattr_static(model, member)  # what isinstance does from Python 3.12 on: no __getattr__
        for call, wanted in inspect.getmembers(protocol, inspect.isfunction):
            if not call.startswith("_"):
                wanted_places, wanted_keywords = arguments(wanted)
                places, keywords = arguments(getattr(type(model), call))
                assert wanted_places <= places and wanted_keywords <= keywords, call


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_example_of_a_condition_is_taken(name):
    model = MODELS[name]().eval()
    condition = model.example_condition(3)
    assert condition.batch == model.null_condition(condition).batch == 3
    state = model.start(condition)
    if isinstance(model, Categorical):
        assert len(model.predict(state)) == 3
    assert model.num_tokens == sum(model.block_sizes)


def test_tokenizers_and_drafters():
    small = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1)
    for tokenizer in (
        VQTokenizer(image_size=8, codebook_size=16, latent_channels=16, **small),
        KLTokenizer(image_size=8, latent_channels=4, **small),
        MultiScaleVQTokenizer(codebook_size=16, codebook_dim=8, scales=(1, 2), **small),
    ):
        assert isinstance(tokenizer, Tokenizer) and not isinstance(tokenizer, Generator)
    assert isinstance(NgramDrafter(), Drafter) and not isinstance(NgramDrafter(), Generator)
    assert isinstance(SpatialHeads(vocab_size=4, grid=(2, 2), width=8), Drafter)
