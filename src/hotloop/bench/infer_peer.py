"""Process of one peer of the inference race: ``python -m hotloop.bench.infer_peer SETUP.json``.

Lines out: with several variants and none chosen, ``{"rates": [samples/s of each]}`` and the end;
else ``{"settings": ..., "error": ...}`` when it is ready. Then for each line in a line out: what a
turn of ``seconds`` gave. torch is imported only by the peers that compute with it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from ..errors import HotloopError
from ..monitor import peak_resident_bytes, resident_bytes
from .infer_peers import PEERS, Job, Prepared, build_hotloop, variants
from .infer_result import HOTLOOP

_WARM_CALLS = 3
_SCOUT_S = 0.3


def main() -> int:
    """Prepare, check, answer."""
    setup = json.loads(Path(sys.argv[1]).read_text())
    # What a peer prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    # Peers that know no number of threads see as many CPUs as they may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup["threads"]])
    try:
        _answer(setup, say)
    except HotloopError as error:
        say(failed=str(error))
        return error.exit_code
    return 0


def _answer(setup: dict[str, Any], say: Any) -> None:
    prepare = PEERS[setup["peer"]][0]

    def job(settings: dict[str, Any]) -> Job:
        return Job(
            setup["model"], setup["batch_size"], setup["threads"], setup["goal"],
            Path(setup["folder"]), settings, setup["max_accuracy_loss"],
        )  # fmt: skip

    if setup["settings"] is None and setup["peer"] in HOTLOOP:
        build_hotloop(job({}))
        say(rates=[1.0])
        return
    if setup["settings"] is None:
        rates = []
        for settings in variants(setup["peer"], setup["model"], setup["threads"], setup["goal"]):
            prepared = prepare(job(settings))
            inputs = [prepared.convert(x) for x in job(settings).x]
            _warm(prepared, inputs)
            rates.append(measure(prepared, inputs, setup["batch_size"], _SCOUT_S)["samples_per_s"])
        say(rates=rates)
        return
    started = time.perf_counter()
    mine = job(setup["settings"])
    prepared = prepare(mine)
    inputs = [prepared.convert(x) for x in mine.x]
    _warm(prepared, inputs)
    prepared_s = time.perf_counter() - started
    told: dict[str, Any] = {"settings": {**mine.settings, **prepared.told}}
    if setup["max_accuracy_loss"] is None or setup["peer"] not in HOTLOOP:
        told["error"] = _error(prepared, inputs, numpy.load(mine.folder / "expected.npy"))
    if (mine.folder / "test_x.npy").exists():
        told["accuracy"] = _accuracy(prepared, mine)
    say(**told, prepared_s=prepared_s, torch_imported="torch" in sys.modules)
    for _ in sys.stdin:
        found = measure(prepared, inputs, setup["batch_size"], setup["seconds"])
        say(**found, resident_bytes=resident_bytes(), peak_bytes=peak_resident_bytes())


def _warm(prepared: Prepared, inputs: Sequence[Any]) -> None:
    for _ in range(_WARM_CALLS):
        for x in inputs:
            prepared.calls[0](x)


def _error(prepared: Prepared, inputs: Sequence[Any], expected: numpy.ndarray) -> float:
    """Largest difference to eager PyTorch over the largest value, over all batches."""
    worst = 0.0
    for x, wanted in zip(inputs, expected, strict=True):
        got = prepared.to_numpy(prepared.calls[0](x))
        if got.shape != wanted.shape or not numpy.isfinite(got).all():
            return float("inf")
        worst = max(worst, float(numpy.abs(got - wanted).max() / numpy.abs(wanted).max()))
    return worst


def _accuracy(prepared: Prepared, job: Job) -> float:
    """Share of the test digits told right; a last part batch is filled with the first rows."""
    x, y = numpy.load(job.folder / "test_x.npy"), numpy.load(job.folder / "test_y.npy")
    right, size = 0, job.batch_size
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        count = len(rows)
        if count < size:
            rows = numpy.concatenate([rows, x[: size - count]])
        scores = prepared.to_numpy(prepared.calls[0](prepared.convert(rows)))
        right += int((scores[:count].argmax(1) == y[start : start + count]).sum())
    return right / len(x)


def measure(
    prepared: Prepared, inputs: Sequence[Any], batch_size: int, seconds: float
) -> dict[str, Any]:
    """Call for ``seconds``, from as many threads as the peer has calls.

    Returns:
        ``samples_per_s``: the sum of each caller's samples over its time; ``p50_s`` and
        ``p99_s`` of a call; ``calls``.
    """
    callers = [_Caller(call, inputs, number) for number, call in enumerate(prepared.calls)]
    if len(callers) == 1:
        callers[0].run(seconds)
    else:
        threads = [threading.Thread(target=caller.run, args=(seconds,)) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for caller in callers:
        if caller.failed is not None:
            raise caller.failed
    times = numpy.concatenate([numpy.diff(caller.marks) for caller in callers])
    return {
        "samples_per_s": sum(
            batch_size * (len(c.marks) - 1) / (c.marks[-1] - c.marks[0]) for c in callers
        ),
        "p50_s": float(numpy.quantile(times, 0.5)),
        "p99_s": float(numpy.quantile(times, 0.99)),
        "calls": len(times),
    }


class _Caller:
    """One thread's calls and the times between which they lay."""

    def __init__(self, call: Any, inputs: Sequence[Any], first: int) -> None:
        self.call = call
        # Two callers do not work on one input at the same time.
        self.inputs = [*inputs[first % len(inputs) :], *inputs[: first % len(inputs)]]
        self.marks: list[float] = []
        self.failed: Exception | None = None

    def run(self, seconds: float) -> None:
        call, inputs, count, clock = self.call, self.inputs, len(self.inputs), time.perf_counter
        try:
            call(inputs[0])  # What a thread sets up at its first call is not counted.
            now = clock()
            marks, until = [now], now + seconds
            while now < until:
                call(inputs[len(marks) % count])
                now = clock()
                marks.append(now)
            self.marks = marks
        except Exception as error:
            self.failed = error


if __name__ == "__main__":
    sys.exit(main())
