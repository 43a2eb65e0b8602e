"""What a checkpoint folder must contain, byte for byte, and whether it does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .system_calls import Files, reading

FORMAT = "hotloop checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
DOCUMENT = "document.json"
TENSOR_SUFFIX = ".safetensors"
MAX_MANIFEST_BYTES = 1024**2
# Numbers and texts only, tensors are elsewhere; a bound, so that no file makes a reader allocate.
MAX_DOCUMENT_BYTES = 64 * 1024**2

_READ_BYTES = 4 * 1024**2
_GROUP = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 (hexadecimal) that a file must have."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of one checkpoint by name: ``document.json`` and ``<group>.safetensors``."""

    step: int
    files: Mapping[str, FileRecord]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the tensor groups."""
        return tuple(n.removesuffix(TENSOR_SUFFIX) for n in self.files if n != DOCUMENT)

    def to_bytes(self) -> bytes:
        """The one JSON text of this manifest, with the sha256 of the rest of it at the end."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {
                name: {"size_bytes": record.size_bytes, "sha256": record.sha256}
                for name, record in sorted(self.files.items())
            },
        }
        digest = hashlib.sha256(_canonical(body)).hexdigest()
        return _canonical(body | {"sha256": digest})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest in these bytes.

        Raises:
            CheckpointError: it is damaged, of another version, or names a file it may not.
        """
        try:
            body = json.loads(data)
            if body["format"] != FORMAT or type(body["version"]) is not int:
                raise CheckpointError("the manifest must be of a hotloop checkpoint")
            if body["version"] != VERSION:
                raise CheckpointError(
                    f"the manifest must be of version {VERSION}",
                    got=body["version"],
                    next_step="use the release of hotloop that wrote it",
                )
            files = {name: FileRecord(**record) for name, record in body["files"].items()}
            manifest = cls(body["step"], files)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError("the manifest cannot be read", got=error) from None
        manifest._check()
        # There is one way to write a manifest, so that every changed byte shows, spaces too.
        if manifest.to_bytes() != data:
            raise CheckpointError("the manifest does not match its own sha256")
        return manifest

    def _check(self) -> None:
        if type(self.step) is not int or self.step < 0:
            raise CheckpointError("the manifest's step must be a whole number", got=self.step)
        if DOCUMENT not in self.files:
            raise CheckpointError(f"the manifest must list {DOCUMENT}")
        for name, record in self.files.items():
            if name != DOCUMENT:
                if not name.endswith(TENSOR_SUFFIX):
                    raise CheckpointError("the manifest lists a file of no known kind", got=name)
                check_group(name.removesuffix(TENSOR_SUFFIX))
            size, digest = record.size_bytes, record.sha256
            if type(size) is not int or size < 0 or type(digest) is not str:
                raise CheckpointError("a file in the manifest must have a size and a sha256")
            if not _SHA256.fullmatch(digest):
                raise CheckpointError("a sha256 has 64 hexadecimal digits", got=digest)


def check_group(name: object) -> None:
    """Whether a tensor group may have this name; it becomes the name of a file.

    Raises:
        CheckpointError: it is empty, has other than letters, digits, ``_`` and ``-``, or is long.
    """
    if not isinstance(name, str) or not _GROUP.fullmatch(name):
        raise CheckpointError(
            "a tensor group is named with up to 64 letters, digits, _ and -, a letter first",
            got=repr(name),
        )


def encode_document(document: Mapping[str, Any]) -> bytes:
    """A document as JSON, if it comes back from JSON as what it is.

    Raises:
        CheckpointError: names the path of the first value that JSON would change or refuse.
    """
    if not isinstance(document, Mapping):
        raise CheckpointError("a document must be a mapping", got=type(document).__name__)
    _check_json(dict(document), "document", 0)
    data = json.dumps(dict(document), allow_nan=False, separators=(",", ":")).encode()
    if len(data) > MAX_DOCUMENT_BYTES:
        raise CheckpointError(
            f"a document must have at most {MAX_DOCUMENT_BYTES} bytes",
            got=len(data),
            next_step="keep numbers in tensors",
        )
    return data


def read_manifest(files: Files, folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; nothing else is looked at.

    Raises:
        CheckpointError: damaged.
        OSError: missing or not readable.
    """
    with reading(files, folder / MANIFEST) as (fd, size):
        if size > MAX_MANIFEST_BYTES:
            raise CheckpointError("the manifest is too large", got=f"{size} bytes")
        return Manifest.from_bytes(_read(files, fd, size))


def check_sizes(files: Files, folder: Path, manifest: Manifest) -> None:
    """Whether every file is there in its size: cheap, and before any of them is read.

    Raises:
        CheckpointError: a size differs.
        OSError: missing or not readable.
    """
    for name, record in manifest.files.items():
        with reading(files, folder / name) as (_, size):
            if size != record.size_bytes:
                raise CheckpointError(
                    f"{name} must have {record.size_bytes} bytes", got=f"{size} bytes"
                )


def check_contents(files: Files, folder: Path, manifest: Manifest) -> None:
    """Read every file once and compare its sha256.

    By plain reads, because a bad sector below a memory mapping is a fatal signal.

    Raises:
        CheckpointError: a byte differs.
        OSError: missing or not readable.
    """
    for name, record in manifest.files.items():
        digest = hashlib.sha256()
        with reading(files, folder / name) as (fd, _):
            while data := files.read(fd, _READ_BYTES):
                digest.update(data)
        if digest.hexdigest() != record.sha256:
            raise CheckpointError(f"{name} does not match its sha256")


def read_document(files: Files, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The document, checked again on the very bytes that are parsed.

    Raises:
        CheckpointError: damaged or larger than any that was written.
        OSError: missing or not readable.
    """
    record = manifest.files[DOCUMENT]
    if record.size_bytes > MAX_DOCUMENT_BYTES:
        raise CheckpointError(f"{DOCUMENT} is too large", got=f"{record.size_bytes} bytes")
    with reading(files, folder / DOCUMENT) as (fd, _):
        data = _read(files, fd, record.size_bytes)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise CheckpointError(f"{DOCUMENT} does not match its sha256")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{DOCUMENT} cannot be read", got=error) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{DOCUMENT} must be a JSON object")
    return document


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()


def _read(files: Files, fd: int, size: int) -> bytes:
    """Up to ``size`` bytes: a file that shrinks meanwhile gives fewer."""
    parts = []
    while size and (data := files.read(fd, size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _check_json(value: Any, path: str, depth: int) -> None:
    kind = type(value)
    if depth > 256:
        raise CheckpointError("a document must not nest over 256 levels", got=path[:80])
    if value is None or kind in (bool, str):
        return
    if kind is int and abs(value) < 2**63:
        return
    if kind is float and value - value == 0.0:
        return
    if kind is list:
        for index, each in enumerate(value):
            _check_json(each, f"{path}.{index}", depth + 1)
        return
    if kind is dict and all(type(key) is str for key in value):
        for key, each in value.items():
            _check_json(each, f"{path}.{key}", depth + 1)
        return
    text = repr(value) if kind in (int, float) else kind.__name__
    raise CheckpointError(
        "a document holds None, bool, 64-bit int, finite float, str, list and dict by str",
        got=f"{text[:80]} at {path}",
        next_step="encode other state with split_state",
    )
