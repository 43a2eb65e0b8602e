"""Threads against CPUs, quotas, neighbours, and where threads run."""

from __future__ import annotations

import math

from ...units import format_share
from ..optimization import Change, Optimization
from . import thresholds as t
from .facts import Facts, Rule, found, gain_of


def quota(facts: Facts) -> Optimization | None:
    """The control group's quota stops the process for part of each period."""
    cpu = facts.report.cpu
    if not cpu.periods or not cpu.throttled_periods:
        return None
    share = cpu.throttled_periods / cpu.periods
    if share < t.THROTTLED.value:
        return None
    allowed = cpu.cpu_quota or facts.cpus
    goal = max(1, math.ceil(allowed))
    threads = facts.threads
    many = threads is not None and threads > goal
    title = f"the CPU quota of {allowed:g} stops the run in {format_share(share)} of its periods"
    if many:
        title += f": {threads} threads use it up by waiting for each other"
    change = facts.threads_changed(goal) if many else Change(command="raise the CPU quota")
    if many and facts.report.workers:
        change = Change(plan={"parallel.num_workers": goal})
    lost = (cpu.throttled_s or 0.0) / (facts.duration_s * max(1, len(facts.machine.cpu_ids)))
    return found(
        "quota",
        title,
        "cpu.throttled_periods / cpu.periods",
        share,
        t.THROTTLED,
        change,
        gain=gain_of(lost),
        gain_source="share of the CPUs' time in which the group was stopped",
    )


def oversubscription(facts: Facts) -> Optimization | None:
    """More threads inside an operation than CPUs: they wait for each other's turn."""
    threads = facts.threads
    if threads is None:
        threads = facts.report.cpu.busy_threads or 0
    delay = facts.run_delay
    if threads <= facts.cpus or delay is None or delay < t.RUN_DELAY.value or _throttled(facts):
        return None
    workers = bool(facts.report.workers)
    change = (
        Change(plan={"parallel.num_workers": facts.cpus})
        if workers
        else facts.threads_changed(facts.cpus)
    )
    return found(
        "oversubscription",
        f"{threads} {'workers' if workers else 'threads'} share {facts.cpus} CPUs",
        "cpu.run_delay_s / (cpu.run_delay_s + cpu.user_s + cpu.system_s)",
        delay,
        t.RUN_DELAY,
        change,
        text=f"threads that could run waited for a CPU {format_share(delay)} of their time",
        gain=gain_of(delay),
        gain_source="share of the threads' time spent waiting for a CPU; barriers make it more",
    )


def pinned_together(facts: Facts) -> Optimization | None:
    """Busy threads may run on fewer CPUs than there are of both."""
    busy = [
        thread
        for thread in facts.report.cpu.threads
        if thread.user_s + thread.system_s + (thread.run_delay_s or 0.0) >= 0.2 * facts.duration_s
        and thread.cpu_ids
    ]
    allowed = {cpu for thread in busy for cpu in thread.cpu_ids}
    usable = set(facts.machine.cpu_ids)
    delay = facts.run_delay
    if delay is None or delay < t.RUN_DELAY.value:
        return None
    if not busy or len(allowed) >= len(busy) or not allowed < usable:
        return None
    change = Change(command="taskset -cp " + ",".join(map(str, sorted(usable))) + " PID")
    if facts.has_plan:
        change = Change(plan={"cpu.thread_affinity": "spread"})
    free = min(len(busy), len(usable))
    return found(
        "affinity",
        f"{len(busy)} busy threads are pinned to {len(allowed)} of {len(usable)} CPUs",
        "cpu.threads[].cpu_ids",
        len(allowed),
        t.Threshold(len(busy), "a CPU for each busy thread: sched_setaffinity(2)"),
        change,
        text=f"pinned threads waited for a CPU {format_share(delay)} of their time",
        gain=free / len(allowed) - 1,
        gain_source="CPUs that the threads could have over those they have",
    )


def noisy_neighbour(facts: Facts) -> Optimization | None:
    """Another process runs on our CPUs, and our threads wait there."""
    cpu = facts.report.cpu
    if cpu.others_s is None or cpu.others_s < t.OTHERS.value * facts.duration_s:
        return None
    # Threads must have waited for it: a neighbour on a CPU that nobody else wants is none.
    waited = (cpu.run_delay_s or 0.0) / facts.duration_s
    threads = facts.threads
    if waited < t.OTHERS.value / 3 or (threads is not None and threads > facts.cpus):
        return None
    if facts.children or _slow_worker(facts):
        return None
    share = min(0.9, cpu.others_s / facts.duration_s)
    other = facts.busiest_other
    place = max(facts.others_by_cpu, key=facts.others_by_cpu.__getitem__, default=None)
    if other is not None and other.cpu is not None:
        place = other.cpu
    named = f"{other.name} (process {other.process})" if other else "another process"
    where = "" if place is None else f" on CPU {place}"
    pid = other.process if other else "PID"
    return found(
        "noisy-neighbour",
        f"{named} takes {format_share(share)} of a CPU{where} from the run",
        "cpu.others_s",
        cpu.others_s,
        t.Threshold(t.OTHERS.value * facts.duration_s, t.OTHERS.source),
        Change(command=f"renice -n 19 -p {pid}  (or move it: taskset -cp CPU {pid}, or stop it)"),
        gain=gain_of(share / 2),
        gain_source="operations wait for their slowest thread, which shares its CPU half and half",
    )


