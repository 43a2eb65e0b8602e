"""How the loop is fed: packed samples by the buffers of a pool, or batches as they are loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..data import PackedBatches, Prefetcher
from ..data.batch import Batch, size_of
from ..data.loaded import LoadedBatches
from ..memory import BatchBuffer, MemoryPool
from ..parallel import Hosts
from ..plan import Plan
from .progress import RunState


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """What one call of the step gets.

    Attributes:
        batch: ``(x, y)`` or ``(x,)``: the batches of ``steps`` steps one after the other.
        num_samples: of all hosts.
        release: to be called when the step is done with the batch.
    """

    batch: Batch
    steps: int
    num_samples: int
    release: Callable[[], None] = field(default=_nothing)


class Feed(Protocol):
    """Gives the calls of an epoch."""

    def calls(self, state: RunState, stack: contextlib.ExitStack) -> Iterator[Call]:
        """From where ``state`` is to the end of its epoch; ``stack`` ends what was begun."""


@dataclass
class PackedFeed:
    """Gathers packed samples; a call ends where the loop has something to do between two steps.

    Attributes:
        steps_per_call: steps of a call at most.
        every_steps: the loop saves after so many steps. max_steps: it ends there.
    """

    batches: PackedBatches
    pool: MemoryPool
    plan: Plan
    steps_per_call: int = 1
    max_steps: int | None = None
    hosts: Hosts | None = None

    def calls(self, state: RunState, stack: contextlib.ExitStack) -> Iterator[Call]:
        """See ``Feed``."""
        counts: list[tuple[int, int]] = []

        def positions() -> Iterator[torch.Tensor]:
            for steps, indices in self._groups(state):
                counts.append((steps, len(indices)))
                yield indices

        for buffer in self._buffers(positions(), state.epoch, stack):
            steps, count = counts.pop(0)
            batch = self.batches.dataset.batch(buffer.rows())
            yield Call(batch, steps, count, _releasing(self.pool, buffer))

    def _buffers(
        self, positions: Iterator[torch.Tensor], epoch: int, stack: contextlib.ExitStack
    ) -> Iterator[BatchBuffer]:
        if self.steps_per_call > 1 or self.hosts is not None:
            return self._filled_here(positions, epoch)
        return iter(
            stack.enter_context(
                Prefetcher(
                    self.batches.dataset,
                    positions,
                    self.pool,
                    epoch=epoch,
                    training=True,
                    queue_size=self.plan.cpu.queue_size,
                )
            )
        )

    def _filled_here(self, positions: Iterator[torch.Tensor], epoch: int) -> Iterator[BatchBuffer]:
        """Fill between calls, in this thread: a second one would bring a second set of OpenMP
        threads, which wait for work by spinning and take the cores from the step."""
        for indices in positions:
            buffer = self.pool.acquire()
            assert buffer is not None
            if self.hosts is not None:
                indices = self.hosts.part(indices)
            buffer.num_rows = len(indices)
            if len(indices):
                self.batches.dataset.gather(indices, *buffer.rows(), epoch=epoch, training=True)
            yield buffer

    def _groups(self, state: RunState) -> Iterator[tuple[int, torch.Tensor]]:
        """How many batches a call has, and the positions of them all."""
        step, chunk = state.step, list[torch.Tensor]()
        every, size = self.plan.checkpoint.every_steps, self.batches.batch_size
        for batch in self.batches.positions(state.epoch, state.batch):
            if chunk and len(batch) < size:
                yield len(chunk), _joined(chunk)
                chunk = []
            chunk.append(batch)
            step += 1
            due = step == self.max_steps or (every is not None and step % every == 0)
            if due or len(chunk) == self.steps_per_call:
                yield len(chunk), _joined(chunk)
                chunk = []
        if chunk:
            yield len(chunk), _joined(chunk)


@dataclass
class LoadedFeed:
    """Batches as they are loaded, one a call."""

    batches: LoadedBatches

    def calls(self, state: RunState, stack: contextlib.ExitStack) -> Iterator[Call]:
        """See ``Feed``."""
        values = self.batches.batches(state.epoch, state.batch)
        close = getattr(values, "close", None)
        if close is not None:
            stack.callback(close)
        default = self.batches.batch_size or 1
        for batch in values:
            yield Call(batch, 1, size_of(batch, default))


def _joined(chunk: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(chunk) if len(chunk) > 1 else chunk[0]


def _releasing(pool: MemoryPool, buffer: BatchBuffer) -> Callable[[], None]:
    return lambda: pool.release(buffer)
