"""The sampling thread: looks at this process now and then, and keeps little.

It uses nothing of torch (a second set of OpenMP threads would take the step's cores) and takes what
``benchmarks/monitor_overhead.py`` records.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..machine.probe.tree import Tree, parse_int
from .cpu_counters import ProcessCounters, read_processes, read_task
from .hot_spots import HotSpots
from .metrics import Sample
from .recorder import StepRecorder

# A look at the stacks and at resident memory; each third look also reads every thread.
LOOK_EVERY_S = 0.2
_THREADS_EVERY = 3
# All processes are looked at so rarely that it takes this share of a CPU, but once in 2 s at most.
_PROCESSES_SHARE = 5e-4
_PROCESSES_EVERY_S = 2.0
# Past so many samples every other one is dropped, and from then on fewer are taken.
_MOST_SAMPLES = 512
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Observer:
    """Called by the sampling thread every ``every_s`` seconds, and once at the end."""

    call: Callable[[], None]
    every_s: float
    due_s: float = 0.0


@dataclass
class Looks:
    """What the sampling thread saw.

    Attributes:
        samples: evenly spread. own_by_cpu: CPU seconds of this process where its threads were
            seen. child_processes: most at a time. sampling_s: CPU seconds of the thread itself.
        processes: as they were seen last; those that ended are still there.
    """

    samples: list[Sample] = field(default_factory=list)
    own_by_cpu: dict[int, float] = field(default_factory=dict)
    child_processes: int | None = None
    sampling_s: float = 0.0
    processes: dict[int, ProcessCounters] = field(default_factory=dict)


class Sampler:
    """A daemon thread between ``start`` and ``stop``.

    Args:
        tree: where to read. recorder: of the step. usable_cpus: of the machine.
        every_s: between two looks.
    """

    def __init__(
        self,
        tree: Tree,
        recorder: StepRecorder,
        usable_cpus: int,
        every_s: float = LOOK_EVERY_S,
    ) -> None:
        self.looks = Looks()
        self.hot_spots = HotSpots()
        self.observers: list[Observer] = []
        self.failure: str | None = None
        self._tree, self._recorder = tree, recorder
        self._usable_cpus, self._every_s = usable_cpus, every_s
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._run_s: dict[int, float] = {}
        self._began_s = self._last_s = time.monotonic()
        self._last_cpu_s = time.process_time()
        self._last_samples = 0
        self._stride = 1
        self._number = 0
        self._processes_due_s = 0.0

    def start(self) -> None:
        """Begin to look."""
        self._began_s = self._last_s = time.monotonic()
        self._last_cpu_s = time.process_time()
        self._last_samples = self._recorder.samples
        self._threads()
        self.looks.own_by_cpu.clear()
        self._thread = threading.Thread(target=self._work, name="hotloop-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, with a last call of the observers. Twice is allowed."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        try:
            while not self._stopping.wait(self._every_s):
                self._look()
                now_s = time.monotonic()
                for observer in self.observers:
                    if now_s >= observer.due_s:
                        observer.due_s = now_s + observer.every_s
                        observer.call()
                self.looks.sampling_s = time.thread_time()
            self._look(last=True)
            for observer in self.observers:
                observer.call()
        except Exception as error:
            # A run must not end because nobody could look at it.
            self.failure = f"sampling ended: {type(error).__name__}: {error}"
        self.looks.sampling_s = time.thread_time()

    def _look(self, *, last: bool = False) -> None:
        if not last:
            self.hot_spots.look("data_wait" if self._recorder.waiting else "step")
        self._number += 1
        if self._number % _THREADS_EVERY == 0 or last:
            self._threads()
        if self._number % self._stride == 0 or last:
            self._sample()
        began_s = time.monotonic()
        if began_s >= self._processes_due_s and not last:
            self.looks.processes.update(read_processes(self._tree))
            took_s = time.monotonic() - began_s
            pause_s = max(_PROCESSES_EVERY_S, took_s / _PROCESSES_SHARE)
            self._processes_due_s = began_s + pause_s

    def _sample(self) -> None:
        now_s, cpu_s, samples = time.monotonic(), time.process_time(), self._recorder.samples
        passed_s = max(now_s - self._last_s, 1e-9)
        words = (self._tree.text("/proc/self/statm") or "").split()
        pages = parse_int(words[1]) if len(words) > 1 else None
        self.looks.samples.append(
            Sample(
                t_s=now_s - self._began_s,
                resident_bytes=None if pages is None else pages * _PAGE_BYTES,
                cpu_fraction=(cpu_s - self._last_cpu_s) / (passed_s * self._usable_cpus),
                samples_per_s=max(0, samples - self._last_samples) / passed_s,
            )
        )
        self._last_s, self._last_cpu_s, self._last_samples = now_s, cpu_s, samples
        if len(self.looks.samples) >= _MOST_SAMPLES:
            self.looks.samples = self.looks.samples[1::2]
            self._stride *= 2

    def _threads(self) -> None:
        """Where the threads are, and what they ran there since the last look."""
        children = 0
        known = False
        for number in self._tree.numbered("/proc/self/task", ""):
            task = read_task(self._tree, number)
            listed = self._tree.text(f"/proc/self/task/{number}/children")
            if listed is not None:
                known = True
                children += len(listed.split())
            if task is None:
                continue
            run_s = task.run_s if task.run_s is not None else task.user_s + task.system_s
            passed_s = run_s - self._run_s.get(number, 0.0)
            self._run_s[number] = run_s
            if task.cpu is not None and passed_s > 0:
                own = self.looks.own_by_cpu
                own[task.cpu] = own.get(task.cpu, 0.0) + passed_s
        if known:
            self.looks.child_processes = max(self.looks.child_processes or 0, children)
