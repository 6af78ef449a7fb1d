"""Which lanes of a sweep are solved together, and when.

Lanes of a batch wait for the slowest of them. So a batch stops when most of its lanes
have ended, and those that have not are put together with those of other batches, in a
next generation. All of a batch then are at similar steps, where their line searches
take similar times. The blocks of a generation depend on nothing but which lanes have
not ended in the one before.

Devices work on their parts of a block by themselves. So what comes out does not depend
on which parts run at the same time: a sweep that was begun on some devices goes on with
the same parts on others.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Block(NamedTuple):
    """Lanes that are solved together.

    Attributes:
      name: The generation and the place in it.
      lanes: Which lanes.
      rows: Their places among those that have been left by the generation before.
      width: The width of the batch: at least their number.
      keep: The batch may stop when at most this many lanes are left on each device.
    """

    name: str
    lanes: Int[np.ndarray, " lanes"]
    rows: slice | Int[np.ndarray, " lanes"]
    width: int
    keep: int


def blocks(
    generation: int,
    remaining: Int[np.ndarray, " lanes"],
    widths: Sequence[int],
    devices: int,
) -> Iterator[Block]:
    """The blocks of a generation.

    Args:
      generation: Its number, from 0.
      remaining: The lanes that have not ended.
      widths: The widths of batches that there are, widest first.
      devices: Over how many devices a batch is split.

    Yields:
      Each block. Each of several leaves at most an eighth of its width, and so does one
      that leaves few enough for a narrower batch. The last leaves none.
    """
    width = next((w for w in reversed(widths) if w >= remaining.size), widths[0])
    is_last = remaining.size <= width and width == widths[-1]
    keep = 0 if is_last else width // devices // 8
    for i, first in enumerate(range(0, remaining.size, width)):
        rows = slice(first, min(first + width, remaining.size))
        yield Block(f"{generation}.{i}", remaining[rows], rows, width, keep)


def split(blocks: Iterable[Block], devices: int) -> Iterator[Block]:
    """The parts of the blocks of a generation, each for one device.

    Args:
      blocks: The blocks, in order.
      devices: Over how many devices they are split.

    Yields:
      Each part that has lanes, as a block of its own.
    """
    numbers = itertools.count()
    for block in blocks:
        generation, _, _ = block.name.partition(".")
        width = block.width // devices
        assert isinstance(block.rows, slice)
        for first in range(0, block.lanes.size, width):
            lanes = block.lanes[first : first + width]
            start = block.rows.start + first
            rows = slice(start, start + lanes.size)
            name = f"{generation}.{next(numbers)}"
            yield Block(name, lanes, rows, width, block.keep)


def merge(parts: Sequence[Block], devices: int) -> Iterator[tuple[Block, list[Block]]]:
    """Puts parts of blocks together again, for another number of devices.

    Args:
      parts: Parts of the blocks of a generation, in order.
      devices: How many of them are solved at a time.

    Yields:
      Each block, of the name of its first part, and its parts.
    """
    for first in range(0, len(parts), devices):
        some = list(parts[first : first + devices])
        name, _, _, width, keep = some[0]
        lanes = np.concatenate([part.lanes for part in some])
        rows = np.concatenate([np.r_[part.rows] for part in some])
        yield Block(name, lanes, rows, width * devices, keep), some
