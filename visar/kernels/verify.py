"""The verdict on a drafted window: which drafts stay, the token after them, what is counted, and the commit.

The accept/resample rule (arXiv 2211.17192, algorithm 1) is applied to all rows of the window at once, one program a
row; then one program per image finds the first rejection. The plain counterparts are in visar/samplers/verify.py, and
`refresh` of visar/samplers/jacobi_drafts.py for the new drafts.

B images, K drafts, L = K + 1 slots, V codes, W largest window, T positions with slack.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.kernels import finite
from visar.kernels.distributions import (
    at,
    chance_of,
    codes_of,
    filtered,
    filters_of,
    inverted,
    likeliest,
    note,
    residual_of,
    tile,
)

_REFRESH = {None: 0, "none": 1, "maximal": 2, "gumbel": 3}
"""Numbers of the couplings of visar.samplers.jacobi_drafts.refresh."""


@triton.jit
def _verify_window(
    given_ptr, p_ptr, flag_ptr, q_ptr, draft_ptr, fresh_ptr, accept_ptr, emit_ptr, verified_ptr, chance_ptr,
    gumbel_ptr, length_ptr, accepted_ptr, emitted_ptr, next_ptr,
    codes, slots, q_image, draft_image, fresh_image, fresh_slot, accept_image, accept_slot, emit_image, emit_slot,
    gumbel_image, temperature, top_k, top_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    LOGITS: tl.constexpr, WATCHED: tl.constexpr, LIMITED: tl.constexpr, CHANCE: tl.constexpr, REFRESH: tl.constexpr,
):  # fmt: skip
    """One row: its distribution, its draft's outcome, the token if the pass ends at this row, and a new draft."""
    line = tl.program_id(0).to(tl.int64)
    image = line // slots
    slot = line % slots
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    if LOGITS:
        x = tl.load(given_ptr + line * codes + code, mask=inside, other=float("-inf")) / temperature
        if WATCHED:
            note(x, flag_ptr)
        _, p = filtered(x, inside, top_k, top_p, TOP_K, TOP_P)
        p = p / tl.sum(p)
        tl.store(p_ptr + line * codes + code, p, mask=inside)
    else:
        p = tl.load(given_ptr + line * codes + code, mask=inside, other=0.0)

    # The slot behind the last draft has no q: what is left of p is p.
    drafted = slot < slots - 1
    place = image * (slots - 1) + slot
    token = tl.load(draft_ptr + image * draft_image + slot, mask=drafted, other=0)
    q = tl.load(q_ptr + image * q_image + slot * codes + code, mask=inside & drafted, other=0.0)
    if CHANCE:
        chance = tl.load(chance_ptr + place, mask=drafted, other=0.0)
    else:
        chance = chance_of(at(p, code, token), at(q, code, token))
    accepted = tl.load(accept_ptr + image * accept_image + slot * accept_slot, mask=drafted, other=1.0) < chance
    tl.store(accepted_ptr + place, accepted.to(tl.uint8), mask=drafted)
    left = residual_of(p, q)
    mass = left
    # Behind the drafts that an image had itself stands what was read for images with longer windows.
    own = drafted
    if LIMITED:
        own = slot < tl.load(verified_ptr + image)
        mass = tl.where(own, left, p)
    emit = tl.load(emit_ptr + image * emit_image + slot * emit_slot)
    emitted = inverted(mass, emit, ROWS, COLUMNS)
    tl.store(emitted_ptr + line, emitted)

    # The new draft stays fair by the rule of visar.samplers.jacobi: drawn anew, by the verdict, or by fixed noise.
    if REFRESH == 1:
        fresh = tl.load(fresh_ptr + image * fresh_image + slot * fresh_slot)
        tl.store(next_ptr + line, inverted(p, fresh, ROWS, COLUMNS))
    if REFRESH == 2:
        if own:
            again = inverted(left, emit, ROWS, COLUMNS)
            tl.store(next_ptr + line, tl.where(accepted, token, again))
        else:
            fresh = tl.load(fresh_ptr + image * fresh_image + slot * fresh_slot)
            tl.store(next_ptr + line, inverted(p, fresh, ROWS, COLUMNS))
    if REFRESH == 3:
        position = tl.load(length_ptr + image) + slot
        noise = tl.load(gumbel_ptr + image * gumbel_image + position * codes + code, mask=inside, other=0.0)
        tl.store(next_ptr + line, likeliest(tl.where(inside, tl.log(p) + noise, float("-inf")), code))


