"""A hard memory limit for a command: a control group where one may be made."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Written by the shell before it becomes the command, so that nothing of it runs outside.
_JOIN = 'echo $$ > "$0" && exec "$@"'
_RLIMIT = 'ulimit -d "$0" && exec "$@"'


@dataclass(frozen=True)
class MemoryLimit:
    """A limit that a command is started under.

    Attributes:
        kind: ``"cgroup v2"``, ``"cgroup v1"`` or ``"RLIMIT_DATA"``.
        limit_bytes: the kernel's limit, whole pages.
        folder: of the control group; ``None`` for ``RLIMIT_DATA``.
        reason: why no control group was taken; ``None`` where one was.
    """

    kind: str
    limit_bytes: int
    folder: Path | None = None
    reason: str | None = None

    def command(self, words: list[str]) -> list[str]:
        """The command that starts ``words`` under the limit."""
        if self.folder is None:
            return ["/bin/sh", "-c", _RLIMIT, str(self.limit_bytes // 1024), *words]
        return ["/bin/sh", "-c", _JOIN, str(self.folder / "cgroup.procs"), *words]

    def was_hit(self) -> bool | None:
        """Whether the kernel killed a process for memory; ``None`` where it does not count."""
        if self.folder is None:
            return None
        name = "memory.events" if self.kind == "cgroup v2" else "memory.oom_control"
        return bool(_fields(self.folder / name).get("oom_kill", 0))

    def peak_bytes(self) -> int | None:
        """Highest use that the kernel charged to the group, file cache included."""
        if self.folder is None:
            return None
        v2 = self.kind == "cgroup v2"
        return _number(self.folder / ("memory.peak" if v2 else "memory.max_usage_in_bytes"))

    def kernel_bytes(self) -> int | None:
        """Page tables, kernel stacks and the kernel's other objects of the group, now."""
        if self.folder is None:
            return None
        if self.kind == "cgroup v2":
            return _fields(self.folder / "memory.stat").get("kernel")
        return _number(self.folder / "memory.kmem.usage_in_bytes")

    def fields(self) -> dict[str, int]:
        """``memory.stat`` of the group; empty without one."""
        return {} if self.folder is None else _fields(self.folder / "memory.stat")

    def process_ids(self) -> list[int]:
        """Processes in the group; empty without one."""
        if self.folder is None:
            return []
        try:
            return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]
        except (OSError, ValueError):
            return []


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[MemoryLimit]:
    """A limit for one command, taken away afterwards.

    Args:
        limit_bytes: of all its processes together, the kernel's memory for them included.
    """
    limit_bytes = -(-limit_bytes // 4096) * 4096
    reasons: list[str] = []
    for make in (_make_v2, _make_v1):
        try:
            made = make(limit_bytes)
        except OSError as error:
            reasons.append(f"{make.__doc__}: {error.strerror}")
            continue
        if made is None:
            reasons.append(f"{make.__doc__}: no memory controller")
            continue
        try:
            yield made
        finally:
            _remove(made.folder)
        return
    yield MemoryLimit("RLIMIT_DATA", limit_bytes, reason="; ".join(reasons))


def _make_v2(limit_bytes: int) -> MemoryLimit | None:
    """cgroup v2"""
    parent = _group_folder("cgroup2", "")
    if parent is None or "memory" not in (parent / "cgroup.controllers").read_text().split():
        return None
    if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        (parent / "cgroup.subtree_control").write_text("+memory")
    folder = parent / _name()
    folder.mkdir()
    try:
        (folder / "memory.max").write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # Without swap accounting there is no such file.
            (folder / "memory.swap.max").write_text("0")
    except OSError:
        _remove(folder)
        raise
    return MemoryLimit("cgroup v2", limit_bytes, folder)


def _make_v1(limit_bytes: int) -> MemoryLimit | None:
    """cgroup v1"""
    parent = _group_folder("cgroup", "memory")
    if parent is None:
        return None
    folder = parent / _name()
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # Memory and swap together.
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        _remove(folder)
        raise
    return MemoryLimit("cgroup v1", limit_bytes, folder)


def _name() -> str:
    return f"hotloop-{os.getpid()}-{time.monotonic_ns()}"


def _group_folder(kind: str, controller: str) -> Path | None:
    """Where this process's group lies, or the mounted root where that is hidden from it."""
    mounted = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        words = right.split()
        options = words[2].split(",") if len(words) > 2 else []
        if words and words[0] == kind and (not controller or controller in options):
            mounted = Path(left.split()[4])
    if mounted is None:
        return None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = mounted / path.lstrip("/")
            return own if own.is_dir() else mounted
    return mounted


def _remove(folder: Path | None) -> None:
    """Remove the group; its last processes may still be ending."""
    for _ in range(100):
        try:
            if folder is not None:
                folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    fields = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if value.isdigit():
                fields[name] = int(value)
    return fields