def steal(facts: Facts) -> Optimization | None:
    """The hypervisor runs others on our CPUs."""
    taken = facts.report.cpu.steal_s
    cores = len(facts.report.cpu.cores)
    if taken is None or not cores:
        return None
    share = taken / (facts.duration_s * cores)
    if share < t.STEAL.value:
        return None
    return found(
        "steal",
        f"the hypervisor takes {format_share(share)} of the CPUs' time for other machines",
        "cpu.steal_s",
        taken,
        t.Threshold(t.STEAL.value * facts.duration_s * cores, t.STEAL.source),
        Change(command="move to a host or an instance type with CPUs of its own"),
        gain=gain_of(share),
        gain_source="share of the CPUs' time that was taken",
    )


def frequency(facts: Facts) -> Optimization | None:
    """Busy CPUs run below the frequency they can reach: heat, power limit or governor."""
    cpu = facts.report.cpu
    if not cpu.frequency_hz or not cpu.max_frequency_hz or (cpu.cpu_fraction or 0.0) < 0.5:
        return None
    share = cpu.frequency_hz / cpu.max_frequency_hz
    if not 0 < share < t.FREQUENCY.value:  # 0: too small for a quotient
        return None
    return found(
        "throttling",
        f"busy CPUs run at {format_share(share)} of their highest frequency",
        "cpu.frequency_hz / cpu.max_frequency_hz",
        share,
        t.FREQUENCY,
        Change(command="cpupower frequency-set -g performance  (else look at cooling and power)"),
        gain=1 / share - 1,
        gain_source="highest frequency over the present one; wide vectors may not reach it",
    )


def physical_cores(facts: Facts) -> Optimization | None:
    """Two threads on one core share its arithmetic units (SMT)."""
    cores = facts.machine.usable_cores
    threads = facts.threads
    if cores is None or threads is None or not cores < threads <= facts.cpus:
        return None
    workers = bool(facts.report.workers)
    change = Change(plan={"parallel.num_workers": cores}) if workers else None
    return found(
        "smt",
        f"{threads} threads on {cores} physical cores: pairs share one core's arithmetic units",
        "work.num_threads",
        threads,
        t.Threshold(cores, "PyTorch performance tuning guide: avoid logical cores"),
        change or facts.threads_changed(cores),
        kind="opportunity",
    )


def idle_cpus(facts: Facts) -> Optimization | None:
    """Fewer threads than CPUs while the run computes."""
    threads, used = facts.threads, facts.report.cpu.cpu_fraction
    most = min(facts.cpus, facts.machine.usable_cores or facts.cpus)
    if threads is None or used is None or threads >= most or facts.data_wait >= t.DATA_WAIT.value:
        return None
    if used > 0.9 or facts.report.workers:
        return None
    return found(
        "idle-cpus",
        f"{threads} of {most} cores compute",
        "work.num_threads",
        threads,
        t.Threshold(most, "physical cores that this process may use"),
        facts.threads_changed(most),
        kind="opportunity",
        text=f"the run uses {format_share(used)} of its CPUs",
    )


def migrations(facts: Facts) -> Optimization | None:
    """The kernel moves threads about, and their caches stay behind."""
    moved = facts.report.cpu.migrations
    threads = facts.threads
    if moved is None or facts.knob("cpu.thread_affinity") not in (None, "none"):
        return None
    rate = moved / facts.duration_s
    if rate < t.MIGRATIONS_PER_S.value or (threads is not None and threads > facts.cpus):
        return None
    change = Change(command="OMP_PROC_BIND=close OMP_PLACES=cores python ...")
    if facts.has_plan:
        change = Change(plan={"cpu.thread_affinity": "compact"})
    return found(
        "migrations",
        f"threads change their CPU {rate:.0f} times a second",
        "cpu.migrations / duration_s",
        rate,
        t.MIGRATIONS_PER_S,
        change,
        kind="opportunity",
    )


def _throttled(facts: Facts) -> bool:
    cpu = facts.report.cpu
    return bool(
        cpu.periods
        and cpu.throttled_periods
        and cpu.throttled_periods / cpu.periods >= t.THROTTLED.value
    )


def _slow_worker(facts: Facts) -> bool:
    slowest = facts.slowest_worker
    return slowest is not None and slowest[1] < t.SLOW_WORKER.value


RULES: tuple[Rule, ...] = (
    quota,
    oversubscription,
    pinned_together,
    noisy_neighbour,
    steal,
    frequency,
    physical_cores,
    idle_cpus,
    migrations,
)
