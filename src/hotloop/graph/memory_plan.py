"""Where each temporary of a program lies: offsets in one block, by when it is made and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

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
    placed: list[int] = []
    total = 0
    for number in sorted(range(len(lifetimes)), key=lambda n: -lifetimes[n].size_bytes):
        mine = lifetimes[number]
        size = -(-mine.size_bytes // LINE_BYTES) * LINE_BYTES
        taken = sorted(
            (offsets[n], offsets[n] + lifetimes[n].size_bytes)
            for n in placed
            if lifetimes[n].first <= mine.last and mine.first <= lifetimes[n].last
        )
        at = 0
        for begin, end in taken:
            if at + size <= begin:
                break
            at = max(at, -(-end // LINE_BYTES) * LINE_BYTES)
        offsets[number] = at
        placed.append(number)
        total = max(total, at + size)
    return offsets, total


class Block:
    """Memory for the temporaries of programs that run one at a time.

    Args:
        forget: called before memory is given back: nothing may use it any more.

    Attributes:
        size_bytes: of the present memory; 0: there is none.
    """

    def __init__(self, forget: Callable[[], None] = lambda: None) -> None:
        self._forget = forget
        self.size_bytes = 0
        self._memory: memoryview | None = None

    def reserve(self, num_bytes: int) -> memoryview:
        """At least so many bytes, aligned to a line; other memory where they were too few."""
        if self._memory is None or num_bytes > self.size_bytes:
            self.release()
            whole = torch.empty(num_bytes + LINE_BYTES, dtype=torch.uint8)
            start = -whole.data_ptr() % LINE_BYTES
            self._memory = memoryview(whole.numpy())[start:]  # type: ignore[arg-type]
            self.size_bytes = num_bytes
        return self._memory

    def release(self) -> None:
        """Give the memory back."""
        self._forget()
        self._memory = None
        self.size_bytes = 0
