"""``Team``: threads that train on chunks of a batch and share one copy of the weights.

A batch is cut into chunks of one size. Each chunk is run by one thread, on one core, and hands over
its gradients (``step.chunk``); then every thread adds up and updates its share of the weights.
Neither which thread ran a chunk nor how many threads there are changes a bit of the result. The
loop is C++ (``kernels/cpp/team.cpp``), and each worker has a program of its own
(``chunk_program``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import kernels
from ..errors import RunError
from ..graph.program import row_strides
from ..kernels import binding
from ..step.chunk import Chunk
from ..step.updates import Update
from .chunk_program import ChunkProgram, Rows
from .placement import WorkerPlacement, fresh_like

# Rows, or elements of what has none, that two workers never share in an update.
_GRAIN = 16


@dataclass(frozen=True)
class WorkerTimes:
    """What one worker did in one call.

    Attributes:
        chunks: how many it ran, ``stolen`` of them another's.
        busy_s: running them, and cpu_s how much of that it had a processor.
        wait_s: waiting for the others. update_s: updating its share.
    """

    chunks: int
    stolen: int
    busy_s: float
    wait_s: float
    update_s: float
    cpu_s: float


class WorkerHangs(RunError):
    """A worker did not come back in time; the weights are those after ``steps_done`` steps."""

    def __init__(self, steps_done: int, losses: torch.Tensor) -> None:
        super().__init__("every worker must end its chunk in time")
        self.steps_done, self.losses = steps_done, losses


class UpdateRefused(Exception):
    """Why workers cannot make the update of this optimizer state, in words for the report."""


class Team:
    """Workers on one model and optimizer, for one kind of chunk.

    Args:
        chunk: what each chunk of a batch is.
        optimizer: on the chunk's weights.
        num_chunks: chunks of a batch.
        num_workers: threads, the calling one included.
        sums: whether the loss is a sum over samples, not a mean.
        placements: where each worker runs; empty: the kernel decides. The caller places itself.
        moves: whether weights and optimizer state move to pages that the worker that updates them
            touched first; they stay the same objects.
        whole: whether the workers make the update; else they leave sums in ``grad``.
        hang_s: seconds that a chunk may take; 0: any.
        steal_threshold: chunks a worker must have left for another to take one.

    Raises:
        RunError: there are no kernels here, or no threads.
    """

    def __init__(
        self,
        chunk: Chunk,
        optimizer: torch.optim.Optimizer,
        *,
        num_chunks: int,
        num_workers: int,
        sums: bool = False,
        placements: Sequence[WorkerPlacement] = (),
        moves: bool = False,
        whole: bool = True,
        hang_s: float = 0.0,
        steal_threshold: int = 1,
    ) -> None:
        kernels.use_torch()
        self.chunk, self.optimizer = chunk, optimizer
        self.num_chunks, self.num_workers = num_chunks, num_workers
        self.whole = whole
        self.weights = chunk.tensors["weight"]
        self.update = Update(optimizer, self.weights)
        self.update.used = [
            number
            for number, part in enumerate(chunk.parts)
            if part.shapes and self.update.has_group(self.weights[number])
        ]
        self._scale = 1.0 if sums else 1.0 / num_chunks
        self._run = binding.TeamRun()
        self._times = (binding.WorkerTimes * num_workers)()
        self._run.times = ctypes.addressof(self._times)
        self._moves, self._moved = moves, set[int]()
        self._of_chunks = Rows.of(chunk, num_chunks)
        self._programs: list[ChunkProgram] = []
        self._programs_see: list[int] = []
        self._bound: Any = None
        self._untouched = True
        self._handle = _open(placements or [WorkerPlacement()] * num_workers)
        self.hang_s, self.steal_threshold = hang_s, steal_threshold
        each, more = divmod(num_chunks, num_workers)
        self.balance([each + (worker < more) for worker in range(num_workers)])

    def balance(self, quota: Sequence[int]) -> None:
        """How many chunks each worker begins a step with; they add up to ``num_chunks``."""
        assert sum(quota) == self.num_chunks
        self.quota = list(quota)
        self._balance_threads(quota, self.steal_threshold, self.hang_s)

    def _balance_threads(self, quota: Sequence[int], steal_threshold: int, hang_s: float) -> None:
        numbers = (ctypes.c_int32 * self.num_workers)(*quota)
        kernels.library().hotloop_team_balance(self._handle, numbers, steal_threshold, hang_s)

    def run(
        self,
        batch: Sequence[torch.Tensor],
        steps: int = 1,
        rates: list[list[float]] | None = None,
        keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[WorkerTimes]]:
        """``steps`` batches one after the other; losses, float32 ``[steps]``, and what workers did.

        Args:
            batch: the parts that chunks read, ``[steps * batch, ...]`` each.
            rates: learning rate of each step and group; ``None``: the optimizer's.
            keys: of the random numbers of each step, int64 ``[steps]``, where chunks draw any.

        Raises:
            UpdateRefused: workers cannot make the update.
            WorkerHangs: a chunk took longer than ``hang_s``; close the team, and build another.
            RunError: a chunk failed twice.
        """
        self._rebind()
        tables = None
        if self.whole:
            if self._counters:
                self._steps_done = self._counters[0].item()
            tables = self.update.rows(self._steps_done, steps, rates)
        losses = torch.empty(steps)
        batch = [_laid_out(t, like) for t, like in zip(batch, self.chunk.batch, strict=True)]
        run, counters, parts = self._run, _addresses(self._counters), _addresses(batch)
        run.batch = ctypes.addressof(parts)
        run.steps, run.losses = steps, losses.data_ptr()
        run.tables = None if tables is None else tables.data_ptr()
        run.groups = 0 if tables is None else tables.shape[1]
        run.counters, run.num_counters = ctypes.addressof(counters), len(self._counters)
        run.keys = keys.data_ptr() if keys is not None and self.chunk.draws else None
        try:
            kernels.call("hotloop_team_run", self._handle, ctypes.byref(run))
        except RunError:
            if not run.hangs:
                raise
            # The thread that hangs uses them.
            self._held = batch, parts, tables, losses, keys, counters
            raise WorkerHangs(run.steps_done, losses) from None
        finally:
            if self.whole:
                self.update.advance(self._steps_done, run.steps_done)
            self._steps_done += run.steps_done
            torch.autograd.graph.increment_version([*self.weights, *self._states])
        self._raise_interrupts()
        return losses, [_seconds(times) for times in self._times]

    def _raise_interrupts(self) -> None:
        """Ctrl-C that came while a worker was in Python: the step is whole, as its chunk was run
        again."""
        for program in self._programs:
            error, program.error = program.error, None
            if error is not None and not isinstance(error, Exception):
                raise error

    def inject_fault(self, number: int, *, sleep_s: float | None = None) -> None:
        """For tests: the next chunk of worker ``number`` fails, or sleeps first."""
        kind = 1 if sleep_s is None else 2
        kernels.library().hotloop_team_inject_fault(self._handle, number, kind, sleep_s or 0.0)

    def close(self) -> None:
        """End the threads. Twice is allowed."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle.value is not None:
            kernels.library().hotloop_team_close(handle)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()

    def _rebind(self) -> None:
        """Hand over where everything lies, again where something was replaced."""
        now = self._where()
        if now == self._bound:
            return
        with torch.no_grad():
            self._bind()
        self._bound = self._where()  # Binding makes what is missing.

    def _where(self) -> tuple[Any, ...]:
        """Where the tensors lie that the threads read and write."""
        state = self.optimizer.state
        tensors = [t for kind in self.chunk.tensors.values() for t in kind]
        tensors += [t for w in self.weights for t in _tensors(state.get(w, {}))]
        # A plain step in between drops the gradients, which the threads would still write to.
        grads = [] if self.whole else [self.weights[n].grad for n in self.update.used]
        return id(state), [None if t is None else t.data_ptr() for t in (*tensors, *grads)]

    def _bind(self) -> None:
        states: list[torch.Tensor] = []
        self._counters: list[torch.Tensor] = []
        self._steps_done = 0.0
        if self.whole:
            try:
                states, self._counters, self._steps_done = self.update.bind()
            except ValueError as error:
                raise UpdateRefused(str(error)) from None
        else:
            for number in self.update.used:
                self.weights[number].grad = torch.zeros_like(self.weights[number])
        self._states = states
        if self._moves:
            self._move(states)
        if self._untouched:
            # Each worker writes first where it will write; see also ``balance``.
            room = [t for t in self._of_chunks.tensors if t.numel()]
            self._fill([fill(t, None, len(t), 0) for t in room])
            self._untouched = False
        left = list(states)
        records = []
        for number, weight in enumerate(self.weights):
            mine = [left.pop(0) for _ in self.update.state_shapes(weight)] if self.whole else []
            if number in self.update.used:
                records.append(self._record(number, weight, mine))
        changed = [
            binding.TeamBuffer(
                bytes=b.nbytes,
                is_float=int(b.dtype == torch.float32),
                shared=b.data_ptr(),
                copies=c.data_ptr(),
                chunk_stride_bytes=c.stride(0) * c.itemsize,
            )
            for b, c in zip(self.chunk.tensors["buffer"], self._of_chunks.copies, strict=True)
        ]
        see = [t.data_ptr() for kind in self.chunk.tensors.values() for t in kind]
        if see != self._programs_see:
            self._programs, self._programs_see = self._make_programs(), see
        programs = (binding.ChunkProgram * self.num_workers)(*(p.record for p in self._programs))
        weights = (binding.TeamWeight * len(records))(*records)
        buffers = (binding.TeamBuffer * len(changed))(*changed)
        bind = binding.TeamBind(
            num_chunks=self.num_chunks,
            programs=ctypes.addressof(programs) if self._programs else None,
            weights=ctypes.addressof(weights),
            num_weights=len(records),
            buffers=ctypes.addressof(buffers),
            num_buffers=len(changed),
            loss_share=self._scale,
            keys=self._of_chunks.keys.data_ptr(),
            losses=self._of_chunks.losses.data_ptr(),
        )
        kernels.call("hotloop_team_bind", self._handle, ctypes.byref(bind))

    def _make_programs(self) -> list[ChunkProgram]:
        """A program for each worker."""
        return [
            ChunkProgram(self.chunk, self.chunk.tensors, self._of_chunks, self._scale)
            for _ in range(self.num_workers)
        ]

    def _move(self, states: list[torch.Tensor]) -> None:
        """Move weights, their state and gradients to pages of the workers that update them."""
        owned, left = [], list(states)
        for number, weight in enumerate(self.weights):
            mine = [left.pop(0) for _ in self.update.state_shapes(weight)] if states else []
            gradient = weight.grad
            owned += [
                (t, self._rows(number))
                for t in (weight, *mine, *([] if gradient is None else [gradient]))
                if t.data_ptr() not in self._moved
            ]
        pages = [fresh_like(t) for t, _ in owned]
        self._fill([fill(new, old, rows) for new, (old, rows) in zip(pages, owned, strict=True)])
        for (tensor, _), new in zip(owned, pages, strict=True):
            tensor.data = new
            self._moved.add(new.data_ptr())

    def _rows(self, number: int) -> int:
        """Rows of a weight that workers share in the update; all elements where it has none."""
        weight = self.weights[number]
        return len(weight) if self.chunk.parts[number].is_factored else weight.numel()

    def _fill(self, fills: list[Any]) -> None:
        array = (binding.TeamFill * len(fills))(*fills)
        kernels.call("hotloop_team_fill", self._handle, array, len(fills))

    def _record(self, number: int, weight: torch.Tensor, states: list[torch.Tensor]) -> Any:
        slots, factored = self._of_chunks.slots[number], self.chunk.parts[number].is_factored
        pointers = [s.data_ptr() for s in states] + [None, None]
        rows, cols = weight.shape if factored else (1, weight.numel())
        gradient = None if self.whole else weight.grad
        return binding.TeamWeight(
            factored=factored,
            group=self.update.group_of(weight),
            rows=rows,
            cols=cols,
            depth=self.num_chunks * slots[0].shape[1] if factored else 0,
            weight=weight.data_ptr(),
            state1=pointers[0],
            state2=pointers[1],
            left=slots[0].data_ptr(),
            right=slots[1].data_ptr() if factored else None,
            chunk_stride=slots[0].stride(0),
            gradient=None if gradient is None else gradient.data_ptr(),
        )


