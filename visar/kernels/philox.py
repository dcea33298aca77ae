"""Philox 4x32-10 random words of visar/core/noise.py in one launch; one program per few blocks of four words."""

# Operators, loops and launch options of kernels are Triton's: a type checker of Python does not know them.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 128


@triton.jit
def _words(
    seed_ptr, place_ptr, counter_ptr, out_ptr, use, counter, images_blocks, positions, count, blocks,
    place_image, place_position, counter_image, counter_position,
    COUNTED: tl.constexpr, UNIFORM: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = cell < images_blocks
    block = cell % blocks
    line = cell // blocks
    image = line // positions
    position = line % positions
    seed = tl.load(seed_ptr + image, mask=inside, other=0)
    place = tl.load(place_ptr + image * place_image + position * place_position, mask=inside, other=0)
    if COUNTED:
        offset = image * counter_image + position * counter_position
        repeated = tl.load(counter_ptr + offset, mask=inside, other=0)
    else:
        repeated = tl.zeros([BLOCKS], tl.int64) + counter
    word_0, word_1, word_2, word_3 = tl.philox_impl(
        block.to(tl.uint32),
        place.to(tl.uint32),
        (tl.zeros([BLOCKS], tl.int64) + use).to(tl.uint32),
        repeated.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    _store(out_ptr, line, block * 4, word_0, inside, count, UNIFORM)
    _store(out_ptr, line, block * 4 + 1, word_1, inside, count, UNIFORM)
    _store(out_ptr, line, block * 4 + 2, word_2, inside, count, UNIFORM)
    _store(out_ptr, line, block * 4 + 3, word_3, inside, count, UNIFORM)


@triton.jit
def _store(out_ptr, line, index, word, inside, count, UNIFORM: tl.constexpr):
    if UNIFORM:
        # 23 bits and the half fit into float32: nothing is rounded.
        value = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    else:
        value = word.to(tl.int64)
    tl.store(out_ptr + line * count + index, value, mask=inside & (index < count))


def draw_words(
    seeds_B: Tensor, place_BX: Tensor, use: int, counter: int | Tensor, count: int, as_uniform: bool
) -> Tensor:
    """`count` words of every position: int64 [B, X, count] in [0, 2^32), or float32 in (0, 1) as `Noise.uniform`.

    Args:
        seeds_B: int64, contiguous.
        place_BX: int64 positions; may be expanded.
        use: see visar.core.noise.Use.
        counter: an int, or int64 [B, X]; may be expanded.
    """
    batch, positions = place_BX.shape
    dtype = torch.float32 if as_uniform else torch.int64
    out_BXC = torch.empty(batch, positions, count, dtype=dtype, device=seeds_B.device)
    counted = isinstance(counter, Tensor)
    counters_BX = counter if isinstance(counter, Tensor) else place_BX
    blocks = triton.cdiv(count, 4)
    total = batch * positions * blocks
    if not total:
        return out_BXC
    _words[(triton.cdiv(total, _BLOCKS),)](
        seeds_B,
        place_BX,
        counters_BX,
        out_BXC,
        use,
        0 if counted else counter,
        total,
        positions,
        count,
        blocks,
        *place_BX.stride(),
        *counters_BX.stride(),
        COUNTED=counted,
        UNIFORM=as_uniform,
        BLOCKS=_BLOCKS,
        num_warps=4,
    )
    return out_BXC
