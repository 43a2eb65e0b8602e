"""Operations on lists of tensors (``torch._foreach_*``) as one operation for each tensor.

On the CPU torch computes them one by one too; as one call they would hide each gradient that
``clip_grad_norm_`` scales from the passes.
"""

from __future__ import annotations

from typing import Any

import torch

from .recording import Entry

_aten: Any = torch.ops.aten
_OVERLOADS = {"Scalar": "Scalar", "ScalarList": "Scalar", "List": "Tensor", "Tensor": "Tensor"}
_ARITHMETIC = ("add", "sub", "mul", "div", "lerp")
# Without a second operand, or with one that the single operation takes by another name.
_OTHERS = ("copy", "zero", "neg", "abs", "sqrt", "exp", "reciprocal", "clamp_min", "clamp_max")


def singles(entry: Entry) -> list[Entry]:
    """The operations that an entry stands for; the entry itself where it is one."""
    name = entry.op._schema.name.split("::")[1]
    if not name.startswith("_foreach_"):
        return [entry]
    name, overload = name.removeprefix("_foreach_"), entry.op._overloadname
    plain = name.removesuffix("_")
    if name == "norm":
        op = _aten.linalg_vector_norm.default
    elif plain in _ARITHMETIC and overload in _OVERLOADS:
        op = getattr(getattr(_aten, name), _OVERLOADS[overload])
    elif plain in _OTHERS and overload in ("default", "Scalar"):
        op = getattr(_aten, name).default
    else:
        return [entry]
    found = []
    for number in range(len(entry.args[0])):
        args = tuple(a[number] if isinstance(a, tuple) else a for a in entry.args)
        if name == "norm":
            args = (*args[:2], *((2,) if len(args) == 1 else ()), None, False)
        results = args[0] if name.endswith("_") else entry.results[number]
        found.append(Entry(op, args, entry.kwargs, results, entry.line))
    return found
