"""Operations of an element-wise program; ``calls.elementwise`` runs one.

``x.mul(2).add(b).relu()`` over tensors 0 (x), 1 (b) and 2 (the result)::

    Operation("load", 0, 0)
    Operation("mul", 0, 0, constant=2.0)
    Operation("load", 1, 1)
    Operation("add", 0, 0, 1)
    Operation("relu", 0, 0)
    Operation("store", 2, 0)
"""

from __future__ import annotations

from typing import NamedTuple

# In the order of Opcode in cpp/elementwise.cpp. Comparisons give 1.0 or 0.0. NaN, infinity and zero
# are as in torch; max and min give NaN where either has one.
OPERATIONS = (
    "load",  # out = tensor a.
    "store",  # Tensor out = a.
    "constant",  # out = constant.
    "add",
    "sub",
    "mul",
    "div",
    "max",
    "min",
    "gt",
    "ge",
    "lt",
    "le",
    "eq",
    "ne",
    "select",  # out = c != 0 ? a : b.
    "fma",  # out = a b + c.
    "threshold",  # out = b <= constant ? 0 : a.
    "neg",
    "abs",
    "sqr",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "exp",
    "log",
    "tanh",
    "sigmoid",
    "erf",
    "relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "pow",  # out = a to the power of constant, a whole number from -64 to 64.
)


class Operation(NamedTuple):
    """One operation: ``out``, ``a``, ``b`` and ``c`` are registers 0 to 15.

    -1 for ``a``, ``b`` or ``c`` stands for ``constant``.
    """

    name: str
    out: int
    a: int = -1
    b: int = -1
    c: int = -1
    constant: float = 0.0
