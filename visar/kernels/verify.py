"""Laws, verdicts and new drafts of a speculative pass: one program a row of the window, or one an image.

The plain counterparts are in visar/samplers/filtering.py, visar/samplers/verify.py and visar/samplers/jacobi.py. The
same uniform numbers are used in the same way; sums are rounded in another order.

B images, K drafts, L = K + 1 slots, V codes, N tokens, T positions with slack, S remembered laws, M rows.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from visar.kernels.draw import _kept

COLUMNS = 128
"""Codes of a block of the inversion, as in visar.samplers.filtering.draw."""

_TINY = tl.constexpr(1.1754943508222875e-38)


def tile(codes: int) -> dict:
    """Launch options of a program that holds laws of V codes."""
    rows = triton.next_power_of_2(triton.cdiv(codes, COLUMNS))
    return dict(ROWS=rows, COLUMNS=COLUMNS, num_warps=min(max(rows // 4, 4), 32))


# ---------------------------------------------------------------------------------------------------------- functions
@triton.jit
def codes_of(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers of all codes, in blocks."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def inverted(mass, uniform, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A code in proportion to its mass: inversion in blocks and then inside the block."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    block = tl.sum(mass, axis=1)
    running = tl.cumsum(block, axis=0)
    rest = uniform * tl.sum(block, axis=0)
    last = tl.max(tl.where(block > 0, row, 0), axis=0)
    chosen = tl.min(tl.where((running > rest) & (block > 0), row, last), axis=0)
    rest -= tl.sum(tl.where(row == chosen, running - block, 0.0), axis=0)
    cell = tl.sum(tl.where(row[:, None] == chosen, mass, 0.0), axis=0)
    running_cell = tl.cumsum(cell, axis=0)
    last_cell = tl.max(tl.where(cell > 0, column, 0), axis=0)
    picked = tl.min(tl.where((running_cell > rest) & (cell > 0), column, last_cell), axis=0)
    return (chosen * COLUMNS + picked).to(tl.int64)


@triton.jit
def at(law, code, token):
    """Entry of one code."""
    return tl.sum(tl.where(code == token, law, 0.0))


@triton.jit
def chance_of(target, drafted):
    """min(1, p(x) / q(x)), as visar.samplers.verify.acceptance."""
    return tl.where(target < drafted, target / tl.maximum(drafted, _TINY), tl.where(target > 0, 1.0, 0.0))


@triton.jit
def residual_of(p, q):
    """[p - q]+; p where nothing is left."""
    mass = tl.maximum(p - q, 0.0)
    return tl.where(tl.sum(mass) > 0, mass, p)


@triton.jit
def likeliest(score, code):
    """The first code of the largest score."""
    return tl.min(tl.where(score == tl.max(score), code, 2147483647)).to(tl.int64)


# ---------------------------------------------------------------------------------------------------- laws and draws
@triton.jit
def _law(
    logits_ptr, out_ptr, codes, temperature, top_k, top_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * codes
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    x = tl.load(logits_ptr + line + code, mask=inside, other=float("-inf")).to(tl.float32) / temperature
    _, mass = _kept(x, inside, top_k, top_p, TOP_K, TOP_P)
    tl.store(out_ptr + line + code, mass / tl.sum(mass), mask=inside)


def filters_of(codes: int, temperature: float, top_k: int, top_p: float) -> tuple[tuple, dict]:
    """Arguments of a kernel that makes laws from logits."""
    return (float(temperature), min(top_k, codes), float(top_p)), dict(TOP_K=0 < top_k < codes, TOP_P=top_p < 1.0)


def law(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """`visar.samplers.verify.token_law` of [..., V], V <= visar.kernels.MAX_CODES."""
    logits = logits.contiguous()
    codes = logits.shape[-1]
    out = torch.empty(logits.shape, device=logits.device)
    settings, switches = filters_of(codes, temperature, top_k, top_p)
    if out.numel():
        _law[(logits.numel() // codes,)](logits, out, codes, *settings, **switches, **tile(codes))
    return out


@triton.jit
def _draw_mass(mass_ptr, uniform_ptr, out_ptr, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    code = codes_of(ROWS, COLUMNS)
    mass = tl.load(mass_ptr + line * codes + code, mask=code < codes, other=0.0)
    tl.store(out_ptr + line, inverted(mass, tl.load(uniform_ptr + line), ROWS, COLUMNS))


def draw_mass(mass: Tensor, uniform: Tensor) -> Tensor:
    """`visar.samplers.filtering.draw` of float32 [..., V], V <= visar.kernels.MAX_CODES."""
    mass, uniform = mass.contiguous(), uniform.contiguous()
    out = torch.empty(uniform.shape, dtype=torch.int64, device=mass.device)
    if out.numel():
        _draw_mass[(out.numel(),)](mass, uniform, out, mass.shape[-1], **tile(mass.shape[-1]))
    return out


# ------------------------------------------------------------------------------------------------------------ verdict
_REFRESH = {None: 0, "none": 1, "maximal": 2, "gumbel": 3}


@triton.jit
def _judge(
    given_ptr, p_ptr, q_ptr, draft_ptr, fresh_ptr, accept_ptr, emit_ptr, judged_ptr, chance_ptr, gumbel_ptr,
    length_ptr, accepted_ptr, emitted_ptr, next_ptr,
    codes, slots, q_image, draft_image, fresh_image, fresh_slot, accept_image, accept_slot, emit_image, emit_slot,
    gumbel_image, temperature, top_k, top_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    LOGITS: tl.constexpr, LIMITED: tl.constexpr, CHANCE: tl.constexpr, REFRESH: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    image = line // slots
    slot = line % slots
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    if LOGITS:
        x = tl.load(given_ptr + line * codes + code, mask=inside, other=float("-inf")) / temperature
        _, p = _kept(x, inside, top_k, top_p, TOP_K, TOP_P)
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
    if LIMITED:
        mass = tl.where(slot < tl.load(judged_ptr + image), left, p)
    emit = tl.load(emit_ptr + image * emit_image + slot * emit_slot)
    emitted = inverted(mass, emit, ROWS, COLUMNS)
    tl.store(emitted_ptr + line, emitted)

    if REFRESH == 1:
        fresh = tl.load(fresh_ptr + image * fresh_image + slot * fresh_slot)
        tl.store(next_ptr + line, inverted(p, fresh, ROWS, COLUMNS))
    if REFRESH == 2:
        if drafted:
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
def counted(
    count, kept, judged, left, refused, image, num_tokens, window,
    per_pass_ptr, drafts_ptr, outcome_ptr, outcome_image, SLOTS: tl.constexpr,
):  # fmt: skip
    """What visar.samplers.verify.Counts.add does for one image."""
    slot = tl.arange(0, SLOTS)
    outcome = tl.where(slot < kept, 2, tl.where((slot == kept) & refused, 1, 0)).to(tl.int8)
    tl.store(outcome_ptr + image * outcome_image + num_tokens - left + slot, outcome, mask=slot < window)
    if left > 0:
        tl.atomic_add(per_pass_ptr + tl.minimum(count, left), 1)
        tl.atomic_add(drafts_ptr, judged)
    tl.atomic_add(drafts_ptr + 1, tl.minimum(kept, left))


@triton.jit
def _settle(
    draft_ptr, accepted_ptr, emitted_ptr, judged_ptr, length_ptr, tokens_ptr, count_ptr, kept_ptr,
    per_pass_ptr, drafts_ptr, outcome_ptr, slots, draft_image, num_tokens, window, outcome_image,
    SLOTS: tl.constexpr, LIMITED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS).to(tl.int64)
    drafted = slot < slots - 1
    accepted = tl.load(accepted_ptr + image * (slots - 1) + slot, mask=drafted, other=0) != 0
    kept = tl.min(tl.where(accepted, slots - 1, slot), axis=0)
    most = slots - 1
    if LIMITED:
        most = tl.load(judged_ptr + image)
        kept = tl.minimum(kept, most)
    draft = tl.load(draft_ptr + image * draft_image + slot, mask=drafted, other=0)
    emitted = tl.load(emitted_ptr + image * slots + kept)
    tl.store(tokens_ptr + image * slots + slot, tl.where(slot == kept, emitted, draft), mask=slot < slots)
    tl.store(kept_ptr + image, kept)
    tl.store(count_ptr + image, kept + 1)
    if COUNT:
        left = num_tokens - tl.load(length_ptr + image)
        judged = tl.minimum(tl.minimum(kept + 1, most), left)
        counted(
            kept + 1, kept, judged, left, judged > kept, image, num_tokens, window,
            per_pass_ptr, drafts_ptr, outcome_ptr, outcome_image, SLOTS,
        )  # fmt: skip


def judge(
    given_BLV: Tensor,
    q_BKV: Tensor,
    draft_BK: Tensor,
    accept_BL: Tensor,
    emit_BL: Tensor,
    *,
    filters: tuple[float, int, float] | None = None,
    judged_B: Tensor | None = None,
    chance_BK: Tensor | None = None,
    coupling: str | None = None,
    fresh_BL: Tensor | None = None,
    gumbel_BTV: Tensor | None = None,
    length_B: Tensor | None = None,
    counts: tuple[int, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`token_law`, `verify` and `refresh` of a window in two launches.

    Args:
        given_BLV: float32 logits; with filters None, laws.
        q_BKV, draft_BK, accept_BL, emit_BL, judged_B, chance_BK: see `visar.samplers.verify.verify`; of accept_BL the
            last slot is not read.
        filters: temperature, top_k and top_p of the laws.
        coupling, fresh_BL, gumbel_BTV: of `visar.samplers.jacobi.refresh`, the noise of all positions; None draws no
            new drafts.
        length_B: int64 committed tokens, for the noise and the counts.
        counts: num_tokens and the counters of `visar.samplers.verify.Counts` to add this pass to.

    Returns: laws [B, L, V]; tokens_BL, count_B, kept_B and accepted_BK of the verdict; new drafts int64 [B, L].
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
    judged = emitted_BL if judged_B is None else judged_B
    length = emitted_BL if length_B is None else length_B
    settings, switches = filters_of(codes, *(filters or (1.0, 0, 1.0)))
    _judge[(batch * slots,)](
        given_BLV,
        p_BLV,
        q_BKV,
        draft_BK,
        fresh_BL,
        accept_BL,
        emit_BL,
        judged,
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
        LIMITED=judged_B is not None,
        CHANCE=chance_BK is not None,
        REFRESH=_REFRESH[coupling],
        **tile(codes),
    )
    tokens_BL = torch.empty_like(emitted_BL)
    count_B = torch.empty(batch, dtype=torch.int64, device=device)
    kept_B = torch.empty_like(count_B)
    num_tokens, per_pass_W, drafts_2, outcome_BT = counts or (0, count_B, count_B, tokens_BL)
    window = per_pass_W.shape[0] - 1
    _settle[(batch,)](
        draft_BK,
        accepted_BK.view(torch.uint8),
        emitted_BL,
        judged,
        length,
        tokens_BL,
        count_B,
        kept_B,
        per_pass_W,
        drafts_2,
        outcome_BT,
        slots,
        draft_BK.stride(0),
        num_tokens,
        window,
        outcome_BT.stride(0),
        SLOTS=triton.next_power_of_2(max(slots, window)),
        LIMITED=judged_B is not None,
        COUNT=counts is not None,
        num_warps=1,
    )
    return p_BLV, (tokens_BL, count_B, kept_B, accepted_BK), next_BL


@triton.jit
def _count(
    count_ptr, kept_ptr, judged_ptr, left_ptr, refused_ptr, per_pass_ptr, drafts_ptr, outcome_ptr,
    num_tokens, window, outcome_image, SLOTS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + image)
    kept = tl.load(kept_ptr + image)
    judged = tl.load(judged_ptr + image)
    left = tl.load(left_ptr + image)
    refused = tl.load(refused_ptr + image) != 0
    counted(
        count, kept, judged, left, refused, image, num_tokens, window,
        per_pass_ptr, drafts_ptr, outcome_ptr, outcome_image, SLOTS,
    )  # fmt: skip


def count_pass(
    count_B: Tensor,
    kept_B: Tensor,
    judged_B: Tensor,
    left_B: Tensor,
    refused_B: Tensor,
    counts: tuple[int, Tensor, Tensor, Tensor],
) -> None:
    """`visar.samplers.verify.Counts.add`; counts: num_tokens and the counters."""
    num_tokens, per_pass_W, drafts_2, outcome_BT = counts
    window = per_pass_W.shape[0] - 1
    _count[(len(count_B),)](
        count_B.contiguous(),
        kept_B.contiguous(),
        judged_B.contiguous(),
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
    """Writes L tokens behind the committed ones of every row and moves its length on by count_B, `num_tokens` at most.

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


