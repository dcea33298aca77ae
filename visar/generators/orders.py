"""Orders of generation: which tokens form a block, and which of the inputs that are read before it predict them.

A generator in blocks (visar/generators/ordered.py) reads every block's tokens in one pass, all of them at once, behind
all that it read before. An order says the rest. Places are those of the tokenizer, counted in raster order.

N tokens, H heads.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """Blocks of tokens and what predicts them.

    What an input sees follows from the blocks: the condition, all inputs of earlier passes and all of its own pass.

    Attributes:
        blocks: places of every block's tokens; together every place once.
        learned: how many learned inputs are read behind the tokens of every block, in the same pass.
        sources: for every head and token, tokens in the order of the blocks: which input of the latest pass predicts
            the token, -1 for none. The latest pass before the first block has one input, the last of the condition.
    """

    blocks: tuple[tuple[int, ...], ...]
    learned: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of every block."""
        return tuple(map(len, self.blocks))

    @property
    def widths(self) -> tuple[int, ...]:
        """Inputs of the pass that reads a block, for every block but the last, which nothing is predicted from."""
        return tuple(len(block) + more for block, more in zip(self.blocks[:-1], self.learned, strict=False))

    @property
    def places(self) -> tuple[int, ...]:
        """Places of all tokens in the order of the blocks."""
        return tuple(itertools.chain.from_iterable(self.blocks))

    @property
    def inputs(self) -> tuple[int, ...]:
        """What every input behind the condition is, in the order of reading: a token's place, or N + i for the i-th
        learned one."""
        learned = itertools.count(len(self.places))
        found: list[int] = []
        for block, more in zip(self.blocks[:-1], self.learned, strict=False):
            found += [*block, *itertools.islice(learned, more)]
        return tuple(found)

    @property
    def passes(self) -> tuple[int, ...]:
        """Which pass reads every input; the condition is pass 0."""
        return tuple(number for number, width in enumerate(self.widths, 1) for _ in range(width))


def neighbor_order(shape: Sequence[int]) -> Order:
    """From near to far: a block is all tokens whose coordinates have one sum. NAR, arXiv 2503.10696.

    There is a head for every axis, those of later axes first: right, below, and for a box the next frame. Head h
    predicts a token from its neighbor before it along its axis, where there is one; the first token is predicted by
    all heads.

    Args:
        shape: length of every axis, such as (rows, columns) or (frames, rows, columns).

    Returns: an order of sum(shape) - len(shape) + 1 blocks.

    Raises:
        ValueError: no axis, or an empty one.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"grid {tuple(shape)}; needed: axes of at least one token each")
    blocks: list[list[tuple[int, ...]]] = [[] for _ in range(sum(shape) - len(shape) + 1)]
    for cell in itertools.product(*map(range, shape)):
        blocks[sum(cell)].append(cell)
    axes = range(len(shape) - 1, -1, -1)
    sources: list[list[int]] = [[0] for _ in axes]
    for before, block in itertools.pairwise(blocks):
        index = {cell: number for number, cell in enumerate(before)}
        for head, axis in enumerate(axes):
            neighbors = [tuple(value - (i == axis) for i, value in enumerate(cell)) for cell in block]
            sources[head] += [index.get(neighbor, -1) for neighbor in neighbors]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return Order(
        tuple(tuple(sum(map(math.prod, zip(cell, strides, strict=True))) for cell in block) for block in blocks),
        (0,) * len(blocks),
        tuple(map(tuple, sources)),
    )


def region_order(shape: Sequence[int], regions: int) -> Order:
    """One token of every region at a time, those of the first block one by one. PAR, arXiv 2412.15119 section 3.2.

    The grid is cut into `regions` equal parts. The first token of every region is drawn alone, in order; from then on
    a block holds the next token of every region. One learned input for every region but the first is read together
    with the last token that is drawn alone; they predict the first block of several tokens, and every token predicts
    the next of its region.

    Args:
        shape: (rows, columns).
        regions: a square number whose root divides both (PAR: 4, 16); 1 is raster order.

    Returns: an order of regions + (N - regions) / regions blocks.

    Raises:
        ValueError: another number of axes, or regions that do not divide the grid.
    """
    side = math.isqrt(max(regions, 0))
    if len(shape) != 2 or min(shape) < 1 or regions < 1 or side * side != regions or any(n % side for n in shape):
        raise ValueError(
            f"regions {regions} on grid {tuple(shape)}; needed: a square number whose root divides rows and columns"
        )
    rows, columns = (length // side for length in shape)
    corners = [(row * rows, column * columns) for row in range(side) for column in range(side)]
    groups = [
        tuple((top + row) * shape[1] + left + column for top, left in corners)
        for row in range(rows)
        for column in range(columns)
    ]
    blocks = (*((place,) for place in groups[0]), *groups[1:])
    learned = [0] * len(blocks)
    learned[regions - 1] = regions - 1 if len(groups) > 1 else 0
    sources = (0,) * regions + tuple(range(regions)) * (len(groups) - 1)
    return Order(blocks, tuple(learned), (sources,))
