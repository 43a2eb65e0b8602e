"""Every system call of a checkpoint goes through one object, so that each can be made to fail.

Kept apart from ``pathlib`` on purpose: a high-level call hides how many system calls it makes, and
a test that fails each of them in turn can only fail the ones it sees.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import StorageError

Buffer = bytes | bytearray | memoryview


class Files:
    """The system calls, one a method, unchanged: they raise ``OSError`` and may write short."""

    def create(self, path: Path) -> int:
        """Descriptor of a new file, open for writing; an existing name is an error."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)

    def open_folder(self, path: Path) -> int:
        """Descriptor of a folder, to sync or lock it; a symbolic link is an error."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def open_read(self, path: Path) -> int:
        """Descriptor of a file, open for reading; never waits for the other end of a FIFO."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)

    def write(self, fd: int, data: Buffer) -> int:
        """Bytes taken, perhaps fewer than given."""
        return os.write(fd, data)

    def read(self, fd: int, count: int) -> bytes:
        """Up to ``count`` bytes; empty at the end."""
        return os.read(fd, count)

    def stat(self, fd: int) -> os.stat_result:
        """Kind, size and time of an open file."""
        return os.fstat(fd)

    def fsync(self, fd: int) -> None:
        """Returns when the disk says it has the file, or the names in the folder."""
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the disk's own cache
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def close(self, fd: int) -> None:
        """The descriptor is gone afterwards, even if this raises."""
        os.close(fd)

    def lock(self, fd: int) -> None:
        """Take the lock that the kernel frees when its holder dies; ``OSError`` if it is taken."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def make_folder(self, path: Path) -> None:
        """A new empty folder; an existing name is an error."""
        os.mkdir(path)

    def list_folder(self, path: Path) -> list[str]:
        """Names in the folder, in no order."""
        return os.listdir(path)

    def rename(self, old: Path, new: Path) -> None:
        """Atomic; a folder with something in it is never replaced."""
        os.rename(old, new)

    def remove_file(self, path: Path) -> None:
        """The name is gone."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """The folder must be empty."""
        os.rmdir(path)


@contextlib.contextmanager
def closing(files: Files, fd: int) -> Iterator[int]:
    """Close at the end; an error of ``close`` counts only where nothing failed before it."""
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            files.close(fd)
        raise
    files.close(fd)


def write_all(files: Files, fd: int, data: Buffer) -> None:
    """Write to the last byte, however short each write comes."""
    rest = memoryview(data)
    while rest:
        taken = files.write(fd, rest)
        if taken <= 0:
            raise OSError(errno.EIO, "the write took nothing")
        rest = rest[taken:]


def sync_folder(files: Files, path: Path) -> None:
    """Make the names in a folder durable: renames and new files are lost without it."""
    with closing(files, files.open_folder(path)) as fd:
        files.fsync(fd)


def is_locked(files: Files, folder: Path) -> bool:
    """Whether a living process holds the lock; ``False`` on a file system that knows no locks."""
    with closing(files, files.open_folder(folder)) as fd:
        try:
            files.lock(fd)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def make_folders(files: Files, path: Path) -> None:
    """Make a folder and its parents where they are missing, each one durable in its parent."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        if path == path.parent:
            break
        path = path.parent
    for each in reversed(missing):
        try:
            files.make_folder(each)
        except FileExistsError:
            if not each.is_dir():
                raise
        sync_folder(files, each.parent)


def remove_tree(files: Files, path: Path) -> None:
    """Remove a folder of plain files; one that holds folders is left with an ``OSError``."""
    for name in files.list_folder(path):
        files.remove_file(path / name)
    files.remove_folder(path)


@contextlib.contextmanager
def reading(files: Files, path: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a plain file.

    Raises:
        OSError: it is missing, not a plain file, or cannot be read.
    """
    with closing(files, files.open_read(path)) as fd:
        info = files.stat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        yield fd, info.st_size


def storage_error(rule: str, path: Path, error: OSError) -> StorageError:
    """One line for what the system refused, with what can be done about it."""
    reason = error.strerror or str(error)
    steps = {
        errno.ENOSPC: f"free space on the disk of {path}",
        errno.EDQUOT: f"free space in the quota for {path}",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "choose a folder on a disk that is not read-only",
        errno.ENOTDIR: "choose a path that is no file",
        errno.EEXIST: "choose a path that is no file",
    }
    return StorageError(
        rule,
        got=f"{reason} ({errno.errorcode.get(error.errno or 0, 'error')}) at {path}",
        next_step=steps.get(error.errno or 0),
    )
