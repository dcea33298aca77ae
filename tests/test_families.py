"""Rows of families: what training, loading and the benchmark read of them; layouts; tokens without images."""

import runpy
import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from visar.core.condition import Condition
from visar.core.guidance import OFF
from visar.core.interface import Continuous, Masked, TokenLayout, first_stage
from visar.data.images import load_image_set
from visar.data.vocabulary import Vocabulary
from visar.generators import families as generators
from visar.layers.quantize import linear_layers
from visar.pipelines.components import GENERATORS, TOKENIZERS
from visar.tokenizers import families as tokenizers
from visar.tokenizers.training import TokenizerFamily
from visar.train.building import build_generator, image_side
from visar.train.conditions import null_words
from visar.train.generator import find_phase
from visar.train.options import GeneratorName, TokenizerName
from visar.train.run import Run
from visar.train.token_batches import TokenBatches
from visar.train.token_cache import build_token_cache

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "training.py")))
CPU = torch.device("cpu")
VOCABULARY = Vocabulary({"class": ("a", "b", "c", "d")})


def tiny_tokenizer(family: TokenizerFamily) -> Any:
    torch.manual_seed(0)
    return family.model(**family.tiny).eval()


def options(**changes: Any) -> Any:
    return TINY.generator_options(Path("x"), Path("x"), Path("x"), words="none", num_layers=9, **changes)


@pytest.fixture(
    params=[(name, phase) for name in generators.FAMILIES for phase in generators.load_family(name).phases]
)
def trained(request) -> tuple[Any, Any, Any, str]:
    """A family's generator for the first tokenizer that fits, as training builds it, and a phase."""
    name, phase = request.param
    family = generators.load_family(name)
    made = (tiny_tokenizer(tokenizers.load_family(kind)) for kind in tokenizers.FAMILIES)
    tokenizer = next(each for each in made if family.fits(each.layout))
    torch.manual_seed(0)
    return family, tokenizer, build_generator(family, tokenizer, VOCABULARY, options()).train(), phase


def test_rows_are_what_is_loaded_and_what_the_command_offers():
    for rows, load, allowed in (
        (generators.FAMILIES, generators.load_family, GENERATORS),
        (tokenizers.FAMILIES, tokenizers.load_family, TOKENIZERS),
    ):
        for name, (module, class_name) in rows.items():
            model = load(name).model
            assert (model.__module__, model.__name__) == (module, class_name) and allowed[class_name] == module
    assert typing.get_args(GeneratorName) == ("auto", *generators.FAMILIES)
    assert typing.get_args(TokenizerName) == tuple(tokenizers.FAMILIES)


def test_the_first_family_that_fits_is_taken_and_others_are_refused():
    grid, scales = (tiny_tokenizer(tokenizers.load_family(kind)).layout for kind in ("vq", "multiscale"))
    find = generators.find_family
    assert find("auto", grid) is generators.load_family("raster")
    assert find("auto", scales) is generators.load_family("next_scale")
    assert find("hmar", scales) is generators.load_family("hmar")
    for arrangement in ("box", "sequence"):
        assert find("auto", replace(grid, arrangement=arrangement)) is generators.load_family("raster")
    for name, layout, message in (
        ("hmar", grid, "does not fit tokens that are 128 codes in arrangement grid; families that do: raster"),
        ("raster", scales, "families that do: next_scale, hmar"),
        (
            "hmar",
            replace(grid, arrangement="box"),
            "are 128 codes in arrangement box; families that do: raster, next_neighbor",
        ),
        (
            "next_neighbor",
            replace(grid, arrangement="sequence"),
            "are 128 codes in arrangement sequence; families that do: raster",
        ),
        (
            "auto",
            replace(scales, vocab_size=0),
            "are vectors in arrangement scales; families that do: none",
        ),
        (
            "raster",
            replace(grid, vocab_size=0),
            "are vectors in arrangement grid; families that do: masked, causal_continuous",
        ),
        ("var", scales, "family 'var'; choose auto, raster, next_scale, hmar"),
    ):
        with pytest.raises(ValueError, match=message):
            find(name, layout)
    with pytest.raises(ValueError, match="kind 'vqgan'; choose vq, multiscale"):
        tokenizers.find_family("vqgan", None)


def test_a_generator_is_built_for_its_tokenizer_and_every_phase_trains_a_part_of_it(trained):
    family, tokenizer, model, phase = trained
    assert model.num_tokens == tokenizer.layout.num_tokens
    layout = tokenizer.layout
    assert model.config.get("vocab_size", 0) == layout.vocab_size
    objective = family.phases[phase](model, tokenizer.layout, options(phase=phase), CPU)
    tokens = torch.randint(128, (3, model.num_tokens), generator=torch.Generator().manual_seed(0))
    if not layout.vocab_size:
        tokens = torch.randn(3, model.num_tokens, layout.channels, generator=torch.Generator().manual_seed(0))
    condition = Condition(labels_BA=torch.tensor([[0], [3], [4]]))
    with torch.no_grad():  # heads begin at zero, and gates near it
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    objective.loss(model, tokens, tokens, condition, torch.Generator().manual_seed(0)).backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.eval()
    with torch.no_grad():
        first, again = (
            objective.measure(model, tokens, (condition, condition), torch.Generator().manual_seed(0))
            for _ in range(2)
        )
    assert len(set(map(float, first + again))) == 1 and float(first[0]) > 0


