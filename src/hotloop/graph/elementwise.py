"""Chains of element-wise operations as one program of a kernel that works block by block.

What lies between two operations of a chain stays in the first-level cache. A chain grows backwards
from its last operation, over operations whose result nothing else reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..kernels.elementwise import Operation
from . import native

_aten: Any = torch.ops.aten
_REGISTERS = 16
_MOST_OPERATIONS = 64
_SQRT_HALF = math.sqrt(0.5)
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)


def fuse(graph: fx.GraphModule) -> None:
    """Replace operations on float32 tensors of one shape and layout, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    taken: set[Any] = set()
    for node in reversed(nodes):
        if node in taken or not _is_element_wise(node):
            continue
        chain = _chain(node, taken)
        made = _Writer(node, chain).write()
        if made is None:
            chain = [node]
            made = _Writer(node, chain).write()
        if made is None:
            continue
        taken.update(chain)
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(native.elementwise, made)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
    graph.graph.eliminate_dead_code()
    graph.recompile()


@dataclass(frozen=True)
class Chain:
    """A program of ``rows`` x ``cols`` elements.

    Attributes:
        kinds: of each operand: ``"whole"``, ``"row"`` (repeated for each row), ``"column"``,
            ``"one"``. The result comes behind them.
    """

    operations: tuple[Operation, ...]
    rows: int
    cols: int
    kinds: tuple[str, ...]


def _is_element_wise(node: Any) -> bool:
    if node.op != "call_function" or node.target not in _RULES:
        return False
    val = node.meta["val"]
    return bool(val.dtype == torch.float32 and val.numel() > 0 and _is_dense(val))


def _chain(last: Any, taken: set[Any]) -> list[Any]:
    chain, left = [last], [last]
    while left and len(chain) < _MOST_OPERATIONS:
        for used in left.pop().all_input_nodes:
            alike = used not in chain and used not in taken and _is_element_wise(used)
            if alike and _same_layout(used, last) and all(u in chain for u in used.users):
                chain.append(used)
                left.append(used)
    return chain


class _Writer:
    """Writes the operations of a chain."""

    def __init__(self, last: Any, chain: list[Any]) -> None:
        self._last, self._chain = last, set(chain)
        val = last.meta["val"]
        self._cols = val.shape[-1] if val.dim() and val.is_contiguous() else val.numel()
        self._rows = val.numel() // self._cols
        self._operands: list[Any] = []
        self._kinds: list[str] = []
        self._operations: list[Operation] = []
        self._register: dict[Any, int] = {}
        self._free = list(range(_REGISTERS - 1, -1, -1))
        self._reads: dict[Any, int] = {}

    def write(self) -> tuple[Any, ...] | None:
        """Arguments of ``native.elementwise``; ``None``: an operand does not fit."""
        order = [n for n in self._last.graph.nodes if n in self._chain]
        for node in order:
            for argument in node.args:
                if isinstance(argument, fx.Node):
                    self._reads[argument] = self._reads.get(argument, 0) + 1
        try:
            for node in order:
                self._write(node)
        except _DoesNotFit:
            return None
        store = Operation("store", len(self._operands), self._register[self._last])
        chain = Chain((*self._operations, store), self._rows, self._cols, tuple(self._kinds))
        return (chain, *self._operands)

    def _write(self, node: Any) -> None:
        given: list[Any] = []
        for argument in node.args:
            given.append(self._loaded(argument) if isinstance(argument, fx.Node) else argument)
        out = self.new()
        if not _RULES[node.target](self, out, given, node.kwargs):
            raise _DoesNotFit
        for argument in {a for a in node.args if isinstance(a, fx.Node)}:
            self._reads[argument] -= sum(a is argument for a in node.args)
            if self._reads[argument] == 0:
                self._free.append(self._register.pop(argument))
        self._register[node] = out

    def _loaded(self, node: Any) -> _Register:
        if node not in self._register:
            kind = self._kind(node)
            self._register[node] = self.new()
            self.add("load", self._register[node], len(self._operands))
            self._operands.append(node)
            self._kinds.append(kind)
        return _Register(self._register[node])

    def _kind(self, node: Any) -> str:
        val, wanted = node.meta["val"], self._last.meta["val"]
        if not isinstance(val, torch.Tensor) or val.dtype != torch.float32:
            raise _DoesNotFit
        if val.numel() == 1:
            return "one"
        if _same_layout(node, self._last):
            return "whole"
        if not wanted.is_contiguous() or not val.is_contiguous():
            raise _DoesNotFit
        sizes = list(val.shape)
        if sizes[-1] == self._cols and val.numel() == self._cols:
            return "row"
        if sizes == [*wanted.shape[:-1], 1]:
            return "column"
        raise _DoesNotFit

    def new(self) -> int:
        """A free register."""
        if not self._free:
            raise _DoesNotFit
        return self._free.pop()

    def add(
        self, name: str, out: int, a: int = -1, b: int = -1, c: int = -1, constant: float = 0.0
    ) -> None:
        """Append an operation."""
        self._operations.append(Operation(name, out, a, b, c, constant))

    def scratch(self, count: int) -> list[int]:
        """Registers for one operation alone."""
        found = self._free[-count:]
        if len(found) < count:
            raise _DoesNotFit
        return found


