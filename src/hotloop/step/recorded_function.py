"""``RecordedFunction``: programs recorded from calls of a train function of the user's own.

As ``RecordedStep``, but what is trained is found while the function runs: tensors that it reaches
(closures, globals, attributes) are read and written where they lie; the steps of optimizers become
their rules; schedulers make their steps in Python, before or after the program.
"""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..graph import biases, passes, product_sums
from ..graph.from_recording import RecordedGraph, graph_of
from ..graph.memory_plan import Block
from ..graph.ordering import inputs_written
from ..graph.recording import Marker, NotRecordable, Recorder, Recording
from ..measure.clock import now
from ..memory.tree import Structure
from . import libraries
from .bound_state import BoundState
from .effects import Effects
from .function_guards import FunctionGuards
from .function_markers import Markers
from .function_reads import Reads, lifted
from .function_updates import add_function_updates, markers_of, updates_of
from .guards import Guards
from .guards_settings import PythonState
from .patience import Patience
from .recorded import RECORDING, RecordedStep
from .recorded_shape import Shape, constants_changed
from .updates import Update

_WHOLE = "the function is one program, recorded from PyTorch's own calls of it"


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Facts:
    """What calls of a function have alike beside what they compute.

    Attributes:
        structure: of what it gives.
        places: of each tensor in it: number of a result of the program, of an argument (kind
            ``"batch"``), or of a tensor that was there before (``"live"``).
        values: of each, whether its value is given as a number.
        kept: numbers of tensors whose ``grad`` is the same object after the call as before it.
        held: numbers of tensors whose ``grad`` is there after the call and is another object.
    """

    structure: Structure
    places: tuple[tuple[str, int], ...]
    values: tuple[bool, ...]
    kept: tuple[int, ...]
    held: tuple[int, ...]


@dataclass
class FunctionShape(Shape):
    """What is known of calls with arguments of one shape."""

    markers: list[Marker] = field(default_factory=list)
    updates: dict[int, Update] = field(default_factory=dict)
    # Of each optimizer: steps done before a call, and a counter of them.
    done: dict[int, tuple[float, torch.Tensor | None]] = field(default_factory=dict)
    # Gradients that the program reads: a tensor, and its gradient.
    gradients: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    # Tensors whose gradient is gone after a call.
    cleared: list[torch.Tensor] = field(default_factory=list)
    # Storages that the program writes, beside those of optimizers.
    written: set[int] = field(default_factory=set)


