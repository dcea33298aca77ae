"""From another project's files to a folder that `visar.load` reads: what `visar convert` runs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from visar.checkpoints import hmar, llamagen, var
from visar.checkpoints.common import State, build, read, require, unwrap
from visar.checkpoints.hub import Source
from visar.checkpoints.options import Convert
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import VQTokenizer

Role = Literal["tokenizer", "generator"]
# What the second training phase of HMAR has and no other file in VAR's layout.
_SECOND_PHASE_MARK = "mask_embed.weight"


@dataclass(frozen=True)
class Layout:
    """A kind of file.

    Attributes:
        sources: projects that have files of this kind.
        role: which part of a pipeline it is.
        marks: keys that files of this kind have, side by side.
        vocabulary: the key whose first axis is the number of codes.
    """

    sources: tuple[Source, ...]
    role: Role
    marks: tuple[str, ...]
    vocabulary: str


RASTER_TOKENIZER = Layout(("llamagen",), "tokenizer", (llamagen.VQ_MARK,), "quantize.embedding.weight")
RASTER_GENERATOR = Layout(("llamagen",), "generator", (llamagen.GPT_MARK,), "tok_embeddings.weight")
SCALE_TOKENIZER = Layout(
    ("var", "hmar", "code"), "tokenizer", (var.VQ_MARK, "encoder.down.0.block.0.conv1.weight"), var.VQ_MARK
)
SCALE_GENERATOR = Layout(("var", "hmar", "code"), "generator", (var.TRANSFORMER_MARK, "head.weight"), "head.weight")
MASKED_GENERATOR = Layout(("hmar",), "generator", (hmar.MERGED_MARK,), "ns_head.weight")
# Sniffing takes the first that fits and, without a second file, the first of its sources.
LAYOUTS = (RASTER_TOKENIZER, RASTER_GENERATOR, SCALE_TOKENIZER, MASKED_GENERATOR, SCALE_GENERATOR)


@dataclass(frozen=True)
class Models:
    """What files hold, in evaluation mode on the CPU, float32; None for what they do not.

    Attributes:
        source: project that they are from.
        tokenizer, generator: a pipeline's two parts.
        refiner: CoDe's second generator.
    """

    source: Source
    tokenizer: VQTokenizer | MultiScaleVQTokenizer | None = None
    generator: RasterGPT | NextScaleTransformer | HierarchicalMaskedTransformer | None = None
    refiner: NextScaleTransformer | None = None


# ------------------------------------------------------------------------------------------------------- sniffing
def _key_sets(content: Mapping[str, object]) -> Iterator[set[str]]:
    """Names of the tensors at every level of a checkpoint, without wrappers' prefixes."""
    yield {
        re.sub(r"^((module|_orig_mod)\.)+", "", str(key)) for key, value in content.items() if torch.is_tensor(value)
    }
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _key_sets(value)


def fits(content: Mapping[str, object], layout: Layout) -> bool:
    """Whether a file is of this kind, by its marks."""
    return any(keys.issuperset(layout.marks) for keys in _key_sets(content))


def sniff(content: Mapping[str, object], source: Source | None, file: str | Path) -> list[Layout]:
    """Kinds of weights in a file: one, or a tokenizer and a generator in a trainer's checkpoint.

    Args:
        content: of the file.
        source: None is every project.
        file: for error messages.

    Raises:
        ValueError: none; says what every converter missed.
    """
    candidates = [layout for layout in LAYOUTS if source is None or source in layout.sources]
    found = [layout for layout in candidates if fits(content, layout)]
    if found:
        return found
    names = sorted(set().union(*_key_sets(content)))
    refusals = [f"{'/'.join(each.sources)} {each.role}: no {' with '.join(each.marks)}" for each in candidates]
    asked = "" if source is None else f" of {source}"
    raise ValueError(
        f"{file} holds no weights that a converter{asked} knows. {'; '.join(refusals)}. "
        f"Its tensors: {', '.join(names[:8]) or 'none'}{' ...' if len(names) > 8 else ''}. "
        f"Sources: llamagen, var, hmar, code"
    )