@triton.jit
def _counted(
    count, num_accepted, verified, left, refused, image, num_tokens, window,
    per_pass_ptr, drafts_ptr, outcome_ptr, outcome_image, SLOTS: tl.constexpr,
):  # fmt: skip
    """What visar.samplers.verify.Counts.add does for one image."""
    slot = tl.arange(0, SLOTS)
    outcome = tl.where(slot < num_accepted, 2, tl.where((slot == num_accepted) & refused, 1, 0)).to(tl.int8)
    tl.store(outcome_ptr + image * outcome_image + num_tokens - left + slot, outcome, mask=slot < window)
    if left > 0:
        tl.atomic_add(per_pass_ptr + tl.minimum(count, left), 1)
        tl.atomic_add(drafts_ptr, verified)
    tl.atomic_add(drafts_ptr + 1, tl.minimum(num_accepted, left))


@triton.jit
def _settle(
    draft_ptr, accepted_ptr, emitted_ptr, verified_ptr, length_ptr, tokens_ptr, count_ptr, num_accepted_ptr,
    per_pass_ptr, drafts_ptr, outcome_ptr, slots, draft_image, num_tokens, window, outcome_image,
    SLOTS: tl.constexpr, LIMITED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One image: the drafts before the first rejection and the token of the row that they end at."""
    image = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS).to(tl.int64)
    drafted = slot < slots - 1
    accepted = tl.load(accepted_ptr + image * (slots - 1) + slot, mask=drafted, other=0) != 0
    num_accepted = tl.min(tl.where(accepted, slots - 1, slot), axis=0)
    most = slots - 1
    if LIMITED:
        most = tl.load(verified_ptr + image)
        num_accepted = tl.minimum(num_accepted, most)
    draft = tl.load(draft_ptr + image * draft_image + slot, mask=drafted, other=0)
    emitted = tl.load(emitted_ptr + image * slots + num_accepted)
    tl.store(tokens_ptr + image * slots + slot, tl.where(slot == num_accepted, emitted, draft), mask=slot < slots)
    tl.store(num_accepted_ptr + image, num_accepted)
    tl.store(count_ptr + image, num_accepted + 1)
    if COUNT:
        left = num_tokens - tl.load(length_ptr + image)
        verified = tl.minimum(tl.minimum(num_accepted + 1, most), left)
        _counted(
            num_accepted + 1, num_accepted, verified, left, verified > num_accepted, image, num_tokens, window,
            per_pass_ptr, drafts_ptr, outcome_ptr, outcome_image, SLOTS,
        )  # fmt: skip


def verify_window(
    given_BLV: Tensor,
    q_BKV: Tensor,
    draft_BK: Tensor,
    accept_BL: Tensor,
    emit_BL: Tensor,
    *,
    filters: tuple[float, int, float] | None = None,
    verified_B: Tensor | None = None,
    chance_BK: Tensor | None = None,
    coupling: str | None = None,
    fresh_BL: Tensor | None = None,
    gumbel_BTV: Tensor | None = None,
    length_B: Tensor | None = None,
    counts: tuple[int, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`filtered_probs`, `verify` and `refresh` of a window in two launches.

    Args:
        given_BLV: float32 logits; with filters None, distributions.
        q_BKV, draft_BK, accept_BL, emit_BL, verified_B, chance_BK: see `visar.samplers.verify.verify`; of accept_BL
            the last slot is not read.
        filters: temperature, top_k and top_p of the distributions.
        coupling, fresh_BL, gumbel_BTV: of `visar.samplers.jacobi_drafts.refresh`, the noise of all positions; None
            draws no new drafts.
        length_B: int64 committed tokens, for the noise and the counts.
        counts: num_tokens and the counters of `visar.samplers.verify.Counts` to add this pass to.

    Returns: distributions [B, L, V]; tokens_BL, count_B, accepted_B and accepted_BK of the verdict; new drafts int64
        [B, L].
    """
    given_BLV = given_BLV.contiguous()
    batch, slots, codes = given_BLV.shape
    device = given_BLV.device
    q_BKV = q_BKV if q_BKV.stride()[1:] == (codes, 1) else q_BKV.contiguous()
    draft_BK = draft_BK if draft_BK.stride(1) == 1 else draft_BK.contiguous()
    p_BLV = given_BLV if filters is None else torch.empty_like(given_BLV)
    accepted_BK = torch.empty(batch, slots - 1, dtype=torch.bool, device=device)
    emitted_BL = torch.empty(batch, slots, dtype=torch.int64, device=device)
    next_BL = torch.empty_like(emitted_BL)
    # What a kernel does not need stands in for itself: the pointer is never followed.
    fresh_BL = emit_BL if fresh_BL is None else fresh_BL
    gumbel_BTV = p_BLV if gumbel_BTV is None else gumbel_BTV
    verified = emitted_BL if verified_B is None else verified_B
    length = emitted_BL if length_B is None else length_B
    flag_1 = finite.flag()
    settings, switches = filters_of(codes, *(filters or (1.0, 0, 1.0)))
    _verify_window[(batch * slots,)](
        given_BLV,
        p_BLV,
        p_BLV if flag_1 is None else flag_1,
        q_BKV,
        draft_BK,
        fresh_BL,
        accept_BL,
        emit_BL,
        verified,
        p_BLV if chance_BK is None else chance_BK.contiguous(),
        gumbel_BTV,
        length,
        accepted_BK.view(torch.uint8),
        emitted_BL,
        next_BL,
        codes,
        slots,
        q_BKV.stride(0),
        draft_BK.stride(0),
        *fresh_BL.stride(),
        *accept_BL.stride(),
        *emit_BL.stride(),
        gumbel_BTV.stride(0),
        *settings,
        **switches,
        LOGITS=filters is not None,
        WATCHED=flag_1 is not None,
        LIMITED=verified_B is not None,
        CHANCE=chance_BK is not None,
        REFRESH=_REFRESH[coupling],
        **tile(codes),
    )
    tokens_BL = torch.empty_like(emitted_BL)
    count_B = torch.empty(batch, dtype=torch.int64, device=device)
    accepted_B = torch.empty_like(count_B)
    num_tokens, per_pass_W, drafts_2, outcome_BT = counts or (0, count_B, count_B, tokens_BL)
    window = per_pass_W.shape[0] - 1
    _settle[(batch,)](
        draft_BK,
        accepted_BK.view(torch.uint8),
        emitted_BL,
        verified,
        length,
        tokens_BL,
        count_B,
        accepted_B,
        per_pass_W,
        drafts_2,
        outcome_BT,
        slots,
        draft_BK.stride(0),
        num_tokens,
        window,
        outcome_BT.stride(0),
        SLOTS=triton.next_power_of_2(max(slots, window)),
        LIMITED=verified_B is not None,
        COUNT=counts is not None,
        num_warps=1,
    )
    return p_BLV, (tokens_BL, count_B, accepted_B, accepted_BK), next_BL


@triton.jit
def _count(
    count_ptr, num_accepted_ptr, verified_ptr, left_ptr, refused_ptr, per_pass_ptr, drafts_ptr, outcome_ptr,
    num_tokens, window, outcome_image, SLOTS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + image)
    num_accepted = tl.load(num_accepted_ptr + image)
    verified = tl.load(verified_ptr + image)
    left = tl.load(left_ptr + image)
    refused = tl.load(refused_ptr + image) != 0
    _counted(
        count, num_accepted, verified, left, refused, image, num_tokens, window,
        per_pass_ptr, drafts_ptr, outcome_ptr, outcome_image, SLOTS,
    )  # fmt: skip


def count_pass(
    count_B: Tensor,
    accepted_B: Tensor,
    verified_B: Tensor,
    left_B: Tensor,
    refused_B: Tensor,
    counts: tuple[int, Tensor, Tensor, Tensor],
) -> None:
    """`visar.samplers.verify.Counts.add`; counts: num_tokens and the counters."""
    num_tokens, per_pass_W, drafts_2, outcome_BT = counts
    window = per_pass_W.shape[0] - 1
    _count[(len(count_B),)](
        count_B.contiguous(),
        accepted_B.contiguous(),
        verified_B.contiguous(),
        left_B.contiguous(),
        refused_B.contiguous().view(torch.uint8),
        per_pass_W,
        drafts_2,
        outcome_BT,
        num_tokens,
        window,
        outcome_BT.stride(0),
        SLOTS=triton.next_power_of_2(window),
        num_warps=1,
    )


@triton.jit
def _commit(
    tokens_ptr, length_ptr, new_ptr, count_ptr, positions, new, num_tokens, NEW: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + image)
    slot = tl.arange(0, NEW)
    token = tl.load(new_ptr + image * new + slot, mask=slot < new, other=0)
    inside = (slot < new) & (length + slot < positions)
    tl.store(tokens_ptr + image * positions + length + slot, token, mask=inside)
    tl.store(length_ptr + image, tl.minimum(length + tl.load(count_ptr + image), num_tokens))


def commit(tokens_BT: Tensor, length_B: Tensor, new_BL: Tensor, count_B: Tensor, num_tokens: int) -> None:
    """Writes L tokens behind the committed ones of every row and adds count_B to its length, `num_tokens` at most.

    Differs from the plain commit where tokens fall beyond the last position: they are dropped.
    """
    batch, new = new_BL.shape
    _commit[(batch,)](
        tokens_BT,
        length_B,
        new_BL.contiguous(),
        count_B.contiguous(),
        tokens_BT.shape[1],
        new,
        num_tokens,
        NEW=triton.next_power_of_2(new),
        num_warps=1,
    )
