"""Timing beside a neighbour that takes the processor away."""

import itertools

from hotloop.step.stopwatch import least_seconds


class Clock:
    """Time that passes only as told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        durations = itertools.cycle(seconds)

        def call():
            self.now += next(durations)

        return call


def test_the_faster_wins_though_it_was_disturbed_most_of_the_time():
    clock = Clock()
    calls = {"fast": clock.work([8.0, 8.0, 8.0, 8.0, 1.0]), "slow": clock.work([2.0])}
    seconds = least_seconds(calls, clock=clock)
    assert seconds == {"fast": 1.0, "slow": 2.0}


def test_quiet_work_is_timed_nine_times_and_disturbed_work_longer():
    for durations, rounds in (([1.0], 9), ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 1.0], 23)):
        clock, count = Clock(), itertools.count()
        work = clock.work(durations)
        least_seconds({"work": lambda work=work, count=count: (next(count), work())}, clock=clock)
        assert next(count) == rounds + 1


def test_time_of_one_call_among_repeats():
    clock = Clock()
    assert least_seconds({"work": clock.work([0.5])}, 4, clock=clock) == {"work": 0.5}