def _open(placements: Sequence[WorkerPlacement]) -> ctypes.c_void_p:
    """A team with a worker for each placement."""
    array = (binding.WorkerPlacement * len(placements))()
    kept = []
    for record, placement in zip(array, placements, strict=True):
        nodes = () if placement.policy is None else placement.policy.nodes
        for name, numbers in (("cpus", placement.cpu_ids), ("nodes", nodes)):
            held = (ctypes.c_int32 * len(numbers))(*numbers)
            setattr(record, name, ctypes.addressof(held))
            setattr(record, f"num_{name}", len(numbers))
            kept.append(held)
        record.policy_mode = -1 if placement.policy is None else placement.policy.mode
    opened = binding.TeamOpen(num_workers=len(placements), placements=ctypes.addressof(array))
    kernels.call("hotloop_team_open", ctypes.byref(opened))
    return ctypes.c_void_p(opened.team)


def _seconds(times: Any) -> WorkerTimes:
    """Of ``binding.WorkerTimes``."""
    nanoseconds = (times.busy_ns, times.wait_ns, times.update_ns, times.cpu_ns)
    return WorkerTimes(times.chunks, times.stolen, *(ns / 1e9 for ns in nanoseconds))


def fill(to: torch.Tensor, source: torch.Tensor | None, rows: int, grain: int = _GRAIN) -> Any:
    """For ``Team._fill``: what the workers write first, each its rows; grain 0: its chunks."""
    at = None if source is None else source.data_ptr()
    return binding.TeamFill(to.data_ptr(), at, rows, to.nbytes // max(1, rows), grain)


def _tensors(state: Any) -> list[torch.Tensor]:
    return [v for v in state.values() if isinstance(v, torch.Tensor)]


def _addresses(tensors: Sequence[torch.Tensor]) -> Any:
    """Where tensors lie, as an array of pointers."""
    return (ctypes.c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))


def _laid_out(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A part of the batch, its rows laid out as chunks read them."""
    if row_strides(part) == row_strides(like):
        return part
    shape = len(part), *part.shape[1:]
    return torch.empty_strided(shape, like.stride(), dtype=part.dtype).copy_(part)