def _check_vocabulary(
    state: Mapping[str, Tensor], layout: Layout, file: str | Path, codes: int, tokenizer: str | Path
) -> None:
    require(state, [layout.vocabulary], str(file), "generator")
    if state[layout.vocabulary].shape[0] != codes:
        raise ValueError(
            f"{file} predicts {state[layout.vocabulary].shape[0]} codes, {tokenizer} has {codes}: they were not "
            "trained together"
        )


# -------------------------------------------------------------------------------------------------------- reading
def read_models(options: Convert) -> Models:
    """Reads the files of a model; `options.out`, `like` and `dtype` are not looked at.

    Raises:
        ValueError: damaged or unsafe files, files of another kind, or options that do not go with them.
    """
    content = read(options.file)
    second = None if options.second is None else read(options.second)
    layouts = sniff(content, options.source, options.file)
    source = options.source or _source_of(layouts[-1], second)
    if second is not None and source not in ("hmar", "code"):
        raise ValueError(f"{options.second}: a second file goes with hmar (its second phase) and code (its refiner)")
    if source == "llamagen":
        return _read_raster(options, content, layouts)
    if options.grid is not None:
        raise ValueError(
            f"grid {options.grid} is for llamagen; the models of {source} have scales, which the file tells"
        )
    return _read_scales(options, source, content, second, layouts)


def _source_of(layout: Layout, second: Mapping[str, object] | None) -> Source:
    if second is None or layout is not SCALE_GENERATOR:
        return layout.sources[0]
    return "hmar" if any(_SECOND_PHASE_MARK in keys for keys in _key_sets(second)) else "code"


def _read_raster(options: Convert, content: Mapping[str, object], layouts: list[Layout]) -> Models:
    file = str(options.file)
    if options.scales is not None:
        raise ValueError(f"scales {options.scales} are for var, hmar and code; llamagen's models have a grid")
    if layouts == [RASTER_TOKENIZER]:
        if options.tokenizer is not None:
            raise ValueError(f"{file} is a tokenizer itself; give the generator's file first, or no tokenizer")
        return Models("llamagen", tokenizer=_raster_tokenizer(content, options.grid, file))
    if options.grid is None:
        raise ValueError(
            f"{file}: the grid of tokens is not in the file; say grid, image size / 16 for the released models "
            "(16 16 for 256 px, 24 24 for 384 px, 32 32 for 512 px), or like=NAME"
        )
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer_content = read(options.tokenizer)
        _expect(tokenizer_content, RASTER_TOKENIZER, options.tokenizer)
        tokenizer = _raster_tokenizer(tokenizer_content, options.grid, str(options.tokenizer))
        codes = tokenizer.config["codebook_size"]
        _check_vocabulary(unwrap(content, file), RASTER_GENERATOR, file, codes, options.tokenizer)
    config, state = llamagen.convert_gpt(
        content, grid=options.grid, rope=options.rope, num_heads=options.num_heads, source=file
    )
    return Models("llamagen", tokenizer, build(RasterGPT, config, state, file, torch.float32))


def _raster_tokenizer(content: Mapping[str, object], grid: tuple[int, int] | None, file: str) -> VQTokenizer:
    config, state = llamagen.convert_vq(content, source=file)
    if grid is not None:
        factor = 2 ** (len(config["channel_multipliers"]) - 1)
        rows, columns = grid
        config["image_size"] = rows * factor if rows == columns else (rows * factor, columns * factor)
    return build(VQTokenizer, config, state, file, torch.float32)


def _expect(content: Mapping[str, object], layout: Layout, file: str | Path) -> None:
    """Checks that a further file is of the kind that goes with the first.

    Raises:
        ValueError: it is not.
    """
    if not fits(content, layout):
        is_instead = next((each for each in LAYOUTS if fits(content, each)), None)
        what = "of no known kind" if is_instead is None else f"a {is_instead.role} of {'/'.join(is_instead.sources)}"
        raise ValueError(f"{file} is {what}; a {layout.role} of {'/'.join(layout.sources)} is needed")


