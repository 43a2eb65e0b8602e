"""``RecordedStep``: programs recorded from plain steps, one for each shape of batch.

The first step of a shape runs as PyTorch makes it and is recorded; so does the second, and where
the two recordings say the same, the third runs as a program. Before each program the guards are
asked; after 16, 128, 1,024, ... programs of a shape one step runs plain and is recorded again, for
what no guard sees.
"""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import RunError
from ..graph import biases, choices, passes, product_sums
from ..graph.compare import difference
from ..graph.from_recording import RecordedGraph, graph_of
from ..graph.lower import lower
from ..graph.memory_plan import Block
from ..graph.program import Program
from ..graph.recording import NotRecordable, Recorder, Recording
from ..graph.rounding import covers, rounds_products
from ..measure.clock import now
from ..memory import TensorArena
from . import libraries
from .batch import Batch, refusal_of
from .bound_state import BoundState
from .check import refuse_hidden
from .guards import Guards
from .guards_ran import CodeRun, Ran, users
from .guards_settings import PythonState
from .operations import Operation, operations
from .patience import Patience
from .recorded_shape import (
    Shape,
    change_of_layout,
    constants_changed,
    is_sparse,
    kind_of,
    reason_of_weights,
    sum_of,
)
from .update_nodes import add_sums, add_updates
from .updates import Update, reason_outside, sums_table

# Recordings of one shape that differ, before the shape stays plain.
_MOST_RECORDINGS = 4
# Guards that failed, before a shape stays plain: something changes all the time.
_MOST_CHANGES = 8
_AUDIT_FACTOR = 8
# Steps in a row that were looked at and stayed plain.
_MOST_IN_VAIN = 16
_OTHER_CODE = "other code runs in the step than when it was recorded"
# Programs kept; the least recently used one goes.
_MOST_PROGRAMS = 128
_FEW_PROGRAMS = 8
RECORDING = "the first steps of each shape of batch run as PyTorch makes them, and are recorded"
WAITING = "a program of this shape of batch would not pay yet: it came too seldom"
_WHOLE = "forward, loss, backward and update are one program, recorded from PyTorch's own step"
_GRADIENTS = "forward, loss and backward are one program, recorded from PyTorch's own step"


def _nothing() -> None:
    pass


class _NeedsAutocast(Exception):
    """hotloop's products are not all that is to be computed in bfloat16."""


