"""What the kernel counts of processors, threads and processes, read at one moment.

Formats: the kernel's ``filesystems/proc.rst`` (stat), ``scheduler/sched-stats.rst`` (schedstat),
``accounting/psi.rst`` (pressure).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..machine.probe.cgroup import Throttling, read_throttling
from ..machine.probe.tree import Tree, parse_cpu_list, parse_fields, parse_int
from .process import ProcessUsage

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CPUS = "/sys/devices/system/cpu"


@dataclass(frozen=True)
class CpuCounters:
    """Seconds of one logical CPU since the machine started."""

    user_s: float
    system_s: float
    iowait_s: float
    steal_s: float
    idle_s: float


@dataclass(frozen=True)
class TaskCounters:
    """One thread since its start; ``cpu`` is where it was seen."""

    name: str
    user_s: float
    system_s: float
    cpu: int | None
    run_s: float | None = None
    run_delay_s: float | None = None
    migrations: int | None = None
    cpu_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ProcessCounters:
    """One process since its start, all threads; ``cpu`` is where its first thread was seen.

    ``ended_s``: CPU seconds of its children that ended and were waited for. ``started``: when, in
    ticks; numbers are used again, numbers and starts are not.
    """

    name: str
    parent: int
    started: int
    cpu_s: float
    ended_s: float
    cpu: int | None


@dataclass(frozen=True)
class CpuSnapshot:
    """All of them at one moment; subtract two (``cpu_stats.cpu_stats``).

    Attributes:
        at_s: ``time.monotonic``. usage: of this process. own: number of this process.
        cpus, tasks, processes: by number. throttling: of the tightest quota, if there is one.
        pressure_s: seconds some task waited for a CPU; ``None``: not told.
        frequencies_hz, max_frequencies_hz: by CPU; empty: not told.
    """

    at_s: float
    usage: ProcessUsage
    own: int | None
    cpus: dict[int, CpuCounters] = field(default_factory=dict)
    tasks: dict[int, TaskCounters] = field(default_factory=dict)
    processes: dict[int, ProcessCounters] = field(default_factory=dict)
    throttling: Throttling | None = None
    pressure_s: float | None = None
    frequencies_hz: dict[int, float] = field(default_factory=dict)
    max_frequencies_hz: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        tree: Tree,
        cpu_ids: Iterable[int],
        processes: dict[int, ProcessCounters] | None = None,
    ) -> CpuSnapshot:
        """Read below ``tree``; takes a millisecond or two. What is missing is left out.

        Args:
            processes: known from a moment ago; ``None``: they are read too.
        """
        cpu_ids = tuple(cpu_ids)
        own = _first_int(tree.text("/proc/self/stat"))
        tasks = {
            task: counters
            for task in tree.numbered("/proc/self/task", "")
            if (counters := read_task(tree, task, whole=True)) is not None
        }
        return cls(
            at_s=time.monotonic(),
            usage=_usage(tree),
            own=own,
            cpus=read_cpus(tree),
            tasks=tasks,
            processes=read_processes(tree) if processes is None else processes,
            throttling=read_throttling(tree),
            pressure_s=read_pressure(tree, "cpu"),
            frequencies_hz=_frequencies(tree, cpu_ids, "scaling_cur_freq"),
            max_frequencies_hz=_frequencies(tree, cpu_ids, "cpuinfo_max_freq"),
        )


def read_cpus(tree: Tree) -> dict[int, CpuCounters]:
    """``/proc/stat`` by CPU."""
    found = {}
    for line in (tree.text("/proc/stat") or "").splitlines():
        match = re.match(r"cpu(\d{1,6}) ", line)
        if match is None:
            continue
        numbers = [(parse_int(word) or 0) / TICKS_PER_S for word in line.split()[1:9]]
        user, nice, system, idle, iowait, irq, softirq, steal = numbers + [0.0] * (8 - len(numbers))
        found[int(match[1])] = CpuCounters(user + nice, system + irq + softirq, iowait, steal, idle)
    return found


def read_task(tree: Tree, task: int, *, whole: bool = False) -> TaskCounters | None:
    """One thread of this process; ``whole``: also where it may run, and its migrations."""
    folder = f"/proc/self/task/{task}"
    words = _stat(tree.text(f"{folder}/stat"))
    if words is None:
        return None
    name, fields = words
    run_s, delay_s = parse_schedstat(tree.text(f"{folder}/schedstat"))
    migrations = None
    cpu_ids: tuple[int, ...] = ()
    if whole:
        match = re.search(r"nr_migrations\s*:\s*(\d+)", tree.text(f"{folder}/sched") or "")
        migrations = int(match[1]) if match else None
        status = parse_fields(tree.text(f"{folder}/status"))
        cpu_ids = parse_cpu_list(status.get("Cpus_allowed_list")) or ()
    return TaskCounters(
        name=name,
        user_s=_ticks(fields, 11),
        system_s=_ticks(fields, 12),
        cpu=parse_int(fields[36]) if len(fields) > 36 else None,
        run_s=run_s,
        run_delay_s=delay_s,
        migrations=migrations,
        cpu_ids=cpu_ids,
    )


def read_processes(tree: Tree) -> dict[int, ProcessCounters]:
    """Every process that ``/proc`` shows; in a container its own only."""
    found = {}
    for number in tree.numbered("/proc", ""):
        words = _stat(tree.text(f"/proc/{number}/stat"))
        if words is None:
            continue
        name, fields = words
        found[number] = ProcessCounters(
            name=name,
            parent=parse_int(fields[1]) or 0,
            started=(parse_int(fields[19]) or 0) if len(fields) > 19 else 0,
            cpu_s=_ticks(fields, 11) + _ticks(fields, 12),
            ended_s=_ticks(fields, 13) + _ticks(fields, 14),
            cpu=parse_int(fields[36]) if len(fields) > 36 else None,
        )
    return found


def descendants(processes: dict[int, ProcessCounters], own: int | None) -> set[int]:
    """Children of ``own``, their children, and so on."""
    children: dict[int, list[int]] = {}
    for number, process in processes.items():
        children.setdefault(process.parent, []).append(number)
    found: set[int] = set()
    waiting = list(children.get(own, ())) if own is not None else []
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += children.get(number, ())
    return found


def read_pressure(tree: Tree, resource: str) -> float | None:
    """Seconds in which some task waited for ``cpu``, ``memory`` or ``io``; ``None``: not told."""
    match = re.search(r"some .*total=(\d+)", tree.text(f"/proc/pressure/{resource}") or "")
    return int(match[1]) / 1e6 if match else None


def _usage(tree: Tree) -> ProcessUsage:
    if tree.is_live:
        return ProcessUsage.now()
    words = _stat(tree.text("/proc/self/stat"))
    fields = words[1] if words else []
    switches = {"voluntary_ctxt_switches": 0, "nonvoluntary_ctxt_switches": 0}
    for task in tree.numbered("/proc/self/task", ""):
        status = parse_fields(tree.text(f"/proc/self/task/{task}/status"))
        for key in switches:
            switches[key] += parse_int(status.get(key)) or 0
    return ProcessUsage(
        user_s=_ticks(fields, 11),
        system_s=_ticks(fields, 12),
        minor_faults=(parse_int(fields[7]) or 0) if len(fields) > 7 else 0,
        major_faults=(parse_int(fields[9]) or 0) if len(fields) > 9 else 0,
        voluntary_switches=switches["voluntary_ctxt_switches"],
        involuntary_switches=switches["nonvoluntary_ctxt_switches"],
    )


def _frequencies(tree: Tree, cpu_ids: Iterable[int], name: str) -> dict[int, float]:
    # In kHz. /proc/cpuinfo has a figure too, which virtual machines never change.
    read = {cpu: tree.number(f"{CPUS}/cpu{cpu}/cpufreq/{name}") for cpu in cpu_ids}
    return {cpu: 1000.0 * value for cpu, value in read.items() if value}


def _stat(text: str | None) -> tuple[str, list[str]] | None:
    """Name, and the fields after it: ``[0]`` is the state, field 3 of the manual."""
    if text is None:
        return None
    # The name may hold blanks and brackets; the last bracket ends it.
    first, last = text.find("("), text.rfind(")")
    fields = text[last + 1 :].split()
    return (text[first + 1 : last], fields) if 0 < first < last and len(fields) > 14 else None


def _ticks(fields: list[str], index: int) -> float:
    return (parse_int(fields[index]) or 0) / TICKS_PER_S if len(fields) > index else 0.0


def parse_schedstat(text: str | None) -> tuple[float | None, float | None]:
    """Seconds a thread ran, and was ready to run without a processor; ``None``: not told."""
    words = (text or "").split()
    numbers = [parse_int(word) for word in words]
    if len(numbers) != 3 or numbers[0] is None or numbers[1] is None:
        return None, None
    return numbers[0] / 1e9, numbers[1] / 1e9


def _first_int(text: str | None) -> int | None:
    return parse_int(text.split(" ", 1)[0]) if text else None
