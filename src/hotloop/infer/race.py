"""The race: candidates in turn, round by round, the clearly slower ones dropped early."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..machine.affinity import pinned_thread

# One turn: long against a clock tick and the waking of threads, short against a disturbance.
TURN_S = 0.03
MIN_ROUNDS = 3
MAX_ROUNDS = 15
# A candidate whose fastest round is this much slower than the best median cannot win.
HOPELESS = 1.25
# So it is with one this much slower in its first calls, where a call is slow.
FAR_BEHIND = 2.0
SLOW_S = 0.1
# How long idle threads of the turn before are waited for, how often one looks (longer than a tick
# of the scheduler's clock), and the share of a CPU that is rest.
SPIN_S = 0.25
LOOK_S = 0.012
AT_REST = 0.1
# Medians this near to the best are equal: then the 99th percentile decides (latency).
EQUAL = 1.02
# Rates this near to the best are equal, and steadiness decides (throughput).
EQUAL_RATES = 1.02


@dataclass
class Runner:
    """One candidate: its call, and the timings of it.

    Attributes:
        call: answers one batch.
        num_instances: threads that call at once; then a round gives wall seconds over calls.
        cpu_ids: where those threads are pinned; empty: nowhere.
        round_s: median seconds of a call in each round. round_p99_s: their 99th percentile.
        least_s, most_s: of all calls (one instance), else of all rounds.
        n: calls timed. dropped: after this many rounds; ``None``: it stayed to the end.
        slow: whether a call takes over ``SLOW_S``.
    """

    call: Callable[[], object]
    num_instances: int = 1
    cpu_ids: Sequence[int] = ()
    round_s: list[float] = field(default_factory=list)
    round_p99_s: list[float] = field(default_factory=list)
    least_s: float = float("inf")
    most_s: float = 0.0
    n: int = 0
    dropped: int | None = None
    slow: bool = False

    def add(self, median_s: float, p99_s: float, n: int) -> None:
        """One more round."""
        self.round_s.append(median_s)
        self.round_p99_s.append(p99_s)
        self.n += n

    @property
    def median_s(self) -> float:
        """Of the rounds."""
        return statistics.median(self.round_s)

    @property
    def p99_s(self) -> float:
        """Median over rounds: what disturbs one round does not decide."""
        return statistics.median(self.round_p99_s)


def race(
    runners: Sequence[Runner], *, by_p99: bool, budget_s: float, max_rounds: int = MAX_ROUNDS
) -> int:
    """Time all in turn; the index of the winner.

    Args:
        runners: at least one. by_p99: among equal medians the lowest 99th percentile wins.
        budget_s: no round begins after it, but ``MIN_ROUNDS`` are made in any case.
    """
    start = time.perf_counter()
    racing = list(runners)
    warm_s = [_warm(runner) for runner in racing]
    fastest_s = min(warm_s)
    for runner, seconds in zip(runners, warm_s, strict=True):
        # Far behind: not worth the seconds that its rounds would take.
        if runner.num_instances == 1 and runner.slow and seconds > FAR_BEHIND * fastest_s:
            runner.add(seconds, seconds, 1)
            runner.least_s = runner.most_s = seconds
            runner.dropped = 0
    racing = [runner for runner in racing if runner.dropped is None]
    for number in range(max_rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            break
        for runner in racing[number % len(racing) :] + racing[: number % len(racing)]:
            _turn(runner)
        if number + 1 >= MIN_ROUNDS:
            best = min(runner.median_s for runner in racing)
            for runner in racing:
                if min(runner.round_s) > HOPELESS * best:
                    runner.dropped = number + 1
            racing = [runner for runner in racing if runner.dropped is None]
        if len(racing) == 1 and number + 1 >= MIN_ROUNDS:
            break
    best = min(runner.median_s for runner in racing)
    equal = [runner for runner in racing if runner.median_s <= EQUAL * best]
    key = (lambda r: r.p99_s) if by_p99 else (lambda r: r.median_s)
    return list(runners).index(min(equal, key=key))


def _warm(runner: Runner) -> float:
    """First calls choose kernels and pack weights; seconds of the last one."""
    clock = time.perf_counter
    end = clock() + TURN_S
    count, seconds = 0, 0.0
    while count < 3 or clock() < end:
        start = clock()
        runner.call()
        seconds = clock() - start
        count += 1
        if count >= 2 and seconds > SLOW_S:
            break
    runner.slow = seconds > SLOW_S
    return seconds


def _quiet() -> None:
    """Untimed: waits until the threads that the turn before has left behind have gone to sleep.

    Those of ONNX Runtime spin for tens of milliseconds, each on a CPU that the next candidate
    needs: after a session of two threads, two instances took 47 us a call instead of 35 (small,
    batch 32, two CPUs), and lost to it.
    """
    ends_at = time.perf_counter() + SPIN_S
    while time.perf_counter() < ends_at:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(LOOK_S)
        if time.process_time() - cpu < AT_REST * (time.perf_counter() - wall):
            return


def _turn(runner: Runner) -> None:
    if not runner.slow:
        _quiet()
    if runner.num_instances > 1:
        _turn_together(runner)
        return
    call, clock = runner.call, time.perf_counter
    _settle(runner)
    seconds: list[float] = []
    least = 1 if runner.slow else 3
    end = clock() + TURN_S
    now = clock()
    while now < end or len(seconds) < least:
        call()
        before, now = now, clock()
        seconds.append(now - before)
    seconds.sort()
    runner.add(statistics.median(seconds), seconds[int(0.99 * len(seconds))], len(seconds))
    runner.least_s = min(runner.least_s, seconds[0])
    runner.most_s = max(runner.most_s, seconds[-1])


def _settle(runner: Runner) -> None:
    """Untimed: wakes the threads that slept."""
    settled = time.perf_counter() + TURN_S / 6
    while not runner.slow and time.perf_counter() < settled:
        runner.call()


def _turn_together(runner: Runner) -> None:
    """All instances call without a pause; wall seconds over calls."""
    start = threading.Barrier(runner.num_instances)
    spans: list[tuple[float, float, int]] = []
    failures: list[BaseException] = []

    def work(position: int) -> None:
        cpus = [runner.cpu_ids[position]] if position < len(runner.cpu_ids) else []
        try:
            with pinned_thread(cpus):
                runner.call()
                _settle(runner)
                start.wait()
                begin = time.perf_counter()
                count = 0
                while time.perf_counter() < begin + TURN_S or count < 3:
                    runner.call()
                    count += 1
                spans.append((begin, time.perf_counter(), count))
        except BaseException as error:
            failures.append(error)
            start.abort()

    threads = [
        threading.Thread(target=work, args=(i,), name=f"hotloop-race-{i}")
        for i in range(runner.num_instances)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        # A broken barrier only says that another thread failed: that one's reason is the answer.
        real = [e for e in failures if not isinstance(e, threading.BrokenBarrierError)]
        raise (real or failures)[0]
    calls = sum(count for _, _, count in spans)
    rate = sum(count / (end - begin) for begin, end, count in spans)
    runner.add(1 / rate, 1 / rate, calls)
    runner.least_s = min(runner.least_s, 1 / rate)
    runner.most_s = max(runner.most_s, 1 / rate)


def steadiest(runners: Sequence[Runner], best: int) -> int:
    """The one with most instances among the equals of the best.

    Threads of one call wait for each other, for as long as it takes between their processors; a
    hypervisor moves those, and what was fastest in the race is not the day after.
    """
    limit = EQUAL_RATES * runners[best].median_s
    equals = [
        place
        for place, runner in enumerate(runners)
        if runner.dropped is None and runner.median_s <= limit
    ]
    return min(equals, key=lambda at: (-runners[at].num_instances, runners[at].median_s))
