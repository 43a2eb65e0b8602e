"""NumPy and torch arrays as a source of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .source import Array, ArraySpec, Chunk, chunk_rows


class ArraySource:
    """Two arrays whose first dimension counts the samples.

    Args:
        x: NumPy array or torch tensor ``[N, ...]``, any device, any layout.
        y: the same with ``[N]`` or ``[N, ...]``.
        description: for reports.

    Raises:
        DataError: not arrays, no samples, or different lengths.
    """

    def __init__(self, x: Any, y: Any, *, description: str | None = None) -> None:
        self._x = _checked(x, "samples")
        self._y = _checked(y, "targets")
        if len(self._x) != len(self._y):
            raise DataError(
                "samples and targets must have the same length",
                got=f"{len(self._x)} samples and {len(self._y)} targets",
            )
        self.num_samples = len(self._x)
        self.x = _spec(self._x)
        self.y = _spec(self._y)
        self.description = description or f"{self.num_samples:,} samples of given arrays"

    def chunks(self) -> Iterator[Chunk]:
        """Slices of the arrays; see ``SampleSource``."""
        rows = chunk_rows(self.x, self.y)
        for start in range(0, self.num_samples, rows):
            rows_here = slice(start, start + rows)
            yield to_numpy(self._x[rows_here]), to_numpy(self._y[rows_here])


def to_numpy(value: Any) -> Array:
    """A NumPy array of a tensor, array or number, without copying where that is possible.

    bfloat16 has no NumPy type and becomes float32, which holds each of its values exactly.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bfloat16:
            value = value.float()
        array: Array = value.cpu().resolve_conj().resolve_neg().numpy()
        return array
    return np.asarray(value)


def _checked(array: Any, what: str) -> Any:
    if not isinstance(array, torch.Tensor | np.ndarray):
        raise DataError(
            f"{what} must be a NumPy array or a torch tensor", got=type(array).__qualname__
        )
    if isinstance(array, np.ma.MaskedArray):
        raise DataError(
            f"{what} must not be a masked array", next_step="fill the masked values first"
        )
    if isinstance(array, torch.Tensor) and array.layout is not torch.strided:
        raise DataError(f"{what} must be a dense tensor", got=array.layout)
    if isinstance(array, torch.Tensor):
        if array.is_meta:
            raise DataError(f"{what} must have values", got="a meta tensor")
        if array.is_floating_point() and array.itemsize == 1:
            raise DataError(
                f"{what} must be numbers of 16 bits or more, or whole numbers",
                got=array.dtype,
                next_step="call .float() on them",
            )
    if array.ndim == 0:
        raise DataError(f"{what} must have a first dimension that counts them", got="a scalar")
    return array


def _spec(array: Any) -> ArraySpec:
    if isinstance(array, torch.Tensor):
        # An empty tensor of the type answers which NumPy type it becomes.
        dtype = to_numpy(torch.empty(0, dtype=array.dtype)).dtype
    else:
        dtype = array.dtype
    return ArraySpec(tuple(array.shape[1:]), dtype)
