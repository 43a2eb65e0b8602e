"""Timing beside a neighbour that takes the processor away."""

import itertools
import os
import subprocess
import sys

from hotloop.measure import least_seconds
from hotloop.measure.neighbours import waited_s


class Processor:
    """Time that passes only as told, and what of it was waiting."""

    def __init__(self):
        self.now = self.waited = 0.0

    def work(self, *parts):
        """Calls that take so long and wait so long before, in turn."""
        turns = itertools.cycle(parts)

        def call():
            seconds, waits = next(turns)
            self.now += seconds + waits
            self.waited += waits

        return call

    def time(self, calls, repeats=1, limit_s=1000.0):
        return least_seconds(
            calls, repeats, clock=lambda: self.now, waited=lambda: self.waited, limit_s=limit_s
        )


def test_the_faster_wins_though_it_waited_nearly_always():
    machine = Processor()
    timing = machine.time(
        {
            "fast": machine.work((1.0, 8.0), (1.0, 8.0), (1.0, 8.0), (1.0, 0.0)),
            "slow": machine.work((2.0, 0.0)),
        }
    )
    assert timing == ({"fast": 1.0, "slow": 2.0}, True)


def test_a_time_with_waiting_in_it_counts_only_where_there_is_no_other():
    machine = Processor()
    # As the clock sees it, the call that waited was the faster one.
    timing = machine.time({"work": machine.work((3.0, 0.0), (1.0, 1.0))})
    assert timing == ({"work": 3.0}, True)
    always = machine.time({"work": machine.work((1.0, 1.0))}, limit_s=20.0)
    assert always == ({"work": 2.0}, False)


def test_time_of_one_call_among_repeats():
    machine = Processor()
    timing = machine.time({"work": machine.work((0.5, 0.0)), "more": machine.work((0.75, 0.0))}, 4)
    assert timing.seconds == {"work": 0.5, "more": 0.75}
    assert timing.fastest == "work"


def test_the_kernel_counts_waiting():
    """Two busy processes on one CPU: each waits for the other."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    spin = f"import os\nos.sched_setaffinity(0, [{cpu}])\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            os.sched_setaffinity(0, {cpu})
            started = waited_s()
            for _ in range(200):
                sum(range(100_000))
            assert waited_s() > started
        finally:
            os.sched_setaffinity(0, before)
            other.kill()


def test_a_clear_lead_ends_a_race_and_a_narrow_one_or_one_beside_a_neighbour_does_not():
    for fast, slow, rounds in (
        (((1.0, 0.0),), ((2.0, 0.0),), 1),
        (((1.0, 0.0),), ((1.25, 0.0),), 5),
        # The first round waited: only the second one counts.
        (((1.0, 0.0), (1.0, 4.0), (1.0, 0.0)), ((2.0, 0.0),), 2),
    ):
        machine, begun = Processor(), []
        parts = machine.work(*fast)

        def first(parts=parts, begun=begun):
            begun.append(1)
            parts()

        timing = least_seconds(
            {"fast": first, "slow": machine.work(*slow)}, rounds=5, until_clear=True,
            limit_s=1000.0, clock=lambda m=machine: m.now, waited=lambda m=machine: m.waited,
        )  # fmt: skip
        assert timing.fastest == "fast"
        assert len(begun) - 1 == rounds  # One to warm up.
