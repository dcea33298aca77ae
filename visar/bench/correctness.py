"""Checks that come before any time: a fast wrong model is not timed."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from visar.bench.subjects import Subject, dtype_of, random_ids
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Categorical, Continuous, Masked
from visar.core.noise import Noise, image_seeds
from visar.core.runtime import EAGER, Runtime
from visar.layers.quantize import dequantize_
from visar.samplers.index import plain_sampler
from visar.tokenizers.decoding import decoder_noise

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
HIGHEST = 5e-2
FORCED_TOKENS = 8


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """|ours - reference| / |reference|, Euclidean over all entries; infinite where ours is not finite."""
    error = float((ours.float() - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def _in_float32(generator: Any) -> Any:
    """A float32 copy with the same weights, quantised ones as their values."""
    return nn.Module.float(dequantize_(copy.deepcopy(generator)))


@torch.no_grad()
def logits_errors(subject: Subject, device: torch.device, batch: int = 2) -> tuple[float, float]:
    """Relative errors of the logits against one float32 pass with the same weights and tokens.

    Returns: of decoding block by block through the cache (raster models: the first 8 tokens; others: all blocks), and
        of one teacher-forced pass, both in the model's own dtype. The second is what the dtype alone costs.
    """
    generator = subject.generator
    tokens_BN, condition = random_ids(subject, batch, device), generator.example_condition(batch)
    reference_model = _in_float32(generator)
    reference_BNV = reference_model(tokens_BN, condition)
    del reference_model
    forced_BNV = generator(tokens_BN, condition)
    state = generator.start(condition, OFF)
    parts, places, done = [], [], 0
    raster = max(generator.block_sizes) == 1
    for block, size in enumerate(generator.block_sizes):
        if raster and done == FORCED_TOKENS:
            break
        state.block = block
        parts.append(generator.predict(state))
        places.append(generator.positions(state)[0])
        generator.append(state, tokens_BN[:, places[-1]])
        done += size
    place_L = torch.cat(places)
    reference_BLV = reference_BNV[:, place_L]
    decoded = relative_error(torch.cat(parts, dim=1), reference_BLV)
    return decoded, relative_error(forced_BNV[:, place_L], reference_BLV)


@torch.no_grad()
def features_errors(subject: Subject, device: torch.device, batch: int = 2) -> tuple[float, float]:
    """As `logits_errors`, of the hidden vectors that a causal model's head reads."""
    generator = subject.generator
    tokens_BNC, condition = random_ids(subject, batch, device), generator.example_condition(batch)
    reference_model = _in_float32(generator)
    reference_BND = reference_model.hidden(tokens_BNC, condition)
    forced_BND = generator.hidden(tokens_BNC, condition)
    state, parts = generator.start(condition, OFF), []
    done = min(FORCED_TOKENS, subject.num_tokens)
    for block in range(done):
        state.block = block
        parts.append(generator.features(state))
        generator.append(state, tokens_BNC[:, block : block + 1])
    decoded = relative_error(torch.cat(parts, dim=1), reference_BND[:, :done])
    return decoded, relative_error(forced_BND[:, :done], reference_BND[:, :done])


@torch.no_grad()
def masked_errors(subject: Subject, device: torch.device, batch: int = 2) -> tuple[float, float]:
    """As `logits_errors`, of the hidden vectors that a masked model's head reads: of one pass, twice."""
    tokens_BNC, condition = random_ids(subject, batch, device), subject.generator.example_condition(batch)
    place_BN = torch.arange(subject.num_tokens, device=device).expand(batch, -1)

    def read(model: Any) -> torch.Tensor:
        state = model.start(condition)
        model.commit_at(state, place_BN, tokens_BNC)
        return model.features_at(state, place_BN[:, ::2], place_BN[:, 1::2])

    error = relative_error(read(subject.generator), read(_in_float32(subject.generator)))
    return error, error


# By what a model gives: what is compared, and how.
_COMPARED: dict[type, tuple[str, Callable[[Subject, torch.device], tuple[float, float]]]] = {
    Categorical: ("logits", logits_errors),
    Continuous: ("hidden vectors", features_errors),
    Masked: ("hidden vectors", masked_errors),
}


