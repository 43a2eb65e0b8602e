"""Where packed rows lie: one aligned block in memory, or one unlinked file.

Rows in a file are fetched with ``preadv``, not through a memory mapping. A mapping counts every
page that was touched as resident, and since Linux has large folios one fault may map 2 MiB at once,
so that one shuffled batch would make a whole MNIST resident. What is read with ``preadv`` stays in
the page cache, which the kernel may drop at any time and which no process owns.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import weakref
from itertools import repeat
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..errors import DataError, StorageError
from ..machine.cache_dir import PACKED
from ..memory.arena import Arena
from ..units import format_bytes
from .rows import copy_rows, read_rows
from .source import Array


class Column(Protocol):
    """Rows of one shape and type, filled once in order, then gathered at random.

    Attributes:
        num_rows: rows there is room for.
        row_shape: shape of one row.
        dtype: type as stored.
        storage_bytes: bytes of all rows.
        resident_bytes: bytes of them that stay in this process's memory.
    """

    num_rows: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    storage_bytes: int
    resident_bytes: int

    def append(self, rows: Array | torch.Tensor) -> None:
        """Add rows ``[k, *row_shape]`` of the stored type after those already there."""

    def gather(
        self, indices: torch.Tensor, out: torch.Tensor, table: torch.Tensor | None = None
    ) -> bool:
        """Copy rows ``indices`` (int64 ``[n]``) to ``out`` (``[n, *row_shape]``, any stride, this
        type or one it converts to).

        Args:
            table: float32 ``[channels, 256]``, what stored bytes stand for: ``rows.byte_table``.

        Returns:
            Whether the table was applied.

        Raises:
            IndexError: an index is outside the rows.
        """


class MemoryColumn:
    """Rows in one block of memory that starts on a page; see ``Column``."""

    def __init__(self, num_rows: int, row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.num_rows, self.row_shape, self.dtype = num_rows, row_shape, dtype
        self.storage_bytes = num_rows * math.prod(row_shape) * dtype.itemsize
        self.resident_bytes = self.storage_bytes
        block = Arena(self.storage_bytes, align_bytes=4096).block
        self._rows = block.view(dtype).view(num_rows, *row_shape)
        self._filled = 0
        self._scratch = _Scratch(row_shape, dtype)

    def append(self, rows: Array | torch.Tensor) -> None:
        """Copy rows to the block."""
        place = self._rows[self._filled : self._filled + len(rows)]
        if isinstance(rows, torch.Tensor):
            place.copy_(rows)
        else:
            place.numpy()[...] = rows
        self._filled += len(rows)

    def gather(
        self, indices: torch.Tensor, out: torch.Tensor, table: torch.Tensor | None = None
    ) -> bool:
        """Copy rows from the block; see ``Column``."""
        if copy_rows(self._rows, indices, out, table):
            return table is not None
        if out.dtype == self.dtype:
            torch.index_select(self._rows, 0, indices, out=out)
        else:
            raw = self._scratch.rows(len(indices))
            torch.index_select(self._rows, 0, indices, out=raw)
            out.copy_(raw)
        return False


class FileColumn:
    """Rows in a file without a name, gone with the last reference to it; see ``Column``.

    Args:
        num_rows: rows there is room for.
        row_shape: shape of one row.
        dtype: type as stored.
        folder: where the file is made; default the cache folder.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(
        self,
        num_rows: int,
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        folder: Path | None = None,
    ) -> None:
        self.num_rows, self.row_shape, self.dtype = num_rows, row_shape, dtype
        self._row_bytes = math.prod(row_shape) * dtype.itemsize
        self.storage_bytes = num_rows * self._row_bytes
        self.resident_bytes = 0
        self._end_bytes = 0
        self._folder = folder
        try:
            self._folder = folder or PACKED.folder
            self._fd, name = tempfile.mkstemp(
                dir=self._folder, prefix=PACKED.pattern.removesuffix("*")
            )
            self._close = weakref.finalize(self, os.close, self._fd)
            os.unlink(name)
        except OSError as error:
            raise self._write_error(error) from error
        self._scratch = _Scratch(row_shape, dtype)

    def append(self, rows: Array | torch.Tensor) -> None:
        """Write rows at the end of the file.

        Raises:
            StorageError: the disk is full or fails.
        """
        if isinstance(rows, torch.Tensor):
            rows = rows.contiguous().view(-1).view(torch.uint8).numpy()
        left = np.ascontiguousarray(rows).data.cast("B")
        try:
            while left:
                written = os.pwrite(self._fd, left, self._end_bytes)
                self._end_bytes += written
                left = left[written:]
        except OSError as error:
            raise self._write_error(error) from error

    def gather(
        self, indices: torch.Tensor, out: torch.Tensor, table: torch.Tensor | None = None
    ) -> bool:
        """Copy rows from the file; see ``Column``.

        Raises:
            StorageError: the disk fails.
        """
        count = len(indices)
        if count == 0:
            return False
        try:
            if read_rows(self._fd, self.num_rows, self.dtype, indices, out, table):
                return table is not None
            self._gather_plainly(indices, out)
        except EOFError:
            raise StorageError(
                f"packed samples in {self._folder} must keep their length",
                got=f"{os.fstat(self._fd).st_size} of {self.storage_bytes} bytes",
            ) from None
        except OSError as error:
            raise StorageError(
                f"packed samples could not be read back from {self._folder}", got=error.strerror
            ) from error
        return False

    def _gather_plainly(self, indices: torch.Tensor, out: torch.Tensor) -> None:
        """The same without compiled code, and with conversion to ``out``'s type."""
        wanted, count = indices.tolist(), len(indices)
        if min(wanted) < 0 or max(wanted) >= self.num_rows:
            raise IndexError(f"row indices must be between 0 and {self.num_rows - 1}")
        raw = self._scratch.rows(count)
        row_bytes = self._row_bytes
        starts = (indices * row_bytes).tolist()
        got = sum(map(os.preadv, repeat(self._fd), self._scratch.buffers(count), starts))
        if got != count * row_bytes:
            raise EOFError
        out.copy_(raw)

    def _write_error(self, error: OSError) -> StorageError:
        return StorageError(
            f"{format_bytes(self.storage_bytes)} of packed samples could not be written to "
            f"{self._folder}",
            got=error.strerror,
            next_step="free space there, or set XDG_CACHE_HOME to a folder with room",
        )


