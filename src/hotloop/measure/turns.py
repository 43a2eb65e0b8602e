"""Candidates take turns: the one loop of the package that calls them and reads the clock.

A candidate is whatever can be called: a kernel, an engine, a child process that trains. In each
round every candidate has a turn, so that what slows the machine for a while slows all alike.
``Turns`` plays the rounds; a rule (``least``, ``pairs``, ``medians``) looks at each of them, drops
a candidate, or stops::

    for played in Turns({"a": a, "b": b}, rounds=6, order=there_and_back):
        print(played["a"].median_s / played["b"].median_s)

What a turn is made of: ``before`` (a rest, a setting), ``settle_s`` of calls that nobody times,
then ``repeats`` calls for each reading of the clock, until ``span_s`` have passed.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Generic, TypeVar

from ..machine.affinity import pinned_thread
from .clock import now

K = TypeVar("K", bound=Hashable)
Order = Callable[[int, Sequence[K]], Sequence[K]]

# A call this long needs no untimed one before it and no second one beside it.
LONG_S = 0.1
# Of a turn: beyond this, threads of ours waited for a processor that another process had.
MOST_WAITED = 0.02


@dataclass(frozen=True)
class Candidate:
    """What is called.

    Attributes:
        calls: one for each thread that calls at the same time as the others; a single one is
            called by the measuring thread itself.
        cpu_ids: where those threads are pinned, in order; empty: nowhere.
    """

    calls: Sequence[Callable[[], Any]]
    cpu_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Turn:
    """One turn of one candidate.

    Attributes:
        seconds: of one call, at each reading of the clock, of all threads.
        calls_per_s: of the whole turn, all threads together.
        quiet: whether no thread of ours waited for a processor; ``True`` where nobody looked.
        answer: what the last call gave.
    """

    seconds: tuple[float, ...]
    calls_per_s: float
    quiet: bool = True
    answer: Any = None

    @property
    def median_s(self) -> float:
        """Of a call."""
        return statistics.median(self.seconds)

    @property
    def p99_s(self) -> float:
        """99th percentile of a call."""
        return sorted(self.seconds)[int(0.99 * len(self.seconds))]


def in_order(number: int, names: Sequence[K]) -> Sequence[K]:
    """A B C, A B C."""
    return names


def rotating(number: int, names: Sequence[K]) -> Sequence[K]:
    """A B C, B C A, C A B: each follows each, each is first."""
    first = number % max(1, len(names))
    return [*names[first:], *names[:first]]


def there_and_back(number: int, names: Sequence[K]) -> Sequence[K]:
    """A B, B A: what drifts evenly falls out of the mean over two rounds."""
    return names if number % 2 == 0 else names[::-1]


@dataclass
class Turns(Generic[K]):
    """Rounds of turns; iterate over it for ``{name: Turn}`` of each round.

    Attributes:
        candidates: by name, in order; a plain call stands for ``Candidate([call])``.
        rounds: at most; ``None``: the rule stops it.
        least_rounds: made in any case. limit_s: no other round begins that would end later after
            the start, by the mean of those before.
        order: of the names in a round, by its number and their order here.
        before: called with a name before its turn; not timed.
        warm_calls, warm_s: of each before the first round: so many calls, and so long.
        settle_s: calls of a turn that are not timed, so long and one at least; ``None``: none.
        repeats: calls within one reading of the clock.
        span_s, least_readings: of a turn. A candidate whose call is longer than ``LONG_S`` has one
            reading, and none that is not timed.
        waited: seconds that threads of ours waited for a processor; ``None``: nobody looks.
        forgive: what a candidate may raise: then it is dropped, and the others go on.
        clock: seconds.
        racing: candidates that are still there. failed: what those that failed have raised.
        warm: turns of ``warm_up``. played: rounds so far.
    """

    candidates: Mapping[K, Candidate | Callable[[], Any]]
    rounds: int | None = None
    least_rounds: int = 1
    limit_s: float = math.inf
    order: Order[K] = in_order
    before: Callable[[K], object] | None = None
    warm_calls: int = 0
    warm_s: float = 0.0
    settle_s: float | None = None
    repeats: int = 1
    span_s: float = 0.0
    least_readings: int = 1
    waited: Callable[[], float] | None = None
    forgive: tuple[type[Exception], ...] = ()
    clock: Callable[[], float] = now
    racing: dict[K, Candidate] = field(init=False)
    failed: dict[K, Exception] = field(init=False, default_factory=dict)
    warm: dict[K, Turn] = field(init=False, default_factory=dict)
    played: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.racing = {
            name: c if isinstance(c, Candidate) else Candidate([c])
            for name, c in self.candidates.items()
        }
        self._began_s = self._first_round_s = self.clock()
        self._is_warm = False
        self._last_s: dict[K, float] = {}

    def __iter__(self) -> Iterator[dict[K, Turn]]:
        self.warm_up()
        while self.racing and (self.rounds is None or self.played < self.rounds):
            if self.played >= self.least_rounds and self.would_pass(self.limit_s):
                return
            yield self.play(self.played)

    def warm_up(self) -> None:
        """The first calls, which choose kernels, pack weights, take memory; once."""
        if self._is_warm:
            return
        self._is_warm = True
        for name in list(self.racing) if self.warm_calls else []:
            self._turn(name, self.warm, None, self.warm_s, self.warm_calls)
        self._first_round_s = self.clock()

    def play(self, number: int) -> dict[K, Turn]:
        """The round with this number; turns of those that did not fail, in their order here."""
        turns: dict[K, Turn] = {}
        for name in self.order(number, list(self.candidates)):
            if name not in self.racing:
                continue
            if self.before is not None:
                self.before(name)
            if self._last_s.get(name, 0.0) > LONG_S:
                self._turn(name, turns, None, 0.0, 1)
            else:
                self._turn(name, turns, self.settle_s, self.span_s, self.least_readings)
        self.played += 1
        return {name: turns[name] for name in self.candidates if name in turns}

    def drop(self, name: K) -> None:
        """It has no more turns."""
        self.racing.pop(name, None)

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return self.clock() - self._began_s

    def would_pass(self, limit_s: float, rounds: int = 1) -> bool:
        """Whether so many more rounds would end later than ``limit_s`` after the start."""
        round_s = (self.clock() - self._first_round_s) / max(1, self.played)
        return self.elapsed_s + rounds * round_s > limit_s

    def _turn(
        self, name: K, turns: dict[K, Turn], settle_s: float | None, span_s: float, least: int
    ) -> None:
        try:
            turn = take_turn(
                self.racing[name], settle_s=settle_s, span_s=span_s, least_readings=least,
                repeats=self.repeats, waited=self.waited, clock=self.clock,
            )  # fmt: skip
        except self.forgive as error:
            self.failed[name] = error
            self.drop(name)
            return
        turns[name] = turn
        self._last_s[name] = turn.seconds[-1]


def take_turn(
    candidate: Candidate,
    *,
    settle_s: float | None = None,
    span_s: float = 0.0,
    least_readings: int = 1,
    repeats: int = 1,
    waited: Callable[[], float] | None = None,
    clock: Callable[[], float] = now,
) -> Turn:
    """One turn by itself, as a process makes it that others take turns with; see ``Turns``."""
    callers = [
        _Caller(call, settle_s, span_s, least_readings, repeats, clock) for call in candidate.calls
    ]
    waited_before, started_s = waited() if waited else 0.0, clock()
    if len(callers) == 1:
        callers[0].run()
    else:
        _run_together(callers, candidate.cpu_ids)
    took_s = clock() - started_s
    quiet = waited is None or waited() - waited_before <= MOST_WAITED * took_s
    return Turn(
        tuple(seconds for caller in callers for seconds in caller.seconds),
        sum(caller.calls_per_s for caller in callers), quiet, callers[-1].answer,
    )  # fmt: skip


@dataclass
class _Caller:
    """The calls of one thread in one turn, and the readings between which they lay."""

    call: Callable[[], Any]
    settle_s: float | None
    span_s: float
    least_readings: int
    repeats: int
    clock: Callable[[], float]
    readings: list[float] = field(default_factory=list)
    answer: Any = None

    def run(self, start: Callable[[], object] = lambda: None) -> None:
        """Settle, wait for ``start``, call and read the clock."""
        call, clock, repeats = self.call, self.clock, self.repeats
        if self.settle_s is not None:
            until_s = clock() + self.settle_s
            call()
            while clock() < until_s:
                call()
        start()
        readings = [clock()]
        until_s = readings[0] + self.span_s
        while readings[-1] < until_s or len(readings) <= self.least_readings:
            for _ in repeat(None, repeats):
                answer = call()
            readings.append(clock())
        self.readings, self.answer = readings, answer

    @property
    def seconds(self) -> list[float]:
        pairs = zip(self.readings[1:], self.readings, strict=False)
        return [(after - before) / self.repeats for after, before in pairs]

    @property
    def calls_per_s(self) -> float:
        took_s = self.readings[-1] - self.readings[0]
        calls = (len(self.readings) - 1) * self.repeats
        return calls / took_s if took_s > 0 else math.inf


def _run_together(callers: Sequence[_Caller], cpu_ids: Sequence[int]) -> None:
    """Each in a thread of its own, pinned where there is a CPU for it; all start at once."""
    barrier = threading.Barrier(len(callers))
    failures: list[BaseException] = []

    def work(position: int) -> None:
        try:
            with pinned_thread(list(cpu_ids[position : position + 1])):
                callers[position].run(barrier.wait)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [
        threading.Thread(target=work, args=(i,), name=f"hotloop-turn-{i}")
        for i in range(len(callers))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A broken barrier only says that another thread failed: that one's reason is the answer.
    real = [e for e in failures if not isinstance(e, threading.BrokenBarrierError)]
    if failures:
        raise (real or failures)[0]
