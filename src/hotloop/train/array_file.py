"""NumPy arrays to a safetensors file and back, in processes without torch.

Files are the same as those of ``tensor_file`` byte for byte, but that no name is tied to another.
What is read is checked as it is read: offsets that overlap, leave a gap or lie outside the file, a
dtype or shape that does not fit them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from ..errors import CheckpointError
from .system_calls import Files, closing, write_all

CHUNK_BYTES = 4 * 1024**2
_MAX_HEADER_BYTES = 16 * 1024**2
DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {name: numpy.dtype(dtype) for dtype, name in DTYPE_NAMES.items()}


def check_tensors(group: str, tensors: Mapping[str, numpy.ndarray]) -> None:
    """Whether all of a group can be written.

    Raises:
        CheckpointError: names the first that cannot.
    """
    for name, array in tensors.items():
        if not isinstance(array, numpy.ndarray) or array.dtype.name not in DTYPE_NAMES:
            raise CheckpointError(
                "a tensor group must hold arrays of a dtype that safetensors knows",
                got=f"{name!r} in group {group!r}",
            )


def write_tensors(
    files: Files, path: Path, tensors: Mapping[str, numpy.ndarray]
) -> tuple[int, str]:
    """Write a new file and sync it: its size in bytes and its sha256 in hexadecimal.

    Arrays that are not C-contiguous are copied a few MiB at a time.

    Raises:
        OSError: from the system.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    digest, size = hashlib.sha256(), 0
    with closing(files, files.create(path)) as fd:
        for chunk in _file_chunks(tensors, order):
            write_all(files, fd, chunk)
            digest.update(chunk)
            size += len(chunk)
        files.fsync(fd)
    return size, digest.hexdigest()


def _file_chunks(tensors: Mapping[str, numpy.ndarray], order: list[str]) -> Iterator[memoryview]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        array = tensors[name]
        start, end = end, end + array.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        yield from _chunks(tensors[name])


def _chunks(array: numpy.ndarray) -> Iterator[memoryview]:
    """The elements in row-major order as pieces of raw bytes."""
    if array.size == 0:
        return
    if array.flags.c_contiguous:
        raw = memoryview(array.reshape(-1).view(numpy.uint8).data)
        for start in range(0, len(raw), CHUNK_BYTES):
            yield raw[start : start + CHUNK_BYTES]
        return
    rows = max(1, CHUNK_BYTES // max(1, array[0].nbytes))
    for first in range(0, len(array), rows):
        part = numpy.ascontiguousarray(array[first : first + rows])
        yield memoryview(part.reshape(-1).view(numpy.uint8).data)


def load_tensors(path: Path) -> dict[str, numpy.ndarray]:
    """Arrays of a file in memory of their own.

    Raises:
        CheckpointError: not a safetensors file.
        OSError: from the system.
    """
    loaded = {}
    with path.open("rb", buffering=0) as file:
        entries, begin = _read_header(file)
        for name, (dtype, shape, start) in entries.items():
            array = loaded[name] = numpy.empty(shape, dtype)
            file.seek(begin + start)
            _fill(file, array)
    return loaded


def shapes_in(path: Path) -> dict[str, tuple[numpy.dtype[Any], tuple[int, ...]]]:
    """Dtype and shape of each array of a file.

    Raises:
        CheckpointError: not a safetensors file.
        OSError: from the system.
    """
    with path.open("rb", buffering=0) as file:
        return {name: entry[:2] for name, entry in _read_header(file)[0].items()}


def read_into(path: Path, arrays: Mapping[str, numpy.ndarray]) -> None:
    """Read arrays of a file to where they shall lie, whatever their strides.

    Raises:
        CheckpointError: not a safetensors file, or one without such an array.
        OSError: from the system.
    """
    with path.open("rb", buffering=0) as file:
        entries, begin = _read_header(file)
        for name, array in arrays.items():
            found = entries.get(name)
            if found is None or found[:2] != (array.dtype, array.shape):
                raise CheckpointError(
                    f"{path.name} must hold {name} {array.dtype} {list(array.shape)}",
                    got="none" if found is None else f"{found[0]} {list(found[1])}",
                )
            file.seek(begin + found[2])
            if array.flags.c_contiguous:
                _fill(file, array)
            else:
                whole = numpy.empty(array.shape, array.dtype)
                _fill(file, whole)
                array[...] = whole


def _fill(file: Any, array: numpy.ndarray) -> None:
    raw = memoryview(array.reshape(-1).view(numpy.uint8).data) if array.size else memoryview(b"")
    while raw:
        got = file.readinto(raw)
        if not got:
            raise CheckpointError("a tensor file must be whole", got="one that ends early")
        raw = raw[got:]


Entry = tuple["numpy.dtype[Any]", tuple[int, ...], int]


def _read_header(file: Any) -> tuple[dict[str, Entry], int]:
    """Dtype, shape and offset of each array, and where the first begins."""
    size_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size_bytes - 8):
        raise _damaged(f"a header of {length} bytes")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {str(name): _entry(value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(f"{type(error).__name__} in its header") from None
    end = 0
    for dtype, shape, start in sorted(entries.values(), key=lambda entry: entry[2]):
        if start != end:
            raise _damaged("a gap or an overlap")
        end += math.prod(shape) * dtype.itemsize
    if end != size_bytes - 8 - length:
        raise _damaged(f"{size_bytes} bytes")
    return entries, 8 + length


def _entry(value: Mapping[str, Any]) -> Entry:
    if set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged("an entry of other fields")
    dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
    start, end = value["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)) or len(shape) > 32:
        raise _damaged("a size that is no whole number")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise _damaged("a shape that does not fit its bytes")
    return dtype, shape, start


def _damaged(got: str) -> CheckpointError:
    return CheckpointError("a tensor file must be safetensors", got=got)
