"""Data sets of a script's own whose ``__getitem__`` is straight arithmetic on rows of tensors.

    def __getitem__(self, index):
        image = self.images[index].float().div(255).sub(0.1307)
        return image.unsqueeze(0), self.labels[index]

Its source is read, and taken only where each statement is an assignment or the ``return`` and each
expression is a row of a tensor of ``self``, or arithmetic on one whose result is exact to the bit
for one sample as for many: then the same operations on all rows of a batch give the same bits.
A branch, a call of anything else, a draw or a global name: it is read sample by sample.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch

from .row_index import index_of, is_plain

# Rounded correctly by IEEE 754, so vectors and single values give the same bits.
_EXACT = (
    "float", "double", "long", "int", "bool",
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "neg", "abs", "clamp", "sqrt",
)  # fmt: skip
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip
# Gives the value for a batch from the values of names and the index.
_Way = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


class _Refused(Exception):
    """Not straight."""


def reader_of(dataset: Any) -> Callable[[Sequence[int]], Any] | None:
    """What gives a batch of rows as ``default_collate`` would; ``None``: not straight."""
    found = inspect.getattr_static(type(dataset), "__getitem__", None)
    if not isinstance(found, FunctionType):
        return None
    try:
        names, returned = _Straight(found).ways()
    except (_Refused, OSError, TypeError, SyntaxError):
        return None

    def read(places: Sequence[int]) -> Any:
        tensors = _tensors_of(dataset, names)
        if tensors is None:
            return None
        index = index_of(places, min(len(t) for t in tensors.values()))
        if index is None:
            return None
        made = [way(tensors, index).contiguous() for way in returned]
        return made if returned.is_tuple else made[0]

    return read


def _tensors_of(dataset: Any, names: set[str]) -> dict[str, torch.Tensor] | None:
    """The tensors now; ``None``: one is something else, or not simply an attribute."""
    found = {}
    for name in names:
        value = vars(dataset).get(name)
        if hasattr(type(dataset), name) or not is_plain(value):
            return None
        found[name] = value
    return found or None


class _Returned(list[_Way]):
    """Ways of what is returned. is_tuple: in a tuple, else alone."""

    is_tuple = False


class _Straight:
    """Reads a function."""

    def __init__(self, function: FunctionType) -> None:
        code = function.__code__
        if (
            code.co_argcount != 2
            or code.co_kwonlyargcount
            or code.co_freevars
            or code.co_flags & 12
        ):
            raise _Refused
        self._self, self._index = code.co_varnames[:2]
        self._body = _body_of(code, inspect.getsource(function))
        self._names: set[str] = set()
        self._locals: dict[str, _Way] = {}

    def ways(self) -> tuple[set[str], _Returned]:
        """Names of the tensors of ``self``, and what is returned."""
        *before, last = self._body
        for statement in before:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # Its docstring.
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                raise _Refused
            self._assign(statement.targets[0], statement.value)
        if not isinstance(last, ast.Return) or last.value is None:
            raise _Refused
        is_tuple = isinstance(last.value, ast.Tuple)
        parts = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        returned = _Returned(self._way(part) for part in parts)
        returned.is_tuple = is_tuple
        return self._names, returned

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            if len(target.elts) != len(value.elts):
                raise _Refused
            # All are made before one is named.
            ways = [self._way(part) for part in value.elts]
            for part, way in zip(target.elts, ways, strict=True):
                self._name(part, way)
            return
        self._name(target, self._way(value))

    def _name(self, target: ast.expr, way: _Way) -> None:
        if not isinstance(target, ast.Name) or target.id in (self._self, self._index):
            raise _Refused
        self._locals[target.id] = way

    def _way(self, node: ast.expr) -> _Way:
        if isinstance(node, ast.Name) and node.id in self._locals:
            return self._locals[node.id]
        if isinstance(node, ast.Subscript):
            return self._row(node)
        if isinstance(node, ast.BinOp):
            return self._operation(node)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and not node.keywords
        ):
            of = self._way(node.func.value)
            return _method(of, node.func.attr, [_constant(argument) for argument in node.args])
        raise _Refused

    def _row(self, node: ast.Subscript) -> _Way:
        of, index = node.value, node.slice
        if not (isinstance(index, ast.Name) and index.id == self._index):
            raise _Refused
        if not (isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name)):
            raise _Refused
        if of.value.id != self._self:
            raise _Refused
        name = of.attr
        self._names.add(name)
        return lambda tensors, index: tensors[name].index_select(0, index)

    def _operation(self, node: ast.BinOp) -> _Way:
        operation = _OPERATORS.get(type(node.op))
        if operation is None:
            raise _Refused
        if isinstance(node.right, (ast.Constant, ast.UnaryOp)):
            of, number = self._way(node.left), _constant(node.right)
            return lambda tensors, index: operation(of(tensors, index), number)
        of, number = self._way(node.right), _constant(node.left)
        return lambda tensors, index: operation(number, of(tensors, index))


def _method(of: _Way, name: str, arguments: list[Any]) -> _Way:
    if name in _EXACT:
        return lambda tensors, index: getattr(of(tensors, index), name)(*arguments)
    whole = all(type(argument) is int for argument in arguments)
    if name == "unsqueeze" and whole and len(arguments) == 1 and arguments[0] >= 0:
        return lambda tensors, index: of(tensors, index).unsqueeze(arguments[0] + 1)
    if name in ("view", "reshape") and whole and arguments:
        return lambda tensors, index: of(tensors, index).reshape(len(index), *arguments)
    if name == "flatten" and not arguments:
        return lambda tensors, index: of(tensors, index).reshape(len(index), -1)
    raise _Refused


def _constant(node: ast.expr) -> int | float:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise _Refused from None
    if type(value) not in (int, float):
        raise _Refused
    number: int | float = value
    return number


def _body_of(code: CodeType, source: str) -> list[ast.stmt]:
    """The statements of a function, if this source is still what it was made from."""
    module = ast.parse(textwrap.dedent(source))
    function = module.body[0]
    if (
        len(module.body) != 1
        or not isinstance(function, ast.FunctionDef)
        or function.decorator_list
    ):
        raise _Refused
    made = [c for c in compile(module, "", "exec").co_consts if isinstance(c, CodeType)]
    if not made or not _is_alike(made[0], code):
        raise _Refused
    return function.body


def _is_alike(a: CodeType, b: CodeType) -> bool:
    parts = ("co_code", "co_names", "co_consts", "co_varnames", "co_argcount")
    return all(getattr(a, part) == getattr(b, part) for part in parts)
