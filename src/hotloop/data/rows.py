"""Rows into a batch: from memory, or from a file without an interpreted call for each."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from typing import Any

import torch

from .. import kernels
from ..kernels import binding

# Below so many bytes waking a second thread costs more than it brings.
_ONE_THREAD_BYTES = 128 * 1024
# As RowCopy has it.
_SHORT = -1


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
        Whether it was done; ``False``: not these layouts or types, or no kernels here, and
        nothing was written.

    Raises:
        IndexError: an index is outside the rows.
    """
    wanted = rows.dtype if table is None else torch.float32
    if not (kernels.is_available() and out.dtype == wanted and rows.is_contiguous()):
        return False
    if not _rows_dense(out):
        return False
    row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
    copy = _row_copy(len(rows), row_bytes, indices, out, table)
    copy.rows = rows.data_ptr()
    _run(copy, indices)
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
    wanted = dtype if table is None else torch.float32
    if not (kernels.is_available() and out.dtype == wanted and _rows_dense(out)):
        return False
    row_bytes = math.prod(out.shape[1:]) * dtype.itemsize
    copy = _row_copy(num_rows, row_bytes, indices, out, table)
    copy.fd = fd
    _run(copy, indices)
    if copy.file_error == _SHORT:
        raise EOFError
    if copy.file_error:
        raise OSError(copy.file_error, os.strerror(copy.file_error))
    return True


def _row_copy(
    num_rows: int,
    row_bytes: int,
    indices: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor | None,
) -> Any:
    """All but where the rows are."""
    assert indices.is_contiguous()
    assert indices.dtype == torch.int64
    alone = (
        len(indices) * row_bytes < _ONE_THREAD_BYTES
        or threading.current_thread() is not threading.main_thread()
    )
    return binding.RowCopy(
        num_rows=num_rows,
        row_bytes=row_bytes,
        indices=indices.data_ptr(),
        count=len(indices),
        out=out.data_ptr(),
        out_step_bytes=out.stride(0) * out.element_size(),
        table=None if table is None else table.data_ptr(),
        channels=1 if table is None else len(table),
        num_threads=1 if alone else torch.get_num_threads(),
    )


def _run(copy: Any, indices: torch.Tensor) -> None:
    kernels.use_torch()
    kernels.call("hotloop_copy_rows", ctypes.byref(copy))
    if copy.bad_index >= 0:
        raise IndexError(
            f"row indices must be between 0 and {copy.num_rows - 1} "
            f"(got: {indices[copy.bad_index].item()})"
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


def look_up(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What bytes stand for.

    Args:
        values: 0 to 255 in any type, ``[n, ...]``; ``[n, channels, ...]`` where the table has
            several rows.
        table: float32 ``[channels, 256]``.
    """
    places = values.long()
    if len(table) == 1:
        return table[0][places]
    channels = torch.arange(len(table)).view(-1, *[1] * (values.dim() - 2))
    return table[channels, places]


def _rows_dense(out: torch.Tensor) -> bool:
    return len(out) == 0 or out[0].is_contiguous()
