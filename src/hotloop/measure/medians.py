"""A rule for engines: the lowest median, the clearly slower ones dropped early.

An engine has a tail and may have several instances that call at the same time; so a turn is some
hundredths of a second of calls, and what counts is the median over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .clock import now
from .neighbours import until_idle
from .turns import LONG_S, Candidate, K, Turn, Turns, rotating

# One turn: long against a clock tick and the waking of threads, short against a disturbance.
TURN_S = 0.03
MIN_ROUNDS = 3
MAX_ROUNDS = 15
# A candidate whose fastest round is this much slower than the best median cannot win.
HOPELESS = 1.25
# Nor can one this much slower in its first calls, where a call is long.
FAR_BEHIND = 2.0
# Medians this near to the best are equal: then the 99th percentile or steadiness decides.
EQUAL = 1.02


@dataclass
class Standing:
    """The timings of one candidate.

    Attributes:
        num_callers: calls at the same time; then a round gives wall seconds over calls.
        round_s: median seconds of a call in each round. round_p99_s: their 99th percentile.
        least_s, most_s: of all calls (one caller), else of all rounds.
        n: calls timed. dropped: after this many rounds; ``None``: it stayed to the end.
    """

    num_callers: int = 1
    round_s: list[float] = field(default_factory=list)
    round_p99_s: list[float] = field(default_factory=list)
    least_s: float = float("inf")
    most_s: float = 0.0
    n: int = 0
    dropped: int | None = None

    def add(self, turn: Turn) -> None:
        """One more round."""
        wall_s = 1 / turn.calls_per_s
        alone = self.num_callers == 1
        self.round_s.append(turn.median_s if alone else wall_s)
        self.round_p99_s.append(turn.p99_s if alone else wall_s)
        self.least_s = min(self.least_s, min(turn.seconds) if alone else wall_s)
        self.most_s = max(self.most_s, max(turn.seconds) if alone else wall_s)
        self.n += len(turn.seconds)

    @property
    def median_s(self) -> float:
        """Of the rounds."""
        return statistics.median(self.round_s)

    @property
    def p99_s(self) -> float:
        """Median over rounds: what disturbs one round does not decide."""
        return statistics.median(self.round_p99_s)


def race(
    candidates: Mapping[K, Candidate],
    *,
    by_p99: bool,
    budget_s: float,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] = now,
    rest: Callable[[], object] = until_idle,
) -> tuple[K, dict[K, Standing]]:
    """Time all in turn; the winner, and how each stands.

    Args:
        candidates: at least one. by_p99: among equal medians the lowest 99th percentile wins.
        budget_s: no round begins that would end after it, but ``MIN_ROUNDS`` are made in any case.
        clock: seconds. rest: before each turn.
    """
    found = {name: Standing(len(c.calls)) for name, c in candidates.items()}
    turns = Turns(
        candidates, rounds=max_rounds, least_rounds=MIN_ROUNDS, limit_s=budget_s, order=rotating,
        before=lambda name: rest(), warm_calls=2, warm_s=TURN_S, settle_s=TURN_S / 6,
        span_s=TURN_S, least_readings=3, clock=clock,
    )  # fmt: skip
    turns.warm_up()
    _drop_far_behind(turns, found)
    for played in turns:
        for name, turn in played.items():
            found[name].add(turn)
        if turns.played < MIN_ROUNDS:
            continue
        best = min(found[name].median_s for name in turns.racing)
        for name in list(turns.racing):
            if min(found[name].round_s) > HOPELESS * best:
                found[name].dropped = turns.played
                turns.drop(name)
        if len(turns.racing) == 1:
            break
    return _winner({name: found[name] for name in turns.racing}, by_p99), found


def _drop_far_behind(turns: Turns[K], found: dict[K, Standing]) -> None:
    """Not worth the seconds that its rounds would take: its last first call is its timing."""
    last_s = {name: turn.seconds[-1] for name, turn in turns.warm.items()}
    fastest_s = min(last_s.values())
    for name, seconds in last_s.items():
        if found[name].num_callers == 1 and seconds > max(LONG_S, FAR_BEHIND * fastest_s):
            found[name].add(Turn((seconds,), 1 / seconds))
            found[name].dropped = 0
            turns.drop(name)


def _winner(racing: Mapping[K, Standing], by_p99: bool) -> K:
    equal = _equals(racing)
    return min(equal, key=lambda name: equal[name].p99_s if by_p99 else equal[name].median_s)


def steadiest(found: Mapping[K, Standing]) -> K:
    """The one with most callers among the equals of the best.

    Threads of one call wait for each other, for as long as it takes between their processors; a
    hypervisor moves those, and what was fastest in the race is not the day after.
    """
    equal = _equals({name: s for name, s in found.items() if s.dropped is None})
    return min(equal, key=lambda name: (-equal[name].num_callers, equal[name].median_s))


def _equals(racing: Mapping[K, Standing]) -> dict[K, Standing]:
    best = min(standing.median_s for standing in racing.values())
    return {name: s for name, s in racing.items() if s.median_s <= EQUAL * best}