class RecordedFunction(RecordedStep):
    """The programs of one function.

    Args:
        function: makes whole train steps.
        num_threads: threads inside each of hotloop's kernels.
    """

    def __init__(self, function: Callable[..., Any], *, num_threads: int) -> None:
        self.function = function
        self.num_threads = num_threads
        self.whole = True
        self.reason = RECORDING
        self.weights: list[torch.Tensor] = []
        self._autocast = self._rounds = False
        self._sums: list[torch.Tensor] = []
        self._shapes: OrderedDict[Any, Any] = OrderedDict()
        unbind = weakref.WeakMethod(self._unbind)
        self._block = Block(lambda: (unbind() or _nothing)())
        self._patience = Patience()
        self.given_up: str | None = None
        self._in_vain = 0
        self._optimizers: list[torch.optim.Optimizer] = []
        self._schedulers: list[LRScheduler] = []
        # Tensors that were there before a call and that it read; kept, so that ids stay theirs.
        self._live: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def _judge_optimizer(self) -> None:
        """A function's optimizers are judged where they make their steps."""

    def _number(self, tensor: torch.Tensor) -> int:
        """The name of a tensor in all recordings."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._live)
            self._live.append(tensor)
        return self._numbers[id(tensor)]

    # ---- Running a program --------------------------------------------------------------------

    def ready(self, key: Any, steps: int = 1) -> int:
        """Whether a call with arguments of a shape may run as a program now: 1, else 0."""
        shape = self._shapes.get(key)
        if shape is None or not shape.is_fast:
            return 0
        change = shape.guards.changed() or constants_changed(shape.graph)
        if change is None and any(t.grad is not g for t, g in shape.gradients):
            change = "a gradient that the function reads was replaced"
        changes = (update.change() for update in shape.updates.values())
        change = change or next((c for c in changes if c is not None), None)
        if change is None:
            change = self._rebind(shape)
        if change is not None:
            self._forget(shape, change)
            return 0
        return int(shape.programs_run < shape.next_audit)

    def writes_into(self, key: Any, batch: Sequence[torch.Tensor]) -> bool:
        """Whether an argument lies in memory that a program writes, which reads a copy of it."""
        shape = self._shapes.get(key)
        written = () if shape is None else shape.written
        return any(t.untyped_storage()._cdata in written for t in batch)

    def call(self, key: Any, batch: Sequence[torch.Tensor]) -> Any:
        """One call as a program, ``ready`` having said so.

        Args:
            batch: the tensors among the arguments.
        """
        shape = self._shapes[key]
        self._shapes.move_to_end(key)
        began_s = now()
        steps = dict.fromkeys(shape.updates, 0)
        last = max((n for n, m in enumerate(shape.markers) if m.kind == "update"), default=-1)
        rows = []
        for marker in shape.markers[: last + 1]:
            if marker.kind == "schedule":
                self._schedulers[marker.number].step()
                continue
            update, (done, counter) = shape.updates[marker.number], shape.done[marker.number]
            if counter is not None:
                done = float(counter)
            rows.append(update.rows(done + steps[marker.number]))
            steps[marker.number] += 1
            # What a scheduler looks at to tell that the optimizer has made its step.
            update.optimizer._opt_called = True
        before = {n: float(c) if c is not None else d for n, (d, c) in shape.done.items()}
        parts = [batch[n] for n in shape.batch_parts]
        results = shape.program.call(parts, torch.cat(rows, 1) if rows else None)
        for number, update in shape.updates.items():
            update.advance(before[number], steps[number])
        for tensor in shape.cleared:
            tensor.grad = None
        for marker in shape.markers[last + 1 :]:
            self._schedulers[marker.number].step()
        shape.programs_run += 1
        self._patience.note_run(now() - began_s, key)
        self.reason = _WHOLE
        facts: Facts = shape.recording.facts
        sources = {"result": results, "batch": batch, "live": self._live}
        found = [sources[kind][n] for kind, n in facts.places]
        given = zip(found, facts.values, strict=True)
        return facts.structure.unflatten([t.item() if value else t for t, value in given])

    # ---- Recording ----------------------------------------------------------------------------

    def record_call(
        self,
        key: Any,
        batch: Sequence[torch.Tensor],
        values: Sequence[Any],
        plain: Callable[[], Any],
    ) -> Any:
        """Call the function, recorded where that is of use.

        Args:
            key: of the shape. batch: tensors among the arguments. values: the other arguments.
            plain: calls it.
        """
        shape = self._shapes.setdefault(key, FunctionShape())
        if not self._is_recorded_now(key):
            return plain()
        began_s = now()
        libraries.learn()
        self._make_room()
        guards = FunctionGuards(self.function, values, self._optimizers)
        refusal = guards.refusal or _refusal_of_arguments(batch, guards.tensors)
        if refusal is not None:
            self._refuse(shape, refusal)
            return plain()
        return self._record(shape, batch, guards, plain, began_s)

    def _record(
        self,
        shape: FunctionShape,
        batch: Sequence[torch.Tensor],
        guards: FunctionGuards,
        plain: Callable[[], Any],
        began_s: float,
    ) -> Any:
        leaves = [t for t in guards.tensors if t.is_leaf]
        gradients = [(t, t.grad) for t in leaves]
        state = PythonState(guards.generators)
        rates = [(s, s.last_epoch) for s in guards.schedulers]
        recorder = Recorder({"batch": batch})
        reads = Reads(self.function, recorder)
        collects = gc.isenabled()
        gc.disable()
        called_s = now()
        markers = Markers(recorder, self._optimizers, self._schedulers)
        effects = Effects()
        try:
            with recorder, markers, effects:
                result = plain()
            returned_s = now()
            refusal = (
                _told(recorder.refusal)
                or effects.found
                or state.changed()
                or _unseen_schedule(rates, markers)
            )
            change = guards.changed() or guards.changed_arrays()
            if refusal is None and change is not None:
                refusal = f"the function itself changes something: {change}"
            if refusal is None:
                refusal = self._name_inputs(shape, recorder, guards, gradients)
            if refusal is None:
                try:
                    given = lifted(result, reads.taken)
                    recorder.recording.facts = self._facts(recorder, given, batch, gradients)
                except NotRecordable as verdict:
                    refusal = str(verdict)
        finally:
            if collects:
                gc.enable()
        self._take(shape, recorder.recording, guards, refusal)
        shape.plain_s = returned_s - called_s - recorder.overhead_s
        shape.overhead_s = now() - began_s - shape.plain_s
        return result

    def _name_inputs(
        self,
        shape: FunctionShape,
        recorder: Recorder,
        guards: FunctionGuards,
        gradients: list[tuple[torch.Tensor, torch.Tensor | None]],
    ) -> str | None:
        """Let tensors that guards look at be inputs by name; why that cannot be, or ``None``."""
        recording = recorder.recording
        known: dict[int, list[torch.Tensor]] = {}
        owner = {id(g): t for t, g in gradients if g is not None}
        for tensor in [*guards.tensors, *(g for _, g in gradients if g is not None)]:
            if tensor.layout == torch.strided:
                known.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        used = []
        for storage, (found, _) in list(recording.constants.items()):
            if found.device.type != "cpu":
                return f"the function computes on {found.device.type}"
            for tensor in known.get(found.untyped_storage()._cdata, ()):
                recording.constants.pop(storage, None)
                number = self._number(tensor)
                recording.inputs.setdefault(recorder.ref(tensor), ("live", number))
                if id(tensor) in owner:
                    used.append((owner[id(tensor)], tensor))
        shape.gradients = used
        return None

    def _facts(
        self,
        recorder: Recorder,
        given: tuple[Structure, list[torch.Tensor], list[bool]],
        batch: Sequence[torch.Tensor],
        gradients: list[tuple[torch.Tensor, torch.Tensor | None]],
    ) -> Facts:
        """What must be the same in the next recording; results are noted in this one."""
        recording = recorder.recording
        structure, tensors, values = given
        before = {ref.storage for ref in recording.inputs} | set(recording.constants)
        places = []
        for tensor in tensors:
            argument = next((n for n, part in enumerate(batch) if part is tensor), None)
            if argument is not None:
                places.append(("batch", argument))
            elif id(tensor) in self._numbers:
                places.append(("live", self._numbers[id(tensor)]))
            else:
                places.append(("result", len(recording.outputs)))
                recording.outputs.append(_output(recorder, tensor, before))
        kept = [self._number(t) for t, g in gradients if g is not None and t.grad is g]
        held = [self._number(t) for t, g in gradients if t.grad is not None and t.grad is not g]
        return Facts(structure, tuple(places), tuple(values), tuple(kept), tuple(held))

    # ---- Building a program ------------------------------------------------------------------

    def _build(self, shape: Shape, recording: Recording, guards: Guards) -> None:
        assert isinstance(shape, FunctionShape)
        assert isinstance(guards, FunctionGuards)
        shape.markers = markers_of(recording)
        graph = self._graph(shape, recording, moves=True) or self._graph(
            shape, recording, moves=False
        )
        assert graph is not None
        if any(kind == "constant" for kind, _ in inputs_written(graph.graph.graph)):
            raise NotRecordable("the function writes into a tensor that it does not name")
        kept, held = set(recording.facts.kept), set(recording.facts.held)
        shape.cleared = [
            t
            for t in guards.tensors
            if t.is_leaf
            and (t.requires_grad or self._number(t) in held)
            and self._number(t) not in kept
        ]
        shape.graph, shape.guards, shape.bound = graph, guards, None
        change = self._rebind(shape)
        if change is not None:
            raise NotRecordable(change)

    def _graph(
        self, shape: FunctionShape, recording: Recording, *, moves: bool
    ) -> RecordedGraph | None:
        """The graph after all passes; ``None``: they left no order that is right.

        Args:
            moves: whether passes may move operations.
        """
        graph = graph_of(recording)
        graph.movable = graph.movable and moves
        if graph.movable:
            product_sums.merge(graph)
            biases.fuse(graph.graph)
        shape.updates = updates_of(graph, self._optimizers, self._live)
        add_function_updates(graph, shape.updates)
        if graph.movable:
            chosen = passes.optimize(graph, self.num_threads)
            if chosen is None:
                return None
            shape.routes, shape.convolutions = chosen
        return graph

    def _rebind(self, shape: Shape) -> str | None:
        """Lower again where the state of an optimizer was replaced."""
        assert isinstance(shape, FunctionShape)
        if shape.bound is not None and shape.bound.is_current():
            uneven: str | None = shape.bound.uneven()
            return uneven
        states: list[torch.Tensor] = []
        counters: list[torch.Tensor] = []
        for number, update in shape.updates.items():
            try:
                with torch.no_grad():
                    mine, counts, done = update.bind()
            except ValueError as error:
                return str(error)
            times = sum(m == Marker("update", number) for m in shape.markers)
            states += mine
            counters += counts * times
            shape.done[number] = done, counts[0] if counts else None
        assert shape.graph is not None
        tensors = {"live": self._live, "state": states}
        outside = [
            tensors[kind][number] for kind, number in inputs_written(shape.graph.graph.graph)
        ]
        shape.written = {t.untyped_storage()._cdata for t in outside}
        change = self._lower(shape, tensors, states, [*outside, *states], counters)
        shape.bound = BoundState(shape.updates.values(), [*states, *counters])
        return change


def _output(recorder: Recorder, tensor: torch.Tensor, before: set[int]) -> Any:
    """A result of the function in its recording."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise NotRecordable("the function gives a tensor that is not dense on the CPU")
    if not recorder.has_seen(tensor):
        raise NotRecordable("the function gives a tensor that no operation of it made")
    ref = recorder.ref(tensor)
    if ref.storage in before:
        raise NotRecordable("the function gives a part of a tensor that was there before")
    return ref


def _refusal_of_arguments(
    batch: Sequence[torch.Tensor], reached: Sequence[torch.Tensor]
) -> str | None:
    if any(t.requires_grad for t in batch):
        return "an argument needs a gradient of its own"
    if any(t.layout != torch.strided or t.is_nested or t.device.type != "cpu" for t in batch):
        return "an argument is not dense on the CPU"
    if any(t.is_conj() or t.is_neg() for t in batch):
        return "an argument is a conjugate or negative view of other memory"
    storages = {t.untyped_storage()._cdata for t in reached if t.layout == torch.strided}
    if any(t.untyped_storage()._cdata in storages for t in batch):
        return "an argument is a tensor that the function reaches by itself"
    return None


def _told(refusal: str | None) -> str | None:
    if refusal is not None and "reads a tensor's value" in refusal:
        return f"{refusal}: return the tensor, and read it outside of the function"
    return refusal


def _unseen_schedule(rates: list[tuple[LRScheduler, int]], markers: Markers) -> str | None:
    for scheduler, epoch in rates:
        if scheduler.last_epoch != epoch and scheduler not in markers.scheduled:
            return f"{type(scheduler).__name__} makes a step that cannot be seen"
    return None
