"""``Journal``: what a search measured, line by line, so that one cut off goes on where it was.

One JSON document a line, appended and synced; a line that was cut off in the middle is dropped when
the file is opened again, and whatever it held is measured once more.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError, StorageError
from ..machine.cache_dir import TUNED_JOURNALS
from .candidate import Candidate, key_of

FORMAT = 1


class Journal:
    """The record of one search, in a file or, without a path, in memory only.

    Args:
        path: the file, made if need be.
        identity: what the search is of (machine, model, choices); another one in the file is an
            error.

    Attributes:
        elapsed_s: seconds that the search had taken at the last line.
        records: all lines but the first.

    Raises:
        InputError: the file is the journal of another search, or none.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path | None = None, identity: dict[str, Any] | None = None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._fd: int | None = None
        if path is None:
            return
        head = {"kind": "search", "format": FORMAT, "identity": identity or {}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            lines = _whole_lines(self._fd)
        except OSError as error:
            raise self._error(error) from error
        if not lines:
            self._append(head)
        elif lines[0] != json.loads(json.dumps(head)):
            self.close()
            raise InputError(
                f"{path} must be the journal of this search",
                got="that of another model, machine, version or space",
                next_step="remove it, or start anew with --fresh",
            )
        self.records = lines[1:]

    @property
    def elapsed_s(self) -> float:
        """Seconds that the search had taken at the last line."""
        return float(self.records[-1]["elapsed_s"]) if self.records else 0.0

    def add(self, kind: str, elapsed_s: float, **values: Any) -> None:
        """Append one record.

        Raises:
            StorageError: the disk is full or fails.
        """
        record = {"kind": kind, "elapsed_s": elapsed_s, **values}
        self.records.append(record)
        if self._fd is not None:
            self._append(record)

    def find(self, kind: str, **values: Any) -> dict[str, Any] | None:
        """The last record of a kind with these values."""
        wanted = {"kind": kind, **values}
        alike = (r for r in reversed(self.records) if all(r.get(k) == wanted[k] for k in wanted))
        return next(alike, None)

    def add_round(
        self, group: str, rung: int, turn: int, costs: dict[str, float], elapsed_s: float
    ) -> None:
        """Costs of one round by ``key_of``."""
        self.add("round", elapsed_s, group=group, rung=rung, turn=turn, costs=costs)

    def round(self, group: str, rung: int, turn: int) -> dict[str, float] | None:
        """Costs of a round that was made before."""
        found = self.find("round", group=group, rung=rung, turn=turn)
        return None if found is None else dict(found["costs"])

    def add_failure(self, group: str, arm: Candidate, reason: str, elapsed_s: float) -> None:
        """A candidate that cannot be run."""
        self.add("failed", elapsed_s, group=group, key=key_of(arm), reason=reason)

    def failures(self, group: str) -> dict[str, str]:
        """Reasons by ``key_of``."""
        return {
            r["key"]: r["reason"]
            for r in self.records
            if r["kind"] == "failed" and r["group"] == group
        }

    def add_winner(self, group: str, arm: Candidate, elapsed_s: float) -> None:
        """A group is decided."""
        self.add("winner", elapsed_s, group=group, candidate=dict(arm))

    def winner(self, group: str) -> Candidate | None:
        """What a decided group chose."""
        found = self.find("winner", group=group)
        return None if found is None else dict(found["candidate"])

    def close(self) -> None:
        """Let go of the file. Twice is allowed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, record: dict[str, Any]) -> None:
        assert self._fd is not None
        try:
            os.write(self._fd, (json.dumps(record) + "\n").encode())
            os.fsync(self._fd)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> StorageError:
        return StorageError(
            f"the journal {self.path} must be readable and writable",
            got=error.strerror,
            next_step="choose another with --journal",
        )


def _whole_lines(fd: int) -> list[dict[str, Any]]:
    """Every line up to the first that is cut off or damaged; the file is cut there."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        content = file.read()
    lines, end = [], 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(record, dict) and "kind" in record
        except ValueError:
            whole = False
        if not whole:
            break
        lines.append(record)
        end += len(line)
    if end < len(content):
        os.ftruncate(fd, end)
    return lines


def journal_path(machine: str, work: str, space: str) -> Path:
    """Where the journal of an unfinished search lies.

    Args:
        machine, work: fingerprints. space: short hash of the choices.

    Raises:
        OSError: no cache folder.
    """
    return TUNED_JOURNALS.path(f"{machine}-{work}-{space}")
