"""Memory, swap and huge pages of the machine, and the control group's limit on this process."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .cgroup import CgroupLimits
from .tree import Tree, parse_fields


@dataclass(frozen=True)
class MachineMemory:
    """Memory as the kernel counts it; every field is ``None`` when unknown.

    Attributes:
        total_bytes: physical memory of the machine.
        available_bytes: what can be taken without swapping, machine-wide.
        limit_bytes: the tightest control-group limit over this process; ``None`` also when
            there is none.
        limit_used_bytes: how much of that limit is used by now, droppable file cache left out.
        swap_total_bytes, swap_free_bytes: swap space.
        huge_page_bytes: size of the default reserved huge page.
        huge_pages_total, huge_pages_free: number of reserved huge pages.
        transparent_huge_pages: ``"always"``, ``"madvise"`` or ``"never"``.
    """

    total_bytes: int | None = None
    available_bytes: int | None = None
    limit_bytes: int | None = None
    limit_used_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_free_bytes: int | None = None
    huge_page_bytes: int | None = None
    huge_pages_total: int | None = None
    huge_pages_free: int | None = None
    transparent_huge_pages: str | None = None

    @property
    def headroom_bytes(self) -> int | None:
        """What this process can still take: the less of machine and control group."""
        room = [] if self.available_bytes is None else [self.available_bytes]
        if self.limit_bytes is not None:
            room.append(max(0, self.limit_bytes - (self.limit_used_bytes or 0)))
        return min(room, default=None)


def read_memory(tree: Tree, limits: CgroupLimits) -> MachineMemory:
    """Read ``/proc/meminfo`` and the setting of transparent huge pages."""
    fields = parse_fields(tree.text("/proc/meminfo"))

    def number(name: str, unit: str = " kB") -> int | None:
        match = re.fullmatch(rf"(\d{{1,18}}){unit}", fields.get(name, ""))
        return int(match[1]) * (1024 if unit else 1) if match else None

    setting = tree.text("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(always|madvise|never)\]", setting)
    return MachineMemory(
        total_bytes=number("MemTotal"),
        available_bytes=number("MemAvailable"),
        limit_bytes=limits.memory_limit_bytes,
        limit_used_bytes=limits.memory_used_bytes,
        swap_total_bytes=number("SwapTotal"),
        swap_free_bytes=number("SwapFree"),
        huge_page_bytes=number("Hugepagesize"),
        huge_pages_total=number("HugePages_Total", ""),
        huge_pages_free=number("HugePages_Free", ""),
        transparent_huge_pages=chosen[1] if chosen else None,
    )
