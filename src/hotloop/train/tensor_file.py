"""Tensors to a safetensors file from where they lie, without a second copy of them.

The format (safetensors, "Format" in its README): 8 bytes length of the header, little-endian; the
header, JSON padded with spaces to a multiple of 8; then the raw bytes of all tensors without a
gap. ``safetensors.torch.save_file`` writes the same, but makes its own system calls, which no
test could fail one by one, and copies what is not contiguous all at once. Files are read back
by the safetensors library.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError, SealedError
from .system_calls import Files, closing, write_all

CHUNK_BYTES = 4 * 1024**2
MAPPED_BYTES = 64 * 1024**2

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_HEADER_BYTES = 100 * 1000**2  # As the safetensors library has it.


def check_tensors(group: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Whether all of a group can be written.

    Raises:
        CheckpointError: names the first that cannot, and why.
    """
    for name, tensor in tensors.items():
        where = f"{name!r} in group {group!r}"
        if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
            raise CheckpointError(
                "a tensor's name must be a Unicode text and not __metadata__", got=where
            )
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                "a tensor group must hold tensors alone",
                got=f"{where} of type {type(tensor).__name__}",
                next_step="encode other state with split_state",
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                "a checkpoint holds dense tensors with values, of a dtype safetensors knows",
                got=f"{where}: {tensor.dtype}, {tensor.layout}, on {tensor.device}",
            )


def write_tensors(files: Files, path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write a new file and sync it: its size in bytes and its sha256 in hexadecimal.

    Values and shapes are kept, strides are not: a channels_last tensor is written row-major. A
    tensor that lies where another of the same file lies, with the same shape and strides (tied
    weights), is written once; the header's metadata maps its name to the other's, as
    ``safetensors.torch.save_model`` does.

    Takes at most ``extra_bytes`` of memory beside the tensors themselves.

    Raises:
        OSError: from the system.
    """
    kept, aliases = _deduplicate(tensors)
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    order = sorted(kept, key=lambda name: (-kept[name].itemsize, name))
    # One for the whole file: many of a few MiB, freed in turn, are kept by the allocator.
    staging = torch.empty(extra_bytes(kept), dtype=torch.uint8)
    digest = hashlib.sha256()
    size = 0
    with closing(files, files.create(path)) as fd:
        chunks = itertools.chain.from_iterable(_chunks(kept[name], staging) for name in order)
        for chunk in itertools.chain([memoryview(_header(kept, order, aliases))], chunks):
            write_all(files, fd, chunk)
            digest.update(chunk)
            size += len(chunk)
        files.fsync(fd)
    return size, digest.hexdigest()


def extra_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Most memory that writing these tensors takes beside them, without the header.

    Nothing for contiguous CPU tensors, which are written from where they lie. Others are copied
    slice by slice along their first dimension: ``CHUNK_BYTES``, or one slice where it is larger.
    """
    return max((_slice_bytes(t) for t in tensors.values() if not _is_direct(t)), default=0)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_direct(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _slice_bytes(tensor: torch.Tensor) -> int:
    size = tensor.numel() * tensor.itemsize
    rows = tensor.shape[0] if tensor.ndim else 1
    return min(size, max(CHUNK_BYTES, size // max(rows, 1)))


def _deduplicate(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, and the names of those that are another one again."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        place = (
            tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(),
            tensor.is_conj(), tensor.is_neg(),
        )  # fmt: skip
        # Tensors without elements have no address to tell them apart; "format" is not ours to use.
        if place in seen and tensor.numel() and name != "format":
            aliases[name] = seen[place]
        else:
            seen.setdefault(place, name)
            kept[name] = tensor.detach()
    return kept, aliases


def _header(
    tensors: Mapping[str, torch.Tensor], order: list[str], aliases: Mapping[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **aliases}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: torch.Tensor, staging: torch.Tensor) -> Iterator[memoryview]:
    """The elements in row-major order as pieces of raw bytes, each gone when the next comes."""
    if tensor.numel() == 0:
        return
    if _is_direct(tensor):
        data = _raw(tensor)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
        return
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    rows_per_slice = max(1, CHUNK_BYTES // (rows[0].numel() * rows.itemsize))
    for first in range(0, len(rows), rows_per_slice):
        part = rows[first : first + rows_per_slice]
        ordered = staging[: part.numel() * part.itemsize].view(part.dtype).view(part.shape)
        ordered.copy_(part)
        yield _raw(ordered)


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor where they lie."""
    # as_strided, because one element counts as contiguous whatever its stride, and flattens so.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file in memory of their own, tied names tied again.

    At its peak takes ``MAPPED_BYTES`` and one tensor more than the tensors themselves.

    Raises:
        CheckpointError: not a safetensors file, or an alias of a tensor that is not there.
        OSError: from the system.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    names: list[str] | None = None
    try:
        while names is None or names:
            # Opened anew every so often: pages of the mapping count as ours until it is closed.
            with safe_open(str(path), framework="pt", device="cpu") as file:
                if names is None:
                    names, metadata = list(file.keys()), file.metadata() or {}
                mapped_bytes = 0
                while names and mapped_bytes < MAPPED_BYTES:
                    # The library hands out windows into the mapping, and a later change of the
                    # file would show through; hence a copy.
                    tensor = file.get_tensor(name := names.pop(0)).clone()
                    mapped_bytes += tensor.nbytes
                    tensors[name] = tensor
    except SafetensorError as error:
        raise CheckpointError("a tensor file must be safetensors", got=error) from None
    return _tied(tensors, metadata)


def read_tensors(file: io.BufferedReader) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors stream, read to where they stay, tied names tied again.

    Raises:
        CheckpointError: not safetensors as ``write_tensors`` writes it. OSError: from the system.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        at = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            start, end = entry["data_offsets"]
            if start != at or end - start != tensor.nbytes:
                raise ValueError(f"offsets of {name}")
            if tensor.nbytes and file.readinto(_raw(tensor)) != tensor.nbytes:
                raise ValueError(f"{name} ends early")
            tensors[name], at = tensor, end
        if file.read(1):
            raise ValueError("bytes after the last tensor")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, SealedError):
            raise
        raise CheckpointError("a tensor file must be safetensors", got=error) from None
    return _tied(tensors, metadata)


def _tied(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    aliases = {name: kept for name, kept in metadata.items() if (name, kept) != ("format", "pt")}
    for name, kept in aliases.items():
        if name in tensors or kept not in tensors:
            raise CheckpointError("a tied name must tie to a tensor", got=f"{name!r} to {kept!r}")
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}
