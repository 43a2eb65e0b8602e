"""What a reader gives the packer: shapes and types before the run, then chunks of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Chunk = tuple[Array, Array]

# Small enough that reading never shows in resident memory, large enough that Python does not.
CHUNK_BYTES = 1024**2
MAX_CHUNK_ROWS = 65536


@dataclass(frozen=True)
class ArraySpec:
    """Shape and element type of one sample, or of one target, without the batch dimension."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as the reader yields it."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class SampleSource(Protocol):
    """A reader. It states what it will yield, so that storage is planned before it is filled."""

    @property
    def description(self) -> str:
        """Where the samples come from, for reports."""

    @property
    def num_samples(self) -> int:
        """Samples that ``chunks`` yields in all."""

    @property
    def x(self) -> ArraySpec:
        """One sample."""

    @property
    def y(self) -> ArraySpec:
        """One target."""

    def chunks(self) -> Iterator[Chunk]:
        """Pairs ``x [k, *x.shape], y [k, *y.shape]`` in the order of the data.

        Raises:
            DataError: the data is damaged or not what ``x`` and ``y`` said.
        """


def chunk_rows(*specs: ArraySpec) -> int:
    """Rows that make a chunk of about ``CHUNK_BYTES``; at least 1."""
    row_bytes = max(1, sum(spec.row_bytes for spec in specs))
    return max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // row_bytes))
