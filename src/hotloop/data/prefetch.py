"""Batches gathered ahead by one thread, into a queue of bounded length."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

import torch

from ..errors import DataError, PlanError, RunError
from ..memory.pool import BatchBuffer, MemoryPool

# How long the thread may sleep on an empty pool before it looks whether it should stop.
_ACQUIRE_TIMEOUT_S = 0.05


class Gatherable(Protocol):
    """What the prefetcher needs of a dataset."""

    def gather(
        self,
        indices: torch.Tensor,
        *outs: torch.Tensor,
        epoch: int = 0,
        training: bool = False,
    ) -> None:
        """See ``PackedDataset.gather``."""


class Prefetcher:
    """A context manager and an iterator of filled buffers, in the order of the batches.

    The consumer releases each buffer to the pool when done with it. An error of the thread, in
    ``batches`` or in ``gather``, is raised again in the consumer once the batches before it are
    consumed. Leaving early stops the thread and releases what it had filled.

    The thread never waits for a buffer when the pool has ``queue_size + 2`` of them: one in use,
    ``queue_size`` in the queue, one being filled. Fewer are allowed. A consumer that holds all
    buffers of the pool and asks for another waits until somebody releases one.

    Args:
        dataset: gathers the batches.
        batches: int64 index tensors, none longer than a buffer.
        pool: lends buffers with a tensor for each column of the dataset.
        epoch: passed to ``gather``.
        training: passed to ``gather``.
        queue_size: filled buffers that may wait for the consumer, at least 1.

    Attributes:
        wait_s: seconds the consumer waited for batches, in all.
        num_waits: how often it had to.

    Raises:
        PlanError: ``queue_size`` below 1.
    """

    def __init__(
        self,
        dataset: Gatherable,
        batches: Iterable[torch.Tensor],
        pool: MemoryPool,
        *,
        epoch: int = 0,
        training: bool = False,
        queue_size: int = 2,
    ) -> None:
        if queue_size < 1:
            raise PlanError(
                "queue_size must be at least 1", got=queue_size, next_step="pass --queue-size 2"
            )
        self.wait_s = 0.0
        self.num_waits = 0
        self._dataset, self._batches, self._pool = dataset, batches, pool
        self._epoch, self._training, self._queue_size = epoch, training, queue_size
        self._changed = threading.Condition()
        self._ready: deque[BatchBuffer] = deque()
        self._finished = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Prefetcher:
        if self._thread is not None:
            raise RunError("a Prefetcher must be entered once", next_step="make a new one")
        self._thread = threading.Thread(target=self._work, name="hotloop-prefetch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> BatchBuffer:
        """The next filled buffer, its ``num_rows`` set to the length of the batch."""
        with self._changed:
            if self._thread is None:
                raise RunError("a Prefetcher must be used in a with block")
            if not self._ready and not self._finished and not self._stopping:
                self._wait()
            if self._ready:
                buffer = self._ready.popleft()
                self._changed.notify_all()
                return buffer
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and release what it had filled. Twice is allowed."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._release_ready()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
            self._release_ready()

    def _wait(self) -> None:
        started = time.perf_counter()
        self._changed.wait_for(lambda: bool(self._ready) or self._finished or self._stopping)
        self.wait_s += time.perf_counter() - started
        self.num_waits += 1

    def _work(self) -> None:
        failure: BaseException | None = None
        try:
            use_one_torch_thread()
            for indices in self._batches:
                buffer = self._acquire()
                if buffer is None:
                    break
                try:
                    self._fill(buffer, indices)
                except BaseException:
                    self._pool.release(buffer)
                    raise
                if not self._put(buffer):
                    self._pool.release(buffer)
                    break
        except BaseException as error:
            # Raised again in the consumer, whatever it is.
            failure = error
        with self._changed:
            self._failure = failure
            self._finished = True
            self._changed.notify_all()

    def _acquire(self) -> BatchBuffer | None:
        """A buffer, or ``None`` when it is time to stop."""
        while not self._stopping:
            buffer = self._pool.acquire(timeout_s=_ACQUIRE_TIMEOUT_S)
            if buffer is not None:
                return buffer
        return None

    def _fill(self, buffer: BatchBuffer, indices: torch.Tensor) -> None:
        if len(indices) > buffer.capacity:
            raise DataError(
                f"a batch must fit the pool's buffers of {buffer.capacity} rows", got=len(indices)
            )
        buffer.num_rows = len(indices)
        self._dataset.gather(indices, *buffer.rows(), epoch=self._epoch, training=self._training)

    def _put(self, buffer: BatchBuffer) -> bool:
        """Queue a buffer when there is room; ``False`` when it is time to stop instead."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._queue_size or self._stopping)
            if self._stopping:
                return False
            self._ready.append(buffer)
            self._changed.notify_all()
            return True

    def _release_ready(self) -> None:
        while True:
            with self._changed:
                if not self._ready:
                    return
                buffer = self._ready.popleft()
            self._pool.release(buffer)


def use_one_torch_thread() -> None:
    """Keep torch's operations in this thread on this thread.

    OpenMP would start a second team of workers for it, to fight with the first over the cores the
    step runs on. ``torch.set_num_threads`` will not do, as it also limits the step's own matrix
    products (MKL's count is one for the process); OpenMP's count belongs to the calling thread.
    """
    torch.get_num_threads()  # Lets torch set its default for this thread first.
    with contextlib.suppress(AttributeError, OSError):  # Not every build of torch uses OpenMP.
        ctypes.CDLL(None).omp_set_num_threads(1)
