"""Values that a function reads out of tensors only to return them: ``return loss.item()``.

Whether that is all that happens to a value is read from the code of the function, from the call
that reads it to the return: on a straight way it may be kept in a variable and put into a tuple,
list or dict, and nothing else may touch it.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch

from ..graph.recording import NotRecordable, Recorder
from ..memory.tree import Structure, flatten

# Operation -> what it takes from the stack and what it puts there, of values that are not the one.
_EFFECTS = {
    "LOAD_CONST": (0, 1), "LOAD_DEREF": (0, 1), "LOAD_CLOSURE": (0, 1), "PUSH_NULL": (0, 1),
    "LOAD_METHOD": (1, 2), "BINARY_OP": (2, 1), "COMPARE_OP": (2, 1), "BINARY_SUBSCR": (2, 1),
    "UNARY_NEGATIVE": (1, 1), "POP_TOP": (1, 0), "PRECALL": (0, 0), "KW_NAMES": (0, 0),
    "BEFORE_WITH": (1, 2), "STORE_SUBSCR": (3, 0),
    "NOP": (0, 0), "CACHE": (0, 0), "EXTENDED_ARG": (0, 0),
}  # fmt: skip
_BUILDS = {"BUILD_TUPLE": 1, "BUILD_LIST": 1, "BUILD_MAP": 2}
_READS = {torch.Tensor.item: 0, torch.Tensor.__float__: 1}


class Reads:
    """Takes the values that a function reads and returns, while it is recorded.

    Args:
        function: as it is called.
        recorder: not entered yet.

    Attributes:
        taken: each value, and a copy of the tensor that it was.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder) -> None:
        called: Any = function
        if not isinstance(function, FunctionType | MethodType):
            called = vars(type(function)).get("__call__")
        self._code = getattr(called, "__code__", None)
        self._recorder = recorder
        self.taken: list[tuple[float, torch.Tensor]] = []
        recorder.take_read = self._take

    def _take(self, read: Any, tensor: torch.Tensor) -> float | None:
        plain = tensor.is_floating_point() and tensor.numel() == 1
        if self._code is None or not plain:
            return None
        if not is_only_returned(read, self._code, sys._getframe(1)):
            return None
        # As it is now: it may be written before the function returns.
        copy = tensor.detach().clone()
        with self._recorder.checking():
            value: float = read(tensor)
        self.taken.append((value, copy))
        return value


def is_only_returned(read: Any, code: CodeType, frame: FrameType | None) -> bool:
    """Whether the call that is being made in a frame gives a value that is returned, untouched.

    Args:
        read: what reads it: ``Tensor.item`` or ``Tensor.__float__``.
        code: of the function.
    """
    while frame is not None and frame.f_code is not code:
        # Python's own wrappers, and hotloop's.
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "hotloop"):
            return False
        frame = frame.f_back
    if frame is None or read not in _READS:
        return False
    instructions = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    at = next((n for n, i in enumerate(instructions) if i.offset == frame.f_lasti), None)
    if at is None or not _is_plain_call(read, instructions[: at + 1]):
        return False
    return _reaches_the_return(instructions[at + 1 :])


def _is_plain_call(read: Any, before: Sequence[dis.Instruction]) -> bool:
    """``x.item()``, or a call with one argument as ``float(x)``."""
    names = [i for i in before if i.opname != "PRECALL"]
    if names[-1].opname != "CALL" or names[-1].arg != _READS[read]:
        return False
    return read is torch.Tensor.__float__ or (len(names) > 1 and names[-2].argval == "item")


def _reaches_the_return(after: Sequence[dis.Instruction]) -> bool:
    stack = [True]
    names: set[str] = set()
    for step in after:
        name, arg = step.opname, step.arg or 0
        if name == "RETURN_VALUE":
            return True
        if name == "STORE_FAST":
            (names.add if _pop(stack, 1) else names.discard)(step.argval)
        elif name == "LOAD_FAST":
            stack.append(step.argval in names)
        elif name in ("SWAP", "COPY"):
            stack = [*[False] * (arg - len(stack)), *stack]
            if name == "SWAP":
                stack[-1], stack[-arg] = stack[-arg], stack[-1]
            else:
                stack.append(stack[-arg])
        elif name in _BUILDS:
            stack.append(_pop(stack, arg * _BUILDS[name]))
        elif name == "BUILD_CONST_KEY_MAP":
            stack.append(_pop(stack, arg + 1))
        else:
            takes, puts = _effect(name, arg)
            if takes < 0 or _pop(stack, takes):
                return False
            stack += [False] * puts
    return False


def _effect(name: str, arg: int) -> tuple[int, int]:
    """What an operation takes and puts; takes -1: it is none that is known."""
    if name == "LOAD_GLOBAL":
        return 0, 1 + (arg & 1)
    if name == "LOAD_ATTR":
        has_flag = "LOAD_METHOD" not in dis.opmap
        return 1, 1 + (arg & 1 if has_flag else 0)
    if name == "CALL":
        return arg + 2, 1
    return _EFFECTS.get(name, (-1, 0))


def _pop(stack: list[bool], count: int) -> bool:
    """Take values from the stack; whether the one is among them."""
    taken = [stack.pop() if stack else False for _ in range(count)]
    return any(taken)


def lifted(
    result: Any, taken: Sequence[tuple[float, torch.Tensor]]
) -> tuple[Structure, list[torch.Tensor], list[bool]]:
    """A function's result with tensors in place of the values that were read out of them.

    Returns:
        Its structure and tensors, and of each whether its value is wanted.

    Raises:
        NotRecordable: a value that was read is not in the result.
    """
    tensors, structure = flatten(result)
    if not taken:
        return structure, tensors, [False] * len(tensors)
    left = iter(tensors)
    found: list[torch.Tensor] = []
    values: list[bool] = []
    missing = dict(enumerate(taken))

    def change(part: Structure) -> Structure:
        if part.kind is None:
            found.append(next(left))
            values.append(False)
            return part
        for number, (value, tensor) in enumerate(taken):
            if part.like is value:
                found.append(tensor)
                values.append(True)
                missing.pop(number, None)
                return Structure(None)
        return replace(part, parts=tuple([change(below) for below in part.parts]))

    made = change(structure)
    if missing:
        raise NotRecordable("a value that the function reads is not in what it gives")
    return made, found, values
