"""The IDX format of MNIST: big-endian arrays behind a short header, gzipped or not.

Header: two zero bytes, one byte for the element type, one for the number of dimensions, then each
dimension as a 4-byte big-endian integer (the format's description is on the MNIST page of LeCun,
Cortes and Burges).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..errors import DataError
from ..sealed import Sealed
from .source import Array, ArraySpec, Chunk, chunk_rows

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Deflate cannot shrink below 1 part in 1032 (its longest match is 258 bytes in 2 bits).
_MAX_DEFLATE_RATIO = 1032
_MAX_DIMS = 32


@dataclass(frozen=True)
class IdxFile:
    """One IDX file whose header was read and found sound.

    Attributes:
        path: the file, gzipped or not; told apart by content, not by name.
        shape: all dimensions; the first counts the rows.
        dtype: element type, in this machine's byte order.
        header_bytes: length of the header.
        gzipped: whether the file is a gzip stream.
    """

    path: Path | Sealed
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header_bytes: int
    gzipped: bool

    @classmethod
    def open(cls, path: Path | Sealed) -> IdxFile:
        """Read and check the header.

        Raises:
            DataError: no such file, no IDX header, or a length that does not fit the header.
        """
        try:
            with path.open("rb") as raw:
                gzipped = raw.read(2) == b"\x1f\x8b"
                size_bytes = raw.seek(0, io.SEEK_END)
                raw.seek(0)
                with _unpacked(raw, gzipped) as stream:
                    shape, code, header_bytes = _read_header(path, stream)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, error) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read", got=error.strerror or error) from error
        dtype = np.dtype(_DTYPES[code])
        expected = header_bytes + math.prod(shape) * dtype.itemsize
        if not gzipped and size_bytes != expected:
            kind = "truncated" if size_bytes < expected else "followed by trailing bytes"
            raise DataError(
                f"{path} is {kind}: its header {list(shape)} asks for {expected} bytes",
                got=f"{size_bytes} bytes",
            )
        if gzipped and expected > size_bytes * _MAX_DEFLATE_RATIO:
            raise DataError(
                f"{path} is truncated: its header {list(shape)} asks for {expected} bytes, more "
                "than a gzip file of its length can hold",
                got=f"{size_bytes} bytes",
            )
        return cls(path, shape, dtype, header_bytes, gzipped)

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return self.shape[0]

    def chunks(self, rows: int) -> Iterator[Array]:
        """Arrays ``[k, *shape[1:]]`` of ``rows`` rows each, the last perhaps fewer.

        Raises:
            DataError: the file ends early, goes on too long, or its gzip stream is damaged.
        """
        row_shape = self.shape[1:]
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        stored = self.dtype.newbyteorder(">")
        try:
            with _open(self.path, self.gzipped) as stream:
                stream.read(self.header_bytes)
                for start in range(0, self.num_rows, rows):
                    count = min(rows, self.num_rows - start)
                    data = stream.read(count * row_bytes)
                    if len(data) < count * row_bytes:
                        got = start + len(data) // max(1, row_bytes)
                        raise DataError(
                            f"{self.path} is truncated: its header asks for {self.num_rows} rows",
                            got=f"{got} rows",
                        )
                    chunk = np.frombuffer(data, stored).reshape(count, *row_shape)
                    yield chunk.astype(self.dtype, copy=False)
                if stream.read(1):
                    raise DataError(
                        f"{self.path} has trailing bytes after the {self.num_rows} rows of its "
                        "header"
                    )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(self.path, error) from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read", got=error.strerror or error) from error


class IdxSource:
    """A file of samples and a file of labels.

    Images of one channel, ``[N, H, W]`` in the file, become samples of shape ``[1, H, W]``, as
    convolutions expect; other files keep their shape.

    Args:
        images: file of samples.
        labels: file of one integer a sample.
        num_classes: labels must be below it; ``None`` does not check.
        description: for reports; default names the folder.

    Raises:
        DataError: a file is damaged, or the two do not belong together.
    """

    def __init__(
        self,
        images: Path | Sealed,
        labels: Path | Sealed,
        *,
        num_classes: int | None = None,
        description: str | None = None,
    ) -> None:
        self._images = IdxFile.open(images)
        self._labels = IdxFile.open(labels)
        self._num_classes = num_classes
        if len(self._images.shape) < 2:
            raise DataError(f"{images} must have at least 2 dimensions", got=self._images.shape)
        if len(self._labels.shape) != 1 or self._labels.dtype.kind not in "iu":
            raise DataError(
                f"{labels} must hold one integer label a sample",
                got=f"{self._labels.dtype} {list(self._labels.shape)}",
            )
        if self._images.num_rows != self._labels.num_rows:
            raise DataError(
                f"{images} and {labels} must hold the same number of samples",
                got=f"{self._images.num_rows} images and {self._labels.num_rows} labels",
            )
        self.num_samples = self._images.num_rows
        row_shape = self._images.shape[1:]
        self.x = ArraySpec(
            (1, *row_shape) if len(row_shape) == 2 else row_shape, self._images.dtype
        )
        self.y = ArraySpec((), self._labels.dtype)
        self.description = description or f"{self.num_samples:,} samples of {images.parent}"

    def chunks(self) -> Iterator[Chunk]:
        """Pairs of images and labels; see ``SampleSource``."""
        rows = chunk_rows(self.x, self.y)
        start = 0
        pairs = zip(self._images.chunks(rows), self._labels.chunks(rows), strict=True)
        for images, labels in pairs:
            if self._num_classes is not None:
                wrong = np.flatnonzero((labels < 0) | (labels >= self._num_classes))
                if wrong.size:
                    raise DataError(
                        f"labels in {self._labels.path} must be between 0 and "
                        f"{self._num_classes - 1}",
                        got=f"{labels[wrong[0]]} for sample {start + int(wrong[0])}",
                    )
            yield images.reshape(len(images), *self.x.shape), labels
            start += len(images)


@overload
def find_idx_pair(folder: Path, split: str) -> tuple[Path, Path] | None: ...
@overload
def find_idx_pair(
    folder: Path | Sealed, split: str
) -> tuple[Path | Sealed, Path | Sealed] | None: ...
def find_idx_pair(folder: Path | Sealed, split: str) -> tuple[Path | Sealed, Path | Sealed] | None:
    """The image and label file of a split in a folder, or in its ``raw`` or ``MNIST/raw`` folder.

    File names as the MNIST mirrors and torchvision have them, ``train-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte`` with or without ``.gz``, also with a dot before ``idx`` or a prefix
    such as ``emnist-digits-``. Unpacked files go before gzipped ones.

    Args:
        folder: where to look.
        split: ``"train"`` or ``"test"``.

    Returns:
        ``(images, labels)``, or ``None`` when the folder holds neither.

    Raises:
        DataError: only one of the two is there, or several sets are.
    """
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        images = _find_one(place, split, "images")
        labels = _find_one(place, split, "labels")
        if images and labels:
            return images, labels
        if images or labels:
            missing = "labels" if images else "images"
            raise DataError(
                f"{place} has the {split} {'images' if images else 'labels'} but no {missing}",
                next_step=f"add the {missing} file beside {(images or labels or place).name}",
            )
    return None


def write_idx(path: Path, array: Array) -> None:
    """Write an array as a gzipped IDX file whose bytes depend on the array alone.

    Raises:
        DataError: the element type has no IDX code.
    """
    code = _CODES.get(array.dtype.str[1:])
    if code is None:
        raise DataError("IDX holds 8, 16 and 32 bit integers and floats", got=array.dtype)
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    data = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    # No name and no time in the gzip header: made twice with one zlib, the file is the same.
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as stream,
    ):
        stream.write(data)


def _find_one(folder: Path | Sealed, split: str, kind: str) -> Path | Sealed | None:
    marks = ("train",) if split == "train" else ("t10k", "test")
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError:
        return None
    found = [
        name
        for name in names
        if kind in name and "idx" in name and any(mark in name for mark in marks)
        if name.endswith(("ubyte", "ubyte.gz", ".idx", ".idx.gz"))
    ]
    sets = {name.removesuffix(".gz") for name in found}
    if len(sets) > 1:
        raise DataError(
            f"{folder} must hold one file of {split} {kind}",
            got=", ".join(sorted(sets)),
            next_step="move one set to a folder of its own",
        )
    # The unpacked name is a prefix of the gzipped one, so it sorts first.
    return folder / found[0] if found else None


@contextlib.contextmanager
def _open(path: Path | Sealed, gzipped: bool) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    with path.open("rb") as raw, _unpacked(raw, gzipped) as stream:
        yield stream


@contextlib.contextmanager
def _unpacked(raw: io.BufferedReader, gzipped: bool) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    if not gzipped:
        yield raw
        return
    with gzip.GzipFile(fileobj=raw) as stream:
        yield stream


def _read_header(
    path: Path | Sealed, stream: gzip.GzipFile | io.BufferedReader
) -> tuple[tuple[int, ...], int, int]:
    magic = stream.read(4)
    if len(magic) < 4:
        raise DataError(f"{path} is truncated: it ends inside the 4-byte IDX magic")
    zeros, code, num_dims = struct.unpack(">HBB", magic)
    if zeros != 0 or code not in _DTYPES or not 1 <= num_dims <= _MAX_DIMS:
        raise DataError(
            f"{path} is not an IDX file: its magic must be two zero bytes, a type and a rank",
            got=magic.hex(" "),
        )
    sizes = stream.read(4 * num_dims)
    if len(sizes) < 4 * num_dims:
        raise DataError(f"{path} is truncated: it ends inside the {num_dims} sizes of its header")
    return struct.unpack(f">{num_dims}I", sizes), code, 4 + 4 * num_dims


def _damaged(path: Path | Sealed, error: Exception) -> DataError:
    if isinstance(error, EOFError):
        return DataError(f"{path} is truncated: its gzip stream has no end")
    return DataError(f"{path} is a damaged gzip file", got=error)
