"""Where hotloop keeps what it may recompute: measured ceilings, fetched data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder, made if need be.

    ``$XDG_CACHE_HOME/hotloop`` (an absolute path, as the XDG Base Directory Specification asks),
    else ``~/.cache/hotloop``; where neither can be written, ``hotloop-<user id>`` in the folder for
    temporary files.

    Raises:
        OSError: not even the temporary folder can be written.
    """
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if not os.path.isabs(base):
            continue
        folder = Path(base) / "hotloop"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return _temporary_folder()


def _temporary_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"hotloop-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Others can write in the shared folder: take only one that is ours.
        if folder.is_symlink() or folder.stat().st_uid != user or not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hotloop-"))
    return folder