class _DoesNotFit(Exception):
    """The chain needs what the kernel does not have."""


class _Register(int):
    """A register, apart from a number that the user wrote."""


Rule = Callable[[_Writer, int, list[Any], dict[str, Any]], bool]


def _unary(name: str) -> Rule:
    def rule(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
        if len(given) != 1 or options:
            return False
        w.add(name, out, given[0])
        return True

    return rule


def _binary(name: str) -> Rule:
    def rule(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
        a, b, *rest = given
        if options or not isinstance(a, _Register) or any(v != 1 for v in rest):
            return False
        if isinstance(b, _Register):
            w.add(name, out, a, b)
        else:
            w.add(name, out, a, constant=float(b))
        return True

    return rule


def _gelu(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
    kind = options.get("approximate", "none")
    if len(given) != 1 or kind not in ("none", "tanh"):
        return False
    w.add("gelu" if kind == "none" else "gelu_tanh", out, given[0])
    return True


def _gelu_backward(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
    if options.get("approximate", "none") != "none" or len(given) != 2:
        return False
    g, x = given
    (s,) = w.scratch(1)
    w.add("mul", out, x, constant=_SQRT_HALF)
    w.add("erf", out, out)
    w.add("add", out, out, constant=1.0)
    w.add("mul", out, out, constant=0.5)
    w.add("sqr", s, x)
    w.add("mul", s, s, constant=-0.5)
    w.add("exp", s, s)
    w.add("mul", s, s, constant=_DENSITY_AT_0)
    w.add("fma", out, s, x, out)
    w.add("mul", out, out, g)
    return True


def _threshold_backward(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
    g, x, threshold = given
    w.add("threshold", out, g, x, constant=float(threshold))
    return not options


def _tanh_backward(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
    g, result = given
    w.add("sqr", out, result)
    w.add("neg", out, out)
    w.add("add", out, out, constant=1.0)
    w.add("mul", out, out, g)
    return not options


def _sigmoid_backward(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
    g, result = given
    w.add("neg", out, result)
    w.add("add", out, out, constant=1.0)
    w.add("mul", out, out, result)
    w.add("mul", out, out, g)
    return not options


def _silu_backward(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
    g, x = given
    (s,) = w.scratch(1)
    w.add("sigmoid", s, x)
    w.add("neg", out, s)
    w.add("add", out, out, constant=1.0)
    w.add("mul", out, out, x)
    w.add("add", out, out, constant=1.0)
    w.add("mul", out, out, s)
    w.add("mul", out, out, g)
    return not options


def _power(w: _Writer, out: int, given: list[Any], options: dict[str, Any]) -> bool:
    x, power = given
    if isinstance(power, _Register) or float(power) != 2.0:
        return False
    w.add("sqr", out, x)
    return not options


_RULES: dict[Any, Rule] = {
    _aten.add.Tensor: _binary("add"),
    _aten.add.Scalar: _binary("add"),
    _aten.sub.Tensor: _binary("sub"),
    _aten.mul.Tensor: _binary("mul"),
    _aten.mul.Scalar: _binary("mul"),
    _aten.div.Tensor: _binary("div"),
    _aten.div.Scalar: _binary("div"),
    _aten.maximum.default: _binary("max"),
    _aten.minimum.default: _binary("min"),
    _aten.neg.default: _unary("neg"),
    _aten.abs.default: _unary("abs"),
    _aten.sqrt.default: _unary("sqrt"),
    _aten.reciprocal.default: _unary("reciprocal"),
    _aten.exp.default: _unary("exp"),
    _aten.tanh.default: _unary("tanh"),
    _aten.sigmoid.default: _unary("sigmoid"),
    _aten.relu.default: _unary("relu"),
    _aten.silu.default: _unary("silu"),
    _aten.gelu.default: _gelu,
    _aten.gelu_backward.default: _gelu_backward,
    _aten.silu_backward.default: _silu_backward,
    _aten.threshold_backward.default: _threshold_backward,
    _aten.tanh_backward.default: _tanh_backward,
    _aten.sigmoid_backward.default: _sigmoid_backward,
    _aten.pow.Tensor_Scalar: _power,
}


def _is_dense(val: torch.Tensor) -> bool:
    last = val.dim() == 4 and val.is_contiguous(memory_format=torch.channels_last)
    return val.is_contiguous() or last


def _same_layout(one: Any, other: Any) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype)
