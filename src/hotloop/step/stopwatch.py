"""Seconds of small pieces of work on a machine that others use too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..monitor.cpu_counters import parse_schedstat

_ROUNDS = 9
_LIMIT_S = 0.5
# Of a round: beyond this, threads of ours waited for a processor that another process had.
_MOST_WAITED = 0.02


class Timing(NamedTuple):
    """Seconds of one call by name, and whether the processors were ours meanwhile."""

    seconds: dict[str, float]
    quiet: bool


def least_seconds(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 1,
    *,
    clock: Callable[[], float] = time.perf_counter,
    waited: Callable[[], float] | None = None,
    limit_s: float = _LIMIT_S,
) -> Timing:
    """The least seconds of one call of each, run in turn after a round to warm up.

    Neighbours only ever slow work down, so the least time is nearest to what the work takes. Two
    threads that meet, beside a busy neighbour, take a slice of the scheduler each time, whatever
    the kernel: a round in which threads of this process waited for a processor is made again,
    until ``limit_s`` have passed.

    Args:
        calls: what to time, by name.
        repeats: calls within one reading of the clock.
        clock: seconds. waited: seconds that threads of this process have waited for a processor;
            Linux's own count when ``None``.
        limit_s: of all rounds together; each gets one round at least.
    """
    waited = waited or waited_s
    quiet: dict[str, list[float]] = {name: [] for name in calls}
    disturbed: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begun = clock()
    while True:
        for name, call in calls.items():
            waited_before, started = waited(), clock()
            for _ in range(repeats):
                call()
            took = clock() - started
            held = waited() - waited_before <= _MOST_WAITED * took
            (quiet if held else disturbed)[name].append(took / repeats)
        if all(len(times) >= _ROUNDS for times in quiet.values()) or clock() - begun > limit_s:
            break
    return Timing(
        {name: min(quiet[name] or disturbed[name]) for name in calls}, all(quiet.values())
    )


def waited_s() -> float:
    """Seconds that this process's threads were ready to run and had no processor; 0: not told.

    Source: the second field of ``schedstat`` (Linux, Documentation/scheduler/sched-stats).
    """
    total_s = 0.0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # The thread has ended.
            total_s += parse_schedstat(path.read_text())[1] or 0.0
    return total_s
