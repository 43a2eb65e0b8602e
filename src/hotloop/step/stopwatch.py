"""Seconds of small pieces of work on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

_LEAST_ROUNDS = 9
_MOST_ROUNDS = 60
# The least times agree: nothing disturbed them.
_AGREEING = 3
_AGREEMENT = 1.05


def least_seconds(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 1,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of one call of each, run in turn after a round to warm up.

    Neighbours only ever slow work down, so the least time is nearest to what the work takes; a
    median taken beside a busy neighbour has chosen the slower of two kernels by far. Rounds are
    added, up to a limit, until the three least times of each agree within 5 %.

    Args:
        calls: what to time, by name.
        repeats: calls within one reading of the clock.
        clock: seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(_MOST_ROUNDS + 1):
        for name, call in calls.items():
            started = clock()
            for _ in range(repeats):
                call()
            if number:
                times[name].append((clock() - started) / repeats)
        if number >= _LEAST_ROUNDS and all(_agree(t) for t in times.values()):
            break
    return {name: min(t) for name, t in times.items()}


def _agree(times: list[float]) -> bool:
    least = sorted(times)[:_AGREEING]
    return least[-1] <= _AGREEMENT * least[0]