def make_column(
    num_rows: int,
    row_shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    in_file: bool,
    folder: Path | None,
) -> Column:
    """An empty column in memory or in a file.

    Raises:
        DataError: rows without elements.
        StorageError: the folder cannot be written.
    """
    if math.prod(row_shape) < 1:
        raise DataError("every dimension of a sample must be at least 1", got=list(row_shape))
    if in_file:
        return FileColumn(num_rows, row_shape, dtype, folder=folder)
    return MemoryColumn(num_rows, row_shape, dtype)


class _Scratch(threading.local):
    """Room for one batch as stored, for each thread its own, kept from batch to batch."""

    def __init__(self, row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._row_shape, self._dtype = row_shape, dtype
        self._row_bytes = math.prod(row_shape) * dtype.itemsize
        self._buffers: list[list[memoryview]] = []
        self._resize(0)

    def rows(self, count: int) -> torch.Tensor:
        """Tensor ``[count, *row_shape]``."""
        if count > len(self._tensor):
            self._resize(count)
        return self._tensor if count == len(self._tensor) else self._tensor[:count]

    def buffers(self, count: int) -> list[list[memoryview]]:
        """The memory of each of the first rows, as ``preadv`` takes it."""
        if len(self._buffers) < count:
            step = self._row_bytes
            ends = range(step, len(self._tensor) * step + 1, step)
            self._buffers = [[self._bytes[end - step : end]] for end in ends]
        return self._buffers if count == len(self._buffers) else self._buffers[:count]

    def _resize(self, count: int) -> None:
        self._tensor = torch.empty((count, *self._row_shape), dtype=self._dtype)
        self._bytes = self._tensor.view(-1).view(torch.uint8).numpy().data
        self._buffers = []
