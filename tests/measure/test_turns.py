"""Who is called when, what a turn holds, and what happens to a candidate that fails."""

import threading

import pytest

from hotloop.errors import RunError
from hotloop.measure import (
    Candidate,
    Turns,
    in_order,
    rotating,
    take_turn,
    there_and_back,
    timed,
)


class Clock:
    """Time that passes only inside calls."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def call(self, name, seconds, answer=None):
        def call():
            self.now += seconds
            self.log.append(name)
            return answer

        return call


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (in_order, "abc abc abc abc"),
        (rotating, "abc bca cab abc"),
        (there_and_back, "abc cba abc cba"),
    ],
)
def test_orders(clock, order, expected):
    calls = {name: clock.call(name, 1.0) for name in "abc"}
    rounds = [list(played) for played in Turns(calls, rounds=4, order=order, clock=clock)]
    assert "".join(clock.log) == expected.replace(" ", "")
    # Whatever the order, a round is told by the names' own.
    assert rounds == [["a", "b", "c"]] * 4


def test_a_reading_is_the_time_of_one_call_among_repeats(clock):
    calls = {"a": clock.call("a", 0.25, "done")}
    (played,) = Turns(calls, rounds=1, repeats=4, clock=clock)
    assert played["a"].seconds == (0.25,)
    assert played["a"].calls_per_s == 4.0
    assert played["a"].answer == "done"
    assert len(clock.log) == 4


def test_a_turn_lasts_its_span_and_has_its_least_readings(clock):
    call = clock.call("a", 0.01)
    assert len(take_turn(Candidate([call]), span_s=0.045, clock=clock).seconds) == 5
    assert len(take_turn(Candidate([call]), least_readings=3, clock=clock).seconds) == 3


def test_settling_and_warming_are_not_timed(clock):
    slow_at_first = iter([0.07, 0.05, 0.05, *[0.01] * 100])

    def call():
        clock.now += next(slow_at_first)

    turns = Turns({"a": call}, rounds=1, warm_calls=2, settle_s=0.0, clock=clock)
    (played,) = turns
    assert turns.warm["a"].seconds == pytest.approx((0.07, 0.05))
    assert played["a"].seconds == pytest.approx((0.01,))


def test_a_long_call_needs_nothing_beside_it(clock):
    turns = Turns(
        {"long": clock.call("long", 0.2), "short": clock.call("short", 0.05)},
        rounds=1, warm_calls=1, settle_s=0.0, least_readings=2, clock=clock,
    )  # fmt: skip
    list(turns)
    assert clock.log == ["long", "short", "long", "short", "short", "short"]


def test_no_round_begins_that_would_end_later(clock):
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 2.0)}
    assert len(list(Turns(calls, limit_s=10.0, clock=clock))) == 3
    assert clock.now == 9.0
    assert len(list(Turns(calls, limit_s=0.0, least_rounds=2, clock=clock))) == 2


def test_a_dropped_candidate_has_no_more_turns(clock):
    turns = Turns({name: clock.call(name, 1.0) for name in "ab"}, rounds=3, clock=clock)
    for _ in turns:
        turns.drop("a")
    assert clock.log == ["a", "b", "b", "b"]
    turns.drop("b")
    assert list(turns) == []


def test_before_each_turn_something_may_be_done(clock):
    told = []
    calls = {name: clock.call(name, 1.0) for name in "ab"}
    list(Turns(calls, rounds=2, before=told.append, warm_calls=1, clock=clock))
    assert told == ["a", "b", "a", "b"]


@pytest.mark.parametrize("when", ["warm", "first", "second"])
def test_a_candidate_that_fails_is_dropped_where_that_is_forgiven(clock, when):
    left = {"warm": 0, "first": 1, "second": 2}[when]
    error = RunError("it broke")

    def broken():
        nonlocal left
        if left == 0:
            raise error
        left -= 1

    turns = Turns(
        {"good": clock.call("good", 1.0), "bad": broken}, rounds=3, warm_calls=1,
        forgive=(RunError,), clock=clock,
    )  # fmt: skip
    rounds = [list(played) for played in turns]
    assert rounds[-1] == ["good"]
    assert turns.failed == {"bad": error}
    assert list(turns.racing) == ["good"]


def test_another_error_ends_it(clock):
    def broken():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        list(Turns({"bad": broken}, forgive=(RunError,), clock=clock))


def test_waiting_for_a_processor_is_seen(clock):
    waited = 0.0

    def disturbed():
        nonlocal waited
        clock.now += 1.0
        waited += 0.5

    turns = Turns(
        {"quiet": clock.call("quiet", 1.0), "disturbed": disturbed}, rounds=1,
        waited=lambda: waited, clock=clock,
    )  # fmt: skip
    (played,) = turns
    assert played["quiet"].quiet
    assert not played["disturbed"].quiet


def test_callers_call_at_the_same_time_and_are_counted_together():
    # Each call waits for the other thread's: it ends only if both are at it.
    together = threading.Barrier(2, timeout=30)
    turn = take_turn(Candidate([together.wait] * 2), least_readings=3, settle_s=0.0)
    assert len(turn.seconds) == 6
    # Each of the two makes about half of the rate; both ran at once.
    assert turn.calls_per_s > 1.2 / (sum(turn.seconds) / 6)


def test_the_failure_of_a_caller_is_the_one_that_happened():
    def broken():
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        take_turn(Candidate([broken, lambda: None]), settle_s=0.0)


def test_p99_and_median_of_a_turn(clock):
    seconds = iter([1e-3] * 98 + [5e-3] * 2)

    def call():
        clock.now += next(seconds)

    turn = take_turn(Candidate([call]), least_readings=100, clock=clock)
    assert turn.median_s == pytest.approx(1e-3)
    assert turn.p99_s == pytest.approx(5e-3)


def test_one_call_timed():
    seconds, answer = timed(lambda: sum(range(1000)))
    assert answer == 499500
    assert seconds > 0
