"""Who wins a race: from calls whose times are made by hand."""

import pytest

from hotloop.infer import race as room
from hotloop.infer.race import Runner, race


class Clock:
    """Time that passes only inside calls."""

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

    def process_time(self):
        return self.cpu_s

    def runner(self, *seconds):
        """Calls that take these seconds in turn."""
        count = 0

        def call():
            nonlocal count
            self.now += seconds[count % len(seconds)]
            count += 1

        return Runner(call)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(room.time, "perf_counter", made)
    monkeypatch.setattr(room.time, "sleep", made.sleep)
    monkeypatch.setattr(room.time, "process_time", made.process_time)
    monkeypatch.setattr(room, "TURN_S", 0.03)
    return made


def test_the_fastest_wins_and_the_clearly_slower_are_dropped(clock):
    runners = [clock.runner(t) for t in (1.1e-3, 1e-3, 2e-3)]
    assert race(runners, by_p99=False, budget_s=10) == 1
    assert [r.dropped for r in runners] == [None, None, room.MIN_ROUNDS]
    assert runners[1].median_s == pytest.approx(1e-3, rel=1e-3)
    assert runners[2].n < runners[1].n


def test_the_tail_decides_among_equals_alone(clock):
    def make():
        steady = clock.runner(1.01e-3)
        ragged = clock.runner(*[1e-3] * 9, 5e-3)
        slow_but_steady = clock.runner(1.1e-3)
        return [ragged, steady, slow_but_steady]

    assert race(make(), by_p99=True, budget_s=10) == 1
    assert race(make(), by_p99=False, budget_s=10) == 0


def test_far_behind_where_calls_are_slow_costs_no_rounds(clock):
    runners = [clock.runner(0.2), clock.runner(0.9)]
    assert race(runners, by_p99=False, budget_s=10) == 0
    assert runners[1].dropped == 0
    assert runners[1].n == 1
    assert runners[1].median_s == pytest.approx(0.9, rel=1e-3)


def test_the_budget_ends_it_after_three_rounds(clock):
    runners = [clock.runner(1e-3), clock.runner(1.01e-3)]
    race(runners, by_p99=False, budget_s=1e-9)
    assert [len(r.round_s) for r in runners] == [room.MIN_ROUNDS] * 2


def test_instances_call_at_once_and_a_failure_is_the_one_that_happened():
    import threading

    together = threading.Barrier(2, timeout=30)
    runner = Runner(together.wait, num_instances=2)

    # Each call waits for the other instance's: it ends only if both are at it.
    def call():
        together.wait()

    runner.call = call
    room.TURN_S, before = 0.0, room.TURN_S
    try:
        room._turn_together(runner)
    finally:
        room.TURN_S = before
    assert runner.n == 6

    def broken():
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        room._turn_together(Runner(broken, num_instances=2))


def test_a_turn_begins_when_the_threads_of_the_one_before_sleep(clock):
    begun = []

    def spinning():
        clock.now += 1e-3
        clock.spin_until = clock.now + 0.04

    def watched():
        clock.now += 1e-3
        begun.append(clock.now - clock.spin_until)

    assert race([Runner(spinning), Runner(watched)], by_p99=False, budget_s=10) in (0, 1)
    # The first calls of all choose kernels; those of a turn find a machine at rest.
    assert min(begun[50:]) >= 0


def test_threads_that_never_sleep_are_not_waited_for_without_end(clock):
    clock.spin_until = 1e9
    assert race([clock.runner(1e-3), clock.runner(2e-3)], by_p99=False, budget_s=10) == 0
    assert clock.now < 100


def test_among_equals_the_one_with_most_instances():
    def timed(median_s, num_instances, dropped=None):
        found = Runner(lambda: None, num_instances, dropped=dropped)
        found.add(median_s, median_s, 1)
        return found

    alone = timed(1.0, 1)
    assert room.steadiest([alone, timed(1.02, 2), timed(1.01, 2), timed(1.02, 4, 3)], 0) == 2
    assert room.steadiest([alone, timed(1.04, 2)], 0) == 0
