"""Verifying drafted tokens: the accept/resample rule, and the loop of passes, that every speculative sampler shares.

Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318. A token x drawn from a
distribution q is accepted with probability min(1, p(x) / q(x)); else a token is drawn from the residual, [p - q]+
normalised. The result follows p whatever q is, if q is the distribution that x was really drawn from. So q is
stored at the moment of the draw, and the residual is used unchanged: filtering it (top-p, temperature) a second time
would change the distribution.

A pass reads a window of L = K + 1 slots, the last committed token and K drafts; row j of p is the conditional of
position length + j given the first j drafts. Every row of the batch commits its own number of tokens and keeps its own
length. A row that is done stays in the batch, so that buffers and captured steps keep their shapes, but it commits and
counts nothing.

B batch, K drafts, L = K + 1 slots, V codes, W largest window, N tokens of an image.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from visar import kernels
from visar.core.checks import WINDOW, Range, check_range
from visar.core.guidance import Guidance
from visar.core.interface import Callback, Generator
from visar.core.noise import Noise
from visar.core.output import SampleOutput, SampleStatistics
from visar.core.runtime import Session
from visar.samplers.filtering import check_filters, draw, fits_kernels

DRAFTS = Range(1, 1000)  # of a chain, one after the other


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """Distribution float32 [..., V] of a draft that was chosen without a draw."""
    zeros = torch.zeros(*tokens.shape, vocab_size, dtype=torch.float32, device=tokens.device)
    return zeros.scatter_(-1, tokens[..., None], 1.0)


def acceptance(p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
    """Probability min(1, p(x) / q(x)) of accepting drafts x int64 [...], drawn from q [..., V]; p has q's shape."""
    target = p.gather(-1, draft[..., None]).squeeze(-1)
    drafted = q.gather(-1, draft[..., None]).squeeze(-1)
    ratio = target / drafted.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(target < drafted, ratio, (target > 0).float())


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Mass [p - q]+ [..., V] (not normalised) to draw from after a rejection; p where rounding left nothing."""
    mass = (p - q).clamp(min=0.0)
    return torch.where(mass.sum(-1, keepdim=True) > 0, mass, p)


def leading(accepted_BK: Tensor) -> Tensor:
    """Number of accepted drafts before the first rejection, int64 [B], 0 ... K."""
    return accepted_BK.long().cumprod(-1).sum(-1)


def verified_in_chain(accepted_B: Tensor, most_B: Tensor | int, left_B: Tensor) -> Tensor:
    """Number of drafts of a chain that were verified: the accepted ones and the rejected one, none beyond the end."""
    return torch.minimum((accepted_B + 1).clamp(max=most_B), left_B)


def row_at(values_BLX: Tensor, index_B: Tensor) -> Tensor:
    """Row index_B[b] of every image's [L, X], as [B, X]."""
    return values_BLX.gather(1, index_B[:, None, None].expand(-1, 1, values_BLX.shape[-1])).squeeze(1)


@dataclass(frozen=True)
class Verdict:
    """What a pass commits.

    Attributes:
        tokens_BL: int64; the first count_B of a row are the accepted drafts and one more token.
        count_B: int64, 1 ... L.
        accepted_B: int64, accepted drafts, count_B - 1.
        accepted_BK: bool, every draft's own outcome, also behind the first rejection.
    """

    tokens_BL: Tensor
    count_B: Tensor
    accepted_B: Tensor
    accepted_BK: Tensor


