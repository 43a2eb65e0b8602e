"""Who is pinned where: from what the workers said, else from the plan on this machine."""

from __future__ import annotations

from ..errors import PlanError
from ..machine import Machine
from ..machine.affinity import ThreadAffinity, format_cpus
from ..machine.probe.caches import Cache
from ..machine.probe.topology import Core, NumaNode
from .document import Document

# Above, a CPU number is garbage (as in ``machine.probe.tree``).
_MOST_CPUS = 65_536


def machine_of(document: Document) -> Machine:
    """The parts of ``Machine.to_dict`` that say where things lie; what is damaged is left out."""
    cores = [
        Core(cpus, core.text("kind"), core.count("node"), core.count("socket"))
        for core in document.items("cores")
        if (cpus := _cpus(core, "cpu_ids"))
    ]
    caches = [
        Cache(level, cache.text("kind"), cache.count("size_bytes"), cache.count("line_bytes"), cpus)
        for cache in document.items("caches")
        if (level := cache.count("level")) and (cpus := _cpus(cache, "shared_by"))
    ]
    nodes = [
        NumaNode(number, _cpus(node, "cpu_ids"), node.count("memory_total_bytes"), ())
        for node in document.items("numa_nodes")
        if (number := node.count("id")) is not None
    ]
    return Machine(
        cpu_ids=_cpus(document, "cpu_ids"),
        cores=tuple(cores),
        caches=tuple(caches),
        numa_nodes=tuple(nodes),
    )


def _cpus(document: Document, key: str) -> tuple[int, ...]:
    numbers = [item.count() for item in document.items(key)]
    return tuple(sorted({n for n in numbers if n is not None and n < _MOST_CPUS}))


def placement(report: Document, machine: Machine) -> tuple[dict[int, str], str]:
    """What runs on which CPU, and that in a sentence.

    Returns:
        Label by CPU; empty where nothing is pinned or it cannot be told.
    """
    seen = _workers_seen(report)
    if seen:
        return seen, f"Each worker is pinned to a CPU of its own: {format_cpus(seen)}."
    workers = report.count("plan", "parallel", "num_workers")
    count = workers or report.count("plan", "cpu", "num_threads")
    text = report.text("plan", "cpu", "thread_affinity")
    if text is None or not count:
        return {}, "Where threads ran is not recorded."
    who = f"{count:,} {'worker' if workers else 'thread'}{'s' if count != 1 else ''}"
    try:
        affinity = ThreadAffinity.parse(text)
        cpus = affinity.cpus(machine, count)
    except PlanError:
        return {}, f"{who} by affinity {text}: which CPUs that was cannot be told from this report."
    nodes = report.at("plan", "numa", "node_assignments")
    if affinity.kind == "none":
        if nodes:
            return {}, f"{who} on NUMA nodes {nodes.shown()}."
        among = f" among CPUs {format_cpus(machine.cpu_ids)}" if machine.cpu_ids else ""
        return {}, f"Nothing is pinned: the kernel moves {who}{among}."
    if workers:
        return (
            {cpu: f"worker {at}" for at, cpu in enumerate(cpus)},
            f"{who}, each pinned to a CPU of its own ({affinity}): {format_cpus(cpus)}.",
        )
    return (
        dict.fromkeys(cpus, "step"),
        f"The step's {who} stay on CPUs {format_cpus(cpus)} ({affinity}).",
    )


def _workers_seen(report: Document) -> dict[int, str]:
    seen: dict[int, str] = {}
    for at, worker in enumerate(report.items("performance", "workers")):
        cpu, number = worker.count("cpu"), worker.count("worker")
        if cpu is not None and cpu < _MOST_CPUS:
            name = f"worker {at if number is None else number}"
            seen[cpu] = f"{seen[cpu]}, {name}" if cpu in seen else name
    return seen
