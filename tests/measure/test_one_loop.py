"""One loop of the package calls candidates in turn and reads the clock: ``measure/turns.py``."""

import ast
from pathlib import Path

import pytest

import hotloop

SOURCE = Path(hotloop.__file__).parent
CLOCKS = {
    "_clock", "clock", "monotonic", "monotonic_ns", "now", "perf_counter", "perf_counter_ns",
    "process_time", "thread_time", "time", "timed",
}  # fmt: skip
LOOPS = (ast.For, ast.While, ast.AsyncFor, ast.ListComp, ast.GeneratorExp, ast.DictComp)
# Other loops that read a clock, and why they choose nothing by it.
OTHERS = {
    "data/batches.py": "says how long samples take to be read, against a limit",
    "data/samples.py": "no clock: where random numbers stand now",
    "bench/load.py": "sends requests when they fall due",
    "bench/peer.py": "an epoch for each line that a loop of Turns, in another process, writes",
    "measure/neighbours.py": "waits until threads sleep",
    "monitor/recorder.py": "laps of a run that goes on anyway",
    "monitor/sampler.py": "looks at the machine every so often",
    "parallel/joining.py": "waits, with a limit",
    "parallel/worker.py": "processor seconds of chunks that the step needs anyway",
    "serve/batcher.py": "deadlines of requests",
    "serve/server.py": "waits, with a limit",
}


def reads_the_clock_in_a_loop(text):
    def name(call):
        return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)

    return any(
        isinstance(inner, ast.Call) and name(inner) in CLOCKS
        for loop in ast.walk(ast.parse(text))
        if isinstance(loop, LOOPS)
        for inner in ast.walk(loop)
    )


def test_timing_loops_left_are_one():
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if reads_the_clock_in_a_loop(path.read_text())
    }
    assert found - set(OTHERS) == {"measure/turns.py"}
    assert set(OTHERS) - found == set(), "no longer needed"


@pytest.mark.parametrize(
    "text",
    [
        "for f in calls:\n    start = time.perf_counter()\n    f()",
        "while left:\n    seconds, _ = timed(left.pop())",
        "seconds = [timed(f)[0] for f in calls]",
        "for f in calls:\n    for _ in range(3):\n        took = self._clock() - start",
    ],
)
def test_a_loop_of_its_own_is_seen(text):
    assert reads_the_clock_in_a_loop(text)
    assert not reads_the_clock_in_a_loop("start = now()\nfor f in calls:\n    f()\nend = now()")