def verify(
    p_BLV: Tensor,
    q_BKV: Tensor,
    draft_BK: Tensor,
    accept_uniform_BK: Tensor,
    emit_uniform_BL: Tensor,
    *,
    verified_B: Tensor | None = None,
    chance_BK: Tensor | None = None,
) -> Verdict:
    """Accepts drafts up to the first rejection and draws the token after them (arXiv 2211.17192, algorithm 1).

    After a rejection the token comes from the residual, after K accepted drafts from p. Exact for chance_BK=None.

    Args:
        p_BLV: float32 target distributions, row j given the first j drafts.
        q_BKV: float32, the distributions that the drafts were drawn from.
        draft_BK: int64.
        accept_uniform_BK, emit_uniform_BL: float32 in (0, 1); a draft is accepted if its uniform number is below
            its chance.
        verified_B: int64, how many drafts of a row are verified at all, 0 ... K; None is K. The token after the last
            of them is drawn from p.
        chance_BK: probabilities of accepting a draft, for lossy samplers; None is min(1, p / q).
    """
    num_drafts = draft_BK.shape[1]
    if fits_kernels(p_BLV):
        from visar.kernels.verify import verify_window

        with kernels.on(p_BLV.device):
            chances: dict = dict(verified_B=verified_B, chance_BK=chance_BK)
            return Verdict(*verify_window(p_BLV, q_BKV, draft_BK, accept_uniform_BK, emit_uniform_BL, **chances)[1])
    if chance_BK is None:
        chance_BK = acceptance(p_BLV[:, :num_drafts], q_BKV, draft_BK)
    accepted_BK = accept_uniform_BK < chance_BK
    accepted_B = leading(accepted_BK)
    last_B = torch.full_like(accepted_B, num_drafts) if verified_B is None else verified_B
    accepted_B = torch.minimum(accepted_B, last_B)
    q_BV = row_at(functional.pad(q_BKV, (0, 0, 0, 1)), accepted_B) * (accepted_B < last_B)[:, None]
    mass_BV = residual(row_at(p_BLV, accepted_B), q_BV)
    emitted_B = draw(mass_BV, row_at(emit_uniform_BL[..., None], accepted_B).squeeze(-1))
    tokens_BL = functional.pad(draft_BK, (0, 1)).scatter(1, accepted_B[:, None], emitted_B[:, None])
    return Verdict(tokens_BL, accepted_B + 1, accepted_B, accepted_BK)


