"""What was decided by measurement on this machine before: one cache, one file for each machine.

A winner is the answer to a question (``"product/64/784/128/nt"``), found with certain versions of
what was timed. It holds on the machine and with the versions it was found with, and nowhere else.
Whoever measures asks here first and keeps here what it found, so that the second run of a program
neither measures again nor takes another choice than the first.

A cache that is damaged, or cannot be written, only means measuring again.

A file has a line for each winner: its key, a tab, the winner as JSON; ``null`` forgets it. A later
line counts more than an earlier one, so that keeping a winner writes nothing but its own line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..files import write_text_atomically
from ..machine.cache_dir import WINNERS, WINNERS_LOCK

_FORMAT = "hotloop winners 2\n"
# Winners of one machine; the oldest go first.
MOST = 5_000
_FORGOTTEN = "null"


@dataclass(frozen=True, kw_only=True)
class Winner:
    """One answer and what it rests on.

    Attributes:
        question: words with a slash between them, the kind of question first.
        answer: plain JSON; the asker knows what it means, and must check it.
        versions: of what was timed, by name; other versions, another question.
        seconds: of the candidates, by name; empty where they were not seconds.
        quiet: ``False``: found beside a busy neighbour; worth another look in another run.
        saved_at_s: seconds since 1970; set by ``add``.
    """

    question: str
    answer: Any
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    quiet: bool = True
    saved_at_s: float = 0.0

    @property
    def key(self) -> str:
        """Its name in the file: the question, and ``torch 2.13.0, ...``."""
        name = f"{self.question} | {versions_text(self.versions)}"
        return " ".join(name.split()) if "\n" in name or "\t" in name else name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: Any) -> Winner | None:
        """What ``to_dict`` wrote; ``None``: something else, or damaged."""
        try:
            found = cls(**document)
            sound = (
                isinstance(found.question, str)
                and all(isinstance(v, str) for v in found.versions.values())
                and all(math.isfinite(s) for s in found.seconds.values())
                and isinstance(found.quiet, bool)
                and math.isfinite(found.saved_at_s)
            )
        except (TypeError, AttributeError):
            return None
        return found if sound else None


def recall(question: str, versions: Mapping[str, str], machine: str | None = None) -> Winner | None:
    """The winner with these versions, if there is one.

    Args:
        machine: fingerprint; ``None``: this one.
    """
    key = Winner(question=question, answer=None, versions=versions).key
    return _winner(key, _read(_path(machine)).get(key))


def recall_all(
    prefix: str, versions: Mapping[str, str], machine: str | None = None
) -> list[Winner]:
    """All winners with these versions whose question begins with ``prefix/``."""
    end = f" | {versions_text(versions)}"
    texts = _read(_path(machine))
    keys = [key for key in texts if key.startswith(f"{prefix}/") and key.endswith(end)]
    return [found for key in keys if (found := _winner(key, texts[key])) is not None]


def add(winners: Iterable[Winner], machine: str | None = None) -> bool:
    """Keep them; what other processes added meanwhile stays.

    Returns:
        whether they are kept. ``False``: the cache cannot be written; the same is measured again.
    """
    now_s = time.time()
    new = [dataclasses.replace(w, saved_at_s=now_s) for w in winners]
    return not new or _append(machine, {w.key: json.dumps(w.to_dict()) for w in new})


def forget(question: str, versions: Mapping[str, str], machine: str | None = None) -> None:
    """Drop a winner; nothing happens where there is none."""
    key = Winner(question=question, answer=None, versions=versions).key
    _append(machine, {key: _FORGOTTEN})


def listed() -> list[tuple[str, Winner]]:
    """Every winner with its machine's fingerprint, the newest first."""
    found = [
        (path.stem.removeprefix("winners-"), winner)
        for path in _paths()
        for key, text in _read(path).items()
        if (winner := _winner(key, text)) is not None
    ]
    return sorted(found, key=lambda entry: -entry[1].saved_at_s)


def clear() -> int:
    """Drop the winners of all machines; gives how many there were."""
    count = len(listed())
    with _locked():
        for path in _paths():
            with contextlib.suppress(OSError):
                path.unlink()
    return count


def versions_of(*libraries: str) -> dict[str, str]:
    """Of those that are installed, read without importing them."""
    found = {name: _version(name) for name in libraries}
    return {name: version for name, version in found.items() if version is not None}


def versions_text(versions: Mapping[str, str]) -> str:
    """``"numpy 2.3.1, torch 2.13.0"``."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


@functools.cache
def _version(library: str) -> str | None:
    loaded = sys.modules.get(library)
    if library == "torch" and loaded is not None:  # Spares the 10 ms of reading its metadata.
        return str(loaded.__version__)
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _path(machine: str | None) -> Path | None:
    """``None``: there is no folder for a cache."""
    cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with contextlib.suppress(OSError):
        return WINNERS.path(machine or _fingerprint(cpus))
    return None


def _paths() -> list[Path]:
    try:
        return sorted(WINNERS.found())
    except OSError:
        return []


@functools.cache
def _fingerprint(cpus: frozenset[int] | None) -> str:
    """Of this machine; ``cpus``, those of this process, are part of it."""
    from ..machine import Machine

    return Machine.probe().fingerprint()


def _read(path: Path | None) -> Mapping[str, str]:
    """Texts by key, the oldest first; empty where there is no file, or a damaged one."""
    if path is None:
        return {}
    try:
        looked = path.stat()
    except OSError:
        return {}
    return _parsed(path, looked.st_ino, looked.st_mtime_ns, looked.st_size)


@functools.lru_cache(maxsize=1)  # Earlier contents are of no use: megabytes, in a long-used cache.
def _parsed(path: Path, *state: int) -> Mapping[str, str]:
    """A file is read again only when it was written again."""
    return _load(path)[0]


def _load(path: Path) -> tuple[dict[str, str], int]:
    """Texts by key, and the lines of the file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            if file.readline() != _FORMAT:
                return {}, 0
            lines = file.read().split("\n")
    except OSError:
        return {}, 0
    found: dict[str, str] = {}
    for line in lines:
        key, tab, text = line.partition("\t")
        if tab:
            found.pop(key, None)
            found[key] = text
    kept = [(key, text) for key, text in found.items() if text != _FORGOTTEN]
    return dict(kept[-MOST:]), len(lines)


def _winner(key: str, text: str | None) -> Winner | None:
    try:
        found = None if text is None else Winner.from_dict(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return found if found is not None and found.key == key else None


def _append(machine: str | None, texts: Mapping[str, str]) -> bool:
    """Write these lines behind the others; the file anew, where it is damaged or too long."""
    path = _path(machine)
    if path is None:
        return False
    added = "".join(f"{key}\t{text}\n" for key, text in texts.items())
    with _locked():
        known, lines = _load(path)
        try:
            if 0 < lines < 2 * MOST:
                with open(path, "a+b") as file:
                    file.seek(-1, os.SEEK_END)
                    torn = file.read(1) != b"\n"  # By a full disk.
                    file.write((b"\n" if torn else b"") + added.encode())
            else:
                old = "".join(f"{key}\t{text}\n" for key, text in known.items())
                write_text_atomically(path, f"{_FORMAT}{old}{added}")
        except (StorageError, OSError):
            return False
        _parsed.cache_clear()  # Two writes may be nearer than the file system's clock tells.
    return True


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time; where the file system knows no locks, as it comes."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(WINNERS_LOCK.path(), "a", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
