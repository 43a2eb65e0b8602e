"""Sealing and unsealing of files and folders; what is written half is never left."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError, SealedError, StorageError
from .key import SealingKey
from .place import INDEX, SUFFIX, FolderIndex, Sealed, associated_data, check_name
from .stream import SealedWriter

_COPY_BYTES = 4 * 1024**2


def seal(source: Path, target: Path, key: SealingKey) -> int:
    """Seal a file to ``target``, named with ``.sealed``, or a folder to a new folder.

    Returns:
        Plain bytes that were sealed.

    Raises:
        InputError: nothing to seal, a name that is taken, or a link in the folder.
        StorageError: the disk failed; nothing is left.
    """
    if source.is_dir():
        return _aside(source, target, lambda aside: _seal_folder(source, aside, key))
    if not target.name.endswith(SUFFIX):
        raise InputError(f"a sealed file must be named with {SUFFIX}", got=target)
    what = associated_data("file", "", target.name.removesuffix(SUFFIX))
    return _aside(source, target, lambda aside: _seal_file(source, aside, key, what))


def unseal(source: Path, target: Path, key: SealingKey) -> int:
    """Write what a sealed file or folder holds, plain, under a new name.

    Returns:
        Plain bytes.

    Raises:
        InputError: nothing is there, or the name is taken.
        SealedError: another key, damaged, cut, or files missing; nothing is left.
        StorageError: the disk failed; nothing is left.
    """
    place = Sealed(source, key)
    if source.is_dir():
        return _aside(source, target, lambda aside: _unseal_folder(place, aside))
    return _aside(source, target, lambda aside: _unseal_file(place, aside))


def new_folder_id() -> str:
    """A name for a sealed folder that no other has."""
    return secrets.token_hex(16)


def write_index(
    index: FolderIndex, key: SealingKey, emit: Callable[[memoryview], None]
) -> None:  # fmt: skip
    """Seal an index."""
    writer = SealedWriter(emit, key.secret, associated_data("index", "", INDEX))
    writer.write(index.to_bytes())
    writer.finish()


def _aside(source: Path, target: Path, make: Callable[[Path], int]) -> int:
    """Make it under another name, sync it, and name it."""
    if not source.exists():
        raise InputError("there must be something to read", got=source)
    if os.path.lexists(target):
        raise InputError("the target must be new", got=target, next_step="choose another name")
    aside = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    try:
        count = make(aside)
        os.rename(aside, target)
        _sync(target.parent)
    except OSError as error:
        raise StorageError(
            f"{target} could not be written from {source}",
            got=error.strerror or error,
        ) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
    return count


def _seal_folder(source: Path, aside: Path, key: SealingKey) -> int:
    folder_id = new_folder_id()
    files: dict[str, int] = {}
    aside.mkdir()
    for path in sorted(source.rglob("*")):
        name = check_name(path.relative_to(source).as_posix())
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise InputError("a folder to seal must hold plain files and folders", got=path)
        if path.is_dir():
            (aside / name).mkdir()
            continue
        what = associated_data("member", folder_id, name)
        files[name] = _seal_file(path, aside / (name + SUFFIX), key, what)
    with _create(aside / (INDEX + SUFFIX)) as file:
        write_index(FolderIndex(folder_id, None, files), key, _emit_to(file))
    for folder in [aside, *(p for p in aside.rglob("*") if p.is_dir())]:
        _sync(folder)
    return sum(files.values())


def _seal_file(source: Path, target: Path, key: SealingKey, what: bytes) -> int:
    with source.open("rb") as plain, _create(target) as file:
        writer = SealedWriter(_emit_to(file), key.secret, what)
        while data := plain.read(_COPY_BYTES):
            writer.write(data)
        writer.finish()
    return writer.plain_bytes


def _unseal_folder(place: Sealed, aside: Path) -> int:
    aside.mkdir()
    index = place.index
    count = 0
    for name in index.files:
        member = place / name
        target = aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            count += _unseal_file(member, target)
        except FileNotFoundError:
            raise SealedError(f"{place} must hold {name}{SUFFIX}", got="no such file") from None
    return count


def _unseal_file(place: Sealed, target: Path) -> int:
    count = 0
    with place.open() as plain, _create(target) as file:
        while data := plain.read(_COPY_BYTES):
            file.write(data)
            count += len(data)
    return count


@contextlib.contextmanager
def _create(path: Path) -> Iterator[io.FileIO]:
    """A new file that its owner alone can read, durable at the end."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with io.FileIO(fd, "wb") as file:
        yield file
        os.fsync(fd)


def _emit_to(file: io.FileIO) -> Callable[[memoryview], None]:
    def emit(data: memoryview) -> None:
        while data:
            data = data[file.write(data) :]

    return emit


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
