"""Workers that share a batch: a slow one, chunks that cannot move, waiting for each other."""

from __future__ import annotations

from ...units import format_share
from ..optimization import Change, Optimization
from . import thresholds as t
from .facts import Facts, Rule, found, gain_of


def slow_worker(facts: Facts) -> Optimization | None:
    """One worker runs its chunks slower than the others."""
    slowest = facts.slowest_worker
    if slowest is None or slowest[1] >= t.SLOW_WORKER.value:
        return None
    number, share = slowest
    cpu = next(w.cpu for w in facts.report.workers if w.worker == number)
    count = len(facts.worker_rates)
    title = f"worker {number} runs at {format_share(share)} of the fastest one's rate"
    other = facts.busiest_other
    change = Change(
        plan={"parallel.chunk_size": _smaller_chunk(facts), "parallel.steal_threshold": 1}
    )
    if other is not None and other.cpu_s >= t.OTHERS.value * facts.duration_s:
        where = "" if cpu is None else f" {cpu}"
        title += f": it shares CPU{where} with {other.name} (process {other.process})"
        change = Change(command=f"renice -n 19 -p {other.process}  (or stop it, or move it)")
    return found(
        "slow-worker",
        title,
        "workers[].chunks / busy_s, least over greatest",
        share,
        t.SLOW_WORKER,
        change,
        gain=gain_of(1 - share) if _cannot_move(facts) else gain_of((1 - share) / count),
        gain_source="the batch ends with its slowest worker",
    )


def steal_threshold(facts: Facts) -> Optimization | None:
    """Workers wait for others that have chunks left, and may not take them."""
    workers = facts.report.workers
    threshold = facts.knob("parallel.steal_threshold")
    waiting = _waiting(facts)
    if len(workers) < 2 or threshold is None or threshold <= 1 or waiting < t.SYNCHRONIZE.value:
        return None
    return found(
        "steal-threshold",
        f"workers wait {format_share(waiting)} of the time and take no chunk below "
        f"{threshold} left",
        "workers[].wait_s / (busy_s + wait_s + update_s)",
        waiting,
        t.SYNCHRONIZE,
        Change(plan={"parallel.steal_threshold": 1}),
        gain=gain_of(waiting),
        gain_source="share of the workers' time spent waiting",
    )


def workers_wait(facts: Facts) -> Optimization | None:
    """Workers wait for each other: smaller chunks even out, or one step with threads inside."""
    workers = facts.report.workers
    waiting = _waiting(facts)
    threshold = facts.knob("parallel.steal_threshold") or 1
    if len(workers) < 2 or waiting < t.SYNCHRONIZE.value or threshold > 1:
        return None
    slowest = facts.slowest_worker
    if slowest is not None and slowest[1] < t.SLOW_WORKER.value:
        return None
    change = Change(plan={"parallel.num_workers": None, "cpu.num_threads": len(workers)})
    if _cannot_move(facts):
        change = Change(plan={"parallel.chunk_size": _smaller_chunk(facts)})
    return found(
        "workers-wait",
        f"workers wait for each other {format_share(waiting)} of the time",
        "workers[].wait_s / (busy_s + wait_s + update_s)",
        waiting,
        t.SYNCHRONIZE,
        change,
        gain=gain_of(waiting),
        gain_source="share of the workers' time spent waiting",
    )


def workers_instead(facts: Facts) -> Optimization | None:
    """Workers with a core each, in place of threads inside each operation."""
    report = facts.report
    cores = min(facts.cpus, facts.machine.usable_cores or facts.cpus)
    threads = report.work.num_threads
    if report.workers or not facts.has_plan or threads is None or not 1 < threads <= cores:
        return None
    if report.work.path != "compiled" or not report.work.has_convolutions:
        return None
    return found(
        "workers",
        f"{threads} threads inside each operation; {cores} workers with a core each may do better",
        "work.path",
        report.work.path,
        t.Threshold(cores, "benchmarks/results/scale-cnn.json: workers gain on convolutions"),
        Change(plan={"parallel.num_workers": cores}),
        kind="opportunity",
    )


def _waiting(facts: Facts) -> float:
    workers = facts.report.workers
    wait_s = sum(w.wait_s for w in workers)
    whole_s = wait_s + sum(w.busy_s + w.update_s for w in workers)
    return wait_s / whole_s if whole_s > 0 else 0.0


def _cannot_move(facts: Facts) -> bool:
    """Whether each worker has one chunk of a batch, so that none can be given away."""
    chunk, batch = facts.knob("parallel.chunk_size"), facts.report.work.batch_size
    return bool(chunk and batch and batch // chunk <= len(facts.report.workers))


def _smaller_chunk(facts: Facts) -> int:
    batch = facts.report.work.batch_size or 64
    chunk = facts.knob("parallel.chunk_size") or max(1, batch // max(1, len(facts.report.workers)))
    return max(1, chunk // 4)


RULES: tuple[Rule, ...] = (slow_worker, steal_threshold, workers_wait, workers_instead)
