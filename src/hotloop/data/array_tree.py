"""Trees of NumPy arrays and torch tensors as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..memory.tree import Arguments, flatten
from .batch import describe
from .rows_source import TensorRows, specs_of


def is_arrays(data: Any) -> bool:
    """Whether data is a tuple of one or two trees of arrays, or a dict of arrays."""
    if isinstance(data, tuple):
        return len(data) in (1, 2) and all(map(_is_tree, data))
    return isinstance(data, Mapping | Arguments) and _is_tree(data)


def array_rows(data: Any) -> TensorRows:
    """The rows of ``(x, y)`` or ``(x,)``, or of a dict, which is ``(x,)``: each in its own type.

    Raises:
        DataError: arrays of objects, or of different lengths.
    """
    batch = tuple(data) if isinstance(data, tuple) else (data,)
    made = _as_tensors(batch)
    tensors, structure = flatten(made)
    lengths = {len(t) if t.dim() else None for t in tensors}
    if len(lengths) != 1 or None in lengths:
        shown = [
            line for part, name in zip(made, "xy", strict=False) for line in describe(part, name)
        ]
        raise DataError(
            "the first dimension of every array must count the samples", got=", ".join(shown)
        )
    count = len(tensors[0])
    if count < 1:
        raise DataError("the data must have at least 1 sample", got="empty arrays")
    specs_of(tensors, count)
    return TensorRows(tensors, structure, f"{count:,} samples of given arrays")


def _is_tree(value: Any) -> bool:
    """Whether there is an array in it, and nothing that is a sample by itself."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return True
    if isinstance(value, Arguments):
        return any(map(_is_tree, [*value.args, *value.kwargs.values()]))
    if isinstance(value, Mapping):
        return any(map(_is_tree, value.values()))
    return isinstance(value, tuple | list) and any(map(_is_tree, value))


def _as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _tensor(value)
    if isinstance(value, Arguments):
        named = {name: _as_tensors(part) for name, part in value.kwargs.items()}
        return Arguments(*map(_as_tensors, value.args), **named)
    if isinstance(value, Mapping):
        return {key: _as_tensors(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_as_tensors, value))
    if isinstance(value, tuple | list):
        return type(value)(map(_as_tensors, value))
    return value


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise DataError("data must not be a masked array", next_step="fill the masked values first")
    try:
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        # torch warns of memory that must not be written; packing only reads it.
        native = np.require(native, requirements=["C", "W"])
        return torch.from_numpy(native).reshape(array.shape)
    except (TypeError, ValueError):
        raise DataError(
            "arrays must hold numbers of a type that torch knows", got=f"{array.dtype} values"
        ) from None
