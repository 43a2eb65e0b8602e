"""Limits of the control groups of this process: CPU quota, cpuset, memory; v1, v2 and hybrid.

Formats: kernel documentation, ``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .tree import Tree, parse_cpu_list, parse_int

# v1 has no word for "unlimited": it reports the largest page-aligned number.
UNLIMITED_BYTES = 2**60


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest limit over all enclosing groups that can be seen; ``None``: no such limit.

    Attributes:
        cpu_quota: CPU seconds per second, such as 1.5.
        cpuset_cpu_ids: CPUs this process is confined to.
        memory_limit_bytes: memory past which the process is killed.
        memory_used_bytes: what the group with that limit uses, less what the kernel can drop
            at once (inactive file pages).
    """

    cpu_quota: float | None
    cpuset_cpu_ids: tuple[int, ...] | None
    memory_limit_bytes: int | None
    memory_used_bytes: int | None


@dataclass(frozen=True)
class _Mount:
    point: str
    subtree: str  # the group that the mount point shows, as named in /proc/self/cgroup
    controllers: frozenset[str]  # v1 only
    is_v2: bool


def read_cgroup(tree: Tree) -> CgroupLimits:
    """Read the limits. Never fails: what is missing or damaged limits nothing."""
    mounts = _mounts(tree)
    paths = _paths(tree)
    limit, used = _memory(tree, _folders(tree, "memory", mounts, paths))
    return CgroupLimits(
        cpu_quota=_quota(tree, _folders(tree, "cpu", mounts, paths)),
        cpuset_cpu_ids=_cpuset(tree, _folders(tree, "cpuset", mounts, paths)),
        memory_limit_bytes=limit,
        memory_used_bytes=used,
    )


def _mounts(tree: Tree) -> list[_Mount]:
    mounts = []
    for line in (tree.text("/proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        mounts.append(
            _Mount(
                point=_unescape(fields[4]).rstrip("/"),
                subtree=_unescape(fields[3]),
                controllers=frozenset(kind[2].split(",")),
                is_v2=kind[0] == "cgroup2",
            )
        )
    return mounts


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), text)


def _paths(tree: Tree) -> dict[str, str]:
    """Group of this process by v1 controller name; the v2 group under ``""``."""
    paths = {}
    for line in (tree.text("/proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            paths.update(dict.fromkeys(parts[1].split(","), parts[2]))
    return paths


def _folders(
    tree: Tree, controller: str, mounts: list[_Mount], paths: dict[str, str]
) -> list[tuple[str, bool]]:
    """(folder, is it v2) of this process's group and each ancestor seen, innermost first.

    A hybrid system mounts both versions and keeps a controller in one of them; the files of the
    other do not exist there, so looking in both needs no rule of its own.
    """
    folders: list[tuple[str, bool]] = []
    for mount in mounts:
        if not mount.is_v2 and controller not in mount.controllers:
            continue
        names = _path_below(tree, mount, paths.get("" if mount.is_v2 else controller))
        for depth in range(len(names), -1, -1):
            folders.append(("/".join([mount.point, *names[:depth]]), mount.is_v2))
    return folders


def _path_below(tree: Tree, mount: _Mount, path: str | None) -> list[str]:
    """Names of the groups from the mount point down to the group ``path``.

    Empty, which stands for the mount point itself, where the mount does not show the group:
    inside a container ``/proc/self/cgroup`` may name it as the host sees it while the mount
    shows the container's own group as its root.
    """
    subtree = mount.subtree.rstrip("/")
    if path is None or not (path == subtree or path.startswith(subtree + "/")):
        return []
    names = [name for name in path[len(subtree) :].split("/") if name]
    # ".." stands for a group outside the namespace, which cannot be seen from here.
    if ".." in names or not tree.is_folder("/".join([mount.point, *names])):
        return []
    return names


def _quota(tree: Tree, folders: list[tuple[str, bool]]) -> float | None:
    quotas = []
    for folder, is_v2 in folders:
        if is_v2:
            words = (tree.text(f"{folder}/cpu.max") or "").split()
            allowed_us = parse_int(words[0]) if words else None
            period_us = parse_int(words[1]) if len(words) == 2 else None
        else:
            allowed_us = tree.number(f"{folder}/cpu.cfs_quota_us")  # -1: no limit
            period_us = tree.number(f"{folder}/cpu.cfs_period_us")
        if allowed_us is not None and period_us is not None and allowed_us > 0 < period_us:
            quotas.append(allowed_us / period_us)
    return min(quotas, default=None)


def _cpuset(tree: Tree, folders: list[tuple[str, bool]]) -> tuple[int, ...] | None:
    allowed: set[int] | None = None
    for folder, is_v2 in folders:
        # The effective set is what the kernel applies; the other file is what was asked for.
        effective = "cpuset.cpus.effective" if is_v2 else "cpuset.effective_cpus"
        for name in (effective, "cpuset.cpus"):
            # Empty means "as the parent", which the loop reaches next.
            if cpu_ids := parse_cpu_list(tree.text(f"{folder}/{name}")):
                allowed = set(cpu_ids) if allowed is None else allowed & set(cpu_ids)
                break
    return tuple(sorted(allowed)) if allowed else None


def _memory(tree: Tree, folders: list[tuple[str, bool]]) -> tuple[int | None, int | None]:
    limit: int | None = None
    used: int | None = None
    for folder, is_v2 in folders:
        stat = dict(
            line.split(" ", 1)
            for line in (tree.text(f"{folder}/memory.stat") or "").splitlines()
            if " " in line
        )
        own = tree.number(f"{folder}/{'memory.max' if is_v2 else 'memory.limit_in_bytes'}")
        # v1 also tells the tightest limit of the ancestors that a container cannot see.
        hierarchical = parse_int(stat.get("hierarchical_memory_limit"))
        for candidate in (own, hierarchical):
            if candidate is None or not 0 < candidate < UNLIMITED_BYTES:
                continue
            if limit is None or candidate < limit:
                limit = candidate
                used = tree.number(
                    f"{folder}/{'memory.current' if is_v2 else 'memory.usage_in_bytes'}"
                )
                name = "inactive_file" if is_v2 else "total_inactive_file"
                if used is not None:
                    used = max(0, used - (parse_int(stat.get(name)) or 0))
    return limit, used


@dataclass(frozen=True)
class Throttling:
    """How often a CPU quota stopped the group, since the group was made.

    Attributes:
        periods: quota periods in which something ran. throttled_periods: in which it was stopped.
        throttled_s: seconds it was stopped, added up over CPUs.
    """

    periods: int
    throttled_periods: int
    throttled_s: float


def read_throttling(tree: Tree) -> Throttling | None:
    """The counters of the enclosing group with the tightest quota; ``None``: there is no quota."""
    tightest: tuple[float, str, bool] | None = None
    for folder, is_v2 in _folders(tree, "cpu", _mounts(tree), _paths(tree)):
        quota = _quota(tree, [(folder, is_v2)])
        if quota is not None and (tightest is None or quota < tightest[0]):
            tightest = quota, folder, is_v2
    if tightest is None:
        return None
    _, folder, is_v2 = tightest
    lines = (line.split() for line in (tree.text(f"{folder}/cpu.stat") or "").splitlines())
    stat = {words[0]: parse_int(words[1]) for words in lines if len(words) == 2}
    stopped = stat.get("throttled_usec" if is_v2 else "throttled_time")
    periods, throttled = stat.get("nr_periods"), stat.get("nr_throttled")
    if periods is None or throttled is None or stopped is None:
        return None
    return Throttling(periods, throttled, stopped / (1e6 if is_v2 else 1e9))