# ---------------------------------------------------------------------------------------------------------- new drafts


@triton.jit
def _carry(
    next_ptr, p_ptr, count_ptr, size_ptr, length_ptr, tokens_ptr, uniform_ptr, recent_ptr, draft_ptr, law_ptr,
    codes, slots, drafts, columns, remembered, token_image, uniform_image,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr, TOKEN: tl.constexpr, MODE: tl.constexpr,
    LAW: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1)
    code = codes_of(ROWS, COLUMNS)
    inside = code < codes
    length = tl.load(length_ptr + image)
    count = tl.load(count_ptr + image)
    window = p_ptr + image * slots * codes + code
    ring = recent_ptr + image * remembered * codes + code
    if slot < drafts:
        carried = tl.load(size_ptr + image) - count
        target = law_ptr + (image * drafts + slot) * codes + code
        if slot < carried:
            source = count + slot
            tl.store(draft_ptr + image * drafts + slot, tl.load(next_ptr + image * slots + source))
            tl.store(target, tl.load(window + source * codes, mask=inside, other=0.0), mask=inside)
        else:
            position = length + slot
            uniform = tl.load(uniform_ptr + image * uniform_image + position)
            token = tl.minimum((uniform * codes).to(tl.int64), codes - 1)
            if TOKEN or MODE or LAW:
                known = length + tl.maximum(carried, 0)
                if LEFT:
                    source = tl.minimum(position - 1, known - 1)
                    found = (position % columns != 0) & (source >= 0)
                else:
                    source = position - columns * ((position - known) // columns + 1)
                    found = source >= 0
                # Rows of this pass: row `count` is the conditional of position `length`.
                index = source - length + count
                if TOKEN:
                    if found:
                        if source < length:
                            token = tl.load(tokens_ptr + image * token_image + source)
                        else:
                            token = tl.load(next_ptr + image * slots + index)
                else:
                    here = found & (index >= 0)
                    law = tl.load(window + tl.maximum(index, 0) * codes, mask=inside & here, other=0.0)
                    past = found & (index < 0)
                    law += tl.load(ring + (source % remembered) * codes, mask=inside & past, other=0.0)
                    if MODE:
                        token = tl.where(found, likeliest(tl.where(inside, law, -1.0), code), token)
                    if LAW:
                        law = tl.where(found, law, tl.where(code == token, 1.0, 0.0))
                        token = inverted(law, uniform, ROWS, COLUMNS)
            if not LAW:
                law = tl.where(code == token, 1.0, 0.0)
            tl.store(draft_ptr + image * drafts + slot, token)
            tl.store(target, law, mask=inside)
    if MODE or LAW:
        # The laws of the committed positions, at their position modulo S: what is read above lies elsewhere.
        if (slot < count) & (slot + remembered >= count):
            position = tl.maximum(length - count + slot, 0)
            tl.store(
                ring + (position % remembered) * codes,
                tl.load(window + slot * codes, mask=inside, other=0.0),
                mask=inside,
            )


def carry(
    initial: str,
    next_BL: Tensor,
    p_BLV: Tensor,
    count_B: Tensor,
    size_B: Tensor,
    length_B: Tensor,
    tokens_BT: Tensor,
    guess_uniform_BT: Tensor,
    recent_BSV: Tensor,
    draft_BK: Tensor,
    law_BKV: Tensor,
    columns: int,
) -> None:
    """Makes the rows behind the committed tokens the next pass's drafts and laws, and guesses the slots beyond them.

    Args:
        initial: see `visar.samplers.jacobi.sample_jacobi`.
        next_BL, p_BLV: new drafts and laws of this pass; count_B: how many tokens it committed; size_B: slots of the
            next pass.
        length_B, tokens_BT: committed tokens, after this pass.
        guess_uniform_BT: a uniform number a position.
        recent_BSV: laws of the last S positions, each at its position modulo S; updated.
        draft_BK, law_BKV: written.
    """
    batch, slots, codes = p_BLV.shape
    drafts, remembered = draft_BK.shape[1], recent_BSV.shape[1]
    _carry[(batch, max(slots, drafts))](
        next_BL,
        p_BLV,
        count_B,
        size_B,
        length_B,
        tokens_BT,
        guess_uniform_BT,
        recent_BSV if remembered else p_BLV,
        draft_BK,
        law_BKV,
        codes,
        slots,
        drafts,
        columns,
        remembered,
        tokens_BT.stride(0),
        guess_uniform_BT.stride(0),
        LEFT=initial.startswith("left"),
        TOKEN=initial in ("left", "above"),
        MODE=initial == "left_mode",
        LAW=initial.endswith("law"),
        **tile(codes),
    )
