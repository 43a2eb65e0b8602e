"""``CpuStats`` from two snapshots: pure, so that it is tested on trees of other machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..machine import Machine
from .cpu_counters import CpuCounters, CpuSnapshot, ProcessCounters, descendants
from .metrics import CoreUse, CpuStats, OtherProcess, ThreadUse

# A thread counts as busy from this share of the interval; a process is named from that.
BUSY_SHARE = 0.05
_NAMED_SHARE = 0.01
_MOST_NAMED = 5
_MOST_THREADS = 64


def cpu_stats(
    before: CpuSnapshot,
    after: CpuSnapshot,
    machine: Machine,
    *,
    own_by_cpu: Mapping[int, float] | None = None,
    child_processes: int | None = None,
    seen: Mapping[int, ProcessCounters] | None = None,
) -> CpuStats:
    """What lay between.

    Args:
        own_by_cpu: CPU seconds of this process by CPU, from looks in between; ``None``: not known.
        child_processes: most children seen at a time.
        seen: processes as they were seen last in between, those that ended included.
    """
    duration_s = max(after.at_s - before.at_s, 1e-9)
    used = after.usage - before.usage
    own_s = used.user_s + used.system_s
    children_s = _children_s(before, after)
    threads = _threads(before, after)
    delays = [t.run_delay_s for t in threads if t.run_delay_s is not None]
    cores = _cores(before, after, machine, own_by_cpu, duration_s)
    busy_s = _summed(before, after, machine, lambda c: c.user_s + c.system_s)
    steal_s = _summed(before, after, machine, lambda c: c.steal_s)
    others_s = None if busy_s is None else max(0.0, busy_s - own_s - (children_s or 0.0))
    throttled = before.throttling, after.throttling
    periods: tuple[int | None, int | None, float | None] = (None, None, None)
    if throttled[0] is not None and throttled[1] is not None:
        periods = (
            throttled[1].periods - throttled[0].periods,
            throttled[1].throttled_periods - throttled[0].throttled_periods,
            throttled[1].throttled_s - throttled[0].throttled_s,
        )
    pressure = None
    if before.pressure_s is not None and after.pressure_s is not None:
        pressure = (after.pressure_s - before.pressure_s) / duration_s
    frequencies = [f for c in cores if (f := c.frequency_hz) is not None]
    return CpuStats(
        user_s=used.user_s,
        system_s=used.system_s,
        children_s=children_s,
        cpu_fraction=(own_s + (children_s or 0.0)) / (duration_s * machine.usable_cpus),
        usable_cpus=machine.usable_cpus,
        cpu_quota=machine.cpu_quota,
        cores=cores,
        threads=tuple(threads[:_MOST_THREADS]),
        busy_threads=sum(t.user_s + t.system_s >= BUSY_SHARE * duration_s for t in threads)
        if threads
        else None,
        run_delay_s=sum(delays) if delays else None,
        others_s=others_s,
        steal_s=steal_s,
        periods=periods[0],
        throttled_periods=periods[1],
        throttled_s=periods[2],
        voluntary_switches=used.voluntary_switches,
        involuntary_switches=used.involuntary_switches,
        migrations=_migrations(before, after),
        frequency_hz=sum(frequencies) / len(frequencies) if frequencies else None,
        max_frequency_hz=max(after.max_frequencies_hz.values(), default=None),
        pressure_some=pressure,
        others=_others(before, {**(seen or {}), **after.processes}, after.own, duration_s),
        child_processes=child_processes,
    )


def _threads(before: CpuSnapshot, after: CpuSnapshot) -> list[ThreadUse]:
    """Threads alive at the end that ran, the busiest first."""
    found = []
    for number, now in after.tasks.items():
        then = before.tasks.get(number)
        user_s = now.user_s - (then.user_s if then else 0.0)
        system_s = now.system_s - (then.system_s if then else 0.0)
        if now.run_s is not None:
            # Ticks are 10 ms; the scheduler's own count is exact, the ratio is the ticks'.
            run_s = now.run_s - ((then.run_s if then else 0.0) or 0.0)
            ticks = user_s + system_s
            user_s = run_s * user_s / ticks if ticks > 0 else run_s
            system_s = max(0.0, run_s - user_s)
        delay_s = now.run_delay_s
        if delay_s is not None and then is not None:
            delay_s -= then.run_delay_s or 0.0
        if user_s + system_s <= 0 and not delay_s:
            continue
        found.append(
            ThreadUse(
                thread=number,
                name=now.name,
                user_s=user_s,
                system_s=system_s,
                run_delay_s=delay_s,
                cpu=now.cpu,
                cpu_ids=now.cpu_ids,
            )
        )
    return sorted(found, key=lambda t: -(t.user_s + t.system_s))


def _migrations(before: CpuSnapshot, after: CpuSnapshot) -> int | None:
    counts = [
        now.migrations - ((then.migrations if (then := before.tasks.get(n)) else 0) or 0)
        for n, now in after.tasks.items()
        if now.migrations is not None
    ]
    return sum(counts) if counts else None


def _children_s(before: CpuSnapshot, after: CpuSnapshot) -> float | None:
    if after.own is None or after.own not in after.processes:
        return None
    # What children used when they ended is in ``ended_s`` of whoever waited for them.
    total = after.processes[after.own].ended_s
    if after.own in before.processes:
        total -= before.processes[after.own].ended_s
    for number in descendants(after.processes, after.own):
        process = after.processes[number]
        total += process.cpu_s + process.ended_s
    for number in descendants(before.processes, after.own):
        process = before.processes[number]
        total -= process.cpu_s + process.ended_s
    return max(0.0, total)


def _others(
    before: CpuSnapshot,
    processes: dict[int, ProcessCounters],
    own: int | None,
    duration_s: float,
) -> tuple[OtherProcess, ...]:
    ours = descendants(processes, own) | {own}
    found = []
    for number, now in processes.items():
        if number in ours:
            continue
        then = before.processes.get(number)
        is_same = then is not None and then.started == now.started
        cpu_s = now.cpu_s - (then.cpu_s if then is not None and is_same else 0.0)
        if cpu_s >= _NAMED_SHARE * duration_s:
            found.append(OtherProcess(process=number, name=now.name, cpu_s=cpu_s, cpu=now.cpu))
    return tuple(sorted(found, key=lambda o: -o.cpu_s)[:_MOST_NAMED])


def _summed(
    before: CpuSnapshot,
    after: CpuSnapshot,
    machine: Machine,
    part: Callable[[CpuCounters], float],
) -> float | None:
    cpus = [c for c in machine.cpu_ids if c in before.cpus and c in after.cpus]
    if not cpus:
        return None
    return sum(part(after.cpus[c]) - part(before.cpus[c]) for c in cpus)


def _cores(
    before: CpuSnapshot,
    after: CpuSnapshot,
    machine: Machine,
    own_by_cpu: Mapping[int, float] | None,
    duration_s: float,
) -> tuple[CoreUse, ...]:
    found = []
    for cpu in machine.cpu_ids:
        then, now = before.cpus.get(cpu), after.cpus.get(cpu)
        if then is None or now is None:
            continue
        parts = {
            name: max(0.0, getattr(now, f"{name}_s") - getattr(then, f"{name}_s"))
            for name in ("user", "system", "iowait", "steal", "idle")
        }
        # What the kernel accounts for; a tick more or less than the clock says.
        whole = sum(parts.values()) or duration_s
        own = None if own_by_cpu is None else min(1.0, own_by_cpu.get(cpu, 0.0) / duration_s)
        seen = [f for s in (before, after) if (f := s.frequencies_hz.get(cpu)) is not None]
        found.append(
            CoreUse(
                cpu=cpu,
                **{name: value / whole for name, value in parts.items()},
                own=own,
                frequency_hz=sum(seen) / len(seen) if seen else None,
            )
        )
    return tuple(found)
