"""Writing small files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import StorageError


def unicode_name(name: str | Path) -> str:
    """A name from the command line or a folder as text that can be written in UTF-8.

    In another locale than UTF-8 Python keeps the bytes that it cannot read as halves of surrogate
    pairs, which no encoder takes.
    """
    try:
        return os.fsencode(name).decode("utf-8", "replace")
    except UnicodeEncodeError:  # Not from the system: it is text already.
        return str(name)


def write_text_atomically(path: Path, text: str) -> None:
    """Write beside ``path`` and rename over it, so that no reader sees half a file.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    import tempfile

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StorageError(
            f"{path} could not be written", got=error.strerror, next_step="choose another folder"
        ) from error
