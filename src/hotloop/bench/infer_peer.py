"""Process of one peer of the inference race: ``python -m hotloop.bench.infer_peer SETUP.json``.

Lines out: with several variants and none chosen, ``{"rates": [samples/s of each]}`` and the end;
else ``{"settings": ..., "error": ...}`` when it is ready. Then for each line in a line out: what a
turn of ``seconds`` gave. torch is imported only by the peers that compute with it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from ..errors import HotloopError
from ..measure import Candidate, now, take_turn
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
    started = now()
    mine = job(setup["settings"])
    prepared = prepare(mine)
    inputs = [prepared.convert(x) for x in mine.x]
    _warm(prepared, inputs)
    prepared_s = now() - started
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
    callers = [_caller(call, inputs, number) for number, call in enumerate(prepared.calls)]
    # What a thread sets up at its first call is not counted.
    turn = take_turn(Candidate(callers), span_s=seconds, settle_s=0.0)
    return {
        "samples_per_s": batch_size * turn.calls_per_s,
        "p50_s": float(numpy.quantile(turn.seconds, 0.5)),
        "p99_s": float(numpy.quantile(turn.seconds, 0.99)),
        "calls": len(turn.seconds),
    }


def _caller(call: Any, inputs: Sequence[Any], first: int) -> Callable[[], Any]:
    """Calls with one input after the other: no two callers work on one at the same time."""
    turned = itertools.cycle([*inputs[first % len(inputs) :], *inputs[: first % len(inputs)]])
    return lambda: call(next(turned))


if __name__ == "__main__":
    sys.exit(main())
