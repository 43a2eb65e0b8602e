"""Rows into a batch, compiled: from memory, or from a file without an interpreted call for each."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..machine import native

# Below so many bytes waking a second thread costs more than it brings.
_ONE_THREAD_BYTES = 128 * 1024
# As rows.cpp has them.
_SHORT, _ERRNO = -2, -10


def copy_rows(
    rows: torch.Tensor, indices: torch.Tensor, out: torch.Tensor, table: torch.Tensor | None = None
) -> bool:
    """Copy ``rows[indices]`` to ``out``, through ``table`` where there is one.

    Threads other than the main one copy alone: OpenMP would give each a team of its own, which
    waits for work by spinning.

    Args:
        rows: ``[n, ...]``, dense.
        indices: int64 ``[k]``.
        out: ``[k, ...]``, each row dense, rows may be apart. With ``table`` float32, else like
            ``rows``.
        table: float32 ``[channels, 256]``: what the bytes of each leading slice of a row stand for.

    Returns:
        Whether it was done; ``False``: not these layouts or types, or no compiler here, and
        nothing was written.

    Raises:
        IndexError: an index is outside the rows.
    """
    library = native_part()
    wanted = rows.dtype if table is None else torch.float32
    if library is None or out.dtype != wanted or not (rows.is_contiguous() and _rows_dense(out)):
        return False
    row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
    _checked(
        library.hotloop_copy_rows(
            rows.data_ptr(), *_arguments(len(rows), row_bytes, indices, out, table)
        ),
        indices,
        len(rows),
    )
    return True


def read_rows(
    fd: int,
    num_rows: int,
    dtype: torch.dtype,
    indices: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
) -> bool:
    """The same from a file of ``num_rows`` dense rows of ``dtype``; see ``copy_rows``.

    Raises:
        IndexError: an index is outside the rows. EOFError: the file is too short.
        OSError: it cannot be read.
    """
    library = native_part()
    wanted = dtype if table is None else torch.float32
    if library is None or out.dtype != wanted or not _rows_dense(out):
        return False
    row_bytes = math.prod(out.shape[1:]) * dtype.itemsize
    result = library.hotloop_read_rows(fd, *_arguments(num_rows, row_bytes, indices, out, table))
    if result == _SHORT:
        raise EOFError
    if result <= _ERRNO:
        raise OSError(_ERRNO - result, os.strerror(_ERRNO - result))
    _checked(result, indices, num_rows)
    return True


def _arguments(
    num_rows: int,
    row_bytes: int,
    indices: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor | None,
) -> tuple[int | None, ...]:
    """What both calls take, in their order."""
    assert indices.is_contiguous()
    assert indices.dtype == torch.int64
    alone = (
        len(indices) * row_bytes < _ONE_THREAD_BYTES
        or threading.current_thread() is not threading.main_thread()
    )
    return (
        num_rows,
        row_bytes,
        indices.data_ptr(),
        len(indices),
        out.data_ptr(),
        out.stride(0) * out.element_size(),
        None if table is None else table.data_ptr(),
        1 if table is None else len(table),
        1 if alone else torch.get_num_threads(),
    )


def _checked(result: int, indices: torch.Tensor, num_rows: int) -> None:
    if result >= 0:
        raise IndexError(
            f"row indices must be between 0 and {num_rows - 1} (got: {indices[result].item()})"
        )


def byte_table(
    scaling: tuple[torch.Tensor, torch.Tensor] | float | None, row_shape: tuple[int, ...]
) -> torch.Tensor | None:
    """What each byte becomes under a divisor or factor and offset, float32 ``[channels, 256]``.

    The same operations as on a batch, so the same bits. ``None``: the factors differ within a
    leading slice of a row.
    """
    values = torch.arange(256, dtype=torch.float32)
    if not isinstance(scaling, tuple):
        return (values if scaling is None else values.div_(scaling)).view(1, 256)
    factor, offset = (torch.as_tensor(t, dtype=torch.float32) for t in scaling)
    channels = max(factor.numel(), offset.numel())
    leading = (channels, *[1] * (len(row_shape) - 1))
    alike = all(tuple(t.shape) == leading or t.numel() == 1 for t in (factor, offset))
    if not alike or (channels > 1 and channels != row_shape[0]):
        return None
    table = values.repeat(channels, 1)
    return table.mul_(factor.reshape(-1, 1)).add_(offset.reshape(-1, 1))


def _rows_dense(out: torch.Tensor) -> bool:
    return len(out) == 0 or out[0].is_contiguous()


_LOCK = threading.Lock()


def native_part() -> ctypes.CDLL | None:
    """The compiled part, or ``None`` where it cannot be compiled."""
    with _LOCK:  # Who comes while it is compiled waits for it.
        return _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    try:
        library = native.load(Path(__file__).parent / "rows.cpp", flags=("-fopenmp",))
    except RunError:
        return None
    number, address, count = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    rest: list[Any] = [number, number, address, number, address, number, address, number, count]
    for call, first in ((library.hotloop_copy_rows, address), (library.hotloop_read_rows, count)):
        call.argtypes = [first, *rest]
        call.restype = number
    return library
