"""Records one train step below autograd: each call of ATen, in order, with its tensors.

Two modes are on while the step runs. One sits below autograd and sees every call that does
something, those of the backward pass among them. The other sits above and notes where a value
leaves torch (``.numpy()``, ``.tolist()``): what comes of it, nobody can see.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# What a tensor is made of: storage, offset, sizes, strides, dtype.
Key = tuple[Any, ...]
_SKIPPED = tuple(
    os.path.normpath(path) + os.sep
    for path in (
        os.path.dirname(torch.__file__),
        sysconfig.get_path("stdlib"),
        os.path.dirname(os.path.dirname(__file__)),
    )
)
# Values that leave torch through Python.
_READS = {
    getattr(torch.Tensor, name)
    for name in ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "item")
}
_SCALAR_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class NotRecordable(Exception):
    """Why this step cannot become a program, in words for the report."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
    """

    entries: list[Entry] = field(default_factory=list)
    storages: int = 0
    inputs: dict[TensorRef, tuple[str, int]] = field(default_factory=dict)
    constants: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    gradients: list[TensorRef | None] = field(default_factory=list)
    loss: TensorRef | None = None


def user_line() -> str:
    """``file:line`` of the nearest frame outside torch, hotloop and the standard library."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED) and not name.startswith("<frozen"):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


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
        if func in _READS and self._recorder.refusal is None:
            name = getattr(func, "__name__", "numpy")
            self._recorder.refusal = f"{user_line()} reads a tensor's value ({name})"
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
    """

    def __init__(self, inputs: dict[str, Sequence[torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.refusal: str | None = None
        self._checks = 0
        # Weak, so that memory is freed as in any step; yet no address comes again for another one.
        self._seen: list[StorageWeakRef] = []
        self._numbers: dict[int, int] = {}
        # Parts of a batch may lie in one larger storage, each time somewhere else, so each counts
        # as a storage by itself. Key of the storage -> first byte, end and number of each part.
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        for tensor in inputs.get("batch", ()):
            self._add_part(tensor)
        for kind, tensors in inputs.items():
            for number, tensor in enumerate(tensors):
                self.recording.inputs.setdefault(self.ref(tensor), (kind, number))
        self._function_mode = _Reads(self)

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._function_mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """While it lasts, values are read only to be checked."""
        self._checks += 1
        try:
            yield
        finally:
            self._checks -= 1

    def __exit__(self, *raised: Any) -> None:
        self._function_mode.__exit__(*raised)  # type: ignore[no-untyped-call]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def ref(self, tensor: torch.Tensor) -> TensorRef:
        """What a tensor is called in the recording."""
        number, begin = self._place(tensor)
        return TensorRef(
            number,
            (_first_byte(tensor) - begin) // tensor.element_size(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Number of a tensor's storage, and the byte from which its offset counts."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        for begin, end, number in self._parts.get(key, ()):
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

    def _add_part(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        parts = self._parts.setdefault(storage._cdata, [])
        begin, end = _first_byte(tensor), _first_byte(tensor) + extent_bytes(tensor)
        for at, (other, its_end, number) in enumerate(parts):
            if begin < its_end and other < end:  # They overlap: one part.
                parts[at] = min(begin, other), max(end, its_end), number
                return
        parts.append((begin, end, self._new_number(storage)))

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        parts = self._parts.get(tensor.untyped_storage()._cdata, ())
        return any(begin <= _first_byte(tensor) < end for begin, end, _ in parts)

    def _known(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._numbers or self._is_batch(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._checks and func in _SCALAR_READS:
            return func(*args, **kwargs)
        if self.refusal is None:
            self._refuse(func, args)
        if self.refusal is not None:
            return func(*args, **kwargs)
        fresh: list[torch.Tensor] = []

        def given(tensor: torch.Tensor) -> TensorRef:
            kind = type(tensor)
            if kind not in _PLAIN_TYPES or tensor.layout != torch.strided:
                name = kind.__name__ if tensor.layout == torch.strided else tensor.layout
                raise NotRecordable(f"{user_line()} computes on a {name}")
            if not self._known(tensor):
                fresh.append(tensor)
            return self.ref(tensor)

        try:
            wanted_args, wanted_kwargs = _mapped((args, kwargs), given)
        except NotRecordable as verdict:
            self.refusal = str(verdict)
            return func(*args, **kwargs)
        for tensor in fresh:
            self.recording.constants[self._place(tensor)[0]] = tensor, version_of(tensor)
        if func._schema.is_mutable:
            self._refuse_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        if any(t.layout != torch.strided for t in _tensors_of(result)):
            self.refusal = f"{user_line()}: {func} gives a sparse tensor"
            return result
        self.recording.entries.append(
            Entry(
                func,
                wanted_args,
                tuple(sorted(wanted_kwargs.items())),
                _mapped(result, self.ref),
                user_line(),
            )
        )
        return result

    def _refuse(self, func: Any, args: Any) -> None:
        tags = func.tags
        if func is torch.ops.aten.index.Tensor and not _has_mask(args[1]):
            return  # By numbers: only a mask gives a shape that depends on its values.
        if func in _SCALAR_READS:
            self.refusal = f"{user_line()} reads a tensor's value"
        elif torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
            self.refusal = f"{user_line()}: the shape that {func} gives depends on the data"

    def _refuse_writes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(target, torch.Tensor) and self._is_batch(target):
                self.refusal = f"{user_line()} writes into its batch"


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


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, (list, tuple)):
        return [tensor for part in tree for tensor in _tensors_of(part)]
    return [tree] if isinstance(tree, torch.Tensor) else []


def _mapped(tree: Any, change: Callable[[torch.Tensor], TensorRef]) -> Any:
    """The tree with each tensor changed, and lists made tuples so that it compares by value."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return tuple(_mapped(part, change) for part in tree)
    if isinstance(tree, dict):
        return {name: _mapped(part, change) for name, part in tree.items()}
    return tree_map_only(torch.Tensor, change, tree)
