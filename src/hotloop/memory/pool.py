"""Batch buffers, allocated once and lent out: the hot loop allocates nothing."""

from __future__ import annotations

import enum
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from ..errors import InputError, PoolError
from .arena import Arena, HugePages
from .layout import BatchLayout, round_up


class BufferState(enum.Enum):
    """Whether a lent buffer may still be used by its holder."""

    FREE = "free"
    IN_USE = "in use"


class BatchBuffer:
    """The right to use one buffer of a pool, from ``acquire`` to ``release``.

    Each ``acquire`` hands out a new object over the same memory, so that one who releases twice
    is caught even where the memory has been lent to somebody else meanwhile.

    Attributes:
        tensors: one tensor a layout, ``[capacity, *row_shape]``, all in one aligned block. The
            same tensor objects for every loan of the same ``index``. They stay valid, as memory,
            after release and after the pool is closed; after release another holder writes there.
        index: which buffer of the pool, 0 to ``num_buffers - 1``.
        capacity: rows there is room for.
        state: ``IN_USE`` until released, then ``FREE`` for ever.
    """

    __slots__ = ("_num_rows", "_pool", "capacity", "index", "state", "tensors")

    def __init__(
        self, pool: MemoryPool, index: int, tensors: tuple[torch.Tensor, ...], capacity: int
    ) -> None:
        self._pool = pool
        self._num_rows = capacity
        self.capacity = capacity
        self.index = index
        self.tensors = tensors
        self.state = BufferState.IN_USE

    @property
    def num_rows(self) -> int:
        """Rows in use, 0 to ``capacity``; a fresh loan has them all in use."""
        return self._num_rows

    @num_rows.setter
    def num_rows(self, num_rows: int) -> None:
        if not 0 <= num_rows <= self.capacity:
            raise InputError(
                f"num_rows of a buffer must be between 0 and its capacity {self.capacity}",
                got=num_rows,
            )
        self._num_rows = num_rows

    def resize(self, num_rows: int) -> None:
        """Set ``num_rows``: the last batch of an epoch may be smaller than the buffer.

        Raises:
            InputError: fewer than 0 or more than ``capacity``.
        """
        self.num_rows = num_rows

    def rows(self) -> tuple[torch.Tensor, ...]:
        """The rows in use: a view ``[num_rows, *row_shape]`` of each tensor."""
        if self._num_rows == self.capacity:
            return self.tensors
        return tuple(tensor.narrow(0, 0, self._num_rows) for tensor in self.tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)
        return f"<BatchBuffer {self.index} ({self.state.value}, {self._num_rows} rows): {shapes}>"


@dataclass(frozen=True)
class PoolStats:
    """What a pool did until now.

    Attributes:
        num_buffers: buffers in the pool.
        in_use: buffers lent now.
        high_water: most buffers ever lent at once.
        hits: calls of ``acquire`` that found a free buffer at once.
        misses: calls that did not; ``hits + misses`` is the number of calls.
        waits: misses that then waited, with success or not.
        wait_s: seconds waited, summed over all threads.
        bytes: memory of all buffers with padding.
        huge_pages_backed: whether the buffers lie on huge pages; ``None``: unknown.
        huge_page_bytes: how many bytes do; ``None``: unknown.
    """

    num_buffers: int
    in_use: int
    high_water: int
    hits: int
    misses: int
    waits: int
    wait_s: float
    bytes: int
    huge_pages_backed: bool | None
    huge_page_bytes: int | None


