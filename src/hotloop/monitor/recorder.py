"""``StepRecorder``: what each call of a step hands over; a few additions, nothing else."""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from .metrics import StepTimes

Phase = Literal["data_wait", "compute", "synchronize", "update", "checkpoint", "other"]
PHASES: tuple[Phase, ...] = (
    "data_wait", "compute", "synchronize", "update", "checkpoint", "other",
)  # fmt: skip
# Calls whose times are kept for median and maximum.
_KEPT = 4096


class StepRecorder:
    """Totals by phase, and the last calls' times in memory that was taken at the start.

    One thread records; others may read the totals at any time, and see them a call apart at most.

    Attributes:
        waiting: whether the step waits for a batch just now.
        thread: number of the recording thread, as ``threading.get_ident`` gives it.
    """

    def __init__(self) -> None:
        self.waiting = False
        self.thread: int | None = None
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.split_update = False
        self.steps = self.calls = self.samples = self.checkpoints = 0
        self._call_s = array("d", bytes(8 * _KEPT))
        self._call_began_s = 0.0
        self._lap_s = time.perf_counter()

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
        """One call of the step, timed by the caller."""
        seconds = self.seconds
        seconds["data_wait"] += data_wait_s
        seconds["compute"] += compute_s
        if synchronize_s:
            seconds["synchronize"] += synchronize_s
        if update_s:
            seconds["update"] += update_s
            self.split_update = True
        self._call_s[self.calls % _KEPT] = compute_s + synchronize_s + update_s
        self.calls += 1
        self.steps += steps
        self.samples += samples

    def add(self, phase: Phase, seconds: float) -> None:
        """Time outside calls of the step."""
        self.seconds[phase] += seconds
        if phase == "checkpoint":
            self.checkpoints += 1

    def lap(self, phase: Phase) -> float:
        """Count what passed since the last lap to ``phase``; returns it."""
        now_s = time.perf_counter()
        passed_s = now_s - self._lap_s
        self._lap_s = now_s
        self.seconds[phase] += passed_s
        if phase == "checkpoint":
            self.checkpoints += 1
        elif phase == "update":
            self.split_update = True
        return passed_s

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Each of ``batches``; the time to get one is data wait, what the caller does is compute.

        Inside the loop ``lap`` may split off other phases. Samples are counted by the length of the
        batch, or of its first part.
        """
        iterator = iter(batches)
        while True:
            self._lap_s = time.perf_counter()
            self.waiting = True
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waiting = False
                self.lap("data_wait")
            count = batch_length(batch)
            began_s = self._lap_s
            outside_s = self.seconds["checkpoint"] + self.seconds["other"]
            yield batch
            self.lap("compute")
            outside_s -= self.seconds["checkpoint"] + self.seconds["other"]
            self._call_s[self.calls % _KEPT] = self._lap_s - began_s + outside_s
            self.calls += 1
            self.steps += 1
            self.samples += count

    def times(self, workers_wait_s: float = 0.0, workers_update_s: float = 0.0) -> StepTimes:
        """The totals; what workers waited and updated is taken out of ``compute``.

        Args:
            workers_wait_s, workers_update_s: means over the workers of a data-parallel step.
        """
        seconds = dict(self.seconds)
        steps, calls, samples = self.steps, self.calls, self.samples
        taken = min(seconds["compute"], workers_wait_s + workers_update_s)
        scale = taken / (workers_wait_s + workers_update_s) if taken else 0.0
        compute_s = seconds["compute"] - taken
        synchronize_s = seconds["synchronize"] + workers_wait_s * scale
        update_s = seconds["update"] + workers_update_s * scale
        train_s = seconds["data_wait"] + compute_s + synchronize_s + update_s
        kept = self._call_s[: min(calls, _KEPT)]
        return StepTimes(
            data_wait_s=seconds["data_wait"],
            compute_s=compute_s,
            synchronize_s=synchronize_s,
            update_s=update_s if self.split_update or workers_update_s else None,
            checkpoint_s=seconds["checkpoint"],
            other_s=seconds["other"],
            steps=steps,
            calls=calls,
            samples=samples,
            samples_per_s=samples / train_s if samples and train_s > 0 else None,
            median_call_s=statistics.median(kept) if kept else None,
            slowest_call_s=max(kept) if kept else None,
            checkpoints=self.checkpoints,
        )


def batch_length(batch: Any) -> int:
    """Samples of a batch: its length, or that of the first of its parts."""
    if isinstance(batch, dict):
        batch = next(iter(batch.values()), ())
    if isinstance(batch, list | tuple) and batch and hasattr(batch[0], "__len__"):
        batch = batch[0]
    try:
        return len(batch)
    except TypeError:
        return 1
