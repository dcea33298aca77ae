"""Drafted speculation: a cheap drafter proposes a chain of tokens, the generator verifies them in one pass.

Sources: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. Trees and several drafts per position are
in visar/samplers/trees.py, drafters in visar/samplers/drafters/interface.py and visar/samplers/drafters/eagle.py.

B batch, K drafts, L = K + 1 slots, V codes, N tokens, R rows (2B when guided), D hidden size.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.core.checks import check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Features, Windowed
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime, Session
from visar.core.window import Window
from visar.samplers.drafters.interface import Drafter, Drafting, Kept, Target
from visar.samplers.drafters.ngram import NgramDrafter
from visar.samplers.filtering import draw, filtered_probs
from visar.samplers.stages import in_stages
from visar.samplers.verify import DRAFTS, Counts, check_passes, run_passes, static_noise, verify


@dataclass(frozen=True)
class Speculation:
    """A generator and its drafter at work on a batch.

    Attributes:
        session, state: of the generator; drafting: of the drafter.
        source: the noise; passes_11: int64, passes so far, which tell the draws of one position apart.
        counts: of the loop.
        depth: most tokens that are drafted one after another in a pass.
        begun: time.perf_counter() at the start.
    """

    session: Session
    state: Any
    drafting: Drafting
    source: Noise
    passes_11: Tensor
    counts: Counts
    depth: int
    begun: float

    def run(self, turn: Callable[[int], None], check_every: int, callback: Callback | None) -> SampleOutput:
        """Runs passes until every image is done; turn: one pass, which is counted here."""

        def step(slots: int) -> None:
            turn(slots)
            self.passes_11.add_(1)

        passes, done = run_passes(
            self.session,
            self.state,
            step,
            num_tokens=self.counts.num_tokens,
            window=self.depth + 1,
            check_every=check_every,
            callback=callback,
        )
        passed, calls = {"generator": passes}, self.drafting.calls(self.depth)
        if calls:
            passed["drafter"] = passes * calls
        tokens = self.state.tokens[:, :done].clone()
        return self.counts.output(tokens, passed, time.perf_counter() - self.begun)


def begin_speculation(
    model: Windowed,
    condition: Condition,
    key: Hashable,
    *,
    noise: Noise,
    guidance: Guidance,
    filters: tuple[float, int, float],
    drafter: Drafter | None,
    runtime: Runtime,
    depth: int,
    room: int,
    chain: bool,
) -> Speculation:
    """Starts a generator and a drafter (None: n-grams) beside it.

    Args:
        key: what a pass depends on besides model, batch, filters and drafter.
        depth, room: most tokens that are drafted in a pass one after another, and in all.
        chain: whether a pass's tokens all follow one another.

    Raises:
        ValueError: a condition or drafter that does not fit.
    """
    begun = time.perf_counter()
    drafter = NgramDrafter() if drafter is None else drafter
    device, batch, num_tokens = noise.device, condition.batch, model.num_tokens
    work = (key, batch, guidance.active(num_tokens), *filters, drafter.key())
    session = runtime.session(model, device, work)
    kept = session.state = session.state or Kept()
    state = kept.target = model.start(condition, guidance, ragged=True, window=room, state=kept.target)
    drafting = drafter.start(session, kept, Target(model, state, condition, guidance, room, depth, filters, chain))
    passes_11 = session.static("pass", torch.zeros(1, 1, dtype=torch.int64, device=device))
    counts = Counts.start(session, depth + 1, batch, num_tokens, device)
    return Speculation(session, state, drafting, static_noise(session, noise), passes_11, counts, depth, begun)


def draft_chain(drafting: Drafting, uniform_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Draws K drafts one after another; int64 [B, K], and the distributions [B, K, V] they were drawn from."""
    probs, drafts = [], uniform_BK[:, :0].long()
    for k in range(uniform_BK.shape[1]):
        probs.append(drafting.extend(drafts) if k else drafting.begin())
        drafts = torch.cat([drafts, draw(probs[-1], uniform_BK[:, k])[:, None]], dim=1)
    return drafts, torch.stack(probs, dim=1)


def read_window(model: Windowed, state: Any, drafting: Drafting, draft_BK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Guided logits [B, L, V] of a window, and the hidden vectors [R, L, D] behind them if the drafter reads them."""
    if not drafting.reads_features:
        return model.verify(state, draft_BK), None
    assert isinstance(model, Features)
    features_RLD = model.features(state, Window.chain(draft_BK))
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
    check_range("num_drafts", num_drafts, DRAFTS)
    check_passes(model, guidance, (temperature, top_k, top_p), num_drafts + 1, check_every)


@in_stages
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
    plain drafted speculation on image tokens at temperature 1 often does not pay, because their distributions are
    flat.

    Args:
        model: a generator of one token per step with start, verify and commit; with features and guided_logits for
            drafters that read hidden vectors.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance, for the drafter too.
        temperature: > 0; 1.0 = off.
        top_k: 0 = off.
        top_p: in (0, 1]; 1.0 = off.
        drafter: proposes the tokens; None is the free n-gram drafter. A generator: ModelDrafter; trained on the
            target's hidden vectors: FeatureDrafter (EAGLE), SpatialHeads.
        num_drafts: K drafts per pass, >= 1. arXiv 2211.17192: 3 to 7.
        check_every: passes between two looks of the host.
        callback: called at every look, see `Callback`; True ends the sampling.
        runtime: eager, or CUDA graphs.

    Returns: tokens int64 [B, N] and statistics, with the drafter's forward passes.

    Raises:
        ValueError: a setting out of range, a condition that does not fit, or a drafter of another vocabulary.
    """
    check_speculative(model, guidance, temperature, top_k, top_p, num_drafts, check_every)
    filters = (temperature, top_k, top_p)
    work = begin_speculation(
        model,
        condition,
        ("speculative", num_drafts),
        noise=noise,
        guidance=guidance,
        filters=filters,
        drafter=drafter,
        runtime=runtime,
        depth=num_drafts,
        room=num_drafts,
        chain=True,
    )
    state, drafting = work.state, work.drafting

    def turn(slots: int) -> None:
        start_B = state.length.clone()
        position_BL = start_B[:, None] + torch.arange(slots, device=noise.device)
        draft_BL, accept_BL, emit_BL = work.source.uniform(Use.DRAFT, position_BL, (3,), work.passes_11).unbind(-1)
        draft_BK, q_BKV = draft_chain(drafting, draft_BL[:, :-1])
        logits_BLV, features_RLD = read_window(model, state, drafting, draft_BK)
        verdict = verify(filtered_probs(logits_BLV, *filters), q_BKV, draft_BK, accept_BL[:, :-1], emit_BL)
        model.commit(state, verdict.tokens_BL, verdict.count_B)
        work.counts.add_chain(verdict, num_drafts, start_B)
        drafting.observe(start_B, features_RLD, verdict.count_B)

    return work.run(turn, check_every, callback)
