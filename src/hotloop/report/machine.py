"""The machine drawn: sockets, NUMA nodes, caches, cores, CPUs, and who runs there.

Boxes of nested lists, not a picture: they wrap on a narrow page, print, and read aloud in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar
from xml.etree.ElementTree import Element

from ..machine import Machine
from ..machine.affinity import format_cpus
from ..machine.probe.caches import Cache
from ..machine.probe.topology import Core
from ..units import format_bytes, format_seconds, format_share
from .document import Document
from .elements import UNKNOWN, Child, bar, facts, keyed, note, section, table, tag
from .placement import machine_of, placement

_MOST_CORES = 512
# With more cores, the private caches are named once and not in each core.
_DETAILED_CORES = 16
_MOST_THREADS = 16
K = TypeVar("K")
_USE = (("this run", 1), ("others", 2), ("hypervisor", 7))


def machine(report: Document, described: Document) -> Element:
    """The section."""
    rebuilt = machine_of(described)
    pins, sentence = placement(report, rebuilt)
    parts: list[Child] = [facts(_facts(described)), tag("p", sentence)]
    parts += _drawing(report, rebuilt, pins)
    parts += _threads(report)
    return section("machine", "The machine", parts)


def _facts(described: Document) -> list[tuple[str, str]]:
    usable, logical = described.count("usable_cpus"), described.count("logical_cpus")
    quota = described.amount("cpu_quota")
    cpus = UNKNOWN if usable is None else f"{usable:,} usable"
    cpus += "" if logical is None else f" of {logical:,}"
    cpus += "" if quota is None else f", quota {quota:g}"
    total = described.amount("memory", "total_bytes")
    total = described.amount("memory_total_bytes") if total is None else total
    limit = described.amount("memory", "limit_bytes")
    size = UNKNOWN if total is None else format_bytes(total)
    rows = [
        ("processor", described.text("cpu_model") or UNKNOWN),
        ("CPUs", cpus),
        ("memory", size if limit is None else f"{size}, limited to {format_bytes(limit)}"),
    ]
    for key, title in (
        ("isa", "instructions"), ("allocator", "allocator"), ("tee", "TEE"), ("kernel", "kernel"),
        ("accelerators", "accelerators"),
    ):  # fmt: skip
        value = described.at(key)
        if value and key == "accelerators":
            names = [d.text("name") or d.text("vendor") or "unnamed" for d in value.items()]
            rows.append((title, ", ".join(names)))
        elif value:
            rows.append((title, value.shown()))
    return rows


def _drawing(report: Document, rebuilt: Machine, pins: dict[int, str]) -> list[Child]:
    if not rebuilt.cores:
        return [note("Sockets, nodes, cores and caches are not recorded in this report.")]
    use = {
        number: core
        for core in report.items("performance", "cpu", "cores")
        if (number := core.count("cpu")) is not None
    }
    cores = rebuilt.cores[:_MOST_CORES]
    last = {cpu: cache for cache in rebuilt.last_level_caches for cpu in cache.shared_by}
    detailed = len(cores) <= _DETAILED_CORES
    memory = {node.id: node.memory_total_bytes for node in rebuilt.numa_nodes}

    def cpu(number: int) -> Element:
        return _cpu(number, number in rebuilt.cpu_ids, pins.get(number), use.get(number))

    def core(one: Core) -> Element:
        kind = f"{one.kind} core" if one.kind else "core" if detailed else None
        private = _private(rebuilt, one) if detailed else None
        return tag(
            "li", tag("span", kind, class_="what") if kind else None,
            tag("ul", map(cpu, one.cpu_ids)),
            tag("span", private, class_="what") if private else None, class_="core",
        )  # fmt: skip

    def cache(of: Cache | None, inside: Sequence[Core]) -> Element:
        cores_drawn = tag("ul", map(core, inside), class_="cores")
        shared = of is not None and len(of.shared_by) > 1
        name = f"L{of.level} {format_bytes(of.size_bytes)}" if of is not None and shared else None
        return tag("li", cores_drawn, tag("span", name, class_="what cache") if name else None)

    def node(number: int | None, inside: Sequence[Core]) -> Element:
        size = memory.get(number) if number is not None else None
        name = "node not known" if number is None else f"NUMA node {number}"
        name += "" if size is None else f", {format_bytes(size)}"
        groups = _grouped(inside, lambda c: last.get(c.cpu_ids[0]))
        boxes = [cache(*group) for group in groups]
        return tag("li", tag("span", name, class_="what"), tag("ul", boxes), class_="node")

    def socket(number: int | None, inside: Sequence[Core]) -> Element:
        name = "socket not known" if number is None else f"socket {number}"
        nodes = [node(*group) for group in _grouped(inside, lambda c: c.node)]
        return tag("li", tag("span", name, class_="what"), tag("ul", nodes), class_="socket")

    sockets = [socket(*group) for group in _grouped(cores, lambda c: c.socket)]
    drawn: list[Child] = [tag("ul", sockets, class_="machine" if detailed else "machine compact")]
    if use:
        drawn.append(tag("ul", [tag("li", keyed(c, name)) for name, c in _USE], class_="legend"))
    if len(rebuilt.cores) > len(cores):
        drawn.append(note(f"{len(rebuilt.cores) - len(cores):,} more cores are not drawn."))
    if not detailed and (private := _private(rebuilt, cores[0])):
        drawn.append(note(f"Each inner box is a core. Its own caches: {private}."))
    return drawn


def _grouped(cores: Iterable[Core], key: Callable[[Core], K]) -> list[tuple[K, list[Core]]]:
    groups: dict[K, list[Core]] = {}
    for core in cores:
        groups.setdefault(key(core), []).append(core)
    return list(groups.items())


def _private(rebuilt: Machine, core: Core) -> str:
    """The caches that only this core uses."""
    suffix = {"data": "d", "instruction": "i"}
    own = [
        f"L{cache.level}{suffix.get(cache.kind or '', '')} {format_bytes(cache.size_bytes)}"
        for cache in rebuilt.caches
        if set(cache.shared_by) <= set(core.cpu_ids)
    ]
    return ", ".join(own)


def _cpu(number: int, usable: bool, pinned: str | None, use: Document | None) -> Element:
    parts: list[Child] = [tag("span", f"CPU {number}", class_="name")]
    if not usable:
        parts.append(tag("span", "not ours", class_="who"))
    elif pinned:
        parts.append(tag("span", pinned, class_="who"))
    if use is not None:
        parts += _use(number, use)
    class_ = "cpu" if usable else "cpu away"
    return tag("li", parts, class_=f"{class_} pinned" if pinned and usable else class_)


def _use(number: int, use: Document) -> list[Element]:
    busy = [use.amount(key) for key in ("user", "system")]
    if None in busy:
        return []
    everybody = sum(value or 0.0 for value in busy)
    own = use.amount("own")
    # Whose time it was is not known without `own`: then all of it is drawn as one.
    mine = everybody if own is None else min(own, everybody)
    steal = use.amount("steal") or 0.0
    said = f"CPU {number}: {format_share(everybody)} busy"
    said += f", {format_share(own)} by this run" if own is not None else ""
    said += f", {format_share(steal)} taken by the hypervisor" if steal else ""
    drawn = bar(said, [(1, mine), (2, everybody - mine), (7, steal)], 1.0, height=8)
    return [drawn, tag("span", format_share(everybody), class_="who")]


def _threads(report: Document) -> list[Child]:
    """The run's busiest threads: where they may run, and where they were seen."""
    found = report.items("performance", "cpu", "threads")
    rows = []
    for thread in found[:_MOST_THREADS]:
        cpus = [n for item in thread.items("cpu_ids") if (n := item.count()) is not None]
        cpu, delay = thread.count("cpu"), thread.amount("run_delay_s")
        rows.append(
            (
                thread.text("name") or "unnamed",
                format_cpus(cpus[:4096]) or "–",
                "–" if cpu is None else f"{cpu}",
                format_seconds(thread.amount("user_s")),
                format_seconds(thread.amount("system_s")),
                UNKNOWN if delay is None else format_seconds(delay),
            )
        )
    if not rows:
        return []
    head = ("thread", "may run on", "seen on", "user", "system", "waited for a CPU")
    shown: list[Child] = [table("Threads, the busiest first", head, rows, right=(3, 4, 5))]
    if len(found) > len(rows):
        shown.append(note(f"{len(found) - len(rows):,} more threads."))
    return shown
