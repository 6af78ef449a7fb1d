"""Which lanes of a sweep are solved together, and when.

Lanes of a batch wait for the slowest of them. So a batch stops when most of its lanes
have ended, and those that have not are put together with those of other batches, in a
next generation. All of a batch then are at similar steps, where their line searches
take similar times. The blocks of a generation depend on nothing but which lanes have
not ended in the one before.
"""

from collections.abc import Iterator, Sequence
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
    rows: slice
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