class MemoryPool:
    """A fixed number of equal batch buffers in one mapping, safe across threads.

    Every buffer is one contiguous block that starts on a cache line and holds one tensor a layout.
    The buffer released last is lent first: it is the one still in cache.

    Attributes:
        memory: all buffers, uint8 ``[total_bytes]``.

    Args:
        layouts: one for each tensor of a batch, all with the same ``num_rows``.
        num_buffers: at least 1.
        huge_pages: ``"never"``, ``"try"`` or ``"require"`` transparent huge pages; see ``Arena``.

    Raises:
        InputError: no layouts, layouts of unequal ``num_rows``, no buffers, or not enough memory.
        PlanError: ``huge_pages`` is not one of the three, or required and not possible.
    """

    def __init__(
        self,
        layouts: Sequence[BatchLayout],
        num_buffers: int,
        *,
        huge_pages: HugePages = "never",
    ) -> None:
        offsets, buffer_bytes, line_bytes = _place(layouts, num_buffers)
        arena = Arena(num_buffers * buffer_bytes, align_bytes=line_bytes, huge_pages=huge_pages)
        self.layouts = tuple(layouts)
        self.num_buffers = num_buffers
        self.capacity = self.layouts[0].num_rows
        self.total_bytes = num_buffers * buffer_bytes
        self._huge_pages_backed = arena.huge_pages_backed
        self._huge_page_bytes = arena.huge_page_bytes
        self.memory = arena.block
        blocks = arena.block.view(num_buffers, buffer_bytes)
        self._tensors = [
            tuple(
                # `.data`: a version counter of its own. All views of one tensor share one, and
                # autograd would take the filling of one buffer for a change of the one in use.
                layout.view(block[offset : offset + layout.total_bytes]).data
                for layout, offset in zip(self.layouts, offsets, strict=True)
            )
            for block in blocks
        ]
        self._free = list(range(num_buffers))[::-1]
        self._available = threading.Condition()
        self._closed = False
        self._high_water = self._hits = self._misses = self._waits = 0
        self._wait_s = 0.0

    @classmethod
    def predict_bytes(cls, layouts: Sequence[BatchLayout], num_buffers: int) -> int:
        """``total_bytes`` of such a pool, without allocating it.

        Raises:
            InputError: as the constructor.
        """
        return num_buffers * _place(layouts, num_buffers)[1]

    def acquire(self, timeout_s: float | None = 0.0) -> BatchBuffer | None:
        """Borrow a buffer; its contents are what the last holder left there.

        Args:
            timeout_s: 0 does not wait, a positive number waits up to so many seconds, ``None``
                waits until one is released.

        Returns:
            The buffer, or ``None`` when none was free in time.

        Raises:
            InputError: the timeout is negative or not a number.
            PoolError: the pool is closed, or was closed while waiting.
        """
        if timeout_s is not None and (math.isnan(timeout_s) or timeout_s < 0):
            raise InputError("timeout_s must be at least 0, or None to wait", got=timeout_s)
        with self._available:
            self._check_open()
            if self._free:
                self._hits += 1
            else:
                self._misses += 1
                if timeout_s == 0 or not self._wait(timeout_s):
                    return None
            index = self._free.pop()
            self._high_water = max(self._high_water, self.num_buffers - len(self._free))
            return BatchBuffer(self, index, self._tensors[index], self.capacity)

    def release(self, buffer: BatchBuffer) -> None:
        """Give a buffer back; any thread may. Also allowed after the pool is closed.

        Raises:
            PoolError: it was released before, or belongs to another pool.
        """
        with self._available:
            if buffer._pool is not self:
                raise PoolError(
                    "a buffer must be released to the pool that lent it",
                    got=f"{buffer!r} of another pool",
                )
            if buffer.state is not BufferState.IN_USE:
                raise PoolError("a buffer must be released once", got=f"{buffer!r} released again")
            buffer.state = BufferState.FREE
            self._free.append(buffer.index)
            self._available.notify()

    def stats(self) -> PoolStats:
        """A consistent snapshot of the counters."""
        with self._available:
            return PoolStats(
                num_buffers=self.num_buffers,
                in_use=self.num_buffers - len(self._free),
                high_water=self._high_water,
                hits=self._hits,
                misses=self._misses,
                waits=self._waits,
                wait_s=self._wait_s,
                bytes=self.total_bytes,
                huge_pages_backed=self._huge_pages_backed,
                huge_page_bytes=self._huge_page_bytes,
            )

    def close(self) -> None:
        """Lend no more; wake all who wait. Twice is allowed.

        The memory itself is returned to the system when the last tensor that views it is gone.
        """
        with self._available:
            self._closed = True
            self._tensors = []
            self.memory = self.memory[:0].clone()
            self._available.notify_all()

    def __enter__(self) -> MemoryPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise PoolError("a closed pool lends no buffers")

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait, holding the condition, until a buffer is free: whether one is."""
        started = time.monotonic()
        # threading cannot wait longer than TIMEOUT_MAX at once; nobody notices the difference.
        limit = None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
        self._waits += 1
        try:
            self._available.wait_for(lambda: bool(self._free) or self._closed, limit)
        finally:
            self._wait_s += time.monotonic() - started
        self._check_open()
        return bool(self._free)


def _place(layouts: Sequence[BatchLayout], num_buffers: int) -> tuple[list[int], int, int]:
    """Offset of each layout in a buffer, bytes of a buffer, and the alignment of its start."""
    if not layouts:
        raise InputError("a pool needs at least one BatchLayout")
    if num_buffers < 1:
        raise InputError("num_buffers of a pool must be at least 1", got=num_buffers)
    num_rows = {layout.num_rows for layout in layouts}
    if len(num_rows) > 1:
        raise InputError("all layouts of a pool must have the same num_rows", got=sorted(num_rows))
    offsets = []
    end = 0
    for layout in layouts:
        offsets.append(round_up(end, layout.line_bytes))
        end = offsets[-1] + layout.total_bytes
    line_bytes = max(layout.line_bytes for layout in layouts)
    return offsets, round_up(end, line_bytes), line_bytes
