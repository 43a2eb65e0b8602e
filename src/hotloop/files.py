"""Writing small files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import StorageError


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
