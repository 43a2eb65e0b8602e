"""Where hotloop keeps what it may make again, and the name of each kind of file there.

Nothing in the cache is needed: what is missing or damaged is measured, built or fetched again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CachedKind:
    """One kind of file in the cache.

    Attributes:
        pattern: of its path below the cache folder; ``*`` is what tells files of a kind apart, and
            is not there where a kind has one file.
        what: it holds, in words. key: what ``*`` is made of.
    """

    pattern: str
    what: str
    key: str

    @property
    def folder(self) -> Path:
        """Where its files lie, below the cache folder or there; only the latter is made.

        Raises:
            OSError: there is no folder for a cache.
        """
        return (cache_dir() / self.pattern).parent

    def path(self, key: str = "") -> Path:
        """Where the file with this key lies, or would lie.

        Raises:
            OSError: there is no folder for a cache.
        """
        return cache_dir() / self.pattern.replace("*", key)

    def found(self, key: str = "*") -> Iterator[Path]:
        """Files that are there, in no order; ``key`` may have wildcards.

        Raises:
            OSError: there is no folder for a cache.
        """
        return cache_dir().glob(self.pattern.replace("*", key))


CEILINGS = CachedKind(
    "ceilings-*.json", "what the machine was measured to do", "fingerprint of the machine"
)
WINNERS = CachedKind(
    "winners-*.tsv", "what won when candidates were timed", "fingerprint of the machine"
)
WINNERS_LOCK = CachedKind("winners.lock", "held while winners are written", "")
GRAPHS = CachedKind(
    "inductor/*.pt2",
    "a model compiled ahead of time for inference",
    "hash of machine, torch, precision and graph",
)
TUNED_JOURNALS = CachedKind("tuned/*.journal", "a search that was cut off", "machine, work, space")
DOWNLOADS = CachedKind("mnist/*", "a fetched data set", "file name of its publisher")
PACKED = CachedKind(
    ".packed-*", "samples of a run larger than memory; has no name while it is open", "random"
)

KINDS = (
    CEILINGS,
    WINNERS,
    WINNERS_LOCK,
    GRAPHS,
    TUNED_JOURNALS,
    DOWNLOADS,
    PACKED,
)


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
    import tempfile

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
