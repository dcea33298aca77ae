"""The drafts of speculative Jacobi decoding: how a pass verifies them, and what it leaves for the next pass.

Sources: SJD, arXiv 2410.01699; the couplings, 2510.24211. Why the drafts stay fair is said in samplers/jacobi.py.
`verify_drafts` and `carry` take the kernels of visar/kernels/verify.py and visar/kernels/jacobi.py where these run.

B batch, K drafts, L = K + 1 slots, V codes, N tokens, T = N + K + 1 positions with slack, S remembered positions,
M = S + K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from visar import kernels
from visar.core.interface import Windowed
from visar.core.noise import Noise, Use
from visar.core.runtime import Session
from visar.samplers.filtering import draw, filtered_probs, fits_kernels
from visar.samplers.verify import Counts, Verdict, one_hot, residual, verify

Coupling = Literal["none", "maximal", "gumbel"]
COUPLINGS = ("none", "maximal", "gumbel")
Initial = Literal["random", "left", "left_mode", "left_law", "above", "above_law"]
INITIALS = ("random", "left", "left_mode", "left_law", "above", "above_law")
Chance = Callable[[Tensor, Tensor, Tensor], Tensor]


def window_sizes(window: int) -> list[int]:
    """Windows of an adaptive call: powers of two from 4 up, then `window` itself."""
    return [size for size in (4, 8, 16, 32, 64, 128) if size < window] + [window]


def gumbel_table(noise: Noise, length: int, vocab_size: int) -> Tensor:
    """Gumbel noise of every position of every image, float32 [B, length, V]; some images at a time to save memory."""
    position = torch.arange(length, device=noise.device)[None]
    rows = torch.arange(noise.batch, device=noise.device)
    few = max(1, 2**22 // (length * vocab_size))
    return torch.cat([noise.rows(some).gumbel(Use.DRAFT, position, (vocab_size,)) for some in rows.split(few)])


@dataclass(frozen=True)
class Drafts:
    """Drafts of the next pass, and what new ones are made from. The tensors are static: changed in place.

    Attributes:
        initial, coupling, adaptive: see `visar.samplers.jacobi.sample_jacobi`.
        columns: of the token grid.
        tokens_BK: int64 drafts.
        probs_BKV: float32, the distributions that they were drawn from.
        sizes: int64, windows to choose from; size_B: slots that every image reads in the next pass.
        mark_B: int64 [B], length at the last choice.
        guess_uniform_BT: float32 in (0, 1), one per position, for first guesses.
        gumbel_BTV: noise of every position, for coupling "gumbel"; else None.
        recent_BSV: distributions of the last S committed positions, for the guesses that use distributions.
    """

    initial: Initial
    coupling: Coupling
    adaptive: bool
    columns: int
    tokens_BK: Tensor
    probs_BKV: Tensor
    sizes: Tensor
    size_B: Tensor
    mark_B: Tensor
    guess_uniform_BT: Tensor
    gumbel_BTV: Tensor | None
    recent_BSV: Tensor

    @classmethod
    def start(
        cls,
        session: Session,
        noise: Noise,
        model: Windowed,
        window: int,
        initial: Initial,
        coupling: Coupling,
        adaptive: bool,
    ) -> "Drafts":
        """Random drafts of the first `window` - 1 tokens."""
        batch, device, vocab_size, columns = (
            noise.batch,
            noise.device,
            model.config["vocab_size"],
            model.config["grid"][-1],
        )
        positions = model.num_tokens + window
        every_position = torch.arange(positions, device=device).expand(batch, -1)
        uniform_BT = session.static("guess", noise.uniform(Use.INITIAL, every_position))
        first_BK = (uniform_BT[:, : window - 1] * vocab_size).long().clamp(max=vocab_size - 1)
        remembered = columns if initial.endswith(("law", "mode")) else 0
        gumbel_BTV = None
        if coupling == "gumbel":
            gumbel_BTV = session.static("gumbel", gumbel_table(noise, positions, vocab_size))
        sizes = session.static("sizes", torch.tensor(window_sizes(window), device=device))
        return cls(
            initial,
            coupling,
            adaptive,
            columns,
            tokens_BK=session.static("draft", first_BK),
            probs_BKV=session.static("probs", one_hot(first_BK, vocab_size)),
            sizes=sizes,
            size_B=session.static("size", (sizes[:1] if adaptive else sizes[-1:]).expand(batch)),
            mark_B=session.static("mark", torch.zeros(batch, dtype=torch.int64, device=device)),
            guess_uniform_BT=uniform_BT,
            gumbel_BTV=gumbel_BTV,
            recent_BSV=session.static(
                "recent", torch.zeros(batch, remembered, vocab_size, dtype=torch.float32, device=device)
            ),
        )

    def adapt(self, length_B: Tensor, passes_11: Tensor, check_every: int) -> None:
        """Every check_every passes: 4 times as many slots as an image lately committed per pass."""
        due = (passes_11[0] % check_every) == 0
        wanted_B = 4 * (length_B - self.mark_B) / check_every
        index_B = (self.sizes < wanted_B[:, None]).sum(-1).clamp(max=len(self.sizes) - 1)
        self.size_B.copy_(torch.where(due, self.sizes[index_B], self.size_B))
        self.mark_B.copy_(torch.where(due, length_B, self.mark_B))


# --------------------------------------------------------------------------------------------------------- verifying
def verify_drafts(
    drafts: Drafts,
    logits_BLV: Tensor,
    uniform_BL3: Tensor,
    length_B: Tensor,
    counts: Counts,
    filters: tuple[float, int, float],
    chance: Chance | None,
) -> tuple[Tensor, Verdict, Tensor]:
    """The distributions of a pass, what it commits, and a new draft of every slot; the pass is counted.

    Args:
        drafts: those that were read, L - 1 of them.
        logits_BLV: guided logits of the window.
        uniform_BL3: float32 in (0, 1), for new drafts, acceptance and the token after the accepted drafts.
        length_B: tokens committed before the pass.
        filters: temperature, top_k and top_p of the distributions.
        chance: (p_BKV, q_BKV, draft_BK) -> probabilities [B, K] of accepting the drafts; None is the exact rule.

    Returns: distributions p [B, L, V], the verdict, and new drafts int64 [B, L], each fair for its row of p.
    """
    last = logits_BLV.shape[1] - 1
    fresh_BL, accept_BL, emit_BL = uniform_BL3.unbind(-1)
    now_BK, q_BKV = drafts.tokens_BK[:, :last], drafts.probs_BKV[:, :last]
    verified_B = drafts.size_B - 1 if drafts.adaptive else None
    if fits_kernels(logits_BLV):
        from visar.kernels.verify import verify_window

        with kernels.on(logits_BLV.device):
            given_BLV = logits_BLV if chance is None else filtered_probs(logits_BLV, *filters)
            p_BLV, fields, next_BL = verify_window(
                given_BLV,
                q_BKV,
                now_BK,
                accept_BL,
                emit_BL,
                filters=filters if chance is None else None,
                verified_B=verified_B,
                chance_BK=None if chance is None else chance(given_BLV[:, :-1], q_BKV, now_BK),
                coupling=drafts.coupling,
                fresh_BL=fresh_BL,
                gumbel_BTV=drafts.gumbel_BTV,
                length_B=length_B,
                counts=counts.counters,
            )
        return p_BLV, Verdict(*fields), next_BL
    p_BLV = filtered_probs(logits_BLV, *filters)
    chance_BK = None if chance is None else chance(p_BLV[:, :-1], q_BKV, now_BK)
    verdict = verify(p_BLV, q_BKV, now_BK, accept_BL[:, :-1], emit_BL, verified_B=verified_B, chance_BK=chance_BK)
    gumbel_BLV = None
    if drafts.gumbel_BTV is not None:
        place_BL = length_B[:, None] + torch.arange(last + 1, device=length_B.device)
        gumbel_BLV = drafts.gumbel_BTV.gather(1, place_BL[..., None].expand(-1, -1, p_BLV.shape[-1]))
    next_BL = refresh(drafts.coupling, p_BLV, q_BKV, now_BK, verdict, fresh_BL, emit_BL, gumbel_BLV, verified_B)
    counts.add_chain(verdict, last if verified_B is None else verified_B, length_B)
    return p_BLV, verdict, next_BL


def refresh(
    coupling: Coupling,
    p_BLV: Tensor,
    q_BKV: Tensor,
    draft_BK: Tensor,
    verdict: Verdict,
    fresh_uniform_BL: Tensor,
    emit_uniform_BL: Tensor,
    gumbel_BLV: Tensor | None = None,
    verified_B: Tensor | None = None,
) -> Tensor:
    """A new fair draft of every row of p, int64 [B, L]: the rules (a) "none", (b) "maximal", (c) "gumbel".

    Rule (b) holds for the drafts that an image had, its first verified_B (all K if None). What stands behind them was
    read for other images with longer windows: it is drawn anew, so that an image does not depend on its batch.
    """
    if coupling == "gumbel":
        assert gumbel_BLV is not None
        return (p_BLV.log() + gumbel_BLV).argmax(-1)
    if coupling == "none":
        return draw(p_BLV, fresh_uniform_BL)
    drafts = draft_BK.shape[1]
    slot_L = torch.arange(drafts + 1, device=p_BLV.device)
    drafted_BL = (slot_L < (drafts if verified_B is None else verified_B[:, None])).expand(len(p_BLV), -1)
    mass_BLV = torch.where(drafted_BL[..., None], residual(p_BLV, functional.pad(q_BKV, (0, 0, 0, 1))), p_BLV)
    drawn_BL = draw(mass_BLV, torch.where(drafted_BL, emit_uniform_BL, fresh_uniform_BL))
    stays_BL = functional.pad(verdict.accepted_BK, (0, 1)) & drafted_BL
    return torch.where(stays_BL, functional.pad(draft_BK, (0, 1)), drawn_BL)


# ---------------------------------------------------------------------------------------------------------- carrying
def shift(values: Tensor, by_B: Tensor, length: int) -> Tensor:
    """Entries by_B ... by_B + length - 1 of axis 1 (the last one repeated behind the end)."""
    index = (by_B[:, None] + torch.arange(length, device=by_B.device)).clamp(max=values.shape[1] - 1)
    return values.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:]))


def guess_source(initial: Initial, position_BK: Tensor, known_B: Tensor, columns: int) -> Tensor:
    """Position that the guess of `position_BK` is taken from, int64 [B, K]; -1 where there is none.

    Left: the neighbour, or the last known token if that comes first; none in column 0. Above: the nearest known token
    of the column. known_B: number of positions from 0 on that are committed or drafted.
    """
    if initial.startswith("left"):
        source_BK = torch.minimum(position_BK - 1, known_B[:, None] - 1)
        return torch.where(position_BK % columns == 0, -1, source_BK)
    rows_up_BK = (position_BK - known_B[:, None]).div(columns, rounding_mode="floor") + 1
    return (position_BK - columns * rows_up_BK.clamp(min=1)).clamp(min=-1)


def guess(
    initial: Initial,
    position_BK: Tensor,
    known_B: Tensor,
    columns: int,
    tokens_BT: Tensor,
    probs_BMV: Tensor | None,
    first_B: Tensor | None,
    uniform_BK: Tensor,
    vocab_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Guesses int64 [B, K] of slots that no pass has predicted yet.

    Args:
        initial: see sample_jacobi.
        position_BK: where; known_B, columns: see guess_source.
        tokens_BT: committed and drafted tokens.
        probs_BMV, first_B: distributions of the positions first_B ... first_B + M - 1, for the kinds that use
            distributions.
        uniform_BK: one uniform number per position.

    Returns: guesses, and the distributions [B, K, V] they were drawn from; None when all are one-hot.
    """
    random_BK = (uniform_BK * vocab_size).long().clamp(max=vocab_size - 1)
    if initial == "random":
        return random_BK, None
    source_BK = guess_source(initial, position_BK, known_B, columns)
    found_BK = source_BK >= 0
    if initial in ("left", "above"):
        return torch.where(found_BK, tokens_BT.gather(1, source_BK.clamp(min=0)), random_BK), None
    assert probs_BMV is not None and first_B is not None
    index_BK = (source_BK - first_B[:, None]).clamp(0, probs_BMV.shape[1] - 1)
    probs_BKV = probs_BMV.gather(1, index_BK[..., None].expand(-1, -1, vocab_size))
    if initial == "left_mode":
        return torch.where(found_BK, probs_BKV.argmax(-1), random_BK), None
    probs_BKV = torch.where(found_BK[..., None], probs_BKV, one_hot(random_BK, vocab_size))
    return draw(probs_BKV, uniform_BK), probs_BKV


