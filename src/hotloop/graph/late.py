"""Values that exist only while a program runs: of operations that give memory of their own."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.calls import Call

Instruction = Callable[[], Any]


@dataclass(frozen=True)
class Late:
    """A value that exists only while the program runs: its place in the list of them."""

    place: int


class _Pending:
    """Stands for a tensor whose address is not known yet: shape and strides, a number for it."""

    def __init__(self, val: torch.Tensor, number: int) -> None:
        self.val, self.number = val, number
        self.shape = val.shape

    def data_ptr(self) -> int:
        """A number that is no address."""
        return self.number

    def stride(self, dim: int | None = None) -> Any:
        """As torch's."""
        return self.val.stride() if dim is None else self.val.stride(dim)

    def as_strided(self, size: Any, stride: Any) -> _Pending:
        """Another view of it."""
        return _Pending(self.val.as_strided(size, stride), self.number)

    def t(self) -> _Pending:
        """The transpose."""
        return _Pending(self.val.t(), self.number)


class Pendings:
    """The late arguments of one call of a kernel, and where in the call their addresses go."""

    _FIRST = 0x7A11_0000_0000_0000

    def __init__(self, node: Any) -> None:
        self._node = node
        self._places: dict[int, int] = {}

    def instead_of_late(self, values: Any, nodes: Any) -> list[Any]:
        """The arguments, with something that has a shape for each that is late."""
        return [self._made(value, node) for value, node in zip(values, nodes, strict=False)]

    def _made(self, value: Any, node: Any) -> Any:
        if isinstance(value, list) and isinstance(node, (list, tuple)):
            return self.instead_of_late(value, node)
        return self._pending(value, node) if isinstance(value, Late) else value

    def _pending(self, value: Late, node: Any) -> _Pending:
        number = self._FIRST + value.place
        self._places[number] = value.place
        return _Pending(node.meta["val"], number)

    def found_in(self, call: Call) -> list[tuple[Any, int]]:
        """The words of the call's structure that want an address, and places of the values."""
        if not self._places:
            return []
        words: list[Any] = []
        for memory in (call.arguments, *(k for k in call.keep if isinstance(k, ctypes.Array))):
            count = ctypes.sizeof(memory) // ctypes.sizeof(ctypes.c_uint64)
            at = ctypes.addressof(memory)
            words += [ctypes.c_uint64.from_address(at + 8 * n) for n in range(count)]
        return [(w, self._places[w.value]) for w in words if w.value in self._places]


def aten_instruction(
    target: Any, args: Sequence[Any], kwargs: dict[str, Any], late: list[Any], place: int | None
) -> Instruction:
    """A call of ``target``; its result goes to ``late[place]``, or where it was told."""
    fixed = not has_late((args, kwargs))
    if fixed and place is None:
        return functools.partial(target, *args, **kwargs)
    if fixed and place is not None:
        at = place

        def make() -> None:
            late[at] = target(*args, **kwargs)

        return make

    def make_of_late() -> None:
        result = target(*_now(args, late), **_now(kwargs, late))
        if place is not None:
            late[place] = result

    return make_of_late


def has_late(tree: Any) -> bool:
    """Whether a value of the tree exists only while the program runs."""
    if isinstance(tree, (list, tuple)):
        return any(has_late(part) for part in tree)
    if isinstance(tree, dict):
        return any(has_late(part) for part in tree.values())
    return isinstance(tree, Late)


def _now(tree: Any, late: list[Any]) -> Any:
    if isinstance(tree, Late):
        return late[tree.place]
    if isinstance(tree, (list, tuple)):
        return [_now(part, late) for part in tree]
    if isinstance(tree, dict):
        return {name: _now(part, late) for name, part in tree.items()}
    return tree
