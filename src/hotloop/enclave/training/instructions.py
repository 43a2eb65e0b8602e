"""Calls of kernels as plain values with addresses as (space, offset), and back. No torch.

What comes from a file is refused unless each structure has exactly its fields, its numbers are in
range, and everything that its kernel reads and writes lies inside one space (``kernels.extents``).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import ModelError
from ...kernels import binding, extents
from ...kernels.calls import Call
from ...kernels.elementwise import OPERATIONS

# Number of a space, and bytes from its start.
Place = list[int]
_ELEMENTWISE = ("operations", "num_operations", "tensors", "num_tensors")
_LEFT_OUT = ("num_threads", "rule")
_MOST_OPERATIONS, _MOST_TENSORS = 256, 256
# What kernels take for places, once they have checked them.
_INDICES = ("labels", "indices", "argmax", "state")
_INT64_FIELDS = ("labels", "indices", "count", "state")


class Space(NamedTuple):
    """Memory that instructions may use: where it lies, its bytes, whether they may write it."""

    address: int
    size_bytes: int
    writable: bool = True


# ---- To plain values -------------------------------------------------------------------------


def to_values(call: Call, place_of: Callable[[int], Place]) -> dict[str, Any]:
    """A call as JSON has it.

    Args:
        place_of: where an address is.

    Raises:
        ModelError: a program without torch cannot make it.
    """
    if call.name not in extents.ENTRIES:
        raise ModelError("every instruction must be hotloop's own kernel", got=call.name)
    return {"entry": call.name, "call": _structure_values(call.arguments, place_of)}


def _structure_values(made: Any, place_of: Callable[[int], Place]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    is_elementwise = isinstance(made, binding.ElementwiseCall)
    for name, kind in made._fields_:
        if name in _LEFT_OUT or (is_elementwise and name in _ELEMENTWISE):
            continue
        value = getattr(made, name)
        if kind is ctypes.c_void_p:
            values[name] = None if not value else place_of(value)
        elif isinstance(value, ctypes.Structure):
            values[name] = _structure_values(value, place_of)
        elif isinstance(value, ctypes.Array):
            values[name] = list(value)
        else:
            values[name] = _number(value)
    if is_elementwise:
        operations, tensors = _elementwise_parts(made)
        values["operations"] = [
            [o.opcode, o.out, o.a, o.b, o.c, _number(o.constant)] for o in operations
        ]
        values["tensors"] = [
            [place_of(t.data), t.plane_stride, t.row_stride, t.col_stride] for t in tensors
        ]
    return values


def _elementwise_parts(made: Any) -> tuple[Any, Any]:
    operations = binding.ElementwiseOperation * made.num_operations
    tensors = binding.ElementwiseTensor * made.num_tensors
    return operations.from_address(made.operations), tensors.from_address(made.tensors)


def _number(value: float) -> float | str:
    """JSON has no infinities."""
    return value if math.isfinite(value) else repr(value)


# ---- From plain values -----------------------------------------------------------------------


class Reader:
    """Makes calls of values that come from a file; refuses what is not exactly right.

    Args:
        spaces: memory, by number.
        num_threads: of every kernel.
        num_states: states that an update has, by number of its parameter group.
    """

    def __init__(
        self, spaces: Sequence[Space], num_threads: int, num_states: Sequence[int]
    ) -> None:
        self._spaces, self._num_threads, self._num_states = spaces, num_threads, num_states
        # Where an argmax lies that a pooling wrote -> its bytes and places in a window.
        self._argmax: dict[int, tuple[int, int]] = {}

    def call(self, value: Any) -> tuple[Call, int | None]:
        """A call, and the parameter group of an update.

        Raises:
            ModelError: the value is no call of a kernel, or leaves its memory.
        """
        entry = "an instruction"
        try:
            fields = closed(value, {"entry", "call", "group"})
            entry = fields["entry"]
            if type(entry) is not str or entry not in extents.ENTRIES:
                raise extents.Refused("it must call one of hotloop's kernels")
            kind = extents.ENTRIES[entry]
            made, kept = self._structure(kind.structure, fields["call"])
            extents.check_numbers(made)
            extents.check_null(entry, made)
            self._check_extents(entry, made, kind.extents(made))
            group = self._group(made, fields["group"])
        except (extents.Refused, TypeError, ValueError, KeyError, OverflowError) as error:
            raise ModelError(
                "an instruction of a training export must be whole and stay inside its memory",
                got=f"{entry}: {error}", next_step="export the model again",
            ) from None  # fmt: skip
        call = Call(entry, made)
        call.hold(*kept)
        return call, group

    def address(self, place: Any, size_bytes: int, *, written: bool = False) -> int:
        """Where a place is, of which so many bytes are used.

        Raises:
            Refused: not all of them lie inside its space.
        """
        if type(place) is not list or len(place) != 2 or any(type(n) is not int for n in place):
            raise extents.Refused("a place has a space and an offset")
        number, offset = place
        if not 0 <= number < len(self._spaces):
            raise extents.Refused("a place must be in a space that is there")
        space = self._spaces[number]
        at: int = offset
        if not 0 <= at <= space.size_bytes - size_bytes:
            raise extents.Refused(
                f"{size_bytes} bytes at {offset} of {space.size_bytes} in space {number}"
            )
        if written and not space.writable:
            raise extents.Refused("a constant must not be written")
        return space.address + at

    def _structure(self, kind: Any, value: Any) -> tuple[Any, list[Any]]:
        is_elementwise = kind is binding.ElementwiseCall
        counts = ("num_operations", "num_tensors") if is_elementwise else ()
        names = {n for n, *_ in kind._fields_ if n not in (*_LEFT_OUT, *counts)}
        fields = closed(value, names)
        made, kept = kind(), []
        for name, of in kind._fields_:
            if name == "num_threads":
                made.num_threads = self._num_threads
            elif is_elementwise and name in _ELEMENTWISE:
                continue
            elif name not in _LEFT_OUT:
                setattr(made, name, self._field(of, fields[name]))
        if is_elementwise:
            kept = self._elementwise(made, fields)
        return made, kept

    def _field(self, of: Any, value: Any) -> Any:
        if of is ctypes.c_void_p:
            return None if value is None else self.address(value, 0)
        if of in (ctypes.c_float, ctypes.c_double):
            return _float(value)
        if issubclass(of, ctypes.Structure):
            return self._structure(of, value)[0]
        if issubclass(of, ctypes.Array):
            if type(value) is not list or len(value) != of._length_:
                raise extents.Refused(f"there must be {of._length_} numbers")
            return of(*(_whole(n) for n in value))
        number = _whole(value)
        if of(number).value != number:
            raise extents.Refused("a number must fit its field")
        return number

    def _elementwise(self, made: Any, fields: Mapping[str, Any]) -> list[Any]:
        given, tensors = _listed(fields["operations"], 6), _listed(fields["tensors"], 4)
        if len(given) > _MOST_OPERATIONS or len(tensors) > _MOST_TENSORS:
            raise extents.Refused("an element-wise program has at most 256 operations and tensors")
        operations = (binding.ElementwiseOperation * len(given))()
        for operation, (*words, constant) in zip(operations, given, strict=True):
            numbers = [_whole(word) for word in words]
            if not 0 <= numbers[0] < len(OPERATIONS) or any(abs(n) > 255 for n in numbers):
                raise extents.Refused("an operation must be one that there is")
            names = ("opcode", "out", "a", "b", "c")
            for name, number in zip(names, numbers, strict=True):
                setattr(operation, name, number)
            operation.constant = _float(constant)
        stored = extents.stored_tensors(operations)
        made.num_threads = self._num_threads
        extents.check_numbers(made_with(made, len(given), len(tensors)))
        places = (binding.ElementwiseTensor * len(tensors))()
        for number, (place, (data, *strides)) in enumerate(zip(places, tensors, strict=True)):
            place.plane_stride, place.row_stride, place.col_stride = map(_whole, strides)
            extents.check_numbers(place)
            written = number in stored
            size_bytes = extents.elementwise_tensor(made, place, stored=written)
            place.data = self.address(data, size_bytes, written=written)
            if written:
                self._wrote(place.data, size_bytes)
        made.operations, made.tensors = ctypes.addressof(operations), ctypes.addressof(places)
        return [operations, places]

    def _check_extents(self, entry: str, made: Any, found: Mapping[str, int]) -> None:
        used = []
        for path, size_bytes in found.items():
            holder, _, name = path.rpartition(".")
            address = getattr(getattr(made, holder) if holder else made, name)
            if address:
                written = extents.is_written(made, path)
                self._check_inside(address, size_bytes, name, written=written)
                used.append((name, address, size_bytes, written))
        _check_apart(used)
        reads_argmax = entry.endswith("_gradient") or entry == "hotloop_pool_backward"
        for name, address, size_bytes, _ in used:
            kept = size_bytes, _window(made)
            if name == "argmax" and reads_argmax and self._argmax.get(address) != kept:
                raise extents.Refused("an argmax must be one that a pooling wrote")
        for _, address, size_bytes, written in used:
            if written:
                self._wrote(address, size_bytes)
        for name, address, size_bytes, written in used:
            if name == "argmax" and written:
                self._argmax[address] = size_bytes, _window(made)

    def _check_inside(self, address: int, size_bytes: int, name: str, *, written: bool) -> None:
        for space in self._spaces:
            # Where two meet, an offset at the end of one is the start of the other: either will do.
            end = space.address + space.size_bytes
            if space.address <= address and address + size_bytes <= end:
                if written and not space.writable:
                    raise extents.Refused(f"{name}: a constant must not be written")
                if (address - space.address) % (8 if name in _INT64_FIELDS else 1):
                    raise extents.Refused(f"{name} must be aligned")
                return
        raise extents.Refused(f"{name}: {size_bytes} bytes do not lie inside its memory")

    def _wrote(self, address: int, size_bytes: int) -> None:
        """No argmax is there any more."""
        for at, (count, _) in list(self._argmax.items()):
            if at < address + size_bytes and address < at + count:
                del self._argmax[at]

    def _group(self, made: Any, group: Any) -> int | None:
        is_update = isinstance(made, (binding.UpdateCall, binding.ProductUpdateCall))
        if not is_update:
            if group is not None:
                raise extents.Refused("only an update has a parameter group")
            return None
        if type(group) is not int or not 0 <= group < len(self._num_states):
            raise extents.Refused("an update must have a parameter group")
        states = bool(made.state1) + bool(made.state2)
        if states != self._num_states[group] or (made.state2 and not made.state1):
            raise extents.Refused(f"an update of this rule has {self._num_states[group]} states")
        return group


def _check_apart(used: Sequence[tuple[str, int, int, bool]]) -> None:
    """Whether nothing is written over numbers that say where a kernel reads or writes next.

    Args:
        used: name, address, bytes and whether they are written, of each operand.

    Raises:
        Refused: something is.
    """
    for name, address, size_bytes, _ in used:
        if name not in _INDICES:
            continue
        for other, at, count, written in used:
            if other != name and written and at < address + size_bytes and address < at + count:
                raise extents.Refused(f"{other} must not be written over {name}")


def made_with(made: Any, num_operations: int, num_tensors: int) -> Any:
    """An ``ElementwiseCall`` that knows how many parts it has."""
    made.num_operations, made.num_tensors = num_operations, num_tensors
    return made


def _window(made: Any) -> int:
    """Places in a window of pooling."""
    windows = getattr(made, "windows", None)
    return 4 if windows is None else windows.kernel_h * windows.kernel_w


def closed(value: Any, names: set[str]) -> dict[str, Any]:
    """An object with exactly these fields.

    Raises:
        Refused: it is something else.
    """
    if type(value) is not dict or set(value) != names:
        found = sorted(map(str, value)) if type(value) is dict else type(value).__name__
        raise extents.Refused(f"fields must be {', '.join(sorted(names))}; they are {found}")
    return value


def _listed(value: Any, count: int) -> list[list[Any]]:
    if type(value) is not list or any(type(row) is not list or len(row) != count for row in value):
        raise extents.Refused(f"rows of {count} must be listed")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise extents.Refused("a whole number must be one")
    return value


def _float(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    if value in ("inf", "-inf", "nan"):
        return float(value)
    raise extents.Refused("a number must be one")
