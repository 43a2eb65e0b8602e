"""NPZ archives, streamed: neither array is ever whole in memory, and nothing is unpickled.

Which arrays are the samples and targets: ``x_train``/``y_train`` and ``train_images``/
``train_labels`` (with ``test`` for the test split) if there, else the first pair present of ``x``/
``y``, ``X``/``Y``, ``X``/``y``, ``images``/``labels``, ``data``/``target``, ``data``/``labels``,
``features``/``labels``, ``arr_0``/``arr_1``.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import DataError, SealedError
from ..sealed import Sealed
from .source import Array, ArraySpec, Chunk, chunk_rows

_PAIRS = (
    ("x", "y"), ("X", "Y"), ("X", "y"), ("images", "labels"), ("data", "target"),
    ("data", "labels"), ("features", "labels"), ("arr_0", "arr_1"),
)  # fmt: skip
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Member:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran_order: bool


class NpzSource:
    """Two arrays of an ``.npz`` file.

    Args:
        path: the file.
        split: ``"train"`` or ``"test"``, for archives that name their arrays so.

    Raises:
        DataError: no such file, not an NPZ archive, no pair of known names, arrays of objects, or
            of different lengths.
    """

    def __init__(self, path: Path | Sealed, *, split: str = "train") -> None:
        self._path = path
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                names = {n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")}
                pair = _pick(names, split)
                if pair is None:
                    raise DataError(
                        f"{path} must hold a pair of arrays named x and y, or as in docs/data.md",
                        got=", ".join(sorted(names)) or "no arrays",
                        next_step="save it with numpy.savez(file, x=..., y=...)",
                    )
                self._x, self._y = (_read_header(archive, name, path) for name in pair)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except (DataError, SealedError):
            raise
        except OSError as error:
            raise DataError(f"{path} cannot be read", got=error.strerror or error) from error
        except _DAMAGE as error:
            raise DataError(f"{path} is not a sound NPZ archive", got=error) from error
        if self._x.shape[0] != self._y.shape[0]:
            raise DataError(
                f"{self._x.name} and {self._y.name} in {path} must have the same length",
                got=f"{self._x.shape[0]} and {self._y.shape[0]}",
            )
        self.num_samples = self._x.shape[0]
        self.x = ArraySpec(self._x.shape[1:], self._x.dtype)
        self.y = ArraySpec(self._y.shape[1:], self._y.dtype)
        self.description = f"{self.num_samples:,} samples of {path}"

    def chunks(self) -> Iterator[Chunk]:
        """Slices of the two arrays, read side by side; see ``SampleSource``."""
        rows = chunk_rows(self.x, self.y)
        try:
            with self._path.open("rb") as file, zipfile.ZipFile(file) as archive:
                pairs = (_chunks(archive, member, rows) for member in (self._x, self._y))
                yield from zip(*pairs, strict=True)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read", got=error.strerror or error) from error
        except (DataError, SealedError):
            raise
        except _DAMAGE as error:
            raise DataError(f"{self._path} is damaged", got=error) from error


def _pick(names: set[str], split: str) -> tuple[str, str] | None:
    marked = ((f"x_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels"))
    return next((pair for pair in (*marked, *_PAIRS) if names >= set(pair)), None)


def _read_header(archive: zipfile.ZipFile, name: str, path: Path | Sealed) -> _Member:
    with archive.open(f"{name}.npy") as stream:
        shape, fortran_order, dtype = _parse_header(stream)
    if dtype.hasobject:
        raise DataError(
            f"{name} in {path} must hold numbers; Python objects are never unpickled",
            got=dtype,
            next_step="save it as a plain numeric array",
        )
    if not shape:
        raise DataError(f"{name} in {path} must have a first dimension that counts samples")
    return _Member(name, shape, dtype, fortran_order)


def _parse_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    # Version 3 differs only in the names of structured types, which are no numbers.
    raise ValueError(f"NPY version {version[0]}.{version[1]}")


def _chunks(archive: zipfile.ZipFile, member: _Member, rows: int) -> Iterator[Array]:
    with archive.open(f"{member.name}.npy") as stream:
        if member.fortran_order:
            # Rows of a column-major array are scattered over the file: only it is read whole.
            array = np.lib.format.read_array(stream, allow_pickle=False)
            for start in range(0, len(array), rows):
                yield array[start : start + rows]
            return
        _parse_header(stream)
        row_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize
        for start in range(0, member.shape[0], rows):
            count = min(rows, member.shape[0] - start)
            data = stream.read(count * row_bytes)
            if len(data) < count * row_bytes:
                raise ValueError(f"{member.name} ends inside row {start + count}")
            chunk = np.frombuffer(data, member.dtype).reshape(count, *member.shape[1:])
            yield chunk.astype(member.dtype.newbyteorder("="), copy=False)
        # Reading to the end makes zipfile compare the checksum.
        if stream.read(1):
            raise ValueError(f"{member.name} has trailing bytes")
