"""What the kernel counts of memory, read at one moment, and ``MemoryStats`` from two of them.

Formats: the kernel's ``filesystems/proc.rst`` (status, smaps_rollup), ``numa_maps(5)``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Protocol

from ..machine import Machine
from ..machine.probe.tree import Tree, parse_fields, parse_int
from .cpu_counters import CpuSnapshot, read_pressure
from .metrics import MemoryStats

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class PoolCounters(Protocol):
    """What is asked of a batch pool's counters (``MemoryPool.stats``)."""

    @property
    def num_buffers(self) -> int: ...  # noqa: D102
    @property
    def high_water(self) -> int: ...  # noqa: D102
    @property
    def hits(self) -> int: ...  # noqa: D102
    @property
    def misses(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class MemorySnapshot:
    """Memory at one moment; ``None``: the kernel does not tell.

    Attributes:
        pages_by_node: resident pages of this process by NUMA node; empty: not told.
        pressure_s: seconds in which some task waited for memory.
    """

    resident_bytes: int | None = None
    peak_resident_bytes: int | None = None
    anonymous_bytes: int | None = None
    huge_page_bytes: int | None = None
    swap_bytes: int | None = None
    swapped_in_bytes: int | None = None
    swapped_out_bytes: int | None = None
    available_bytes: int | None = None
    pressure_s: float | None = None
    pages_by_node: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, tree: Tree, *, whole: bool = True) -> MemorySnapshot:
        """Read below ``tree``; ``whole``: also what walks the page tables (milliseconds a GiB)."""
        status = parse_fields(tree.text("/proc/self/status"))
        machine = parse_fields(tree.text("/proc/meminfo"))
        pages = dict(
            line.split(" ", 1)
            for line in (tree.text("/proc/vmstat") or "").splitlines()
            if line.startswith("pswp")
        )
        rollup = parse_fields(tree.text("/proc/self/smaps_rollup")) if whole else {}
        nodes = tree.numbered("/sys/devices/system/node", "node")
        return cls(
            resident_bytes=_kib(status, "VmRSS"),
            peak_resident_bytes=_kib(status, "VmHWM"),
            anonymous_bytes=_kib(rollup, "Anonymous"),
            huge_page_bytes=_kib(rollup, "AnonHugePages"),
            swap_bytes=_kib(status, "VmSwap"),
            swapped_in_bytes=_pages(pages, "pswpin"),
            swapped_out_bytes=_pages(pages, "pswpout"),
            available_bytes=_kib(machine, "MemAvailable"),
            pressure_s=read_pressure(tree, "memory"),
            pages_by_node=_nodes(tree) if whole and len(nodes) > 1 else (),
        )


def memory_stats(
    before: tuple[CpuSnapshot, MemorySnapshot],
    after: tuple[CpuSnapshot, MemorySnapshot],
    machine: Machine,
    *,
    pool: PoolCounters | None = None,
    arena: tuple[int, int] | None = None,
) -> MemoryStats:
    """What lay between, and what is at the end.

    Args:
        pool: counters of the batch pool, if there is one.
        arena: peak and capacity of the tensor arena in bytes, if there is one.
    """
    then, now = before[1], after[1]
    duration_s = max(after[0].at_s - before[0].at_s, 1e-9)
    used = after[0].usage - before[0].usage
    share = None
    if now.huge_page_bytes is not None and now.anonymous_bytes:
        share = now.huge_page_bytes / now.anonymous_bytes
    limits = (machine.memory.limit_bytes, machine.memory.total_bytes)
    pressure = None
    if then.pressure_s is not None and now.pressure_s is not None:
        pressure = (now.pressure_s - then.pressure_s) / duration_s
    return MemoryStats(
        resident_bytes=now.resident_bytes,
        peak_resident_bytes=now.peak_resident_bytes,
        minor_faults=used.minor_faults,
        major_faults=used.major_faults,
        anonymous_bytes=now.anonymous_bytes,
        huge_page_bytes=now.huge_page_bytes,
        huge_page_share=share,
        numa_local_share=_local_share(now, machine),
        pool_hits=pool.hits if pool else None,
        pool_misses=pool.misses if pool else None,
        pool_buffers=pool.num_buffers if pool else None,
        pool_high_water=pool.high_water if pool else None,
        arena_peak_bytes=arena[0] if arena else None,
        arena_capacity_bytes=arena[1] if arena else None,
        swap_bytes=now.swap_bytes,
        swap_in_bytes=_less(now.swapped_in_bytes, then.swapped_in_bytes),
        swap_out_bytes=_less(now.swapped_out_bytes, then.swapped_out_bytes),
        limit_bytes=min((size for size in limits if size is not None), default=None),
        available_bytes=now.available_bytes,
        pressure_some=pressure,
    )


def _local_share(now: MemorySnapshot, machine: Machine) -> float | None:
    total = sum(pages for _, pages in now.pages_by_node)
    if not total:
        return None
    usable = set(machine.cpu_ids)
    local = {node.id for node in machine.numa_nodes if usable & set(node.cpu_ids)}
    return sum(pages for node, pages in now.pages_by_node if node in local) / total


def _nodes(tree: Tree) -> tuple[tuple[int, int], ...]:
    counts: dict[int, int] = {}
    for line in (tree.text("/proc/self/numa_maps") or "").splitlines():
        size = re.search(r"kernelpagesize_kB=(\d+)", line)
        factor = int(size[1]) // 4 if size else 1
        for node, pages in re.findall(r"\bN(\d+)=(\d+)", line):
            counts[int(node)] = counts.get(int(node), 0) + int(pages) * max(1, factor)
    return tuple(sorted(counts.items()))


def _kib(fields: dict[str, str], name: str) -> int | None:
    number = parse_int(fields.get(name, "").removesuffix(" kB"))
    return None if number is None else number * 1024


def _pages(pages: dict[str, str], name: str) -> int | None:
    number = parse_int(pages.get(name))
    return None if number is None else number * _PAGE_BYTES


def _less(now: int | None, then: int | None) -> int | None:
    return None if now is None or then is None else now - then