class RecordedStep:
    """The programs of one step.

    Args:
        model, loss_fn, optimizer: as for ``compile_step``.
        num_threads: threads inside each of hotloop's kernels.
        whole: whether the optimizer's rule may be in the program; else it gives gradients.
        autocast: whether the step is in bfloat16: by products that round their factors where these
            are all that there is to compute in it (``graph.rounding``), else by torch's autocast.
        clip_norm, clip_value: limits of the gradient.

    Attributes:
        whole: whether a program makes the update too.
        reason: why the last step ran as it did.
        given_up: why every step from now on is PyTorch's own, whatever its batch; ``None``: none.
        judge: says of a recording why it must not become a program; ``None``: nobody is asked.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        num_threads: int,
        whole: bool,
        autocast: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.num_threads = num_threads
        self._may_be_whole = whole
        self._judge_optimizer()
        self._autocast = autocast
        self._rounds = autocast and rounds_products()
        self.limits = clip_norm, clip_value
        self.reason = RECORDING
        self.judge: Callable[[Recording], str | None] | None = None
        self._shapes: OrderedDict[Any, Shape] = OrderedDict()
        self._resumed: dict[str, list[int]] = {}
        self._sums: list[torch.Tensor] = []
        # Weak, so that a step that nobody holds gives its memory back at once.
        unbind = weakref.WeakMethod(self._unbind)
        self._block = Block(lambda: (unbind() or _nothing)())
        self._patience = Patience()
        self.given_up: str | None = None
        self._in_vain = 0
        # Code of the user's that ran in any recording; ``None``: there was none yet.
        self._ran: Ran | None = None
        self._follows_all = False
        self._last_guards: Guards | None = None
        self._find_tensors()

    def _judge_optimizer(self) -> None:
        self._outside = reason_outside(self.optimizer) or reason_of_weights(self.optimizer)
        self.whole = self._may_be_whole and self._outside is None

    def _find_tensors(self) -> None:
        modules = [m for m in (self.model, self.loss_fn) if isinstance(m, nn.Module)]
        found = [p for m in modules for p in m.parameters()]
        found += [p for g in self.optimizer.param_groups for p in g["params"]]
        parameters = list({id(p): p for p in found}.values())
        self.weights: list[torch.Tensor] = [p for p in parameters if p.requires_grad]
        frozen: list[torch.Tensor] = [p for p in parameters if not p.requires_grad]
        buffers = list({id(b): b for m in modules for b in m.buffers()}.values())
        self._tensors: dict[str, list[torch.Tensor]] = {
            "weight": self.weights,
            "frozen": frozen,
            "buffer": buffers,
        }

    @property
    def has_program(self) -> bool:
        """Whether a batch of some shape runs as a program."""
        return any(shape.is_fast for shape in self._shapes.values())

    @property
    def programs(self) -> list[Shape]:
        """Shapes that run as a program, the one used last at the end."""
        return [shape for shape in self._shapes.values() if shape.program is not None]

    @property
    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What programs find, by kind: ``weight``, ``frozen``, ``buffer``."""
        return self._tensors

    @property
    def block(self) -> Block:
        """Memory of the temporaries."""
        return self._block

    @property
    def arena_bytes(self) -> int | None:
        """Of the largest program's temporaries and batch; ``None``: there is no program."""
        return max((s.arena_bytes for s in self._shapes.values() if s.graph), default=None)

    def operations(self) -> list[Operation]:
        """Products and convolutions of the program used last, timed alone.

        Those that torch's autocast computes are left out.
        """
        for shape in reversed(self._shapes.values()):
            if shape.graph is not None:
                if self._autocast and not shape.rounds:
                    return []
                given = shape.routes, shape.convolutions
                return operations(shape.graph.graph, *given, self.num_threads)
        return []

    # ---- Going on with a run -----------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps: a resumed run then makes the same steps by the same kernels.

        Returns:
            ``shapes``: of each that is not refused, recordings, programs so far, the next audit
            and how often it came before it was recorded; ``patience``; ``kernels``: the choices.
        """
        shapes = {
            repr(key): [min(s.recordings, 2), s.programs_run, s.next_audit, s.seen]
            for key, s in self._shapes.items()
            if s.refusal is None and (s.recordings or s.seen)
        }
        patience = self._patience.steps
        return {"shapes": shapes, "patience": patience, "kernels": choices.made_here()}

    def go_on(self, progress: dict[str, Any]) -> None:
        """Go on where ``progress`` was."""
        self._resumed = dict(progress.get("shapes", {}))
        self._patience.steps = progress.get("patience")
        choices.go_on(progress.get("kernels", {}))

    def recordings_of(self, key: Any) -> int:
        """How often a shape was recorded so far."""
        return self._shapes[key].recordings if key in self._shapes else 0

    def waits_for(self, key: Any) -> bool:
        """Whether a shape was recorded before the run was resumed, and not yet after it."""
        return bool(self._resumed) and repr(key) in self._resumed

    def rehearse(self, key: Any, batch: Batch, plain: Callable[[bool], torch.Tensor]) -> None:
        """Record a shape as often as it was before, on a batch whose step is not made by it.

        Buffers, gradients and torch's random numbers stay as they are.
        """
        recordings, programs_run, next_audit, seen = self._resumed.pop(repr(key))
        shape = self._shapes.setdefault(key, Shape(rounds=self._rounds))
        shape.begun, shape.seen = recordings > 0, seen
        with torch.no_grad():
            buffers = [(b, b.clone()) for b in self._tensors["buffer"]]
        held = [(w, w.grad) for w in self.weights]
        for number in range(_MOST_RECORDINGS):
            # Where there was a program, until two agree: the first one may make a cache again.
            if shape.agreed is not None if programs_run else number == recordings:
                break
            with torch.random.fork_rng(devices=[]):
                self.record(key, batch, plain)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for weight, gradient in held:
                weight.grad = gradient
        self.build()
        for weight, gradient in held:
            weight.grad = gradient
        shape.programs_run, shape.next_audit = programs_run, next_audit

    # ---- Running a program ------------------------------------------------------------------

    def ready(self, key: Any, steps: int = 1) -> int:
        """How many of ``steps`` steps on batches of a shape may run as a program now."""
        shape = self._shapes.get(key)
        if shape is None or not shape.is_fast:
            return 0
        assert shape.guards is not None
        assert shape.graph is not None
        change = shape.guards.changed() or constants_changed(shape.graph)
        if change is None and shape.update is not None:
            change = shape.update.change()
        if change is None:
            change = self._rebind(shape)
        if change is not None:
            self._forget(shape, change)
            return 0
        return min(steps, shape.next_audit - shape.programs_run)

    def run(
        self,
        key: Any,
        batch: Sequence[torch.Tensor],
        steps: int = 1,
        rates: list[list[float]] | None = None,
    ) -> torch.Tensor:
        """``steps`` whole steps, ``ready`` having said so; the losses ``[steps]``."""
        shape = self._shapes[key]
        self._shapes.move_to_end(key)
        assert shape.program is not None
        assert shape.update is not None
        if shape.counters:
            shape.steps_done = float(shape.counters[0])
        tables = shape.update.rows(shape.steps_done, steps, rates)
        parts, began_s = [batch[n] for n in shape.batch_parts], now()
        losses = shape.program.run(parts, tables, steps)
        self._patience.note_run((now() - began_s) / steps, key)
        shape.update.advance(shape.steps_done, steps)
        shape.steps_done += steps
        shape.programs_run += steps
        self.reason = _WHOLE
        return losses

    def add_gradients(
        self, key: Any, batch: Sequence[torch.Tensor], *, first: bool
    ) -> torch.Tensor:
        """Run a program that gives gradients, into the parameters' ``grad``; the loss.

        Args:
            first: begin anew; else what is in ``grad`` stays.
        """
        shape = self._shapes[key]
        self._shapes.move_to_end(key)
        assert shape.program is not None
        assert shape.graph is not None
        for weight, total, used in zip(
            self.weights, self._sums, shape.graph.gradients, strict=True
        ):
            if first or weight.grad is None:
                if used is not None:
                    total.zero_()
            elif weight.grad is not total:
                total.copy_(weight.grad)
        parts, began_s = [batch[n] for n in shape.batch_parts], now()
        loss = shape.program.run(parts, sums_table().unsqueeze(0))[0]
        self._patience.note_run(now() - began_s, key)
        for weight, total, used in zip(
            self.weights, self._sums, shape.graph.gradients, strict=True
        ):
            if used is not None:
                weight.grad = total
        shape.programs_run += 1
        why = self._outside or "gradients are accumulated over micro-batches"
        self.reason = f"{_GRADIENTS}; {why}"
        return loss

    # ---- Recording ----------------------------------------------------------------------------

    def record(self, key: Any, batch: Batch, plain: Callable[[bool], torch.Tensor]) -> torch.Tensor:
        """Run forward and backward as PyTorch makes them, recorded where that is of use.

        Args:
            key: of the shape. batch: as the model gets it.
            plain: runs them, leaves the gradients in ``grad`` and gives the loss; told whether
                under autocast.
        """
        shape = self._shapes.setdefault(key, Shape(rounds=self._rounds))
        if not self._is_recorded_now(key):
            return plain(self._autocast)
        began_s = now()
        libraries.learn()
        self._judge_optimizer_anew()
        lends = not self._sums and self._block.size_bytes > 0
        if lends:  # Programs stay as they are.
            self._block.lend_pages()
        else:
            self._make_room()
        self._find_tensors()
        refusal = self._refusal_before(batch)
        if refusal is not None:
            self._refuse(shape, refusal)
            return plain(self._autocast)
        guards = self._guards(shape)
        if guards is not None and guards.iterators:
            self._refuse(shape, f"a step may take the next value of {guards.iterators[0]}")
            return plain(self._autocast)
        held = [(w, w.grad) for w in self.weights]
        for weight in self.weights:
            weight.grad = None
        state = PythonState(None if guards is None else guards.generators)
        recorder = Recorder({**self._tensors, "batch": batch.tensors})
        recorder.watch = state.changed if shape.draws else None
        # So many new objects would make the collector look through all old ones, again and again.
        collects = gc.isenabled()
        gc.disable()
        code = CodeRun()
        called_s = now()
        try:
            with recorder, code:
                recorder.profile = code.look
                loss = plain(self._autocast and not shape.rounds)
            returned_s = now()
            recording = recorder.recording
            refusal = recorder.refusal
            sparse = next((w for w in self.weights if is_sparse(w.grad)), None)
            if refusal is None and sparse is not None:
                refusal = f"{self._name(sparse)} gets a sparse gradient"
            if refusal is None:
                recording.loss = recorder.ref(loss)
                recording.gradients = [
                    None if w.grad is None else recorder.ref(w.grad) for w in self.weights
                ]
            drawn = state.changed()
            looks_closer = drawn is not None and not shape.draws
            shape.draws = drawn is not None
            refusal = refusal or drawn
            change = None if guards is None else guards.changed()
            if refusal is None and change is not None:
                refusal = f"the step itself changes something: {change}"
        finally:
            if collects:
                gc.enable()
            for weight, before in held:
                if before is not None:
                    weight.grad = before if weight.grad is None else before.add_(weight.grad)
        is_new = self._note_code(guards, code.ran)
        if is_new and shape.is_fast and refusal is None:
            self._forget(shape, _OTHER_CODE)
        elif (is_new or looks_closer) and shape.recordings + 1 < _MOST_RECORDINGS:
            # Another recording tells: whether what this code names stays, where numbers are drawn.
            shape.recording, shape.recordings = recording, shape.recordings + 1
            self.reason = RECORDING
        else:
            self._take(shape, recording, guards, refusal)
        shape.plain_s = returned_s - called_s - recorder.overhead_s
        shape.overhead_s = now() - began_s - shape.plain_s
        if lends:
            TensorArena().trim()
        return loss

    def _guards(self, shape: Shape) -> Guards | None:
        """A snapshot before a step that is recorded; ``None``: it shows which code runs first."""
        if shape.guards is not None:
            return shape.guards  # An audit: they were asked before it.
        if self._ran is None and not self._follows_all:
            return None
        follows_all = self._follows_all or shape.recordings == _MOST_RECORDINGS - 1
        ran, last = None if follows_all else self._ran, self._last_guards
        if last is None or last.ran is not ran or last.changed() is not None:
            self._last_guards = last = Guards(self.model, self.loss_fn, self.optimizer, ran=ran)
        return last

    def _note_code(self, guards: Guards | None, ran: Ran | None) -> bool:
        """Note what ran in a step; whether code of the user's did that its guards do not follow."""
        self._follows_all = self._follows_all or ran is None
        known, found = self._ran or {}, users(ran or {})
        if self._ran is None or not found.keys() <= known.keys():
            self._ran = {**known, **found}
        if guards is None or guards.ran is None:
            return False
        return ran is None or not found.keys() <= guards.ran.keys()

    def leave_out(self, plain: Callable[[bool], torch.Tensor], reason: str) -> torch.Tensor:
        """Run forward and backward as PyTorch makes them; nothing is recorded."""
        self.reason = reason
        return plain(self._autocast)

    def _is_recorded_now(self, key: Any) -> bool:
        """Whether a step on batches of a shape is to be recorded; else the reason says why not."""
        shape = self._shapes[key]
        self._shapes.move_to_end(key)
        while len(self._shapes) > _MOST_PROGRAMS:
            self._shapes.popitem(last=False)
        if shape.refusal is not None:
            self.reason = shape.refusal
            self._note_in_vain()
            return False
        begun = sum(other.begun for other in self._shapes.values())
        if not shape.begun and not self._patience.allows(shape.seen, begun):
            shape.seen += 1
            self.reason = WAITING
            self._note_in_vain()
            return False
        shape.begun = True
        self._in_vain = 0
        return True

    def _note_in_vain(self) -> None:
        """A step was looked at and runs plain: after so many, and no program, none is looked at."""
        self._in_vain += 1
        if self._in_vain < _MOST_IN_VAIN or self._patience.steps is not None:
            return
        begun = [shape for shape in self._shapes.values() if shape.begun]
        if begun and all(shape.refusal is not None for shape in begun):
            self.given_up = self.reason = str(begun[0].refusal)

    def _make_room(self) -> None:
        """Let a plain step have the memory of programs and sums; they are made again after it.

        With many shapes that would take longer than it is worth.
        """
        if sum(shape.graph is not None for shape in self._shapes.values()) > _FEW_PROGRAMS:
            return
        self._block.release()
        in_use = {id(w.grad) for w in self.weights}
        if not in_use.intersection(map(id, self._sums)):
            self._sums = []

    def lend_pages(self) -> None:
        """Let others have the memory of programs until the next one runs."""
        self._block.lend_pages()

    def _unbind(self) -> None:
        """Let go of what lies in the block."""
        for shape in self._shapes.values():
            shape.program = shape.bound = None

    def _refusal_before(self, batch: Batch) -> str | None:
        try:
            modules = [m for m in (self.model, self.loss_fn) if isinstance(m, nn.Module)]
            for module in modules:
                refuse_hidden(module)
        except NotRecordable as verdict:
            return str(verdict)
        for tensor in (t for tensors in self._tensors.values() for t in tensors):
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                return f"{self._name(tensor)} is not dense on the CPU"
        return refusal_of(batch)

    def _name(self, tensor: torch.Tensor) -> str:
        """What a parameter or a buffer is called."""
        for module in (m for m in (self.model, self.loss_fn) if isinstance(m, nn.Module)):
            for name, mine in (*module.named_parameters(), *module.named_buffers()):
                if mine is tensor:
                    kind = "parameter" if isinstance(mine, nn.Parameter) else "buffer"
                    return f"{kind} {name}"
        return "a parameter"

    def _take(
        self, shape: Shape, recording: Recording, guards: Guards | None, refusal: str | None
    ) -> None:
        """A recording: the first of a shape, one that confirms it, or one that differs."""
        before, shape.recording = shape.recording, recording
        shape.recordings += 1
        differs = None if before is None else difference(before, recording)
        audit = shape.is_fast
        if audit:
            shape.next_audit *= _AUDIT_FACTOR
            if refusal is None and differs is None:
                self.reason = RECORDING
                return
            self._refuse(shape, refusal or f"found by an audit: {differs}")
            return
        if refusal is None and differs is not None and shape.recordings < _MOST_RECORDINGS:
            self.reason = RECORDING
            return
        if (refusal or differs) is not None:
            # A cache may be made in the first step of a shape.
            if shape.recordings > 1:
                self._refuse(shape, str(refusal or differs))
            return
        self.reason = RECORDING
        shape.agreed = None if before is None else guards

    def _refuse(self, shape: Shape, refusal: str) -> None:
        self._drop(shape)
        shape.refusal = self.reason = refusal

    def _forget(self, shape: Shape, change: str) -> None:
        """A guard failed: this step runs plain and the shape is recorded again."""
        self._drop(shape)
        self._last_guards = None
        shape.recordings = 0
        shape.changes += 1
        self.reason = change
        if shape.changes >= _MOST_CHANGES:
            shape.refusal = f"{change}; so many things changed that the step stays plain"
        self._judge_optimizer_anew()

    def _judge_optimizer_anew(self) -> None:
        """Where its rule is another, other parts of a step become a program."""
        before = self.whole
        self._judge_optimizer()
        if before != self.whole:
            for each in self._shapes.values():  # Programs of the other kind.
                self._drop(each)
                each.recordings = 0

    @staticmethod
    def _drop(shape: Shape) -> None:
        shape.program = shape.graph = shape.guards = shape.recording = shape.update = None
        shape.agreed = shape.chunk = None
        shape.counters = []

    # ---- Building a program --------------------------------------------------------------------

    def build(self, update_s: float = 0.0) -> None:
        """Make the programs of shapes whose recordings agree.

        Args:
            update_s: what the optimizer's own step took, which a program may make too.
        """
        for key, shape in self._shapes.items():
            guards, recording = shape.agreed, shape.recording
            if guards is not None and recording is not None:
                shape.agreed = None
                self._try_to_build(key, recording, guards, update_s)

    def _try_to_build(
        self, key: Any, recording: Recording, guards: Guards, update_s: float
    ) -> None:
        shape = self._shapes[key]
        if self.whole:  # Programs leave no gradients either.
            for weight in self.weights:
                weight.grad = None
        began_s = now()
        try:
            self._build(shape, recording, guards)
            plain_s = shape.plain_s + (update_s if self.whole else 0.0)
            self._patience.note_build(plain_s, shape.overhead_s, now() - began_s, key)
        except (NotRecordable, RunError) as verdict:
            self._refuse(shape, str(verdict))
        except _NeedsAutocast:
            self._drop(shape)
            self._rounds = shape.rounds = False
            shape.recordings, self.reason = 0, RECORDING

    def _build(self, shape: Shape, recording: Recording, guards: Guards) -> None:
        self._ask_judge(recording)
        graph = graph_of(recording)
        if all(g is None for g in graph.gradients):
            raise NotRecordable("no parameter gets a gradient")
        if shape.rounds and not (graph.movable and covers(graph.graph)):
            raise _NeedsAutocast
        if graph.movable:
            product_sums.merge(graph)
            biases.fuse(graph.graph)
        if self.whole:
            shape.update = Update(self.optimizer, self.weights, *self.limits)
            add_updates(graph, shape.update)
        else:
            add_sums(graph)
        self._optimize(shape, graph)
        shape.graph, shape.guards = graph, guards
        shape.bound = None
        change = self._rebind(shape)
        if change is not None:
            raise NotRecordable(change)

    def _ask_judge(self, recording: Recording) -> None:
        verdict = None if self.judge is None else self.judge(recording)
        if verdict is not None:
            raise NotRecordable(verdict)

    def _optimize(self, shape: Shape, graph: RecordedGraph) -> None:
        """The passes over a graph, where they may move its operations."""
        if not graph.movable:
            return
        chosen = passes.optimize(graph, self.num_threads, rounds=shape.rounds)
        if chosen is None:
            raise NotRecordable("a buffer is read and written in an order that no program keeps")
        shape.routes, shape.convolutions = chosen

    def _rebind(self, shape: Shape) -> str | None:
        """Lower again where weights lie elsewhere or the optimizer's state was replaced.

        Returns:
            Why that cannot be, or ``None``.
        """
        addresses = [t.data_ptr() for tensors in self._tensors.values() for t in tensors]
        if shape.bound is not None:
            state, then = shape.bound
            if then == addresses and (state is None or state.is_current()):
                return None if state is None else state.uneven()
        if shape.update is None:
            if [kind_of(t) for t in self._sums] != [kind_of(w) for w in self.weights]:
                self._sums = [sum_of(w) for w in self.weights]
            change = self._lower(shape, self._tensors, self._sums, written=[])
            shape.bound = None, addresses
            return change
        try:
            with torch.no_grad():
                states, shape.counters, shape.steps_done = shape.update.bind()
        except ValueError as error:
            return str(error)
        written = [*self.weights, *states]
        change = self._lower(shape, self._tensors, states, written, shape.counters)
        shape.bound = BoundState([shape.update], [*states, *shape.counters]), addresses
        return change

    def _lower(
        self,
        shape: Shape,
        held: Mapping[str, Sequence[torch.Tensor]],
        states: Sequence[torch.Tensor],
        written: list[torch.Tensor],
        counters: Sequence[torch.Tensor] = (),
    ) -> str | None:
        """Make the program of a shape's graph on tensors where they lie now.

        Args:
            held: those that were there before the step, by kind; ``states`` beside them.
            written, counters: see ``Program``.

        Returns:
            Why that cannot be, or ``None``.
        """
        graph = shape.graph
        assert graph is not None
        tensors = {
            **held,
            "state": list(states),
            "constant": [tensor for tensor, _ in graph.constants],
            "control": [torch.empty(0)],
        }
        inputs = [
            None if kind == "batch" else tensors[kind][number].detach()
            for kind, number in graph.inputs
        ]
        change = change_of_layout(graph, inputs)
        if change is not None:
            return change
        shape.batch_parts = [number for kind, number in graph.inputs if kind == "batch"]
        shape.program = None  # It lies in memory that is used again.
        lowered = lower(graph.graph, inputs, self.num_threads, self._block)
        shape.arena_bytes = lowered.arena_bytes
        shape.program = Program(lowered, written, counters, self.num_threads)
        return None
