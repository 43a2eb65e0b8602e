"""Chains of element-wise operations as one program of a kernel that works block by block.

What lies between two operations of a chain stays in the first-level cache. A chain grows backwards
from its last operation, over operations whose result nothing else reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..kernels.elementwise import Operation
from . import native
from .nodes import remove_dead
from .ordering import readers_before_writes

_aten: Any = torch.ops.aten
_REGISTERS = 16
_MOST_OPERATIONS = 64
_LENGTHS = (64, 12, 4)  # Of chains that are tried, one after the other.
_MOST_DIMS = 3  # As in the kernel.
_SQRT_HALF = math.sqrt(0.5)
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)


def fuse(graph: fx.GraphModule) -> None:
    """Replace operations on float32 tensors of one shape, in place."""
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    taken = readers_before_writes(graph.graph)
    for node in reversed(list(order)):
        if node in taken or not is_element_wise(node):
            continue
        for chain in _chains(node, taken, order):
            made = _Writer(node, chain).write()
            if made is not None:
                break
        else:
            continue
        taken.update(chain)
        _put(graph.graph, chain, *made)
    remove_dead(graph.graph)
    graph.recompile()


def _put(graph: fx.Graph, chain: list[Any], args: tuple[Any, ...], results: list[Any]) -> None:
    with graph.inserting_before(chain[0]):
        new = graph.call_function(native.elementwise, args)
        if len(results) == 1:
            new.meta["val"] = results[0].meta["val"]
            results[0].replace_all_uses_with(new)
            return
        new.meta["val"] = tuple(result.meta["val"] for result in results)
        for number, result in enumerate(results):
            part = graph.call_function(operator.getitem, (new, number))
            part.meta["val"] = result.meta["val"]
            result.replace_all_uses_with(part, lambda user: user not in chain)


@dataclass(frozen=True)
class Chain:
    """A program over the elements of a shape.

    Attributes:
        shape: of at most three dimensions.
        strides: in these dimensions, of each operand, and of the results behind them.
    """

    operations: tuple[Operation, ...]
    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def is_element_wise(node: Any) -> bool:
    """Whether a chain may have a node."""
    if node.op != "call_function" or node.target not in _RULES:
        return False
    val = node.meta["val"]
    return bool(val.dtype == torch.float32 and val.numel() > 0)


def _chains(last: Any, taken: set[Any], order: dict[Any, int]) -> list[list[Any]]:
    """Chains that end in ``last``, the longest first.

    What a chain makes may be read by others too, if they come after it.
    """

    def grown(fits: Callable[[Any], bool], most: int, shares: bool) -> list[Any]:
        def is_free(user: Any) -> bool:  # A node that is not known stands for later ones.
            return user in chain or (shares and order.get(user, len(order)) > order[last])

        chain, left = [last], [last]
        while left and len(chain) < most:
            for used in left.pop(0).all_input_nodes:
                alike = used not in chain and used not in taken and is_element_wise(used)
                if alike and fits(used) and all(map(is_free, used.users)):
                    chain.append(used)
                    left.append(used)
        return chain

    shape = last.meta["val"].shape

    def has_shape(node: Any) -> bool:
        return bool(node.meta["val"].shape == shape)

    def is_alike(node: Any) -> bool:
        return _same_layout(node, last)

    found = [grown(has_shape, most, True) for most in _LENGTHS]
    found += [grown(is_alike, most, shares) for most in _LENGTHS for shares in (True, False)]
    return [*found, [last]]


class _Writer:
    """Writes the operations of a chain."""

    def __init__(self, last: Any, chain: list[Any]) -> None:
        self._last, self._chain = last, set(chain)
        self._operands: list[Any] = []
        self._results: list[Any] = []
        self._operations: list[Operation] = []
        self._register: dict[Any, int] = {}
        self._free = list(range(_REGISTERS - 1, -1, -1))
        self._reads: dict[Any, int] = {}

    def write(self) -> tuple[tuple[Any, ...], list[Any]] | None:
        """Arguments of ``native.elementwise``, and what it gives; ``None``: it does not fit."""
        chain = sorted(self._chain)  # As they stand in the graph.
        for node in chain:
            for argument in node.args:
                if isinstance(argument, fx.Node):
                    self._reads[argument] = self._reads.get(argument, 0) + 1
        try:
            for node in chain:
                self._write(node)
            shape, strides = _dimensions([*self._operands, *self._results])
        except _DoesNotFit:
            return None
        # Results come behind the operands, whose number is known only now.
        operations = [
            o._replace(out=len(self._operands) + o.out) if o.name == "store" else o
            for o in self._operations
        ]
        return (Chain(tuple(operations), shape, strides), *self._operands), self._results

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
        if node is self._last or any(user not in self._chain for user in node.users):
            self.add("store", len(self._results), out)
            self._results.append(node)
        if self._reads.get(node):
            self._register[node] = out
        else:
            self._free.append(out)

    def _loaded(self, node: Any) -> _Register:
        if node not in self._register:
            val = node.meta["val"]
            if not isinstance(val, torch.Tensor) or val.dtype != torch.float32:
                raise _DoesNotFit
            self._register[node] = self.new()
            self.add("load", self._register[node], len(self._operands))
            self._operands.append(node)
        return _Register(self._register[node])

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
    _aten.rsqrt.default: _unary("rsqrt"),
    _aten.log.default: _unary("log"),
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


def _same_layout(one: Any, other: Any) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype)


def _dimensions(nodes: list[Any]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The fewest dimensions in which all can be walked through, the last one in its own order.

    Returns:
        Sizes, and strides of each.

    Raises:
        _DoesNotFit: there are more than the kernel has.
    """
    val = nodes[-1].meta["val"]
    order = sorted(range(val.dim()), key=lambda d: -val.stride(d))
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in nodes]
    try:
        wholes = [node.meta["val"].expand(val.shape) for node in nodes]
    except RuntimeError:
        raise _DoesNotFit from None
    for d in order:
        if val.shape[d] == 1:
            continue
        now = [whole.stride(d) for whole in wholes]
        if sizes and all(s[-1] == t * val.shape[d] for s, t in zip(strides, now, strict=True)):
            sizes[-1] *= val.shape[d]
            for mine, stride in zip(strides, now, strict=True):
                mine[-1] = stride
        else:
            sizes.append(val.shape[d])
            for mine, stride in zip(strides, now, strict=True):
                mine.append(stride)
    if len(sizes) > _MOST_DIMS:
        raise _DoesNotFit
    return tuple(sizes), tuple(tuple(mine) for mine in strides)
