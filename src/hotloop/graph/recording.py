"""Records one train step below autograd: each call of ATen, in order, with its tensors.

Two modes are on while the step runs. One sits below autograd and sees every call that does
something, those of the backward pass among them. The other sits above and notes where a value
leaves torch (``.numpy()``, ``.tolist()``): what comes of it, nobody can see.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..measure.clock import now
from . import tracing
from .user_code import user_line

# What a tensor is made of: storage, offset, sizes, strides, dtype.
Key = tuple[Any, ...]
# Values that leave torch through Python.
_READS = {
    getattr(torch.Tensor, name)
    for name in ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "item", "__float__")
}
_SCALAR_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class NotRecordable(Exception):
    """Why this step cannot become a program, in words for the report."""


class Marker(NamedTuple):
    """Stands in a recording, as an operation, for what is run in another way.

    Attributes:
        kind: ``"update"``: the step of an optimizer; its arguments are the weights that have a
            gradient, and the gradients. ``"schedule"``: the step of a scheduler.
        number: of the optimizer or the scheduler.
    """

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{'optimizer' if self.kind == 'update' else 'scheduler'} {self.number}'s step"


@dataclass(slots=True, unsafe_hash=True)  # Not frozen, which would take three times as long.
class TensorRef:
    """A tensor in a recording: which storage, and which part of it.

    Attributes:
        storage: number of the storage, in the order of its first use.
    """

    storage: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    # What is read is the conjugate, or the negative, of what lies there.
    is_conjugate: bool = False
    is_negative: bool = False


@dataclass(slots=True)
class Entry:
    """One call of ATen.

    Attributes:
        args, kwargs: as given, with a ``TensorRef`` for each tensor.
        results: as returned, likewise.
        line: ``file:line`` of the user's code that made it; empty in the backward pass.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    results: Any
    line: str = field(compare=False)

    @property
    def targets(self) -> list[TensorRef]:
        """What the call writes into."""
        kwargs, found = dict(self.kwargs), []
        for place, name in _facts(self.op).written:
            given = self.args[place] if place < len(self.args) else kwargs.get(name)
            parts = given if isinstance(given, tuple) else (given,)
            found += [part for part in parts if isinstance(part, TensorRef)]
        return found


@dataclass
class Recording:
    """One step.

    Attributes:
        entries: calls in order.
        storages: number of storages seen.
        inputs: what was there before the step -> its name, ``("weight", 3)``.
        constants: storage number -> a tensor of it from nowhere the step knows, and its version.
        gradients: of each weight, in order; ``None``: it got none.
        loss: the result.
        outputs: other results.
        facts: what else must be the same in another recording; compared by value.
    """

    entries: list[Entry] = field(default_factory=list)
    storages: int = 0
    inputs: dict[TensorRef, tuple[str, int]] = field(default_factory=dict)
    constants: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    gradients: list[TensorRef | None] = field(default_factory=list)
    loss: TensorRef | None = None
    outputs: list[TensorRef] = field(default_factory=list)
    facts: Any = None


class _Facts(NamedTuple):
    """What the recorder must know of an operation."""

    reads_value: bool
    shape_depends_on_data: bool
    draws: bool
    # Of a profiler: it computes nothing.
    is_label: bool
    # Places and names of the arguments that it writes to.
    written: tuple[tuple[int, str], ...]


@functools.cache
def _facts(op: Any) -> _Facts:
    dynamic = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    arguments = enumerate(op._schema.arguments)
    written = tuple(
        (place, a.name) for place, a in arguments if a.alias_info and a.alias_info.is_write
    )
    draws = torch.Tag.nondeterministic_seeded in op.tags
    is_label = op.namespace == "profiler"
    return _Facts(op in _SCALAR_READS, not dynamic.isdisjoint(op.tags), draws, is_label, written)


# Their code in C++ reads the values of a tensor that says how much belongs together, which no mode
# sees: name -> place of that argument.
_FORMS = {"tensor_split": 1, "lstm": 1, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}


# Reads its argument's values to refuse them, not to compute: what comes after does so too.
_CHECKED = (torch.nn.functional.one_hot, torch._C._nn.one_hot)


def _num_classes(tensor: Any, num_classes: int = -1) -> int:
    return num_classes


