"""What rules ask of a report and a machine, worked out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...machine import Machine
from ..metrics import OtherProcess, PerformanceReport
from ..optimization import Change, Evidence, Kind, Optimization
from .thresholds import Threshold


@dataclass(frozen=True)
class Facts:
    """A report, a machine, and shares of the one by the other."""

    report: PerformanceReport
    machine: Machine

    def knob(self, name: str) -> Any:
        """A knob of the plan by its dotted name; ``None``: there is no plan, or it is ``None``."""
        part, _, key = name.partition(".")
        return self.report.plan.get(part, {}).get(key)

    @property
    def has_plan(self) -> bool:
        """Whether hotloop ran it, so that a plan can change it."""
        return bool(self.report.plan)

    @property
    def cpus(self) -> int:
        """CPUs that can run at once."""
        return max(1, self.report.cpu.usable_cpus or self.machine.usable_cpus)

    @property
    def duration_s(self) -> float:
        """Of the interval, never 0."""
        return max(self.report.duration_s, 1e-9)

    @property
    def train_s(self) -> float:
        """Seconds in batches and steps; the interval where none was recorded."""
        return self.report.step.train_s or self.duration_s

    @property
    def threads(self) -> int | None:
        """Threads inside an operation, or workers; ``None``: not known."""
        return len(self.report.workers) or self.report.work.num_threads

    @cached_property
    def own_s(self) -> float:
        """CPU seconds of this process."""
        return self.report.cpu.user_s + self.report.cpu.system_s

    @cached_property
    def run_delay(self) -> float | None:
        """Share of the threads' time in which they could run and had no CPU."""
        delay_s = self.report.cpu.run_delay_s
        if delay_s is None or delay_s + self.own_s <= 0:
            return None
        return delay_s / (delay_s + self.own_s)

    @property
    def data_wait(self) -> float:
        """Share of the training time spent waiting for batches."""
        step = self.report.step
        return step.data_wait_s / self.train_s if step.calls else 0.0

    @property
    def step_s(self) -> float | None:
        """Seconds of one step without data wait; ``None``: no step was recorded."""
        step = self.report.step
        return (step.train_s - step.data_wait_s) / step.steps if step.steps else None

    @property
    def floor_s(self) -> float | None:
        """Seconds of a step at the measured rates of arithmetic and memory; ``None``: not known."""
        work = self.report.work
        if not work.flop_per_step or not work.ceiling_flop_per_s:
            return None
        memory_s = 0.0
        if work.parameter_bytes and work.ceiling_bytes_per_s:
            # Weights are read and, with their gradient, written at least once a step.
            memory_s = 3 * work.parameter_bytes / work.ceiling_bytes_per_s
        return work.flop_per_step / work.ceiling_flop_per_s + memory_s

    @property
    def children(self) -> int:
        """Processes that prepare data, or other children."""
        return max(self.report.work.loader_workers or 0, self.report.cpu.child_processes or 0)

    @cached_property
    def worker_rates(self) -> dict[int, float]:
        """Chunks a second of each worker that ran one, over the time it was busy or lost.

        Lost is what the worker with the most time accounted for has and this one has not: its
        thread was ready, and its CPU ran another's. That may be all that shows, where the other
        gives way while a chunk runs and comes in between. The smoothed rate of the last calls will
        not do: such a loss comes in milliseconds now and then, and most calls look undisturbed.
        """
        spent = {w.worker: w.busy_s + w.wait_s + w.update_s for w in self.report.workers}
        most = max(spent.values(), default=0.0)
        return {
            w.worker: w.chunks / (w.busy_s + most - spent[w.worker])
            if w.busy_s > 0
            else w.rate_per_s or 0.0
            for w in self.report.workers
            if w.chunks and (w.busy_s > 0 or w.rate_per_s)
        }

    @property
    def slowest_worker(self) -> tuple[int, float] | None:
        """Which, and its rate over the greatest; ``None``: fewer than two workers are known."""
        rates = self.worker_rates
        if len(rates) < 2:
            return None
        slow = min(rates, key=rates.__getitem__)
        return slow, rates[slow] / max(rates.values())

    @cached_property
    def busiest_other(self) -> OtherProcess | None:
        """The process beside this one that used most of our CPUs."""
        return next(iter(self.report.cpu.others), None)

    @cached_property
    def others_by_cpu(self) -> dict[int, float]:
        """Share of each CPU that others used; empty: not known."""
        return {
            core.cpu: max(0.0, core.user + core.system - core.own)
            for core in self.report.cpu.cores
            if core.own is not None and core.user is not None and core.system is not None
        }

    def threads_changed(self, count: int) -> Change:
        """Another number of threads, as a plan or as a line of a script."""
        if self.has_plan:
            return Change(plan={"cpu.num_threads": count})
        return Change(
            command=f"OMP_NUM_THREADS={count} MKL_NUM_THREADS={count} python ...  "
            f"(in the script: torch.set_num_threads({count}))"
        )


Rule = Callable[[Facts], Optimization | None]


def gain_of(lost: float) -> float:
    """Throughput over now, less 1, when a lost share of the time comes back."""
    lost = min(max(lost, 0.0), 0.95)
    return lost / (1 - lost)


def found(
    name: str,
    title: str,
    metric: str,
    value: float | int | str | None,
    threshold: Threshold,
    change: Change,
    *,
    text: str = "",
    kind: Kind = "problem",
    exact: bool = True,
    gain: float | None = None,
    gain_source: str = "not known",
) -> Optimization:
    """An ``Optimization`` in the state of a hypothesis."""
    return Optimization(
        name=name,
        title=title,
        evidence=Evidence(
            metric=metric,
            value=value,
            threshold=threshold.value,
            threshold_source=threshold.source,
            text=text or title,
        ),
        change=change,
        exact=exact,
        expected_gain=gain,
        gain_source=gain_source,
        kind=kind,
    )
