"""Where the tensor arena will put each block, without allocating anything.

The same algorithm as ``kernels/cpp/placement.cpp``, in the same order of ties: change both or
neither. Best fit with immediate coalescing is described in D. Knuth, The Art of Computer
Programming, vol. 1, section 2.5; the untouched end of the range, used last, is the "wilderness" of
K.-P. Vo's malloc.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

from ..errors import InputError

THRESHOLD_BYTES: Final = 64 * 1024
GRANULARITY_BYTES: Final = 4096


class ArenaModel:
    """The arena's book-keeping on numbers alone.

    It is exact for an arena that was empty when it was installed, and for one thread: the order
    of allocations of concurrent threads is not known beforehand.

    Args:
        threshold_bytes: smaller requests are left to the system's allocator.
        granularity_bytes: sizes are rounded up to a multiple; a multiple of 64.
        capacity_bytes: size of the range; requests that do not fit are left to the system's
            allocator too. ``None``: no end.

    Attributes:
        live_bytes, peak_live_bytes: rounded sizes of the blocks in use in the arena.
        top_bytes, peak_top_bytes: end of the highest block in use. The peak is what the arena holds
            resident, as freed pages are kept.
        outside_bytes, peak_outside_bytes: requested bytes left to the system's allocator.
        num_allocations, num_fallbacks: requests placed in the arena; those that did not fit.

    Raises:
        InputError: a size is negative or not of its unit.
    """

    def __init__(
        self,
        *,
        threshold_bytes: int = THRESHOLD_BYTES,
        granularity_bytes: int = GRANULARITY_BYTES,
        capacity_bytes: int | None = None,
    ) -> None:
        check_sizes(threshold_bytes, granularity_bytes, capacity_bytes)
        self.threshold_bytes = threshold_bytes
        self.granularity_bytes = granularity_bytes
        self.capacity_bytes = capacity_bytes
        self.live_bytes = self.peak_live_bytes = 0
        self.top_bytes = self.peak_top_bytes = 0
        self.outside_bytes = self.peak_outside_bytes = 0
        self.num_allocations = self.num_fallbacks = 0
        self._handles = 0
        self._in_use: dict[int, tuple[int, int]] = {}  # handle -> (offset, size)
        self._outside: dict[int, int] = {}  # handle -> size
        self._free: list[tuple[int, int]] = []  # (size, offset), sorted
        self._free_at: dict[int, int] = {}  # offset -> size
        self._free_before: dict[int, int] = {}  # end -> size

    def malloc(self, num_bytes: int) -> int:
        """A handle for a request of ``num_bytes``.

        Raises:
            InputError: ``num_bytes`` is negative.
        """
        if num_bytes < 0:
            raise InputError("a size must be at least 0 bytes", got=num_bytes)
        self._handles += 1
        offset = None
        if num_bytes >= self.threshold_bytes:
            size = -(-num_bytes // self.granularity_bytes) * self.granularity_bytes
            offset = self._place(size) if size else None
            if offset is None:
                self.num_fallbacks += 1
        if offset is None:
            self._outside[self._handles] = num_bytes
            self.outside_bytes += num_bytes
            self.peak_outside_bytes = max(self.peak_outside_bytes, self.outside_bytes)
        else:
            self._in_use[self._handles] = offset, size
            self.num_allocations += 1
            self.live_bytes += size
            self.peak_live_bytes = max(self.peak_live_bytes, self.live_bytes)
            self.peak_top_bytes = max(self.peak_top_bytes, self.top_bytes)
        return self._handles

    def free(self, handle: int) -> None:
        """Take the block of ``handle`` back.

        Raises:
            InputError: the handle was freed before, or never given.
        """
        if handle in self._outside:
            self.outside_bytes -= self._outside.pop(handle)
            return
        if handle not in self._in_use:
            raise InputError("a handle must be in use to be freed", got=handle)
        offset, size = self._in_use.pop(handle)
        self.live_bytes -= size
        after = self._free_at.get(offset + size)
        if after is not None:
            self._take(after, offset + size)
            size += after
        before = self._free_before.get(offset)
        if before is not None:
            self._take(before, offset - before)
            offset -= before
            size += before
        if offset + size == self.top_bytes:
            self.top_bytes = offset
        else:
            self._give(size, offset)

    def offset(self, handle: int) -> int | None:
        """Bytes from the start of the arena; ``None`` if the system's allocator has the block."""
        return self._in_use[handle][0] if handle in self._in_use else None

    def reset_peak(self) -> None:
        """Let the peaks start again from what is in use now."""
        self.peak_live_bytes = self.live_bytes
        self.peak_top_bytes = self.top_bytes
        self.peak_outside_bytes = self.outside_bytes

    def _place(self, size: int) -> int | None:
        # Sorted by (size, offset): the first entry from here on is the best fit, lowest address.
        index = bisect_left(self._free, (size, 0))
        if index < len(self._free):
            found, offset = self._free[index]
            self._take(found, offset)
            if found > size:
                self._give(found - size, offset + size)
            return offset
        if self.capacity_bytes is not None and self.top_bytes + size > self.capacity_bytes:
            return None
        offset = self.top_bytes
        self.top_bytes += size
        return offset

    def _give(self, size: int, offset: int) -> None:
        insort(self._free, (size, offset))
        self._free_at[offset] = size
        self._free_before[offset + size] = size

    def _take(self, size: int, offset: int) -> None:
        del self._free[bisect_left(self._free, (size, offset))]
        del self._free_at[offset]
        del self._free_before[offset + size]


def check_sizes(threshold_bytes: int, granularity_bytes: int, capacity_bytes: int | None) -> None:
    """Refuse sizes that neither the arena nor its model can work with.

    Raises:
        InputError: a threshold below 0, a granularity that is not a positive multiple of 64, or a
            capacity below 1.
    """
    if threshold_bytes < 0:
        raise InputError("threshold_bytes must be at least 0", got=threshold_bytes)
    if granularity_bytes < 64 or granularity_bytes % 64:
        raise InputError("granularity_bytes must be a multiple of 64", got=granularity_bytes)
    if capacity_bytes is not None and capacity_bytes < 1:
        raise InputError("capacity_bytes must be at least 1", got=capacity_bytes)