class _Reads(TorchFunctionMode):
    """Notes where a value leaves torch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS and self._recorder.is_recording:
            read = self._recorder.take_read
            value = None if read is None else read(func, *args, **(kwargs or {}))
            if value is not None:
                return value
            name = getattr(func, "__name__", "numpy")
            self._recorder.refusal = f"{user_line()} reads a tensor's value ({name})"
        place = _FORMS.get(getattr(func, "__name__", ""))
        if place is not None and place < len(args) and self._recorder.knows(args[place]):
            self._recorder.refusal = self._recorder.refusal or (
                f"{user_line()} reads a tensor's value ({func.__name__})"
            )
        if func in _CHECKED and _num_classes(*args, **(kwargs or {})) > 0:
            with self._recorder.checking():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records the calls made while it is entered.

    Args:
        inputs: tensors that are there before the step, by name: ``{"weight": [...], ...}``.

    Attributes:
        recording: what was recorded.
        refusal: why the step cannot become a program; ``None`` so far.
        watch: asked at each call what happened outside of torch, in words for the report.
        profile: what ``sys.setprofile`` was given; off while a call is written down.
    """

    def __init__(self, inputs: dict[str, Sequence[torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.refusal: str | None = None
        self.watch: Callable[[], str | None] | None = None
        self.profile: Callable[..., Any] | None = None
        # Seconds that recording itself took.
        self.overhead_s = 0.0
        # Given what reads a value, and the tensor: the value, where reading it is no matter.
        self.take_read: Callable[..., Any] | None = None
        self._checks = 0
        self._pauses = 0
        self._unwritten: set[int] = set()
        # Of torch's generator, after the last draw.
        self._random_state = torch.default_generator.get_state()
        # Weak, so that memory is freed as in any step; yet no address comes again for another one.
        self._seen: list[StorageWeakRef] = []
        self._numbers: dict[int, int] = {}
        # Parts of a batch may lie in one larger storage, each time somewhere else, so each counts
        # as a storage by itself. Key of the storage -> first byte, end and number of each part.
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        self._add_parts(inputs.get("batch", ()))
        for kind, tensors in inputs.items():
            for number, tensor in enumerate(tensors):
                self.recording.inputs.setdefault(self.ref(tensor), (kind, number))
        self._function_mode = _Reads(self)
        self._traced = tracing.traced()

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._function_mode.__enter__()  # type: ignore[no-untyped-call]
        self._traced.__enter__()
        return self

    def knows(self, value: Any) -> bool:
        """Whether a value is an integer tensor of the batch, or one that the step made."""
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            return False
        key = value.untyped_storage()._cdata
        return key in self._parts or key in self._numbers

    @property
    def is_recording(self) -> bool:
        """Whether calls are being written down."""
        return self.refusal is None and self._pauses == 0

    @contextlib.contextmanager
    def paused(self, read: Sequence[torch.Tensor] = ()) -> Iterator[None]:
        """While it lasts, calls are made and not written down.

        Args:
            read: tensors that nothing may write meanwhile.
        """
        self._pauses += 1
        self._unwritten = {t.untyped_storage()._cdata for t in read}
        try:
            yield
        finally:
            self._pauses -= 1
            self._unwritten = set()

    def _refuse_writes(self, facts: _Facts, args: Any, kwargs: dict[str, Any]) -> None:
        for place, name in facts.written:
            given = args[place] if place < len(args) else kwargs.get(name)
            for target in given if isinstance(given, (list, tuple)) else (given,):
                if not isinstance(target, torch.Tensor):
                    continue
                if target.untyped_storage()._cdata in self._unwritten:
                    self.refusal = self.refusal or f"{user_line()} writes into gradients"

    def mark(self, marker: Marker, *tensors: Sequence[torch.Tensor]) -> None:
        """Write down what is run in another way, and its tensors."""
        if not self.is_recording:
            return
        try:
            args = tuple(tuple(self._given(t) for t in group) for group in tensors)
        except NotRecordable as verdict:
            self.refusal = str(verdict)
            return
        self.recording.entries.append(Entry(marker, args, (), None, user_line()))

    def has_seen(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's storage was there before the step, or was made in it."""
        storage = tensor.untyped_storage()
        return storage._cdata in self._parts or storage._cdata in self._numbers

    def _check_random_state(self, where: str) -> None:
        """Refuse a step that sets the state of torch's random numbers: a program would not."""
        if not torch.equal(self._random_state, torch.default_generator.get_state()):
            self.refusal = (
                self.refusal or f"torch's random state is set in the step, before {where}"
            )

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """While it lasts, values are read only to be checked."""
        self._checks += 1
        try:
            yield
        finally:
            self._checks -= 1

    def __exit__(self, *raised: Any) -> None:
        self._traced.__exit__(*raised)
        self._function_mode.__exit__(*raised)  # type: ignore[no-untyped-call]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        if raised[0] is None:
            self._check_random_state("its end")

    def ref(self, tensor: torch.Tensor) -> TensorRef:
        """What a tensor is called in the recording."""
        storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
        key = storage._cdata
        number = None if key in self._parts else self._numbers.get(key)
        if number is None:
            number, begin = self._place(tensor)
            offset += -begin // tensor.element_size()
        return TensorRef(
            number,
            offset,
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )

    def _given(self, tensor: torch.Tensor) -> TensorRef:
        """An argument; one that nothing before the step or in it has made is a constant."""
        kind = type(tensor)
        if kind not in _PLAIN_TYPES or tensor.layout != torch.strided:
            name = kind.__name__ if tensor.layout == torch.strided else tensor.layout
            raise NotRecordable(f"{user_line()} computes on a {name}")
        known = self.recording.storages
        ref = self.ref(tensor)
        if ref.storage == known:
            self.recording.constants[known] = tensor, version_of(tensor)
        return ref

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Number of a tensor's storage, and the byte from which its offset counts."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._parts:
            for begin, end, number in self._parts[key]:
                if begin <= _first_byte(tensor) < end:
                    return number, begin
        known = self._numbers.get(key)
        if known is None:
            known = self._numbers[key] = self._new_number(storage)
        return known, 0

    def _new_number(self, storage: torch.UntypedStorage) -> int:
        self._seen.append(StorageWeakRef(storage))
        self.recording.storages += 1
        return self.recording.storages - 1

    def _add_parts(self, tensors: Sequence[torch.Tensor]) -> None:
        """What a batch has of each storage; tensors that overlap are one part."""
        filled = [t for t in tensors if t.numel()]
        spans: dict[int, list[tuple[int, int]]] = {}
        for tensor in filled:
            begin, key = _first_byte(tensor), tensor.untyped_storage()._cdata
            spans.setdefault(key, []).append((begin, begin + extent_bytes(tensor)))
        merged = {key: _merged(found) for key, found in spans.items()}
        for tensor in filled:
            storage, first = tensor.untyped_storage(), _first_byte(tensor)
            parts = self._parts.setdefault(storage._cdata, [])
            begin, end = next(span for span in merged[storage._cdata] if first < span[1])
            if all(begin != known for known, _, _ in parts):
                parts.append((begin, end, self._new_number(storage)))

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        parts = self._parts.get(tensor.untyped_storage()._cdata, ())
        return any(begin <= _first_byte(tensor) < end for begin, end, _ in parts)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Nothing compiles while a step is recorded; asking costs as much as the call.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.profile is None or sys.getprofile() is not self.profile:
            return self._dispatched(func, args, kwargs or {})
        # Else each of the many calls below would cost as much again.
        sys.setprofile(None)
        try:
            return self._dispatched(func, args, kwargs or {})
        finally:
            sys.setprofile(self.profile)

    def _dispatched(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a call, and write it down."""
        began_s = now()
        facts = _facts(func)
        if self._unwritten:
            self._refuse_writes(facts, args, kwargs)
        if facts.is_label or self._pauses or (self._checks and facts.reads_value):
            return func(*args, **kwargs)
        happened = self.watch() if self.watch is not None and self.refusal is None else None
        if happened is not None:
            self.refusal = f"{happened}, before {user_line()}"
        if self.refusal is None and (facts.reads_value or facts.shape_depends_on_data):
            self._refuse(func, args)
        if facts.draws and kwargs.get("generator") is None:
            self._check_random_state(user_line() or "its backward pass draws numbers")
        if self.refusal is not None:
            return func(*args, **kwargs)
        try:
            wanted_args = _mapped(args, self._given)
            wanted_kwargs = {name: _mapped(part, self._given) for name, part in kwargs.items()}
        except NotRecordable as verdict:
            self.refusal = str(verdict)
            return func(*args, **kwargs)
        for place, name in facts.written:
            target = args[place] if place < len(args) else kwargs.get(name)
            if isinstance(target, torch.Tensor) and self._is_batch(target):
                self.refusal = f"{user_line()} writes into its batch"
        line = user_line()
        called_s = now()
        result = func(*args, **kwargs)
        returned_s = now()
        if facts.draws:
            self._random_state = torch.default_generator.get_state()

        def made(tensor: torch.Tensor) -> TensorRef:
            if tensor.layout != torch.strided:
                raise NotRecordable(f"{line}: {func} gives a sparse tensor")
            return self.ref(tensor)

        try:
            results = _mapped(result, made)
        except NotRecordable as verdict:
            self.refusal = str(verdict)
            return result
        named = tuple(sorted(wanted_kwargs.items())) if wanted_kwargs else ()
        self.recording.entries.append(Entry(func, wanted_args, named, results, line))
        self.overhead_s += called_s - began_s + now() - returned_s + _CALL_S
        return result

    def _refuse(self, func: Any, args: Any) -> None:
        if func is torch.ops.aten.index.Tensor and not _has_mask(args[1]):
            return  # By numbers: only a mask gives a shape that depends on its values.
        if func in _SCALAR_READS:
            self.refusal = f"{user_line()} reads a tensor's value"
        else:
            self.refusal = f"{user_line()}: the shape that {func} gives depends on the data"


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of bytes, those that overlap made one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _first_byte(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def extent_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(1 + reach) * tensor.element_size()


def _has_mask(indices: Any) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(isinstance(i, torch.Tensor) and i.dtype in masks for i in indices)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


# From the dispatcher to Python and back.
_CALL_S = 4e-6
_SCALARS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout))
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _mapped(tree: Any, change: Callable[[torch.Tensor], TensorRef]) -> Any:
    """The tree with each tensor changed, and lists made tuples so that it compares by value."""
    kind = type(tree)
    if kind in _SCALARS:
        return tree
    if kind is torch.Tensor or isinstance(tree, torch.Tensor):
        return change(tree)
    if kind is list or kind is tuple:
        return tuple([_mapped(part, change) for part in tree])
    if isinstance(tree, dict):
        return {name: _mapped(part, change) for name, part in tree.items()}
    return tree_map_only(torch.Tensor, change, tree)
