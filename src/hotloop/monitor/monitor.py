"""``PerformanceMonitor``: collects what a run does to the machine, and says what may help."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RunError
from ..machine import Machine
from ..machine.probe.tree import Tree
from .cache_stats import cache_stats
from .cpu_counters import CpuSnapshot
from .cpu_stats import cpu_stats
from .memory_counters import MemorySnapshot, PoolCounters, memory_stats
from .metrics import PerformanceReport, Work, WorkerUse
from .optimization import Optimization
from .perf_events import HardwareCounters
from .recorder import Phase, StepRecorder
from .rules import suggest
from .sampler import LOOK_EVERY_S, Observer, Sampler


class PerformanceMonitor:
    """A context manager around training or inference, in a ``Trainer`` or any loop.

    ::

        with PerformanceMonitor() as monitor:
            for x, y in monitor.watch(loader):
                ...                              # forward, backward
                monitor.lap("compute")
                optimizer.step()
                monitor.lap("update")
        for suggestion in monitor.suggest_optimizations():
            print(suggestion.title, suggestion.change.command)

    Entering reads the kernel's counters and starts a sampling thread; leaving reads them again.
    What a step calls in between (``record``, ``lap``, ``watch``) adds a few numbers, no more.

    Args:
        machine: probed when ``None``.
        root: where ``/proc`` and ``/sys`` lie: ``"/"``, or copies of another machine's files.
        look_every_s: between two looks of the sampling thread; ``None``: no such thread, and then
            no samples, hot spots or use by core.
        hardware_counters: whether to open them where they exist.
    """

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        root: str | Path = "/",
        look_every_s: float | None = LOOK_EVERY_S,
        hardware_counters: bool = True,
    ) -> None:
        self.machine = machine or Machine.probe(root)
        self.recorder = StepRecorder()
        self.work = Work()
        self.plan: dict[str, Any] = {}
        self._tree = Tree(root)
        self._look_every_s, self._wants_counters = look_every_s, hardware_counters
        self._before: tuple[CpuSnapshot, MemorySnapshot] | None = None
        self._last: PerformanceReport | None = None
        self._sampler: Sampler | None = None
        self._observers: list[Observer] = []
        self._counters: HardwareCounters | None = None
        self._counters_reason: str | None = None
        self._pool: Callable[[], PoolCounters] | None = None
        self._arena: Callable[[], tuple[int, int]] | None = None
        self._workers: Callable[[], Sequence[WorkerUse]] | None = None
        self._collecting = threading.Lock()

    def start(self) -> None:
        """Begin the interval; what was recorded before is forgotten.

        Raises:
            RunError: it is under way.
        """
        if self._sampler is not None:
            raise RunError("a monitor must be stopped before it is started again")
        self.recorder.reset()
        self.recorder.thread = threading.get_ident()
        self._last = None
        if self._wants_counters and self._tree.is_live:
            self._counters, self._counters_reason = HardwareCounters.open()
        else:
            self._counters_reason = "hardware counters were not asked for"
        self._sampler = Sampler(
            self._tree,
            self.recorder,
            self.machine.usable_cpus,
            self._look_every_s or LOOK_EVERY_S,
        )
        self._sampler.observers = list(self._observers)
        self._before = self._read()
        if self._look_every_s is not None:
            self._sampler.start()

    def stop(self) -> PerformanceReport:
        """End the interval. Twice is allowed.

        Raises:
            RunError: it never began.
        """
        if self._sampler is not None:
            self._sampler.stop()
            self._last = self._collect()
            self._sampler = None
            if self._counters is not None:
                self._counters.close()
                self._counters = None
        return self.collect_metrics()

    def __enter__(self) -> PerformanceMonitor:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether the interval is under way."""
        return self._sampler is not None

    @property
    def has_report(self) -> bool:
        """Whether ``collect_metrics`` has something to tell."""
        return self._sampler is not None or self._last is not None

    # What a step calls.

    def record(
        self,
        samples: int,
        *,
        steps: int = 1,
        data_wait_s: float = 0.0,
        compute_s: float = 0.0,
        synchronize_s: float = 0.0,
        update_s: float = 0.0,
    ) -> None:
        """One call of the step, timed by the caller: its samples, steps and seconds by phase."""
        self.recorder.record(
            samples,
            steps=steps,
            data_wait_s=data_wait_s,
            compute_s=compute_s,
            synchronize_s=synchronize_s,
            update_s=update_s,
        )

    def lap(self, phase: Phase) -> float:
        """Count the time since the last lap to ``data_wait``, ``compute``, ``synchronize``,
        ``update``, ``checkpoint`` or ``other``; returns it."""
        return self.recorder.lap(phase)

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Each of ``batches``; getting one is data wait, what the loop does with it compute."""
        return self.recorder.watch(batches)

    # What is known of the run.

    def describe(self, **facts: Any) -> None:
        """Change fields of ``Work``, such as ``batch_size=64``.

        Raises:
            TypeError: no field of that name.
        """
        self.work = dataclasses.replace(self.work, **facts)

    def observe(
        self,
        *,
        plan: dict[str, Any] | None = None,
        pool: Callable[[], PoolCounters] | None = None,
        arena: Callable[[], tuple[int, int]] | None = None,
        workers: Callable[[], Sequence[WorkerUse]] | None = None,
    ) -> None:
        """Where to ask for more when a report is made.

        Args:
            plan: every knob as resolved, ``Plan.to_dict``.
            pool: counters of the batch pool. arena: peak and capacity of the tensor arena, bytes.
            workers: of a data-parallel step, since they began.
        """
        self.plan = plan if plan is not None else self.plan
        self._pool = pool or self._pool
        self._arena = arena or self._arena
        self._workers = workers or self._workers

    def every(self, seconds: float, call: Callable[[], None]) -> None:
        """Let the sampling thread call ``call`` so often, and once at the end; before ``start``."""
        self._observers.append(Observer(call, seconds))

    # What comes out.

    def collect_metrics(self, *, whole: bool = True) -> PerformanceReport:
        """What lay between ``start`` and now, or ``stop``. Takes some 10 ms a GiB of memory.

        Args:
            whole: ``False``: in half a millisecond, with processes as the sampling thread saw them
                last, and huge pages and NUMA nodes as they were at the start.

        Raises:
            RunError: it never began.
        """
        if self._last is not None:
            # What was learned of the run after its end belongs to it.
            return dataclasses.replace(self._last, work=self.work, plan=self.plan)
        if self._sampler is None:
            raise RunError("a monitor must be started first", next_step="use it in a with block")
        return self._collect(whole)

    def suggest_optimizations(self) -> list[Optimization]:
        """What may help, the largest expected gain first; hypotheses all of them."""
        return suggest(self.collect_metrics(), self.machine)

    def _read(self) -> tuple[CpuSnapshot, MemorySnapshot]:
        return CpuSnapshot.read(self._tree, self.machine.cpu_ids), MemorySnapshot.read(self._tree)

    def _read_quickly(self) -> tuple[CpuSnapshot, MemorySnapshot]:
        assert self._before is not None
        assert self._sampler is not None
        before, now = self._before, MemorySnapshot.read(self._tree, whole=False)
        seen = {**before[0].processes, **self._sampler.looks.processes}
        return CpuSnapshot.read(self._tree, self.machine.cpu_ids, seen), dataclasses.replace(
            now,
            anonymous_bytes=before[1].anonymous_bytes,
            huge_page_bytes=before[1].huge_page_bytes,
            pages_by_node=before[1].pages_by_node,
        )

    def _collect(self, whole: bool = True) -> PerformanceReport:
        assert self._before is not None
        assert self._sampler is not None
        with self._collecting:
            before, after = self._before, self._read() if whole else self._read_quickly()
            looks = self._sampler.looks
            workers = tuple(self._workers()) if self._workers else ()
            count = max(1, len(workers))
            counted = self._counters.read() if self._counters else None
            threads = len(workers) or self.work.num_threads
            return PerformanceReport(
                duration_s=after[0].at_s - before[0].at_s,
                cpu=cpu_stats(
                    before[0],
                    after[0],
                    self.machine,
                    own_by_cpu=dict(looks.own_by_cpu) or None,
                    child_processes=looks.child_processes,
                    seen=dict(looks.processes),
                ),
                memory=memory_stats(
                    before,
                    after,
                    self.machine,
                    pool=self._pool() if self._pool else None,
                    arena=self._arena() if self._arena else None,
                ),
                cache=cache_stats(
                    self.machine,
                    counted=counted,
                    reason=self._counters_reason,
                    step_bytes=self.work.step_bytes,
                    num_threads=threads,
                ),
                step=self.recorder.times(
                    sum(w.wait_s for w in workers) / count,
                    sum(w.update_s for w in workers) / count,
                ),
                workers=workers,
                work=self.work,
                plan=self.plan,
                samples=tuple(looks.samples),
                hot_spots=self._sampler.hot_spots.found(),
                sampling_s=looks.sampling_s or None,
                notes=(self._sampler.failure,) if self._sampler.failure else (),
            )
