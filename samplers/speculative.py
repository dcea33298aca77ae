"""Drafted speculation: a cheap drafter proposes a chain of tokens, the generator judges them in one pass.

Sources: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. Trees and several drafts a position are in
visar/samplers/trees.py, drafters in visar/samplers/drafters/interface.py and visar/samplers/drafters/eagle.py.

B batch, K drafts, L = K + 1 slots, V codes, N tokens, R rows (2B when guided), D width.
"""

import time
from typing import Any

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Features, Windowed
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.samplers.drafters.interface import Drafter, Drafting, Kept, Target
from visar.samplers.drafters.ngram import NgramDrafter
from visar.samplers.filtering import draw, token_law
from visar.samplers.verify import Counts, check_passes, held_noise, judged_in_chain, run_passes, verify


def draft_chain(drafting: Drafting, uniform_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Draws K drafts one after another; int64 [B, K], and the laws [B, K, V] they were drawn from."""
    laws, drafts = [], uniform_BK[:, :0].long()
    for k in range(uniform_BK.shape[1]):
        laws.append(drafting.extend(drafts) if k else drafting.begin())
        drafts = torch.cat([drafts, draw(laws[-1], uniform_BK[:, k])[:, None]], dim=1)
    return drafts, torch.stack(laws, dim=1)


def read_window(model: Windowed, state: Any, drafting: Drafting, draft_BK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Guided logits [B, L, V] of a window, and the hidden vectors [R, L, D] behind them if the drafter reads them."""
    if not drafting.reads_features:
        return model.verify(state, draft_BK), None
    assert isinstance(model, Features)
    features_RLD = model.features(state, draft_BK)
    return model.guided_logits(state, features_RLD), features_RLD


def check_speculative(
    model: Windowed,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    num_drafts: int,
    check_every: int,
) -> None:
    """Checks the arguments of `sample_speculative`; errors as there."""
    if num_drafts < 1:
        raise ValueError(f"num_drafts {num_drafts}; it must be >= 1")
    check_passes(model, guidance, (temperature, top_k, top_p), num_drafts + 1, check_every)


@torch.no_grad()
def sample_speculative(
    model: Windowed,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    drafter: Drafter | None = None,
    num_drafts: int = 4,
    check_every: int = 8,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens by speculative sampling with a chain of drafts. Exact.

    Speculative sampling, arXiv 2211.17192, algorithm 1 (and 2302.01318, algorithm 2). The gain depends on the drafter:
    plain drafted speculation on image tokens at temperature 1 often does not pay, because their laws are flat.

    Args:
        model: a generator of one token a step with start, verify and commit; with features and guided_logits for
            drafters that read hidden vectors.
        condition: of the B images.
        noise: one seed an image.
        guidance: classifier-free guidance, for the drafter too.
        temperature: > 0; 1.0 = off.
        top_k: 0 = off.
        top_p: in (0, 1]; 1.0 = off.
        drafter: who proposes; None is the free n-gram drafter. A generator: ModelDrafter; trained on the target's
            hidden vectors: FeatureDrafter (EAGLE), SpatialHeads.
        num_drafts: K drafts a pass, >= 1. arXiv 2211.17192: 3 to 7.
        check_every: passes between two looks of the host.
        callback: called at every look, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N] and statistics, with the drafter's forward passes.

    Raises:
        ValueError: a setting out of range, a condition that does not fit, or a drafter of another vocabulary.
    """
    check_speculative(model, guidance, temperature, top_k, top_p, num_drafts, check_every)
    begun = time.perf_counter()
    drafter = NgramDrafter() if drafter is None else drafter
    device, batch, num_tokens, window = noise.device, condition.batch, model.num_tokens, num_drafts + 1
    filters = (temperature, top_k, top_p)
    guided = guidance.active(num_tokens)
    session = runtime.session(model, device, ("speculative", batch, guided, *filters, num_drafts, drafter.key()))
    kept = session.state = session.state or Kept()
    state = kept.target = model.start(condition, guidance, ragged=True, window=num_drafts, state=kept.target)
    drafting = drafter.start(session, kept, Target(model, state, condition, guidance, num_drafts, num_drafts, filters))
    source = held_noise(session, noise)
    pass_11 = session.hold("pass", torch.zeros(1, 1, dtype=torch.int64, device=device))
    counts = Counts.start(session, window, batch, num_tokens, device)

    def step(slots: int) -> None:
        start_B = state.length.clone()
        position_BL = start_B[:, None] + torch.arange(slots, device=device)
        draft_BL, accept_BL, emit_BL = source.uniform(Use.DRAFT, position_BL, (3,), pass_11).unbind(-1)
        draft_BK, q_BKV = draft_chain(drafting, draft_BL[:, :-1])
        logits_BLV, features_RLD = read_window(model, state, drafting, draft_BK)
        verdict = verify(token_law(logits_BLV, *filters), q_BKV, draft_BK, accept_BL[:, :-1], emit_BL)
        model.commit(state, verdict.tokens_BL, verdict.count_B)
        left_B = num_tokens - start_B
        judged_B = judged_in_chain(verdict.kept_B, num_drafts, left_B)
        counts.add(verdict.count_B, verdict.kept_B, judged_B, left_B, judged_B > verdict.kept_B)
        drafting.observe(start_B, features_RLD, verdict.count_B)
        pass_11.add_(1)

    passes, done = run_passes(
        session,
        state,
        step,
        num_tokens=num_tokens,
        window=window,
        check_every=check_every,
        callback=callback,
    )
    tokens = state.tokens[:, :done].clone()
    passed = {"generator": passes}
    if drafting.calls(num_drafts):
        passed["drafter"] = passes * drafting.calls(num_drafts)
    return counts.output(tokens, passed, time.perf_counter() - begun)