def check_logits(subject: Subject, device: torch.device) -> tuple[float, str]:
    """Error of decoding, of the logits or of the hidden vectors that a head reads, and a line that says it.

    Allowed is 2e-2 (float32: 1e-4), or in 16 bits half as much again as the dtype alone costs in one teacher-forced
    pass of this depth, but never more than 5e-2.

    Raises:
        ValueError: the error is larger: nothing is timed.
    """
    what, compare = next(row for kind, row in _COMPARED.items() if isinstance(subject.generator, kind))
    decoded, forced = compare(subject, device)
    dtype = dtype_of(subject.generator)
    limit = LIMITS[dtype]
    if dtype != torch.float32:
        limit = min(max(limit, 1.5 * forced), HIGHEST)
    name = str(dtype).removeprefix("torch.")
    line = f"{what} of decoding in {name} against float32: relative error {decoded:.1e} (one pass {forced:.1e})"
    if not decoded <= limit:
        raise ValueError(f"{subject.name}: {line}; allowed is {limit:.1e}: wrong results are not timed")
    return decoded, line


@torch.no_grad()
def check_images(subject: Subject, device: torch.device) -> str:
    """A line with the error of decoded images against a float32 copy of the tokenizer.

    Raises:
        ValueError: it is above 1e-1 (16 bits alone cost about 4e-2 with random weights) or 2e-2 in float32
            (TF32 convolutions).
    """
    ids_BN = random_ids(subject, 2, device)
    exact: Any = nn.Module.float(copy.deepcopy(subject.tokenizer))
    noise = decoder_noise(subject.tokenizer, image_seeds(0, 2), device)
    drawing: dict[str, Any] = {} if noise is None else {"noise": noise}
    reference_BCHW = exact.decode(ids_BN, **drawing)
    dtype = next(subject.tokenizer.decoder.parameters()).dtype
    error = relative_error(subject.tokenizer.decode(ids_BN, **drawing), reference_BCHW)
    limit = 2e-2 if dtype == torch.float32 else 1e-1
    line = f"decoded images in {str(dtype).removeprefix('torch.')} against float32: relative error {error:.1e}"
    if not error <= limit:
        raise ValueError(f"{subject.name}: {line}; allowed is {limit:.1e}: wrong results are not timed")
    return line


def _sample(model: Any, condition: Condition, **settings: Any) -> torch.Tensor:
    """Tokens by the plain sampler of the model's kind."""
    return plain_sampler(model).load()(model, condition, **settings).tokens


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether ids are equal, or continuous tokens to rounding."""
    if not first.is_floating_point():
        return torch.equal(first, second)
    return torch.allclose(first, second, atol=1e-3, rtol=1e-3)


def paths_agree(generator: Any, batch: int, device: torch.device, guidance_scale: float) -> bool:
    """Whether captured and eager decoding give the same ids for the same seeds, at float32.

    In bfloat16 they need not: the library behind a matrix product may choose another algorithm under capture.
    """
    model = _in_float32(generator)
    settings: dict[str, Any] = dict(noise=Noise(image_seeds(7, batch), device), guidance=Guidance(guidance_scale))
    condition = model.example_condition(batch)
    runtime = Runtime()
    captured, again, eager = (
        _sample(model, condition, runtime=each, **settings) for each in (runtime, runtime, EAGER)
    )
    return _same(captured, eager) and _same(again, eager)


def batches_agree(generator: Any, device: torch.device, guidance_scale: float) -> bool:
    """Whether two images made together have the ids that each has alone, at float32."""
    model = _in_float32(generator)
    condition, noise = model.example_condition(2), Noise(image_seeds(7, 2), device)
    guidance = Guidance(guidance_scale)
    together = _sample(model, condition, noise=noise, guidance=guidance)
    rows = (slice(0, 1), slice(1, 2))
    alone = [
        _sample(model, condition.rows(row), noise=Noise(image_seeds(7, 2)[row], device), guidance=guidance)
        for row in rows
    ]
    return _same(together, torch.cat(alone))
