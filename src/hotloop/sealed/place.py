"""``Sealed``: a sealed file or folder, given where a path is expected."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import SealedError
from .counter import Counter
from .key import SealingKey
from .stream import SealedReader

SUFFIX = ".sealed"
INDEX = "index.json"
_FORMAT = "hotloop sealed folder"
_MAX_INDEX_BYTES = 64 * 1024**2


def associated_data(kind: str, folder_id: str, name: str) -> bytes:
    """What a file is: ``file`` by itself, ``index`` or ``member`` of a folder, and its name."""
    return json.dumps(["hotloop sealed", 1, kind, folder_id, name], ensure_ascii=True).encode()


@dataclass(frozen=True)
class FolderIndex:
    """What a sealed folder holds; itself a sealed file, ``index.json.sealed``.

    Attributes:
        folder_id: random; each file of the folder is sealed with it.
        number: of a checkpoint, larger for each that is saved; ``None``: no checkpoint.
        files: name below the folder, with ``/`` -> plain bytes.
    """

    folder_id: str
    number: int | None
    files: Mapping[str, int]

    def to_bytes(self) -> bytes:
        """As JSON."""
        body = {"format": _FORMAT, "version": 1, "folder_id": self.folder_id,
                "number": self.number, "files": dict(sorted(self.files.items()))}  # fmt: skip
        return json.dumps(body, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> FolderIndex:
        """Raises SealedError where a later version wrote it."""
        try:
            body = json.loads(data)
            if body["format"] != _FORMAT or body["version"] != 1:
                raise SealedError(
                    f"{where} must be of version 1",
                    got=body["version"],
                    next_step="use the release of hotloop that wrote it",
                )
            number = body["number"]
            index = cls(
                str(body["folder_id"]),
                None if number is None else int(number),
                {check_name(name): int(size) for name, size in body["files"].items()},
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, SealedError):
                raise
            raise SealedError(f"{where} cannot be read", got=error) from None
        return index


def check_name(name: str) -> str:
    """A name below a folder, never a way out of it.

    Raises:
        SealedError: it is one.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
        raise SealedError("a file of a sealed folder must have a name inside it", got=repr(name))
    return name


class Sealed:
    """A sealed file or folder. Readers take it where they take a path, and then accept nothing
    that is not sealed with this key under this name.

    Args:
        path: ``NAME.sealed`` for a file; a folder that ``seal`` or a sealed run wrote.
        key: what it was sealed with.
        counter: of checkpoints: the number below which one is too old.

    Has of ``pathlib.Path`` what readers use: ``name``, ``suffix``, ``stem``, ``parent``,
    ``is_dir``, ``is_file``, ``exists``, ``iterdir``, ``/``, ``open("rb")``, ``read_bytes``.
    """

    def __init__(
        self, path: str | os.PathLike[str], key: SealingKey, *, counter: Counter | None = None
    ) -> None:
        self.path = Path(path)
        self.key = key
        self.counter = counter
        # Of what lies in a folder: the folder itself, and the name in it.
        self._root: Sealed = self
        self._inside = ""
        self._index: FolderIndex | None = None

    def __str__(self) -> str:
        return str(self.path / self._inside if self._inside else self.path)

    def __repr__(self) -> str:
        return f"Sealed({str(self)!r})"

    @property
    def name(self) -> str:
        """Name of what is sealed, without ``.sealed``."""
        return PurePosixPath(self._inside or self.path.name.removesuffix(SUFFIX)).name

    @property
    def suffix(self) -> str:
        """Of ``name``."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """Of ``name``."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> Sealed | Path:
        """The folder it lies in."""
        if not self._inside:
            return self.path.parent
        above = str(PurePosixPath(self._inside).parent)
        return self._root if above == "." else self._root / above

    @property
    def index(self) -> FolderIndex:
        """What the folder holds, read once.

        Raises:
            SealedError: not sealed, another key, or damaged.
        """
        root = self._root
        if root._index is None:
            where = root.path / (INDEX + SUFFIX)
            if not where.is_file():
                raise SealedError(
                    f"{root.path} must be a sealed folder",
                    got=f"no {INDEX}{SUFFIX} in it",
                    next_step="seal it with hotloop enclave seal",
                )
            with _open(where, self.key, associated_data("index", "", INDEX)) as file:
                if file.seek(0, io.SEEK_END) > _MAX_INDEX_BYTES:
                    raise SealedError(f"{where} is too large")
                file.seek(0)
                root._index = FolderIndex.from_bytes(file.read(), str(where))
        return root._index

    def __truediv__(self, name: str) -> Sealed:
        child = Sealed(self.path, self.key)
        child._root = self._root
        child._inside = str(PurePosixPath(self._inside) / name)
        return child

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        if not self._inside:
            return self.path.is_dir()
        return any(name.startswith(f"{self._inside}/") for name in self.index.files)

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._inside in self.index.files if self._inside else self.path.is_file()

    def exists(self) -> bool:
        """Whether it is there."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[Sealed]:
        """What lies in the folder."""
        start = f"{self._inside}/" if self._inside else ""
        below = (n.removeprefix(start) for n in self.index.files if n.startswith(start))
        for name in sorted({name.partition("/")[0] for name in below}):
            yield self / name

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The plain bytes, as a stream that can seek.

        Raises:
            SealedError: another key, another file, damaged or cut. OSError: from the system.
        """
        assert mode == "rb", "sealed files are read as bytes"
        if self._inside:
            index = self.index
            if self._inside not in index.files:
                raise FileNotFoundError(2, "No such file or directory", str(self))
            what = associated_data("member", index.folder_id, self._inside)
            file = _open(self.path / (self._inside + SUFFIX), self.key, what)
            if file.seek(0, io.SEEK_END) != index.files[self._inside]:
                raise SealedError(f"{self} must have {index.files[self._inside]} bytes")
            file.seek(0)
            return file
        if not self.path.name.endswith(SUFFIX):
            raise SealedError(
                f"a sealed file must be named with {SUFFIX}",
                got=self.path,
                next_step=f"seal it: hotloop enclave seal {self.path}",
            )
        return _open(self.path, self.key, associated_data("file", "", self.name))

    def read_bytes(self) -> bytes:
        """All plain bytes; see ``open``."""
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """All plain text; see ``open``."""
        return self.read_bytes().decode(encoding)


def _open(path: Path, key: SealingKey, what: bytes) -> io.BufferedReader:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    reader: Any = SealedReader(fd, key.secret, what, str(path))
    return io.BufferedReader(reader, 64 * 1024)
