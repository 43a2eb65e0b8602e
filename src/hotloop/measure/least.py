"""A rule for kernels: the least time of each.

Neighbours only ever slow work down, so the least time is nearest to what the work takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .clock import now
from .neighbours import waited_s
from .turns import Turns

ROUNDS = 9
LIMIT_S = 0.5
# So many times the fastest's seconds, and more rounds would not change the order.
_CLEAR = 1.5


class Timing(NamedTuple):
    """Least seconds of one call by name, and whether the processors were ours meanwhile."""

    seconds: dict[str, float]
    quiet: bool

    @property
    def fastest(self) -> str:
        """Name of the one with the least."""
        return min(self.seconds, key=lambda name: self.seconds[name])


def least_seconds(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 1,
    *,
    rounds: int = ROUNDS,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = now,
    waited: Callable[[], float] = waited_s,
    until_clear: bool = False,
) -> Timing:
    """The least seconds of one call of each, in turn, after one call each to warm up.

    Two threads that meet, beside a busy neighbour, take a slice of the scheduler each time,
    whatever the kernel: so a turn in which threads of this process waited for a processor counts
    only where there is no other, and ``rounds`` are those without waiting.

    Args:
        calls: what to time, by name. repeats: calls within one reading of the clock.
        rounds: ends after so many quiet ones. limit_s: ends it in any case, after one round.
        clock, waited: see ``Turns``.
        until_clear: whether a quiet round in which one is far ahead is enough: the times of the
            others are not asked for.
    """
    quiet: dict[str, list[float]] = {name: [] for name in calls}
    disturbed: dict[str, list[float]] = {name: [] for name in calls}
    turns = Turns(calls, repeats=repeats, warm_calls=1, limit_s=limit_s, waited=waited, clock=clock)
    for played in turns:
        for name, turn in played.items():
            (quiet if turn.quiet else disturbed)[name] += turn.seconds
        if all(len(times) >= rounds for times in quiet.values()):
            break
        if until_clear and _is_clear([min(times, default=0.0) for times in quiet.values()]):
            break
    least = {name: min(quiet[name] or disturbed[name], default=math.inf) for name in calls}
    return Timing(least, all(quiet.values()))


def _is_clear(least_s: list[float]) -> bool:
    """Whether one is far ahead of all others; 0: it had no quiet turn yet."""
    first, *others = sorted(least_s)
    return 0.0 < _CLEAR * first < min(others, default=0.0)
