"""``Team``: threads that train on chunks of a batch and share one copy of the weights.

A batch is cut into chunks of one size. Each chunk is run by one thread, on one core, and hands over
its gradients (``step.chunk``); then every thread adds up and updates its share of the weights.
Neither which thread ran a chunk nor how many threads there are changes a bit of the result. The
loop is C++ (``step/kernels/team.cpp``): no thread holds the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RunError
from ..step import chunk_random, convolutions
from ..step.capture import LossFn, NotCapturable, capture
from ..step.program import compile_captured, described, kernels
from ..step.routes import route
from ..step.updates import Update, reason_outside
from .placement import Seat, fresh_like

# Rows, or elements of what has none, that two workers never share in an update.
_GRAIN = 16


class _Weight(ctypes.Structure):
    """``Weight`` of ``step/kernels/team.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("factored", "group", "rows", "cols", "depth")),
        *((name, ctypes.c_void_p) for name in ("weight", "s1", "s2", "left", "right")),
        ("slot_stride", ctypes.c_int64),
        ("gradient", ctypes.c_void_p),
    )


class _Buffer(ctypes.Structure):
    """``Buffer`` of ``step/kernels/team.cpp``."""

    _fields_ = (
        ("bytes", ctypes.c_int64),
        ("is_float", ctypes.c_int64),
        ("shared", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        ("copy_stride", ctypes.c_int64),
    )


class _Fill(ctypes.Structure):
    """``Fill`` of ``step/kernels/team.cpp``."""

    _fields_ = (
        ("to", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "row_bytes", "grain")),
    )


@dataclass(frozen=True)
class LaneStats:
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
        seats: where each worker runs; empty: the kernel decides. The caller seats itself.
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
        seats: Sequence[Seat] = (),
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
        self._described = described((x, y))
        self._y_at = 3 + 2 * x.dim()
        self._steps_of = (_bytes(x), _bytes(y))
        self._library = kernels()
        message = ctypes.create_string_buffer(400)
        places = [n for seat in seats or [Seat()] * num_workers for n in _seat_numbers(seat)]
        placed = (ctypes.c_int32 * len(places))(*places)
        self._moves, self._moved = moves, set[int]()
        self._library.hotloop_team_open.restype = ctypes.c_void_p
        opened = self._library.hotloop_team_open(
            str(path).encode(), num_workers, placed, message, 400
        )
        if not opened:
            raise RunError("a compiled step must load", got=message.value.decode(errors="replace"))
        self._handle = ctypes.c_void_p(opened)
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
        self._library.hotloop_team_balance(
            self._handle,
            (ctypes.c_int32 * self.num_workers)(*quota),
            ctypes.c_int32(self.steal_threshold),
            ctypes.c_double(self.hang_s),
        )

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
    ) -> tuple[torch.Tensor, list[LaneStats]]:
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
        self._described[0], self._described[self._y_at] = x.data_ptr(), y.data_ptr()
        stats = (ctypes.c_int64 * (6 * self.num_workers))()
        done = ctypes.c_int64()
        counters = (ctypes.c_void_p * max(1, len(self._counters)))(
            *(c.data_ptr() for c in self._counters)
        )
        result = self._library.hotloop_team_run(
            self._handle,
            self._described,
            ctypes.c_int64(self._steps_of[0]),
            ctypes.c_int64(self._steps_of[1]),
            ctypes.c_int64(steps),
            ctypes.c_void_p(None if tables is None else tables.data_ptr()),
            ctypes.c_int64(0 if tables is None else tables[0].numel()),
            ctypes.c_void_p(losses.data_ptr()),
            counters,
            ctypes.c_int64(len(self._counters)),
            ctypes.c_void_p(keys.data_ptr() if keys is not None and self.draws else None),
            stats,
            ctypes.byref(done),
        )
        self._steps_done += done.value
        if result == 2:
            raise WorkerHangs(done.value, losses)
        if result:
            raise RunError("a chunk failed on two workers", got=f"after {done.value} steps")
        rows = [stats[at : at + 6] for at in range(0, len(stats), 6)]
        return losses, [LaneStats(c, s, *(ns / 1e9 for ns in rest)) for c, s, *rest in rows]

    def inject_fault(self, number: int, *, sleep_s: float | None = None) -> None:
        """For tests: the next chunk of worker ``number`` fails, or sleeps first."""
        self._library.hotloop_team_fault(
            self._handle, number, 1 if sleep_s is None else 2, ctypes.c_double(sleep_s or 0.0)
        )

    def close(self) -> None:
        """End the threads. Twice is allowed."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle.value is not None:
            self._library.hotloop_team_close(handle)

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
            _Buffer(
                b.numel() * b.itemsize, int(b.dtype == torch.float32), b.data_ptr(), c.data_ptr(),
                c.stride(0) * c.itemsize,
            )
            for b, c in zip(self.captured.buffers, self._copies, strict=True)
        ]  # fmt: skip
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
        shares = (ctypes.c_double * self.num_chunks)(*[1.0 / self.num_chunks] * self.num_chunks)
        if self._library.hotloop_team_bind(
            self._handle,
            self.num_chunks,
            described(self._inputs),
            ctypes.c_int64(len(inputs) // self.num_chunks),
            (_Weight * max(1, len(records)))(*records),
            ctypes.c_int64(len(records)),
            (_Buffer * max(1, len(changed)))(*changed),
            ctypes.c_int64(len(changed)),
            shares,
            ctypes.c_void_p(self._keys.data_ptr()),
        ):
            raise RunError("the inputs of a compiled step must be dense tensors")

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

    def _fill(self, fills: list[_Fill]) -> None:
        if self._library.hotloop_team_fill(
            self._handle, (_Fill * max(1, len(fills)))(*fills), ctypes.c_int64(len(fills))
        ):
            raise RunError("the workers of a team that was given up cannot be used")

    def _record(
        self, number: int, weight: torch.Tensor, states: list[torch.Tensor], factored: bool
    ) -> _Weight:
        slots = self._slots[number]
        pointers = [s.data_ptr() for s in states] + [None, None]
        rows, cols = weight.shape if factored else (1, weight.numel())
        gradient = None if self.whole else weight.grad
        return _Weight(
            factored=factored,
            group=self.update.group_of(weight),
            rows=rows,
            cols=cols,
            depth=self.num_chunks * slots[0].shape[1] if factored else 0,
            weight=weight.data_ptr(),
            s1=pointers[0],
            s2=pointers[1],
            left=slots[0].data_ptr(),
            right=slots[1].data_ptr() if factored else None,
            slot_stride=slots[0].stride(0),
            gradient=None if gradient is None else gradient.data_ptr(),
        )


def _seat_numbers(seat: Seat) -> list[int]:
    mode, nodes = (-1, ()) if seat.policy is None else (seat.policy.mode, seat.policy.nodes)
    return [len(seat.cpu_ids), *seat.cpu_ids, mode, len(nodes), *nodes]


def fill(to: torch.Tensor, source: torch.Tensor | None, rows: int, grain: int = _GRAIN) -> _Fill:
    """For ``Team._fill``: what the workers write first, each its rows; grain 0: its chunks."""
    at = None if source is None else source.data_ptr()
    return _Fill(to.data_ptr(), at, rows, to.nbytes // max(1, rows), grain)


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