def test_later_phases_start_from_the_one_before(trained):
    family, _, _, phase = trained
    if phase == next(iter(family.phases)):
        assert find_phase(family, options(phase=phase)) is family.phases[phase]
    else:
        with pytest.raises(ValueError, match="needs initial"):
            find_phase(family, options(phase=phase))
    with pytest.raises(ValueError, match="phase 'third'; .* is trained in next_scale"):
        find_phase(family, options(phase="third"))


def test_a_block_reads_no_linear_layers_but_those_that_the_family_names(trained):
    _, _, model, _ = trained
    model.eval()
    named = linear_layers(model, model.read_once_per_block)
    used: set[str] = set()
    stage = first_stage(model)
    state = stage.start(Condition(labels_BA=torch.zeros(1, 1, dtype=torch.int64)), OFF)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: used.add(name))
    if isinstance(model, Masked):
        places = torch.arange(model.num_tokens)[None]
        features = model.features_at(state, places[:, :2], places[:, 2:])
        model.token_head.draw(features, lambda number: torch.zeros(1, model.num_tokens - 2, 4), steps=2)
    for block, size in enumerate(() if isinstance(model, Masked) else model.block_sizes):
        state.block = block
        if isinstance(model, Continuous):
            tokens = model.token_head.draw(model.features(state), lambda number: torch.zeros(1, 1, 4), steps=2)
            model.append(state, tokens)
            continue
        stage.predict(state)
        stage.append(state, torch.zeros(1, size, dtype=torch.int64))
    assert used and used <= set(named)
    assert set(linear_layers(model, model.quantized_parts)) & used
    assert model.cache_bytes(6, 5) == 30 * model.cache_bytes(1, 1) and model.cache_bytes(2) == 2 * model.cache_bytes(1)


def test_layouts_count_tokens_and_name_what_decodes():
    assert TokenLayout(((3, 4, 5), (2,)), "box", 0, 8).sizes == (60, 2)
    grid, scales = (tiny_tokenizer(tokenizers.load_family(kind)) for kind in ("vq", "multiscale"))
    assert (grid.layout.num_tokens, grid.layout.previews) == (16, ())
    assert (scales.layout.num_tokens, scales.layout.previews) == (21, (1, 5, 21))
    ids = torch.zeros(1, 21, dtype=torch.int64)
    for length in range(1, 22):
        if length in scales.layout.previews:
            assert scales.decode(ids[:, :length]).shape == (1, 3, 8, 8)
        else:
            with pytest.raises(ValueError, match="whole number of scales"):
                scales.decode(ids[:, :length])
    assert (image_side(grid), image_side(scales)) == (8, 8)
    oblong = SimpleNamespace(layout=TokenLayout(((4, 8),), "grid", 16, 4), downsampling=2)
    with pytest.raises(ValueError, match="4 x 8 tokens; training needs square images"):
        image_side(oblong)


class Unreadable:
    """Images that must not be read."""

    def __len__(self) -> int:
        return 24

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"images were read: {name}")


def test_batches_hold_tokens_and_conditions_and_never_read_an_image(tmp_path):
    images = load_image_set(TINY.write_images(tmp_path / "bars.npz"), 8)
    cache = build_token_cache(images, tiny_tokenizer(tokenizers.load_family("vq")))
    run = Run(options(seed=3))
    unread: Any = replace(images, images=Unreadable())
    batches = TokenBatches(run, unread, cache, with_class=True, label_dropout=0.0)
    assert len(batches.train) + len(batches.validation) <= 24

    for step in range(3):
        drawn = batches.draw(step)
        ids, condition = batches.part(drawn, step, 0)
        assert ids.shape == (8, 16) and ids.dtype == torch.int64
        index = batches.train.index_N[drawn[0]]
        assert torch.equal(ids, cache.tokens_NKL[index, 0].long())
        assert torch.equal(condition.labels_BA, images.labels_NA[index])
        assert torch.equal(condition.words_BT, images.words_NT[index])
        assert all(torch.equal(one, other) for one, other in zip(drawn, batches.draw(step), strict=True))
    without = TokenBatches(run, unread, cache, with_class=False, label_dropout=1.0)
    _, condition = without.part(without.draw(0), 0, 0)
    assert condition.labels_BA is None and torch.equal(condition.words_BT, null_words(condition.words_BT))
