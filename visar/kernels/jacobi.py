"""The next pass of Jacobi decoding (arXiv 2410.01699): rows behind the committed tokens move up, the rest is guessed.

One program a slot. The plain counterparts are `shift` and `guess` of visar/samplers/jacobi_drafts.py.

B images, K drafts, L = K + 1 slots, V codes, T positions with slack, S remembered distributions.
"""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from visar.kernels.distributions import codes_of, inverted, likeliest, tile


@triton.jit
def _carry(
    next_ptr, p_ptr, count_ptr, size_ptr, length_ptr, tokens_ptr, uniform_ptr, recent_ptr, draft_ptr, probs_ptr,
    codes, slots, drafts, columns, remembered, token_image, uniform_image,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr, TOKEN: tl.constexpr, MODE: tl.constexpr,
    PROBS: tl.constexpr,
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
        target = probs_ptr + (image * drafts + slot) * codes + code
        if slot < carried:
            source = count + slot
            tl.store(draft_ptr + image * drafts + slot, tl.load(next_ptr + image * slots + source))
            tl.store(target, tl.load(window + source * codes, mask=inside, other=0.0), mask=inside)
        else:
            position = length + slot
            uniform = tl.load(uniform_ptr + image * uniform_image + position)
            # A random code, unless there is a source to guess from.
            token = tl.minimum((uniform * codes).to(tl.int64), codes - 1)
            if TOKEN or MODE or PROBS:
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
                    probs = tl.load(window + tl.maximum(index, 0) * codes, mask=inside & here, other=0.0)
                    past = found & (index < 0)
                    probs += tl.load(ring + (source % remembered) * codes, mask=inside & past, other=0.0)
                    if MODE:
                        token = tl.where(found, likeliest(tl.where(inside, probs, -1.0), code), token)
                    if PROBS:
                        probs = tl.where(found, probs, tl.where(code == token, 1.0, 0.0))
                        token = inverted(probs, uniform, ROWS, COLUMNS)
            if not PROBS:
                probs = tl.where(code == token, 1.0, 0.0)
            tl.store(draft_ptr + image * drafts + slot, token)
            tl.store(target, probs, mask=inside)
    if MODE or PROBS:
        # The distributions of the committed positions, at their position modulo S: what is read above lies elsewhere.
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
    probs_BKV: Tensor,
    columns: int,
) -> None:
    """Carries the rows behind the committed tokens over to the next pass, and guesses the slots beyond them.

    Args:
        initial: see `visar.samplers.jacobi.sample_jacobi`.
        next_BL, p_BLV: new drafts and distributions of this pass; count_B: how many tokens it committed; size_B: slots
            of the next pass.
        length_B, tokens_BT: committed tokens, after this pass.
        guess_uniform_BT: a uniform number per position.
        recent_BSV: distributions of the last S positions, each at its position modulo S; updated.
        draft_BK, probs_BKV: written.
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
        probs_BKV,
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
        PROBS=initial.endswith("law"),
        **tile(codes),
    )
