"""Where each temporary of a program lies: offsets in one block, by when it is made and read.

Imports no torch: a network of inference is planned here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from ..machine.heap import give_back_pages

LINE_BYTES = 64


@dataclass(frozen=True)
class Lifetime:
    """A block of memory from instruction ``first`` to instruction ``last``, both included."""

    size_bytes: int
    first: int
    last: int


def plan_offsets(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """An offset for each, no two that live at once overlapping; and the bytes of the whole.

    The largest first, each at the lowest place that is free for its lifetime (Pisarchyk and Lee,
    "Efficient Memory Management for Deep Neural Net Inference", 2020: greedy by size).
    """
    offsets = [0] * len(lifetimes)
    total = 0
    # Of what is placed, in this order: offset, end, first, last.
    placed = numpy.zeros((len(lifetimes), 4), dtype=numpy.int64)
    order = sorted(range(len(lifetimes)), key=lambda n: -lifetimes[n].size_bytes)
    for count, number in enumerate(order):
        mine = lifetimes[number]
        size = -(-mine.size_bytes // LINE_BYTES) * LINE_BYTES
        others = placed[:count]
        beside = others[(others[:, 2] <= mine.last) & (mine.first <= others[:, 3])]
        at = _lowest_gap(beside[beside[:, 0].argsort(kind="stable")], size)
        offsets[number] = at
        placed[count] = at, at + size, mine.first, mine.last
        total = max(total, at + size)
    return offsets, total


def _lowest_gap(taken: Any, size: int) -> int:
    """Where ``size`` bytes fit between blocks in the order of their offsets, or after them."""
    if not len(taken):
        return 0
    # The end of all that lies below each block, and below the end.
    ends = numpy.maximum.accumulate(taken[:, 1])
    before = numpy.concatenate([[0], ends])
    room = numpy.concatenate([taken[:, 0], [numpy.iinfo(numpy.int64).max]]) - before
    return int(before[numpy.argmax(room >= size)])


class Block:
    """Memory for the temporaries of programs that run one at a time.

    Small tensors that stay (an optimizer's state, made while gradients lay around it) may part the
    arena, so that the block finds room only above all that was touched before. The pages of the
    free blocks are then given back, for a run holds either the block or a plain step's tensors.

    Args:
        forget: called before memory is given back: nothing may use it any more.

    Attributes:
        size_bytes: of the present memory; 0: there is none.
    """

    def __init__(self, forget: Callable[[], None] = lambda: None) -> None:
        self._forget = forget
        self.size_bytes = 0
        self._memory: memoryview | None = None
        self._lies_above = False
        self._address = 0

    def reserve(self, num_bytes: int) -> memoryview:
        """At least so many bytes, aligned to a line; other memory where they were too few."""
        if self._memory is None or num_bytes > self.size_bytes:
            import torch  # Here: plans are made in processes without it.

            from ..memory import TensorArena

            self.release()
            arena = TensorArena()
            touched_bytes = arena.stats().touched_bytes
            whole = torch.empty(num_bytes + LINE_BYTES, dtype=torch.uint8)
            self._lies_above = arena.stats().touched_bytes > touched_bytes
            if self._lies_above:
                arena.trim()
            self._address = whole.data_ptr()
            start = -self._address % LINE_BYTES
            self._memory = memoryview(whole.numpy())[start:]  # type: ignore[arg-type]
            self.size_bytes = num_bytes
        return self._memory

    @property
    def address(self) -> int:
        """Where the memory that ``reserve`` gives begins; 0: there is none."""
        return self._address + (-self._address % LINE_BYTES) if self._memory is not None else 0

    def lend_pages(self) -> None:
        """Let others have the memory until the next program runs; it stays where it is."""
        if self._memory is not None:
            give_back_pages(self._address, self.size_bytes)

    def release(self) -> None:
        """Give the memory back."""
        self._forget()
        self._memory = None
        self.size_bytes = 0
        if self._lies_above:
            from ..memory import TensorArena

            TensorArena().trim()
            self._lies_above = False
