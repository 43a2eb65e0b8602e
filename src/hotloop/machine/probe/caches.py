"""Caches by level, with the CPUs that share each, from sysfs."""

from __future__ import annotations

from dataclasses import dataclass

from .topology import CPUS
from .tree import Tree, parse_size


@dataclass(frozen=True)
class Cache:
    """One cache.

    Attributes:
        level: 1 is nearest to the core.
        kind: ``"data"``, ``"instruction"`` or ``"unified"``; ``None`` when unknown.
        size_bytes: capacity, ``None`` when unknown.
        line_bytes: line size, ``None`` when unknown.
        shared_by: CPUs that use it.
    """

    level: int
    kind: str | None
    size_bytes: int | None
    line_bytes: int | None
    shared_by: tuple[int, ...]


def read_caches(tree: Tree, online: tuple[int, ...]) -> tuple[Cache, ...]:
    """Every cache once, ordered by level, kind and first CPU; empty when sysfs shows none."""
    caches: set[Cache] = set()
    # A cache shared by 16 CPUs is listed 16 times under the same index. Skipping those already
    # covered keeps the probe of a machine with hundreds of CPUs short.
    covered: dict[int, set[int]] = {}
    for cpu in online:
        folder = f"{CPUS}/cpu{cpu}/cache"
        for index in tree.numbered(folder, "index"):
            if cpu in covered.setdefault(index, set()):
                continue
            here = f"{folder}/index{index}"
            level = tree.number(f"{here}/level")
            shared_by = tree.cpu_list(f"{here}/shared_cpu_list")
            if level is None or level < 1 or not shared_by:
                continue
            covered[index].update(shared_by)
            kind = (tree.text(f"{here}/type") or "").lower()
            line_bytes = tree.number(f"{here}/coherency_line_size")
            caches.add(
                Cache(
                    level=level,
                    kind=kind if kind in ("data", "instruction", "unified") else None,
                    size_bytes=parse_size(tree.text(f"{here}/size")),
                    line_bytes=line_bytes if line_bytes is not None and line_bytes > 0 else None,
                    shared_by=shared_by,
                )
            )
    return tuple(sorted(caches, key=lambda c: (c.level, c.kind or "", c.shared_by)))