def carry(drafts: Drafts, state: Any, next_BL: Tensor, p_BLV: Tensor, count_B: Tensor) -> None:
    """Makes the slots behind the committed tokens the next pass's drafts, and guesses the slots beyond them.

    Args:
        drafts: changed in place.
        state: the generator's, with the pass committed.
        next_BL, p_BLV: new drafts of the pass and their distributions.
        count_B: how many tokens it committed.
    """
    if fits_kernels(p_BLV):
        from visar.kernels.jacobi import carry as carry_all

        places = (state.length, state.tokens, drafts.guess_uniform_BT, drafts.recent_BSV)
        with kernels.on(p_BLV.device):
            return carry_all(
                drafts.initial,
                next_BL,
                p_BLV,
                count_B,
                drafts.size_B,
                *places,
                drafts.tokens_BK,
                drafts.probs_BKV,
                drafts.columns,
            )
    num_drafts, vocab_size = drafts.tokens_BK.shape[1], p_BLV.shape[-1]
    slot_K = torch.arange(num_drafts, device=count_B.device)
    carried_B = drafts.size_B - count_B
    carried_BK = slot_K < carried_B[:, None]
    tokens_BK, probs_BKV = shift(next_BL, count_B, num_drafts), shift(p_BLV, count_B, num_drafts)
    position_BK = state.length[:, None] + slot_K
    probs_BMV, first_B, remembered = None, None, drafts.recent_BSV.shape[1]
    if remembered:
        drafts.recent_BSV.copy_(shift(torch.cat([drafts.recent_BSV, p_BLV], dim=1), count_B, remembered))
        probs_BMV, first_B = torch.cat([drafts.recent_BSV, probs_BKV], dim=1), state.length - remembered
    guess_BK, guess_probs_BKV = guess(
        drafts.initial,
        position_BK,
        state.length + carried_B,
        drafts.columns,
        torch.scatter(state.tokens, 1, position_BK, tokens_BK),
        probs_BMV,
        first_B,
        drafts.guess_uniform_BT.gather(1, position_BK),
        vocab_size,
    )
    if guess_probs_BKV is None:
        guess_probs_BKV = one_hot(guess_BK, vocab_size)
    drafts.tokens_BK.copy_(torch.where(carried_BK, tokens_BK, guess_BK))
    drafts.probs_BKV.copy_(torch.where(carried_BK[..., None], probs_BKV, guess_probs_BKV))
