"""``ProcessTeam``: workers that are processes, so that one that crashes takes nobody with it.

Weights, buffers, batch and what chunks hand over lie in one shared block, of which there is one
copy. Workers only write what their chunk hands over; sums and updates are made by threads of the
trainer's process, as in ``Team``, when all chunks of a step are there. A worker that dies or hangs
is ended and started anew, and its chunk run again: nothing of a step counts before it is whole.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection as connections
from typing import Any

import torch

from ..data.hashing import mix, signed
from ..errors import RunError
from ..graph.table import to_rows
from ..step.chunk import Chunk
from . import shared, worker
from .chunk_program import ChunkProgram, Rows
from .placement import WorkerPlacement
from .team import Team, WorkerTimes, fill

# A process needs so long at most to start.
_START_S = 120.0


class _Process:
    """One worker's process, its pipe, and the chunk it is at."""

    def __init__(self, context: Any, job: worker.Job) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker.main, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()
        self.chunk: int | None = None
        self.since_s = time.monotonic()
        self.ready = False

    def send(self, number: int) -> bool:
        """Whether the worker could be told."""
        try:
            self.pipe.send_bytes(worker.REQUEST.pack(number))
        except OSError:
            return False
        return True

    def end(self) -> None:
        """At once, and for certain."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class ProcessTeam(Team):
    """As ``Team``, with ``num_workers`` processes for the chunks and as many threads for updates.

    Parameters and buffers of the model move into the shared block; they stay the same objects. Each
    process is sent the chunk's graph and makes a program of it.

    Args:
        max_restarts: of all workers together, before the run is given up.
        Others: those of ``Team``.
    """

    def __init__(
        self,
        chunk: Chunk,
        optimizer: torch.optim.Optimizer,
        *,
        max_restarts: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(chunk, optimizer, **options)
        self._batch = [
            torch.empty_strided(
                (self.num_chunks * len(t), *t.shape[1:]), t.stride(), dtype=t.dtype, device="meta"
            )
            for t in chunk.batch
        ]
        self._addresses: list[int] = []
        self.max_restarts, self.restarts = max_restarts, 0
        self._placements: Sequence[WorkerPlacement] = options.get("placements") or ()
        self._context = multiprocessing.get_context("forkserver")
        # Forked from a process that has imported torch but never run it: ready in milliseconds.
        self._context.set_forkserver_preload(["hotloop.parallel.preloaded"])
        self._processes: list[_Process] = []
        self._faults: deque[tuple[int, int]] = deque()
        self._descriptor: int | None = None

    def run(
        self,
        batch: Sequence[torch.Tensor],
        steps: int = 1,
        rates: list[list[float]] | None = None,
        keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[WorkerTimes]]:
        """See ``Team.run``.

        Raises:
            RunError: more than ``max_restarts`` restarts.
        """
        self._share_memory()
        total = [[0, 0, 0.0, 0.0, 0.0, 0.0] for _ in range(self.num_workers)]
        self._rebind()
        losses = []
        rows = len(batch[0]) // steps
        for step in range(steps):
            for view, part in zip(self._views, batch, strict=True):
                view.copy_(part[step * rows : (step + 1) * rows])
            if keys is not None and self.chunk.draws:
                word = int(keys[step])
                chunks = [signed(mix(word, chunk)) for chunk in range(self.num_chunks)]
                self._of_chunks.keys.copy_(torch.tensor(chunks)[:, None])
            self._run_chunks(total)
            made, stats = super().run(
                self._views, 1, None if rates is None else rates[step : step + 1]
            )
            losses.append(made)
            for row, times in zip(total, stats, strict=True):
                row[4] += times.update_s
        return torch.cat(losses), [WorkerTimes(int(c), int(s), *rest) for c, s, *rest in total]

    def _make_programs(self) -> list[ChunkProgram]:
        """None here: chunks run in the processes."""
        return []

    def _balance_threads(self, quota: Sequence[int], steal_threshold: int, hang_s: float) -> None:
        """The threads begin with no chunk: those are the processes'."""
        super()._balance_threads([0] * self.num_workers, 1, 0.0)

    def inject_fault(self, number: int, *, sleep_s: float | None = None) -> None:
        """For tests: the worker dies before its next chunk, or never comes back."""
        self._faults.append((number, worker.DIE if sleep_s is None else worker.SLEEP))

    def pids(self) -> list[int]:
        """Process numbers of the workers; none before the first step."""
        return [p.process.pid for p in self._processes]

    def close(self) -> None:
        """End processes and threads. Twice is allowed."""
        for process in getattr(self, "_processes", []):
            process.end()
        self._processes = []
        descriptor, self._descriptor = getattr(self, "_descriptor", None), None
        if descriptor is not None:
            os.close(descriptor)
        super().close()

    def _share_memory(self) -> None:
        """Move into the block what is not there: the first time, or when a parameter was moved."""
        tensors = self.chunk.tensors
        owned = [*self.weights, *tensors["frozen"], *tensors["buffer"]]
        if self._processes and [t.data_ptr() for t in owned] == self._addresses:
            return
        for process in self._processes:
            process.end()
        constants, rows = tensors["constant"], self._of_chunks.tensors
        places, num_bytes = shared.places([*owned, *constants, *rows, *self._batch])
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = shared.create(num_bytes)
        block = shared.opened(self._descriptor, num_bytes)
        views = [place.view(block) for place in places]
        with torch.no_grad():
            weights = range(len(self.weights))
            # Each thread writes first what it will update.
            self._fill([fill(views[n], self.weights[n], self._rows(n)) for n in weights])
            for number, tensor in enumerate(owned):
                tensor.data = views[number] if number in weights else views[number].copy_(tensor)
            first = len(owned)
            for view, constant in zip(views[first:], constants, strict=False):
                view.copy_(constant)
        first += len(constants)
        self._of_chunks = Rows.from_tensors(self.chunk.parts, views[first : first + len(rows)])
        self._views = views[first + len(rows) :]
        self._addresses = [t.data_ptr() for t in owned]
        self._moved.update(self._addresses)  # They stay there.
        self._bound = None
        self._job = self._describe(places, num_bytes)
        self._processes = [self._start(number) for number in range(self.num_workers)]

    def _describe(self, places: list[shared.Place], num_bytes: int) -> worker.Job:
        """The job, but for its block and placement."""
        left = list(places)

        def take(count: int) -> list[shared.Place]:
            taken, left[:] = left[:count], left[count:]
            return taken

        return worker.Job(
            graph=to_rows(self.chunk.graph),
            parts=self.chunk.parts,
            scale=self._scale,
            block="",
            num_bytes=num_bytes,
            tensors={
                kind: take(len(self.chunk.tensors[kind]))
                for kind in ("weight", "frozen", "buffer", "constant")
            },
            rows=take(len(self._of_chunks.tensors)),
            batch=take(len(self._batch)),
            placement=None,
        )

    def _start(self, number: int) -> _Process:
        placement = self._placements[number] if self._placements else None
        assert self._descriptor is not None
        block = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        job = dataclasses.replace(self._job, block=block, placement=placement)
        return _Process(self._context, job)

    def _run_chunks(self, total: list[list[Any]]) -> None:
        """Every chunk of the batch in the block."""
        begin, queues = 0, []
        for count in self.quota:
            queues.append(deque(range(begin, begin + count)))
            begin += count
        done: set[int] = set()
        while self._faults:
            number, kind = self._faults.popleft()
            self._processes[number].send(kind)
        while len(done) < self.num_chunks:
            for number, process in enumerate(self._processes):
                if process.ready and process.chunk is None:
                    self._give(number, process, queues, total)
            for number in self._wait():
                self._hear(number, queues, done, total)

    def _give(
        self, number: int, process: _Process, queues: list[deque[int]], total: list[list[Any]]
    ) -> None:
        """The worker's next chunk, or the last one of whoever has most."""
        own = queues[number]
        if own:
            process.chunk = own.popleft()
        else:
            most = max(queues, key=len)
            if len(most) < self.steal_threshold:
                return
            process.chunk = most.pop()
            total[number][1] += 1
        process.since_s = time.monotonic()
        process.send(process.chunk)  # Where that fails, the pipe says so when it is heard.

    def _wait(self) -> list[int]:
        """Numbers of the workers that answered, died or hang; waits for the first."""
        now = time.monotonic()
        limits = [
            p.since_s + (_START_S if not p.ready else self.hang_s or _START_S) - now
            for p in self._processes
            if p.chunk is not None or not p.ready
        ]
        heard = connections.wait(
            [p.pipe for p in self._processes], max(0.0, min(limits, default=_START_S))
        )
        now = time.monotonic()
        return [
            number
            for number, p in enumerate(self._processes)
            if p.pipe in heard
            or (p.chunk is not None and self.hang_s and now - p.since_s > self.hang_s)
            or (not p.ready and now - p.since_s > _START_S)
        ]

    def _hear(
        self,
        number: int,
        queues: list[deque[int]],
        done: set[int],
        total: list[list[Any]],
    ) -> None:
        process = self._processes[number]
        try:
            if not process.pipe.poll():
                raise TimeoutError
            chunk, cpu_s = worker.ANSWER.unpack(process.pipe.recv_bytes())
        except (EOFError, OSError):  # TimeoutError is one: dead, or as good as dead.
            process.end()
            self.restarts += 1
            if self.restarts > self.max_restarts:
                raise RunError(
                    f"workers must not need more than {self.max_restarts} restarts",
                    next_step="look for what kills them; raise parallel.max_restarts",
                ) from None
            if process.chunk is not None:
                queues[number].appendleft(process.chunk)
            self._processes[number] = self._start(number)
            return
        if chunk == worker.END:
            process.ready = True
            return
        done.add(chunk)
        total[number][0] += 1
        total[number][2] += time.monotonic() - process.since_s
        total[number][5] += cpu_s
        process.chunk = None
