"""``Team``: threads that train on chunks of a batch and share one copy of the weights.

A batch is cut into chunks of one size. Each chunk is run by one thread, on one core, and hands over
its gradients (``step.chunk``); then every thread adds up and updates its share of the weights.
Neither which thread ran a chunk nor how many threads there are changes a bit of the result. The
loop is C++ (``kernels/cpp/team.cpp``): no thread holds the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..errors import RunError
from ..graph import convolutions
from ..graph.routes import route
from ..kernels import binding
from ..step import chunk_random
from ..step.capture import LossFn, NotCapturable, capture
from ..step.program import TensorSpecs, addresses, compile_captured, load_step
from ..step.updates import Update, reason_outside
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


class Team:
    """Workers on one model and optimizer, for chunks of one shape.

    Args:
        model, loss_fn, optimizer: as for ``compile_step``.
        x, y: a chunk; only shapes, strides and dtypes count.
        num_chunks: chunks of a batch.
        num_workers: threads, the calling one included.
        placements: where each worker runs; empty: the kernel decides. The caller places itself.
        moves: whether weights and optimizer state move to pages that the worker that updates them
            touched first; they stay the same objects.
        whole: whether the workers make the update; else they leave sums in ``grad``.
        hang_s: seconds that a chunk may take; 0: any.
        steal_threshold: chunks a worker must have left for another to take one.

    Raises:
        NotCapturable: why not.
        RunError: no compiler, or it refused.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        num_chunks: int,
        num_workers: int,
        placements: Sequence[WorkerPlacement] = (),
        moves: bool = False,
        whole: bool = True,
        hang_s: float = 0.0,
        steal_threshold: int = 1,
    ) -> None:
        self.num_chunks, self.num_workers = num_chunks, num_workers
        self.optimizer = optimizer
        self.captured = capture(model, loss_fn, x, y, update=None, is_chunk=True)
        if foreign := chunk_random.foreign(self.captured.graph):
            raise NotCapturable(f"{foreign} draws from one generator, chunks run in any order")
        self.whole = whole and reason_outside(optimizer) is None
        self.weights = self.captured.weights
        for weight in self.weights:
            if not _is_dense(weight):
                raise NotCapturable("a parameter is not dense in memory")
        self.update = Update(optimizer, self.weights)
        groups = {id(p) for g in optimizer.param_groups for p in g["params"]}
        self.update.used = [
            number
            for number, part in enumerate(self.captured.parts)
            if part.outputs and id(self.weights[number]) in groups
        ]
        self.routes = route(self.captured.graph, 1)
        convolutions.route(self.captured.graph, 1)
        path = compile_captured(self.captured, 1)
        self._chunk_key = _key(x, y)
        self._chunk = TensorSpecs((x, y))
        x_chunk, y_chunk = self._chunk.array
        self._run = binding.TeamRun(
            x=x_chunk, y=y_chunk, x_chunk_bytes=_bytes(x), y_chunk_bytes=_bytes(y)
        )
        self._times = (binding.WorkerTimes * num_workers)()
        self._run.times = ctypes.addressof(self._times)
        self._moves, self._moved = moves, set[int]()
        self._handle = _open(load_step(path), placements or [WorkerPlacement()] * num_workers)
        self.hang_s, self.steal_threshold = hang_s, steal_threshold
        self.resize(num_chunks)

    def resize(self, num_chunks: int) -> None:
        """Batches have so many chunks from now on; each worker begins with as many."""
        self.num_chunks = num_chunks
        self._slots = [
            [_slot(num_chunks, shape, w, len(part.shapes) == 2) for shape in part.shapes]
            for part, w in zip(self.captured.parts, self.weights, strict=True)
        ]
        self._copies = [
            torch.empty(num_chunks, max(1, b.numel()), dtype=b.dtype) for b in self.captured.buffers
        ]
        self._share = torch.tensor([1.0 / num_chunks, 0.0])
        self._keys = torch.zeros(num_chunks, 1 if self.captured.drawing else 0, dtype=torch.int64)
        self._bound: Any = None
        self._untouched = True
        each, more = divmod(num_chunks, self.num_workers)
        self.balance([each + (worker < more) for worker in range(self.num_workers)])

    def balance(self, quota: Sequence[int]) -> None:
        """How many chunks each worker begins a step with; they add up to ``num_chunks``."""
        assert sum(quota) == self.num_chunks
        self.quota = list(quota)
        self._balance_threads(quota, self.steal_threshold, self.hang_s)

    def _balance_threads(self, quota: Sequence[int], steal_threshold: int, hang_s: float) -> None:
        numbers = (ctypes.c_int32 * self.num_workers)(*quota)
        kernels.library().hotloop_team_balance(self._handle, numbers, steal_threshold, hang_s)

    @property
    def draws(self) -> bool:
        """Whether chunks draw random numbers."""
        return self.captured.drawing

    def accepts(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether chunks of this batch are what was captured."""
        rows = len(x) // self.num_chunks
        return len(x) == rows * self.num_chunks and _key(x[:rows], y[:rows]) == self._chunk_key

    def run(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        steps: int = 1,
        rates: list[list[float]] | None = None,
        keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[WorkerTimes]]:
        """``steps`` batches one after the other; losses, float32 ``[steps]``, and what workers did.

        Args:
            x, y: ``[steps * batch, ...]``.
            rates: learning rate of each step and group; ``None``: the optimizer's.
            keys: of the random numbers of each step, int64 ``[steps]``, where ``draws``.

        Raises:
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
        run, counters = self._run, addresses(self._counters)
        run.x.data, run.y.data = x.data_ptr(), y.data_ptr()
        run.steps, run.losses = steps, losses.data_ptr()
        run.tables = None if tables is None else tables.data_ptr()
        run.groups = 0 if tables is None else tables.shape[1]
        run.counters, run.num_counters = ctypes.addressof(counters), len(self._counters)
        run.keys = keys.data_ptr() if keys is not None and self.draws else None
        try:
            kernels.call("hotloop_team_run", self._handle, ctypes.byref(run))
        except RunError:
            if not run.hangs:
                raise
            self._held = (x, y, tables, losses, keys, counters)  # The thread that hangs uses them.
            raise WorkerHangs(run.steps_done, losses) from None
        finally:
            if self.whole:
                self.update.advance(self._steps_done, run.steps_done)
            self._steps_done += run.steps_done
        return losses, [_seconds(times) for times in self._times]

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
        tensors = [*self.weights, *self.captured.frozen, *self.captured.buffers]
        tensors += [t for w in self.weights for t in _tensors(state.get(w, {}))]
        # A plain step in between drops the gradients, which the threads would still write to.
        grads = [] if self.whole else [self.weights[n].grad for n in self.update.used]
        return id(state), [None if t is None else t.data_ptr() for t in (*tensors, *grads)]

    def _bind(self) -> None:
        states: list[torch.Tensor] = []
        self._counters: list[torch.Tensor] = []
        self._steps_done = 0.0
        if self.whole:
            states, self._counters, self._steps_done = self.update.bind()
        else:
            for number in self.update.used:
                self.weights[number].grad = torch.zeros_like(self.weights[number])
        self._states = states
        if self._moves:
            self._move(states)
        if self._untouched:
            # Each worker writes first where it will write; see also ``balance``.
            room = [*(slot for mine in self._slots for slot in mine), *self._copies]
            self._fill([fill(t, None, len(t), 0) for t in room])
            self._untouched = False
        records = []
        for number, (weight, part) in enumerate(
            zip(self.weights, self.captured.parts, strict=True)
        ):
            mine = [states.pop(0) for _ in self.update.state_shapes(weight)] if self.whole else []
            if number in self.update.used:
                records.append(self._record(number, weight, mine, len(part.outputs) == 2))
        self._kept = [t for w in self.weights for t in _tensors(self.optimizer.state.get(w, {}))]
        changed = [
            binding.TeamBuffer(
                bytes=b.numel() * b.itemsize,
                is_float=int(b.dtype == torch.float32),
                shared=b.data_ptr(),
                copies=c.data_ptr(),
                chunk_stride_bytes=c.stride(0) * c.itemsize,
            )
            for b, c in zip(self.captured.buffers, self._copies, strict=True)
        ]
        inputs: list[torch.Tensor] = []
        for chunk in range(self.num_chunks):
            copies = [
                c[chunk][: b.numel()].view(b.shape)
                for b, c in zip(self.captured.buffers, self._copies, strict=True)
            ]
            slots = [slot[chunk] for mine in self._slots for slot in mine]
            key = [self._keys[chunk]] if self.draws else []
            inputs += [*self.weights, *self.captured.frozen, *copies, *slots, *key, self._share]
        self._inputs = [t.detach() for t in inputs]
        specs = TensorSpecs(self._inputs)
        weights = (binding.TeamWeight * len(records))(*records)
        buffers = (binding.TeamBuffer * len(changed))(*changed)
        shares = (ctypes.c_double * self.num_chunks)(*[1.0 / self.num_chunks] * self.num_chunks)
        bind = binding.TeamBind(
            num_chunks=self.num_chunks,
            inputs=ctypes.addressof(specs.array),
            num_inputs=len(inputs) // self.num_chunks,
            weights=ctypes.addressof(weights),
            num_weights=len(records),
            buffers=ctypes.addressof(buffers),
            num_buffers=len(changed),
            shares=ctypes.addressof(shares),
            keys=self._keys.data_ptr(),
        )
        kernels.call("hotloop_team_bind", self._handle, ctypes.byref(bind))

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
        factored = len(self.captured.parts[number].outputs) == 2
        return len(weight) if factored else weight.numel()

    def _fill(self, fills: list[Any]) -> None:
        array = (binding.TeamFill * len(fills))(*fills)
        kernels.call("hotloop_team_fill", self._handle, array, len(fills))

    def _record(
        self, number: int, weight: torch.Tensor, states: list[torch.Tensor], factored: bool
    ) -> Any:
        slots = self._slots[number]
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


def _open(step: Any, placements: Sequence[WorkerPlacement]) -> ctypes.c_void_p:
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
    opened = binding.TeamOpen(
        step=step, num_workers=len(placements), placements=ctypes.addressof(array)
    )
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


def _is_dense(tensor: torch.Tensor) -> bool:
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _slot(
    num_chunks: int, shape: tuple[int, ...], weight: torch.Tensor, is_factor: bool
) -> torch.Tensor:
    """Room for what each chunk hands over; a gradient is laid out like its weight."""
    if is_factor:
        return torch.empty(num_chunks, *shape)
    stride = (weight.numel(), *weight.stride())
    return torch.empty_strided((num_chunks, *shape), stride)


def _key(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
    return (x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype)


def _bytes(chunk: torch.Tensor) -> int:
    return len(chunk) * chunk.stride(0) * chunk.element_size()
