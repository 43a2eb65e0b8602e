"""Who wins among engines: from calls whose times are made by hand."""

import pytest

from hotloop.measure import Candidate, Standing, Turn, race, steadiest
from hotloop.measure.medians import MIN_ROUNDS
from hotloop.measure.neighbours import until_idle


class Clock:
    """Time that passes only inside calls and sleep."""

    def __init__(self):
        self.now = 0.0
        self.spin_until = 0.0  # Another thread of the process computes until then.
        self.cpu_s = 0.0

    def __call__(self):
        self.now += 1e-9
        return self.now

    def sleep(self, seconds):
        self.cpu_s += min(seconds, max(0.0, self.spin_until - self.now))
        self.now += seconds

    def rest(self):
        until_idle(clock=self, sleep=self.sleep, cpu_s=lambda: self.cpu_s)

    def call(self, *seconds):
        """A call that takes these seconds in turn."""
        count = 0

        def call():
            nonlocal count
            self.now += seconds[count % len(seconds)]
            count += 1

        return call

    def race(self, *calls, by_p99=False, budget_s=10.0):
        """Number of the winner, and all standings."""
        candidates = {number: Candidate([call]) for number, call in enumerate(calls)}
        best, found = race(candidates, by_p99=by_p99, budget_s=budget_s, clock=self, rest=self.rest)
        return best, list(found.values())


@pytest.fixture
def clock():
    return Clock()


def test_the_fastest_wins_and_the_clearly_slower_are_dropped(clock):
    best, found = clock.race(*(clock.call(t) for t in (1.1e-3, 1e-3, 2e-3)))
    assert best == 1
    assert [s.dropped for s in found] == [None, None, MIN_ROUNDS]
    assert found[1].median_s == pytest.approx(1e-3, rel=1e-3)
    assert found[2].n < found[1].n


def test_the_tail_decides_among_equals_alone(clock):
    def make():
        steady = clock.call(1.01e-3)
        ragged = clock.call(*[1e-3] * 9, 5e-3)
        slow_but_steady = clock.call(1.1e-3)
        return ragged, steady, slow_but_steady

    assert clock.race(*make(), by_p99=True)[0] == 1
    assert clock.race(*make(), by_p99=False)[0] == 0


def test_far_behind_where_calls_are_long_costs_no_rounds(clock):
    best, found = clock.race(clock.call(0.2), clock.call(0.9))
    assert best == 0
    assert found[1].dropped == 0
    assert found[1].n == 1
    assert found[1].median_s == pytest.approx(0.9, rel=1e-3)


def test_a_long_call_is_made_once_a_turn(clock):
    _, found = clock.race(clock.call(0.2), clock.call(0.21))
    assert [s.n for s in found] == [len(s.round_s) for s in found]


def test_the_budget_ends_it_after_three_rounds(clock):
    _, found = clock.race(clock.call(1e-3), clock.call(1.01e-3), budget_s=1e-9)
    assert [len(s.round_s) for s in found] == [MIN_ROUNDS] * 2


def test_a_turn_begins_when_the_threads_of_the_one_before_sleep(clock):
    begun = []

    def spinning():
        clock.now += 1e-3
        clock.spin_until = clock.now + 0.04

    def watched():
        clock.now += 1e-3
        begun.append(clock.now - clock.spin_until)

    clock.race(spinning, watched)
    # The first calls of all choose kernels; those of a turn find a machine at rest.
    assert min(begun[50:]) >= 0


def test_threads_that_never_sleep_are_not_waited_for_without_end(clock):
    clock.spin_until = 1e9
    assert clock.race(clock.call(1e-3), clock.call(2e-3))[0] == 0
    assert clock.now < 100


def test_several_callers_count_by_their_rate_together():
    standing = Standing(num_callers=2)
    standing.add(Turn((2.0, 2.0, 2.0, 2.0), calls_per_s=1.0))
    assert (standing.median_s, standing.p99_s, standing.n) == (1.0, 1.0, 4)


def test_among_equals_the_one_with_most_instances():
    def timed(median_s, num_callers, dropped=None):
        found = Standing(num_callers, dropped=dropped)
        found.add(Turn((median_s,), 1 / median_s))
        return found

    alone = timed(1.0, 1)
    rows = [alone, timed(1.02, 2), timed(1.01, 2), timed(1.02, 4, 3)]
    assert steadiest(dict(enumerate(rows))) == 2
    assert steadiest({"one": alone, "two": timed(1.04, 2)}) == "one"