@dataclass(frozen=True)
class Counts:
    """Counters of a loop, on the device: what SampleStatistics is made from.

    Attributes:
        num_tokens: N.
        per_pass_W: int64 [W + 1], how often a pass of a row that was not done committed 0, 1, ... tokens.
        drafts_2: int64 [2], verified and accepted drafts.
        outcome_BT: int8 [B, N + W], see SampleOutput; the slack takes writes beyond the end.
    """

    num_tokens: int
    per_pass_W: Tensor
    drafts_2: Tensor
    outcome_BT: Tensor

    @classmethod
    def start(cls, session: Session, window: int, batch: int, num_tokens: int, device: torch.device) -> "Counts":
        """Zeros, in the session's tensors."""
        return cls(
            num_tokens,
            session.static("per_pass", torch.zeros(window + 1, dtype=torch.int64, device=device)),
            session.static("drafts", torch.zeros(2, dtype=torch.int64, device=device)),
            session.static("outcome", torch.zeros(batch, num_tokens + window, dtype=torch.int8, device=device)),
        )

    @property
    def counters(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """N and the counters, as kernels take them."""
        return self.num_tokens, self.per_pass_W, self.drafts_2, self.outcome_BT

    def add(self, count_B: Tensor, accepted_B: Tensor, verified_B: Tensor, left_B: Tensor, refused_B: Tensor) -> None:
        """Counts one pass.

        Args:
            count_B: tokens committed; accepted_B: accepted drafts; verified_B: verified drafts, none beyond the end.
            left_B: tokens that a row lacked before the pass; 0 when it was done. Nothing beyond the end counts.
            refused_B: bool, whether a draft was rejected where the token after the accepted ones is.
        """
        if kernels.available(count_B.device):
            from visar.kernels.verify import count_pass

            with kernels.on(count_B.device):
                return count_pass(count_B, accepted_B, verified_B, left_B, refused_B, self.counters)
        live_B = left_B > 0
        # The whole window is written: what is behind the committed tokens is written again by the passes to come.
        slot_W = torch.arange(len(self.per_pass_W) - 1, device=left_B.device)
        outcome_BW = 2 * (slot_W < accepted_B[:, None]) + ((slot_W == accepted_B[:, None]) & refused_B[:, None]).long()
        place_BW = self.num_tokens - left_B[:, None] + slot_W
        self.outcome_BT.scatter_(1, place_BW, outcome_BW.to(torch.int8))
        self.per_pass_W.scatter_add_(0, torch.minimum(count_B, left_B), live_B.long())
        self.drafts_2.add_(torch.stack([(verified_B * live_B).sum(), torch.minimum(accepted_B, left_B).sum()]))

    def add_chain(self, verdict: Verdict, most_B: Tensor | int, length_B: Tensor) -> None:
        """Counts a pass that verified a chain of drafts, the first most_B of every row.

        length_B: tokens that were committed before it.
        """
        left_B = self.num_tokens - length_B
        verified_B = verified_in_chain(verdict.accepted_B, most_B, left_B)
        self.add(verdict.count_B, verdict.accepted_B, verified_B, left_B, verified_B > verdict.accepted_B)

    def output(self, tokens_BN: Tensor, forward_passes: dict[str, int], seconds: float) -> SampleOutput:
        """Tokens with the counts on the host."""
        outcome_BN = self.outcome_BT[:, : tokens_BN.shape[1]].clone()
        return SampleOutput(tokens_BN, self.statistics(forward_passes, seconds), outcome_BN=outcome_BN)

    def statistics(self, forward_passes: dict[str, int], seconds: float) -> SampleStatistics:
        """The counts on the host."""
        proposed, accepted = self.drafts_2.tolist()
        histogram = {count: times for count, times in enumerate(self.per_pass_W.tolist()) if times}
        return SampleStatistics(forward_passes, histogram, proposed, accepted, seconds)


def static_noise(session: Session, noise: Noise) -> Noise:
    """The same source with its seeds in the session, so that captured steps read those of the latest call."""
    static = copy.copy(noise)
    static.seeds_B = session.static("seeds", noise.seeds_B)
    return static


def run_passes(
    session: Session,
    state: Any,
    step: Callable[[int], None],
    *,
    num_tokens: int,
    window: int,
    check_every: int,
    callback: Callback | None,
    width: Callable[[], int] | None = None,
) -> tuple[int, int]:
    """Runs passes until every row has all its tokens, or the callback ends the sampling.

    The host looks at the rows' lengths at passes that are multiples of `check_every` at the latest, and sooner when
    the slowest row might be done: it needs at least (tokens it lacks) / window passes, so no pass is ever wasted.

    Args:
        step: one pass; its argument is the number of slots it reads.
        num_tokens: N; window: most slots, the most tokens a pass commits.
        check_every: passes between two looks at most.
        callback: called at every look, see `Callback`.
        width: slots of the passes up to the next look, asked at every look; None is always `window`.

    Returns: the number of passes, and of tokens that all rows have.
    """
    slot_N = torch.arange(num_tokens, device=state.tokens.device)
    left, passes = num_tokens, 0
    while left:
        slots = window if width is None else width()
        for _ in range(min(check_every - passes % check_every, -(-left // window))):
            session.run(lambda: step(slots), ("pass", slots))  # noqa: B023 - run calls it at once
            passes += 1
        left = num_tokens - int(state.length.min())
        if callback is not None:
            known_BN = state.tokens[:, :num_tokens] * (slot_N < state.length[:, None])
            if callback(num_tokens - left, known_BN):
                break
    session.check_finite()
    return passes, num_tokens - left


def check_passes(
    model: Generator, guidance: Guidance, filters: tuple[float, int, float], window: int, check_every: int
) -> None:
    """Checks the settings that all samplers of windows and trees have.

    Raises:
        ValueError: see `check_filters` and `Guidance.scales`; window or check_every outside of WINDOW.
    """
    check_filters(*filters)
    guidance.scales(model.num_tokens)
    check_range("window", window, WINDOW)
    check_range("check_every", check_every, WINDOW)
