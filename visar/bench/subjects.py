"""What is timed: released shapes with random weights, or a model of the user's own."""

import dataclasses
import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visar.core.interface import Categorical, Continuous, Masked, Scales
from visar.generators import families as generators
from visar.generators.training import GeneratorFamily
from visar.layers.quantize import linear_layers, quantize_, stored
from visar.pipelines.loading import load
from visar.tokenizers import families as tokenizers
from visar.tokenizers.families import find_family as find_tokenizer
from visar.tokenizers.vq import VQ_PRESETS, VQTokenizer


@dataclass(frozen=True)
class Preset:
    """Released shapes of a generator and of the tokenizer that decodes its ids.

    Attributes:
        generator: class, or None for decoding alone.
        config: its constructor's arguments.
        tokenizer: class.
        tokenizer_config: its constructor's arguments.
    """

    generator: type | None
    config: dict[str, Any]
    tokenizer: type
    tokenizer_config: dict[str, Any]


def _released(family: GeneratorFamily, config: dict[str, Any]) -> Preset:
    """A family's preset with the tokenizer that it was released with; settings that both have are the generator's."""
    tokenizer, name = find_tokenizer(None, family.tokenizer)
    settings = inspect.signature(tokenizer.model).parameters
    shared = {key: value for key, value in config.items() if key in settings}
    if "grid" in config and "image_size" in settings:
        shared["image_size"] = 16 * config["grid"][0]
    return Preset(family.model, config, tokenizer.model, {**tokenizer.presets[name], **shared})


_GENERATORS = {family.model: family for family in map(generators.load_family, generators.FAMILIES)}
_TOKENIZERS = {family.model: family for family in map(tokenizers.load_family, tokenizers.FAMILIES)}
PRESETS: dict[str, Preset] = {
    **{name: _released(family, config) for family in _GENERATORS.values() for name, config in family.presets.items()},
    "vq-16": Preset(None, {}, VQTokenizer, VQ_PRESETS["vq-16"]),
}


@dataclass(frozen=True)
class Subject:
    """A model on its device.

    Attributes:
        name: name of the preset, embedded model or folder.
        generator: None for decoding alone.
        tokenizer: decodes.
        build_s: seconds to build or load it.
    """

    name: str
    generator: Any
    tokenizer: Any
    build_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.tokenizer.layout.num_tokens

    @property
    def vocab_size(self) -> int:
        """Codes that both know; 0 for continuous tokens."""
        return self.tokenizer.layout.vocab_size


def find_preset(name: str, grid: int | None = None) -> Preset:
    """The preset of that name, on another grid if asked for.

    Raises:
        ValueError: no preset of that name, or a grid for a model whose scales are part of its shape.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if grid is None:
        return preset
    if "image_size" not in preset.tokenizer_config or grid < 1:
        raise ValueError(
            f"grid {grid} for {name}; it is for presets of one grid (llamagen-*, nar-*, par-*, vq-16), and >= 1"
        )
    return dataclasses.replace(
        preset,
        config={**preset.config, "grid": (grid, grid)} if preset.generator is not None else {},
        tokenizer_config={**preset.tokenizer_config, "image_size": 16 * grid},
    )


def tiny(preset: Preset) -> Preset:
    """The smallest model of the preset's family: where there is no GPU, correctness can be checked, speed cannot."""
    return Preset(
        preset.generator,
        {} if preset.generator is None else _GENERATORS[preset.generator].tiny,
        preset.tokenizer,
        _TOKENIZERS[preset.tokenizer].tiny,
    )


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights that keep activations of one size at any depth and make every part count.

    Released starts have zero heads and near-zero gates, with which nothing that is wrong would show.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None and "ada_lin" in name:
                nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


def build(name: str, preset: Preset, device: torch.device, dtype: torch.dtype, quantize: str = "none") -> Subject:
    """A preset with random weights, the same ones at every call on one kind of device; `quantize`: `visar.load`'s."""
    begun = time.perf_counter()
    torch.manual_seed(0)
    with device:
        tokenizer = preset.tokenizer(**preset.tokenizer_config).eval()
        generator = None if preset.generator is None else preset.generator(**preset.config).eval()
    if generator is not None:
        fill(generator)
        nn.Module.to(generator, dtype)  # diffusers' own `to` warns about float32 modules that do not exist
        quantize_(generator, quantize)
    if isinstance(generator, Scales):  # it has a copy of the tokenizer's codes
        tokenizer.quantizer.embedding.load_state_dict(generator.pyramid.embedding.state_dict())
    nn.Module.to(tokenizer, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Subject(name, generator, tokenizer, time.perf_counter() - begun)


def load_subject(name: str, device: torch.device, dtype: torch.dtype, quantize: str = "none") -> Subject:
    """An embedded or official model, or a folder.

    Raises:
        ValueError: as of `visar.load`, or a generator that makes all tokens at once.
    """
    begun = time.perf_counter()
    pipeline = load(name, device=device, dtype=dtype, quantize=quantize)
    if not isinstance(pipeline.generator, Categorical | Continuous | Masked):
        raise ValueError(
            f"{name} is a {type(pipeline.generator).__name__}; the benchmark takes generators that predict ids block "
            "after block, or continuous tokens (`visar eval --speed-batches` times every model)"
        )
    return Subject(name, pipeline.generator, pipeline.tokenizer, time.perf_counter() - begun)


def random_ids(subject: Subject, batch: int, device: torch.device) -> torch.Tensor:
    """Ids int64 [B, N], or continuous tokens float32 [B, N, C], the same ones at every call."""
    generator = torch.Generator().manual_seed(batch)
    if not subject.vocab_size:
        shape = (batch, subject.num_tokens, subject.tokenizer.layout.channels)
        return torch.randn(shape, generator=generator).to(device)
    ids = torch.randint(subject.vocab_size, (batch, subject.num_tokens), generator=generator)
    return ids.to(device)


# ------------------------------------------------------------------------------------------------------------ floor
def dtype_of(generator: Any) -> torch.dtype:
    """Dtype of its products; some models have other parts in float32."""
    return next(iter(linear_layers(generator, generator.read_once_per_block).values())).weight.dtype


def floor_seconds(generator: Any, rows: int, machine: dict[str, float]) -> float:
    """Least time of all blocks of an ancestral call: for every block the larger of what its bytes and what its
    products need, at the speeds that were measured.

    Bytes: weights once, and keys and values of what came before, of every row. Products: 2 operations a weight and
    position, and those of attention.
    """
    weights = linear_layers(generator, generator.read_once_per_block).values()
    weight_bytes = sum(part.nbytes for module in weights for part in stored(module) if part is not None)
    parameters = sum(module.weight.numel() for module in weights)
    layers, width = generator.config["num_layers"], generator.config["width"]
    cached = generator.cache_bytes(1) > 0
    seen = getattr(generator, "prefix_length", 0)
    total = 0.0
    for size in generator.block_sizes:
        keys = seen + size if cached else size
        moved = weight_bytes + generator.cache_bytes(rows, keys)
        operations = rows * size * (2 * parameters + 4 * layers * width * keys)
        total += max(moved / (machine["copy_gb_s"] * 1e9), operations / (machine["matmul_tflop_s"] * 1e12))
        seen += size
    return total
