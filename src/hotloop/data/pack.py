"""Packing: a source of samples, read once and checked, becomes a dataset in packed storage.

What is kept: bytes stay bytes; booleans become bytes; other integers become int64 (tokens); floats
of any width become float32. Targets: integers and booleans become int64, floats float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from ..units import MIB
from .labels import LabelCounter
from .packed import PackedDataset
from .source import Array, ArraySpec, SampleSource
from .storage import Column, make_column
from .transforms import Transform

MMAP_ABOVE_BYTES = 16 * MIB
_EXTEND_ROWS = 256  # Distorting takes some twenty times the memory of the rows as stored.

# Stored samples [n, ...] and int64 positions [n] of new ones -> their samples [n, ...].
Extend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pack(
    source: SampleSource,
    *,
    num_samples: int | None = None,
    extend: Extend | None = None,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
    mmap_above_bytes: int = MMAP_ABOVE_BYTES,
    storage_folder: Path | None = None,
    description: str | None = None,
) -> PackedDataset:
    """Read a source once, chunk by chunk, into packed storage.

    Args:
        source: the reader.
        num_samples: how many to keep, from the first; default all.
        extend: makes samples beyond those of the source out of them, in turn; without it, asking
            for more is an error.
        transforms: see ``PackedDataset``.
        seed: of random transforms.
        mmap_above_bytes: larger samples (or targets) go to a file instead of memory.
        storage_folder: where that file is made; default the cache folder.
        description: instead of the source's.

    Raises:
        DataError: empty, not numbers, NaN or infinite, negative labels, too few samples, or what
            the source raises.
        StorageError: the packed samples could not be written.
    """
    total = _check_total(source, num_samples, extend)
    x_dtype, y_dtype = stored_dtype(source.x, "samples"), stored_dtype(source.y, "targets")
    if y_dtype == torch.uint8:
        y_dtype = torch.int64
    columns = [
        make_column(
            total,
            spec.shape,
            dtype,
            in_file=_column_bytes(total, spec, dtype) > mmap_above_bytes,
            folder=storage_folder,
        )
        for spec, dtype in ((source.x, x_dtype), (source.y, y_dtype))
    ]
    x, y = columns
    labels = LabelCounter()
    real = min(total, source.num_samples)
    start = 0
    for x_chunk, y_chunk in source.chunks():
        if start + len(x_chunk) > source.num_samples:
            raise DataError(f"{source.description} must yield {source.num_samples} samples")
        count = min(len(x_chunk), real - start)
        x_rows = _converted(x_chunk[:count], x_dtype, start, f"samples of {source.description}")
        y_rows = _converted(y_chunk[:count], y_dtype, start, f"targets of {source.description}")
        if y_dtype == torch.int64:
            if source.y.shape == ():
                _check_labels(y_rows, start, source.description)
            labels.look(y_rows, start)
        x.append(x_rows)
        y.append(y_rows)
        start += count
        if start == real and real < source.num_samples:
            break
    if start < real:
        raise DataError(f"{source.description} must yield {real} samples", got=start)
    if extend is not None:
        _append_extended(x, y, real, total, extend)
    counted = y_dtype == torch.int64
    return PackedDataset(
        x,
        y,
        num_samples=total,
        num_classes=labels.num_classes if counted else None,
        labels=labels.first if counted else None,
        value_scale=1.0 if source.x.dtype.kind == "b" else 1 / 255,
        description=description or _describe(source, total),
        transforms=transforms,
        seed=seed,
    )


def stored_dtype(spec: ArraySpec, what: str) -> torch.dtype:
    """The type in which values are packed; see the top of this file.

    Raises:
        DataError: not real numbers.
    """
    if spec.dtype.kind == "f":
        return torch.float32
    if spec.dtype.kind == "b" or spec.dtype == np.uint8:
        return torch.uint8
    if spec.dtype.kind in "iu":
        return torch.int64
    raise DataError(
        f"{what} must be real numbers",
        got=f"{spec.dtype} values",
        next_step="convert them to a numeric array first",
    )


def _check_total(source: SampleSource, num_samples: int | None, extend: Extend | None) -> int:
    if source.num_samples < 1:
        raise DataError("the data must have at least 1 sample", got=source.description)
    if num_samples is None:
        return source.num_samples
    if num_samples < 1:
        raise DataError("num_samples must be at least 1", got=num_samples)
    if num_samples > source.num_samples and extend is None:
        raise DataError(
            f"num_samples must be at most the {source.num_samples} there are",
            got=num_samples,
            next_step="only digits can be extended by distorted copies",
        )
    return num_samples


def _check_labels(labels: Array, start: int, where: str) -> None:
    """One label a sample is a class; where there are several, what is no class is the loss's."""
    if (labels < 0).any():
        row = int(np.flatnonzero(labels < 0)[0])
        raise DataError(
            f"class labels of {where} must be integers from 0",
            got=f"{labels[row]} for sample {start + row}",
        )


def _column_bytes(total: int, spec: ArraySpec, dtype: torch.dtype) -> int:
    return total * math.prod(spec.shape) * dtype.itemsize


def _converted(rows: Array, dtype: torch.dtype, start: int, where: str) -> Array:
    """Rows in the stored type, refused when a value cannot be kept."""
    if dtype == torch.float32:
        with np.errstate(over="ignore"):  # What overflows becomes infinite and is refused here.
            values = rows.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            bad = rows[row][~finite[row]].flat[0] if rows.ndim > 1 else rows[row]
            raise DataError(
                f"{where} must be finite float32 numbers", got=f"{bad} in sample {start + row}"
            )
        return values
    if (
        rows.dtype.kind == "u"
        and rows.dtype.itemsize == 8
        and rows.size
        and int(rows.max()) > np.iinfo(np.int64).max
    ):
        raise DataError(f"{where} must be at most 2**63 - 1", got=int(rows.max()))
    target = np.uint8 if dtype == torch.uint8 else np.int64
    return rows.astype(target, copy=False)


def _append_extended(x: Column, y: Column, real: int, total: int, extend: Extend) -> None:
    """Fill positions ``real`` to ``total`` with samples made of the real ones, each in turn."""
    for start in range(real, total, _EXTEND_ROWS):
        positions = torch.arange(start, min(start + _EXTEND_ROWS, total))
        originals = positions % real
        x_rows = torch.empty((len(positions), *x.row_shape), dtype=x.dtype)
        y_rows = torch.empty((len(positions), *y.row_shape), dtype=y.dtype)
        x.gather(originals, x_rows)
        y.gather(originals, y_rows)
        x.append(extend(x_rows, positions).numpy())
        y.append(y_rows.numpy())


def _describe(source: SampleSource, total: int) -> str:
    if total < source.num_samples:
        return f"first {total:,} of {source.description}"
    return source.description
