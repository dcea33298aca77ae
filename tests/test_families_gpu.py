"""Every family of generators with every sampler that takes it, on a GPU: captured against eager steps, against the
CPU, and in bfloat16. New rows of the two tables are tried without a line here."""

from typing import Any

import pytest
import torch

from visar.bench.subjects import fill
from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise
from visar.core.runtime import EAGER, Runtime
from visar.generators.families import FAMILIES, load_family
from visar.samplers.index import SAMPLERS

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# Samplers that cannot do without more than a drafter: tests/test_scales_gpu.py (several models over scales, edits).
PAIRS = [
    (family, sampler)
    for family in FAMILIES
    for sampler, row in SAMPLERS.items()
    if all(setting.default is not setting.empty for setting in row.settings().values())
]


def make(family: str, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    row = load_family(family)
    arguments = dict(row.tiny)
    if "head_arguments" in arguments:  # deviations that are the head's alone: exact speculation needs them
        arguments["head_arguments"] = {**arguments["head_arguments"], "variance": "large"}
    model = row.model(**arguments).eval()
    fill(model)
    torch.nn.Module.to(model, dtype)
    return model.to(device)


def settings_of(sampler: str, model: Any, family: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a sampler cannot do without, for a tiny model."""
    known = SAMPLERS[sampler].settings()
    device = next(model.parameters()).device
    given: dict[str, Any] = {}
    if "codebook" in known:
        size = model.config["vocab_size"]
        given["codebook"] = torch.randn(size, 8, generator=torch.Generator().manual_seed(0)).to(device)
    if "num_neighbours" in known:
        given |= dict(num_neighbours=10, max_moved=0.3)
    if sampler in ("continuous_speculation", "masked_speculation"):
        given["drafter"] = make(family, device, dtype, seed=1)
    if "head_steps" in known:
        given["head_steps"] = 5
    return given


def run(sampler: str, model: Any, given: dict[str, Any], guidance: Guidance, first: int, runtime: Runtime) -> Any:
    device = next(model.parameters()).device
    noise = Noise([first, first + 1, first + 2], device)
    condition = model.example_condition(3).to(device)
    return SAMPLERS[sampler].load()(model, condition, noise=noise, guidance=guidance, runtime=runtime, **given)


@pytest.fixture(params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    family, sampler = request.param
    if not SAMPLERS[sampler].fits(make(family, torch.device("cpu"))):
        pytest.skip(f"{sampler} does not sample {family}")
    return family, sampler


@torch.no_grad()
def test_captured_steps_give_the_tokens_of_eager_ones(pair):
    family, sampler = pair
    model, runtime = make(family, DEVICE), Runtime(max_sessions=16)
    given = settings_of(sampler, model, family, torch.float32)
    for first, guidance in ((0, Guidance(2.0)), (7, Guidance(2.0)), (20, OFF), (30, Guidance(2.0)), (40, OFF)):
        eager = run(sampler, model, given, guidance, first, EAGER)
        captured = run(sampler, model, given, guidance, first, runtime)
        if eager.tokens.is_floating_point():
            torch.testing.assert_close(captured.tokens, eager.tokens, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(captured.tokens, eager.tokens), (first, guidance)


@torch.no_grad()
def test_a_gpu_draws_what_a_cpu_draws(pair):
    family, sampler = pair
    outputs = []
    for device in (torch.device("cpu"), DEVICE):
        model = make(family, device)
        given = settings_of(sampler, model, family, torch.float32)
        outputs.append(run(sampler, model, given, Guidance(2.0), 0, EAGER).tokens.cpu())
    if outputs[0].is_floating_point():
        # A token that a coupling or a rule takes on one device and not on the other is another token.
        near = ((outputs[0] - outputs[1]).abs() < 1e-2).all(-1).float().mean()
    else:
        near = (outputs[0] == outputs[1]).float().mean()
    assert near > 0.9


@torch.no_grad()
def test_bfloat16_runs_captured(pair):
    family, sampler = pair
    model, runtime = make(family, DEVICE, torch.bfloat16), Runtime()
    given = settings_of(sampler, model, family, torch.bfloat16)
    for first in (0, 3, 6):
        tokens = run(sampler, model, given, Guidance(2.0), first, runtime).tokens
        if tokens.is_floating_point():
            assert torch.isfinite(tokens).all()
        else:
            assert (tokens >= 0).all() and (tokens < model.config["vocab_size"]).all()