def _read_scales(
    options: Convert,
    source: Source,
    content: Mapping[str, object],
    second: Mapping[str, object] | None,
    layouts: list[Layout],
) -> Models:
    file = str(options.file)
    generators = [layout for layout in layouts if layout.role == "generator"]
    if not generators:
        if options.tokenizer is not None or second is not None:
            raise ValueError(f"{file} is a tokenizer; give the generator's file first, or this one alone")
        return Models("var", tokenizer=_scale_tokenizer(content, options.scales or var.SCALES_256, file))
    layout = generators[0]
    tokenizer_file = str(options.tokenizer or options.file)
    if options.tokenizer is None and SCALE_TOKENIZER not in layouts:
        raise ValueError(
            f"{file}: a model of scales includes its tokenizer's codebook; say tokenizer (vae_ch160v4096z32.pth for "
            "the released models)"
        )
    tokenizer_content = content if options.tokenizer is None else read(options.tokenizer)
    _expect(tokenizer_content, SCALE_TOKENIZER, tokenizer_file)
    codes = var.find_weights(tokenizer_content, var.VQ_MARK, tokenizer_file)[var.VQ_MARK].shape[0]
    state = var.find_weights(content, layout.marks[0], file)
    require(state, ["pos_1LC", "lvl_embed.weight"], file, "transformer in VAR's layout")
    _check_vocabulary(state, layout, file, codes, tokenizer_file)
    scales = var.sniff_scales(state, options.scales, file)
    tokenizer = _scale_tokenizer(tokenizer_content, scales, tokenizer_file)
    if source == "hmar":
        if layout is SCALE_GENERATOR:
            state = _merge(options, state, second)
            file = f"{file} with {options.second}"
        elif second is not None:
            raise ValueError(f"{options.second}: {file} holds both phases of HMAR already; give it alone")
        config, state = hmar.convert(state, tokenizer, scales=scales, num_heads=options.num_heads, source=file)
        masked = build(HierarchicalMaskedTransformer, config, state, file, torch.float32)
        return Models("hmar", tokenizer, masked)
    generator = _next_scale(state, tokenizer, scales, options.num_heads, file)
    if source == "var":
        return Models("var", tokenizer, generator)
    if second is None:
        raise ValueError(f"{file}: CoDe's models are pairs; say second, the refiner's file")
    _expect(second, SCALE_GENERATOR, str(options.second))
    refining = var.find_weights(second, var.TRANSFORMER_MARK, str(options.second))
    _check_vocabulary(refining, SCALE_GENERATOR, str(options.second), codes, tokenizer_file)
    # The refiner's heads are read off its own file: the option is for the drafter.
    refiner = _next_scale(refining, tokenizer, scales, None, str(options.second))
    return Models("code", tokenizer, generator, refiner)


def _scale_tokenizer(content: Mapping[str, object], scales: var.Scales, file: str) -> MultiScaleVQTokenizer:
    config, state = var.convert_vq(content, scales=scales, source=file)
    return build(MultiScaleVQTokenizer, config, state, file, torch.float32)


def _next_scale(
    state: State, tokenizer: MultiScaleVQTokenizer, scales: var.Scales, num_heads: int | None, file: str
) -> NextScaleTransformer:
    config, converted = var.convert_transformer(state, tokenizer, scales=scales, num_heads=num_heads, source=file)
    return build(NextScaleTransformer, config, converted, file, torch.float32)


def _merge(options: Convert, first: State, second: Mapping[str, object] | None) -> State:
    if second is None:
        raise ValueError(f"{options.file} is one training phase of HMAR; say second, the file of the other")
    _expect(second, SCALE_GENERATOR, str(options.second))
    refinement = var.find_weights(second, hmar.PHASE_MARK, str(options.second))
    require(refinement, [_SECOND_PHASE_MARK], str(options.second), "second phase of HMAR")
    return hmar.merge_phases(first, refinement, options.refinement_layers)


# -------------------------------------------------------------------------------------------------------- writing
