"""A recording as a graph of ATen's operations on values.

In-place operations on a temporary become operations that give a new value wherever nobody can tell
the difference; passes may then move what reads the old one. Where somebody could, the graph says
so (``RecordedGraph.movable``) and is run as it was recorded.

Buffers, and what a function that is recorded finds again (kind ``"live"``), may be written and read
again: after each write its reading is a node of its own (``native.version``), and ``ordering``
keeps readers and writes apart.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import native
from .foreach import singles
from .recording import Entry, Marker, NotRecordable, Recording, TensorRef

_aten = torch.ops.aten
# Give back their argument, under the same name.
_SAME = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)


class _Overwritten(Exception):
    """A tensor is read of which another name was given a new value."""


# Kinds of inputs whose values are nodes of their own after each write.
_READ_AGAIN = ("live", "buffer")
_FILLS = (_aten.copy_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default)


@dataclass
class RecordedGraph:
    """A step as a graph.

    Attributes:
        graph: its output is ``[loss, *gradients, *outputs]``.
        constants: tensors of the step that were there before it, and their versions then.
        loss: ``None``: of a function that gives what it likes.
        gradients: of each weight, a node; ``None``: it has none.
        movable: whether an operation may be moved past the ones after it that do not use it.
    """

    graph: fx.GraphModule
    constants: list[tuple[torch.Tensor, int]]
    loss: Any
    gradients: list[fx.Node | None]
    movable: bool = True

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """Kind and number of each placeholder, in order: ``("weight", 3)``, ``("constant", 0)``."""
        return [n.meta["input"] for n in self.graph.graph.nodes if n.op == "placeholder"]

    def add_input(self, kind: str, number: int, val: torch.Tensor | None) -> Any:
        """A placeholder where nodes are being inserted."""
        node = self.graph.graph.placeholder(f"{kind}_{number}")
        node.meta |= {"input": (kind, number), "val": val}
        return node


class _Uncompiled(fx.GraphModule):
    """Nodes whose Python code nobody runs; writing it took longer than the passes."""

    def recompile(self) -> Any:
        """Nothing."""


class _Builder:
    """Builds the graph.

    Args:
        parts: whether a write into a part of a temporary gives a new value of that part too. Right
            as long as nothing reads what it overlaps; else ``_Overwritten`` is raised.
    """

    def __init__(self, recording: Recording, *, parts: bool) -> None:
        self.recording = recording
        self._parts = parts
        self.graph = fx.Graph()
        self.constants: list[tuple[torch.Tensor, int]] = []
        self.movable = True
        self._values: dict[TensorRef, Any] = {}
        # Of each storage, the names it is known by, and the first of them.
        self._names: dict[int, list[TensorRef]] = {}
        self._first: dict[int, Any] = {}
        # Of each storage, the parts that have new values in memory of their own.
        self._written: dict[int, list[TensorRef]] = {}
        self._outside: set[int] = set()
        # Of each storage that a function finds again: all of it as it is now; and what wrote it
        # since that was read for the last time.
        self._live: dict[int, Any] = {}
        self._writes: dict[int, Any] = {}
        self._batch: dict[int, list[TensorRef]] = {}

    def build(self) -> RecordedGraph:
        for ref, (kind, number) in self.recording.inputs.items():
            self._placeholder(ref, kind, number)
        for entry in self.recording.entries:
            if isinstance(entry.op, Marker):
                self._add_marker(entry)
            else:
                for single in singles(entry):
                    self._add(single)
        loss = None if self.recording.loss is None else self._value(self.recording.loss)
        gradients = [None if g is None else self._value(g) for g in self.recording.gradients]
        outputs = [self._value(ref) for ref in self.recording.outputs]
        self.graph.output(tuple(n for n in (loss, *gradients, *outputs) if n is not None))
        module = _Uncompiled({}, self.graph)
        return RecordedGraph(module, self.constants, loss, gradients, self.movable)

    def _placeholder(self, ref: TensorRef, kind: str, number: int) -> None:
        node = self.graph.placeholder(f"{kind}_{number}")
        node.meta["input"] = (kind, number)
        self._outside.add(ref.storage)
        if kind == "batch":
            self._batch.setdefault(ref.storage, []).append(ref)
        if kind in _READ_AGAIN:
            # Of one that has two names, a write changes both.
            self._live[ref.storage] = None if ref.storage in self._live else node
        self._bind(ref, node)

    def _bind(self, ref: TensorRef, node: Any) -> None:
        if "val" not in node.meta:
            node.meta["val"] = meta_of(ref)
        self._values[ref] = node
        names = self._names.setdefault(ref.storage, [])
        self._first.setdefault(ref.storage, node)
        if ref not in names:
            names.append(ref)

    def _wrote(self, storage: int, node: Any) -> None:
        """``node`` wrote into a storage that was there before the step."""
        if self._live.get(storage) is None:
            return
        self._writes[storage] = node
        for name in self._names[storage]:
            self._values.pop(name, None)

    def _read_again(self, storage: int) -> None:
        """Let a storage that was written be what it is after the write."""
        write = self._writes.pop(storage)
        node = self.graph.call_function(native.version, (self._live[storage], write))
        node.meta |= {"val": self._live[storage].meta["val"], "aliases": True}
        self._live[storage] = self._first[storage] = node
        self._values[self._names[storage][0]] = node

    def _value(self, ref: TensorRef) -> Any:
        if ref.storage in self._writes:
            self._read_again(ref.storage)
        node = self._values.get(ref)
        if node is not None:
            return node
        if any(_overlap(ref, part) for part in self._written.get(ref.storage, ())):
            raise _Overwritten
        names = self._names.get(ref.storage)
        if not names:
            return self._constant(ref)
        # Another view of what is known, as autograd makes them of what it saved.
        base, begin = names[0], 0
        if ref.storage in self._batch:  # Each part of the batch is copied to a place of its own.
            base = next((n for n in self._batch[ref.storage] if _covers(n, ref)), base)
            begin = base.offset
        if _reading(ref) != _reading(base) or not _covers(base, ref):
            raise NotRecordable("a tensor of the step is a view that reaches beyond what it views")
        known = self._first[ref.storage] if ref.storage in self._written else self._values[base]
        node = self.graph.call_function(
            _aten.as_strided.default,
            (known, list(ref.size), list(ref.stride), ref.offset - begin),
        )
        self._bind(ref, node)
        return node

    def _constant(self, ref: TensorRef) -> Any:
        tensor, version = self.recording.constants[ref.storage]
        whole = TensorRef(
            ref.storage,
            int(tensor.storage_offset()),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        self._placeholder(whole, "constant", len(self.constants))
        self.constants.append((tensor, version))
        return self._value(ref)

    def _add_marker(self, entry: Entry) -> None:
        """The step of an optimizer; that of a scheduler is made outside of the graph."""
        marker: Marker = entry.op
        if marker.kind != "update":
            return
        weights, gradients = entry.args
        for weight in weights:
            known = self._names.get(weight.storage, [None])[0]
            if known != weight or self._live.get(weight.storage) is None:
                raise NotRecordable("an optimizer updates a part of a tensor, or one without name")
        node = self.graph.call_function(
            native.optimizer_step, (marker.number, self._filled(weights), self._filled(gradients))
        )
        node.meta["line"] = entry.line
        for weight in weights:
            self._wrote(weight.storage, node)

    def _add(self, entry: Entry) -> None:
        op: Any = entry.op
        if op in _SAME and isinstance(entry.results, TensorRef) and entry.results == entry.args[0]:
            self._value(entry.results)
            return
        # Another view of the same values; an offset counts from where its own storage begins.
        if torch.Tag.inplace_view in op.tags or op is _aten.as_strided.default:
            self._value(entry.results)
            return
        if op._schema.is_mutable:
            self._add_mutable(entry)
            return
        self._call(op, entry)

    def _call(self, op: Any, entry: Entry) -> Any:
        if op is _aten.native_batch_norm.default and entry.args[5] and entry.args[3] is not None:
            op = _aten._native_batch_norm_legit.default  # The same, and says that it writes.
        node = self.graph.call_function(
            op, self._arguments(entry), {n: self._filled(v) for n, v in entry.kwargs}
        )
        node.meta["line"] = entry.line
        # Some operations give a part of what they got and do not say so.
        node.meta["aliases"] = any(ref.storage in self._names for ref in _refs(entry.results))
        self._results(node, entry.results)
        if op is _aten._native_batch_norm_legit.default:
            for running in entry.args[3:5]:
                self._wrote(running.storage, node)
        return node

    def _results(self, node: Any, results: Any) -> None:
        if isinstance(results, TensorRef):
            if results not in self._values:  # Else a view that has a name already.
                self._bind(results, node)
            return
        if isinstance(results, tuple):
            node.meta["val"] = tuple(meta_of(r) if isinstance(r, TensorRef) else r for r in results)
            for number, result in enumerate(results):
                if isinstance(result, TensorRef):
                    part = self.graph.call_function(operator.getitem, (node, number))
                    self._results(part, result)

    def _add_mutable(self, entry: Entry) -> None:
        targets = entry.targets
        inside = [t for t in targets if t.storage not in self._outside]
        alone = all(self._names.get(t.storage, [t]) == [t] for t in inside)
        if not inside:
            self.movable = self.movable and all(self._live.get(t.storage) for t in targets)
            self._literal(entry)
        elif len(targets) == 1 and (alone or self._parts) and entry.results == targets[0]:
            self._functional(entry, targets[0], alone)
        else:
            self.movable = False
            self._literal(entry)

    def _literal(self, entry: Entry) -> None:
        if any(target.storage in self._written for target in entry.targets):
            raise _Overwritten  # Its other parts lie elsewhere.
        node = self.graph.call_function(
            entry.op, self._arguments(entry), {n: self._filled(v) for n, v in entry.kwargs}
        )
        node.meta["line"] = entry.line
        if isinstance(entry.results, TensorRef):
            node.meta["val"] = meta_of(entry.results)
            if entry.results not in self._values:
                self._bind(entry.results, node)
        else:
            self._results(node, entry.results)
        for target in entry.targets:
            self._wrote(target.storage, node)

    def _functional(self, entry: Entry, target: TensorRef, alone: bool) -> None:
        """An in-place operation on a temporary: what it leaves is a new value.

        alone: the storage has no other name.
        """
        before = self._value(target)
        # What only fills memory stays where it is.
        fills = entry.op in _FILLS and not before.users and alone
        op = None if fills else _functional_of(entry.op)
        if op is None and (before.users or not alone):
            self.movable = False
            self._literal(entry)
            return
        node = self.graph.call_function(
            entry.op if op is None else op,
            self._arguments(entry),
            {n: self._filled(v) for n, v in entry.kwargs},
        )
        node.meta["line"] = entry.line
        node.meta["val"] = meta_of(target)
        self._values[target] = node
        if not alone:
            self._written.setdefault(target.storage, []).append(target)
            for name in self._names[target.storage]:
                if name != target and _overlap(name, target):
                    self._values.pop(name, None)

    def _filled(self, tree: Any) -> Any:
        if isinstance(tree, TensorRef):
            return self._value(tree)
        if isinstance(tree, tuple):
            return [self._filled(part) for part in tree]
        return tree

    # fx wants the arguments themselves as a tuple.
    def _arguments(self, entry: Entry) -> tuple[Any, ...]:
        return tuple(self._filled(part) for part in entry.args)


def _refs(tree: Any) -> list[TensorRef]:
    if isinstance(tree, TensorRef):
        return [tree]
    return [ref for part in tree for ref in _refs(part)] if isinstance(tree, tuple) else []


def meta_of(ref: TensorRef) -> torch.Tensor:
    """A tensor without memory, of the same shape."""
    return torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype, device="meta")


def _reading(ref: TensorRef) -> Any:
    """As what a storage is read."""
    return ref.dtype, ref.is_conjugate, ref.is_negative


def _covers(whole: TensorRef, part: TensorRef) -> bool:
    """Whether a part of a storage lies inside another, first element to last."""
    ends = [
        ref.offset + sum((n - 1) * s for n, s in zip(ref.size, ref.stride, strict=True))
        for ref in (whole, part)
    ]
    return 0 in part.size or (whole.offset <= part.offset and ends[1] <= ends[0])


def _overlap(one: TensorRef, other: TensorRef) -> bool:
    """Whether two parts of a storage may have an element in common."""
    first, second = sorted((one, other), key=lambda ref: ref.offset)
    reach = first.offset + sum((n - 1) * s for n, s in zip(first.size, first.stride, strict=True))
    if 0 in (*one.size, *other.size) or reach < second.offset:
        return False
    if one.stride != other.stride:
        return True
    # Of one grid, with rows that do not reach into the next: both are boxes in it.
    apart, room = second.offset - first.offset, None
    steps = sorted(zip(first.stride, first.size, second.size, strict=True), key=lambda d: -d[0])
    disjoint = False
    for stride, size, other_size in steps:
        if stride <= 0 or size != other_size:
            return True
        place, apart = divmod(apart, stride)
        if room is not None and (place + size) * stride > room:
            return True
        disjoint = disjoint or place >= size
        room = stride
    return not (disjoint and apart == 0)


def _functional_of(op: Any) -> Any:
    """The operation that gives what ``op`` writes; ``None``: there is none, or it draws numbers."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        return None
    name = op._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    found = getattr(packet, op._overloadname, None) if packet is not None else None
    if found is None or found._schema.is_mutable:
        return None
    return found if len(found._schema.arguments) == len(op._schema.arguments) else None


def graph_of(recording: Recording) -> RecordedGraph:
    """The graph of a recorded step."""
    try:
        return _Builder(recording, parts=True).build()
    except _Overwritten:
        return _Builder(recording, parts=False).build()
