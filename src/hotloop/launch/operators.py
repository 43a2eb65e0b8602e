"""Operators of a launched script that hotloop's kernels take over, each shape where timed faster.

They are registered at torch's CPU key, below autograd: what the script's modules and their
gradients call ends here. The way through the interpreter costs some microseconds a call, so an
operator is given back to torch where its kernel does not save that.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RunError
from . import convolutions, poolings
from .choice import Choice
from .operator_kernel import Kernel

# How many calls lie between two looks at whether an operator pays, and what the way here costs.
_LOOK_EVERY = 256
_DETOUR_S = 12e-6


@dataclass
class OperatorUse:
    """What became of an operator.

    Attributes:
        calls: that reached hotloop. taken: made by its kernel.
        saved_s: against torch's least time of the same shape, about.
    """

    name: str
    calls: int = 0
    taken: int = 0
    saved_s: float = 0.0


class _Operator:
    """One operator from ``install`` to ``remove``."""

    def __init__(self, kernel: Kernel) -> None:
        self.use = OperatorUse(kernel.name)
        self._take = kernel.take
        self._choices: dict[Hashable, Choice] = {}
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        self._plain = torch.library.get_kernel(f"aten::{kernel.name}", "CPU")
        self._library: Any = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That a kernel is replaced is the purpose.
            self._library.impl(kernel.name, self._call, "CPU")

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None

    def _call(self, *args: Any, **options: Any) -> Any:
        use = self.use
        use.calls += 1
        if use.calls % _LOOK_EVERY == 0 and use.saved_s < use.calls * _DETOUR_S:
            self.remove()
        taken = None
        if not torch.are_deterministic_algorithms_enabled():
            taken = self._take(*args, **options)
        if taken is None:
            return self._plain.call_boxed(self._keys, *args, **options)
        key, make = taken
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = Choice()
        ours = choice.next()
        started_s = time.perf_counter()
        if ours:
            try:
                result = make()
            except RunError:  # Such as no memory for it.
                ours = False
        if not ours:
            result = self._plain.call_boxed(self._keys, *args, **options)
        seconds = time.perf_counter() - started_s
        choice.note(ours, seconds)
        if ours:
            use.taken += 1
            if choice.fastest and math.isfinite(choice.least_s[0]):
                use.saved_s += choice.least_s[0] - choice.least_s[1]
        return result


_operators: list[_Operator] = []


def install() -> None:
    """Take the operators over; once a process."""
    if not _operators:
        for kernel in (*convolutions.KERNELS, *poolings.KERNELS):
            _operators.append(_Operator(kernel))


def remove() -> None:
    """Give them back."""
    for operator in _operators:
        operator.remove()
    _operators.clear()


def uses() -> list[OperatorUse]:
    """What became of each."""
    return [operator.use for operator in _operators]
