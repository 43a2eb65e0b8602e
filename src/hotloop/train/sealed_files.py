"""The files of a sealed checkpoint: the same system calls, sealed on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..sealed import SUFFIX, FolderIndex, SealedReader, SealedWriter, SealingKey
from ..sealed.folder import new_folder_id, write_index
from ..sealed.place import INDEX, associated_data
from .system_calls import Buffer, Files, closing, write_all

_SIZE_FIELD = 6  # st_size in what os.stat_result is made of.


class SealedFiles(Files):
    """Files of one checkpoint's folder: what is written is sealed, what is read was verified.

    A file ``NAME`` lies as ``NAME.sealed``; sizes are those of the plain bytes. Nothing plain
    leaves this process.

    Args:
        files: the system calls below.
        key: of the checkpoints.
        index: of the folder that is read; ``None``: of a new one, which ``write_index`` ends.
    """

    def __init__(self, files: Files, key: SealingKey, index: FolderIndex | None = None) -> None:
        self._files, self._key = files, key
        self.folder_id = new_folder_id() if index is None else index.folder_id
        self._sizes: dict[str, int] = {}
        self._writers: dict[int, tuple[str, SealedWriter]] = {}
        self._readers: dict[int, SealedReader] = {}

    def create(self, path: Path) -> int:
        """See ``Files``."""
        fd = self._files.create(path.with_name(path.name + SUFFIX))
        try:
            what = associated_data("member", self.folder_id, path.name)
            emit = _emit_to(self._files, fd)
            self._writers[fd] = path.name, SealedWriter(emit, self._key.secret, what)
        except BaseException:
            self._files.close(fd)
            raise
        return fd

    def write(self, fd: int, data: Buffer) -> int:
        """See ``Files``."""
        return self._writers[fd][1].write(data)

    def fsync(self, fd: int) -> None:
        """Write the last segment and sync: nothing can be written after it."""
        name, writer = self._writers[fd]
        writer.finish()
        self._sizes[name] = writer.plain_bytes
        self._files.fsync(fd)

    def open_read(self, path: Path) -> int:
        """See ``Files``; ``SealedError`` where the file is not what was sealed."""
        fd = self._files.open_read(path.with_name(path.name + SUFFIX))
        what = associated_data("member", self.folder_id, path.name)
        self._readers[fd] = SealedReader(fd, self._key.secret, what, path.name)
        return fd

    def read(self, fd: int, count: int) -> bytes:
        """See ``Files``."""
        return self._readers[fd].read(count) or b""

    def stat(self, fd: int) -> os.stat_result:
        """With the size of the plain bytes."""
        fields = list(self._files.stat(fd)[:10])
        fields[_SIZE_FIELD] = self._readers[fd].plain_bytes
        return os.stat_result(fields)

    def close(self, fd: int) -> None:
        """See ``Files``."""
        self._writers.pop(fd, None)
        reader = self._readers.pop(fd, None)
        if reader is not None:
            reader.close()
        else:
            self._files.close(fd)

    def write_index(self, folder: Path, number: int) -> None:
        """End a new checkpoint: its files, their sizes and its number, sealed."""
        index = FolderIndex(self.folder_id, number, dict(self._sizes))
        with closing(self._files, self._files.create(folder / (INDEX + SUFFIX))) as fd:
            write_index(index, self._key, _emit_to(self._files, fd))
            self._files.fsync(fd)


def _emit_to(files: Files, fd: int) -> Callable[[memoryview], None]:
    return lambda data: write_all(files, fd, data)
