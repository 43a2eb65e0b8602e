"""CPUs, cores, sockets and NUMA nodes, from sysfs and, where that is missing, ``/proc/cpuinfo``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .isa import CpuInfo
from .tree import Tree, parse_int

CPUS = "/sys/devices/system/cpu"
NODES = "/sys/devices/system/node"

# Capacities of equal cores differ a little where some are picked for higher clocks.
_SAME_CAPACITY = 1.1


@dataclass(frozen=True)
class Core:
    """One physical core.

    Attributes:
        cpu_ids: its logical CPUs (SMT siblings), ascending.
        kind: ``"performance"`` or ``"efficiency"`` on a hybrid processor, else ``None``.
        node: NUMA node number, ``None`` when unknown.
        socket: package number, ``None`` when unknown.
    """

    cpu_ids: tuple[int, ...]
    kind: str | None
    node: int | None
    socket: int | None


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node.

    Attributes:
        id: node number as the kernel counts.
        cpu_ids: logical CPUs of the node; empty for a node of memory alone.
        memory_total_bytes: its memory, ``None`` when unknown.
        distances: relative cost of reaching each node, in the order of ``Machine.numa_nodes``
            (10 is local); empty when unknown.
    """

    id: int
    cpu_ids: tuple[int, ...]
    memory_total_bytes: int | None
    distances: tuple[int, ...]


def read_online(tree: Tree, cpuinfo: CpuInfo) -> tuple[int, ...]:
    """Logical CPUs that are online, ascending; empty when nothing tells."""
    online = tree.cpu_list(f"{CPUS}/online")
    return online or tuple(tree.numbered(CPUS, "cpu")) or tuple(sorted(cpuinfo.packages))


def read_nodes(tree: Tree) -> tuple[NumaNode, ...]:
    """NUMA nodes by number; empty when the kernel shows none."""
    nodes = []
    for number in tree.numbered(NODES, "node"):
        folder = f"{NODES}/node{number}"
        cpu_ids = tree.cpu_list(f"{folder}/cpulist")
        if cpu_ids is None:
            continue
        match = re.search(r"MemTotal:\s*(\d+) kB", tree.text(f"{folder}/meminfo") or "")
        distances = [parse_int(word) for word in (tree.text(f"{folder}/distance") or "").split()]
        nodes.append(
            NumaNode(
                id=number,
                cpu_ids=cpu_ids,
                memory_total_bytes=int(match[1]) * 1024 if match else None,
                distances=tuple(d for d in distances if d is not None),
            )
        )
    return tuple(nodes)


def read_cores(
    tree: Tree, online: tuple[int, ...], nodes: tuple[NumaNode, ...], cpuinfo: CpuInfo
) -> tuple[Core, ...]:
    """Physical cores, ordered by socket, node and first CPU; empty when siblings are unknown."""
    node_of = {cpu: node.id for node in nodes for cpu in node.cpu_ids}
    kind_of = _kinds(tree, online)
    is_online = set(online)
    cores: list[Core] = []
    seen: set[int] = set()
    for cpu in online:
        if cpu in seen:
            continue
        siblings, socket = _siblings(tree, cpu, cpuinfo)
        if siblings is None:
            return ()
        cpu_ids = tuple(sorted((is_online & siblings) | {cpu}))
        seen |= set(cpu_ids)
        cores.append(Core(cpu_ids, kind_of.get(cpu), node_of.get(cpu), socket))
    unknown_last = 1 << 30

    def place(core: Core) -> tuple[int, int, int]:
        socket = unknown_last if core.socket is None else core.socket
        return socket, unknown_last if core.node is None else core.node, core.cpu_ids[0]

    return tuple(sorted(cores, key=place))


def count_sockets(cores: Iterable[Core]) -> int | None:
    """Number of sockets, ``None`` when any core's is unknown."""
    sockets = {core.socket for core in cores}
    return len(sockets) if sockets and None not in sockets else None


def _siblings(tree: Tree, cpu: int, cpuinfo: CpuInfo) -> tuple[set[int] | None, int | None]:
    """CPUs on the core of ``cpu`` (``None``: unknown) and its socket."""
    folder = f"{CPUS}/cpu{cpu}/topology"
    socket = tree.number(f"{folder}/physical_package_id")
    place = cpuinfo.packages.get(cpu)
    if socket is None and place is not None:
        socket = place[0]
    if socket is not None and socket < 0:  # firmware that does not say
        socket = None
    # core_cpus_list replaced thread_siblings_list in Linux 5.3; both are still written.
    for name in ("core_cpus_list", "thread_siblings_list"):
        if siblings := tree.cpu_list(f"{folder}/{name}"):
            return set(siblings), socket
    if place is not None and None not in place:
        return {other for other, where in cpuinfo.packages.items() if where == place}, socket
    return None, socket


def _kinds(tree: Tree, online: tuple[int, ...]) -> dict[int, str]:
    """Kind of each CPU of a hybrid processor; empty where all are alike or nothing tells."""
    kinds: dict[int, str] = {}
    # x86 hybrids have one performance-counter device per kind of core.
    for device, kind in (
        ("cpu_core", "performance"),
        ("cpu_atom", "efficiency"),
        ("cpu_lowpower", "efficiency"),
    ):
        for cpu in tree.cpu_list(f"/sys/devices/{device}/cpus") or ():
            kinds[cpu] = kind
    if kinds:
        return kinds
    # Arm: relative speed of each CPU, 1024 for the fastest.
    capacities = {cpu: tree.number(f"{CPUS}/cpu{cpu}/cpu_capacity") for cpu in online}
    known = {cpu: value for cpu, value in capacities.items() if value is not None and value > 0}
    if not known or len(known) < len(online):
        return {}
    slowest, fastest = min(known.values()), max(known.values())
    if slowest * _SAME_CAPACITY >= fastest:
        return {}
    return {
        cpu: "efficiency" if value <= slowest * _SAME_CAPACITY else "performance"
        for cpu, value in known.items()
    }
