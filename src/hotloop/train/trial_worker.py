"""Process of one trial: ``python -m hotloop.train.trial_worker SETUP.json``; slices when told.

It trains by ``Trainer.fit`` under one plan and is held between two steps until the next line comes,
so that several of them can be measured in turn without starting anew.

Lines in: ``{"do": "build"}``, then ``{"do": "slice", "s": seconds}`` any number of times; the end
of the input ends it. Lines out: ``{"up": true}`` after the imports; what ``Facts`` holds once it is
warm; ``s_per_step``, ``steps``, ``losses`` for each slice; ``{"failed": text}`` where it cannot.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Losses kept for comparing results: past so many steps rounding has grown to something else.
KEPT_LOSSES = 16
_WARM_S = 0.2
# Of a slice, run before its clock starts: caches are another trial's, the queue is full.
_LEAD_IN = 0.15
_FOREVER = 10**9


class Slices:
    """Called by the loop after each call of the step; times slices, and waits between them.

    Args:
        say: sends an answer. read: gives the next line, empty at the end of the input.
        lead_steps: steps before the clock starts: batches that were queued while nothing ran.
        facts: what is sent once it is warm.
    """

    def __init__(
        self,
        say: Callable[..., None],
        read: Callable[[], str],
        lead_steps: int,
        facts: Callable[[], dict[str, Any]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._say, self._read, self._facts, self._clock = say, read, facts, clock
        self._lead_steps = lead_steps
        self.losses: list[float] = []
        self.steps = 0
        self.steps_per_call = 1
        self._warm = False
        self._slice_s = _WARM_S
        self._started_s: float | None = None
        self._started_step = self._lead_until_step = 0
        self._lead_until_s = 0.0

    def __call__(self, losses: list[float]) -> None:
        """After the steps with these losses."""
        self.steps += len(losses)
        self.steps_per_call = max(self.steps_per_call, len(losses))
        self.losses += losses[: KEPT_LOSSES - len(self.losses)]
        now = self._clock()
        if self._started_s is None:
            if self.steps >= self._lead_until_step and now >= self._lead_until_s:
                self._started_s, self._started_step = now, self.steps
            return
        if now - self._started_s < self._slice_s:
            return
        if self._warm:
            steps = self.steps - self._started_step
            self._say(s_per_step=(now - self._started_s) / steps, steps=steps, losses=self.losses)
        else:
            self._warm = True
            self._say(**self._facts())
        line = self._read()
        if not line:
            raise SystemExit(0)
        self._slice_s = float(json.loads(line)["s"])
        self._begin(_LEAD_IN * self._slice_s)

    def _begin(self, lead_s: float) -> None:
        self._started_s = None
        self._lead_until_s = self._clock() + lead_s
        self._lead_until_step = self.steps + self._lead_steps


def main() -> int:
    """Import, build, warm up, answer."""
    setup = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # What a model prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        from ..errors import HotloopError

        importlib.import_module("hotloop.train.trainer")  # Slow, and may be done beside others.
        say(up=True)
        if not sys.stdin.readline():
            return 0
        _run(setup, say)
    except BrokenPipeError:
        pass  # Nobody listens any more.
    except HotloopError as error:
        say(failed=str(error))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        say(failed=f"{type(error).__name__}: {first}"[:500])
    return 0


def _run(setup: dict[str, Any], say: Callable[..., None]) -> None:
    from ..monitor import PerformanceMonitor, peak_resident_bytes
    from ..plan import Plan

    module, _, name = setup["target"].partition(":")
    plan = Plan.from_dict(setup["plan"])
    work = getattr(importlib.import_module(module), name)(setup["arguments"], plan)
    # Told of the step, but looking at nothing: a held trial must take no time of the processor.
    monitor = PerformanceMonitor(work.trainer.machine, look_every_s=None, hardware_counters=False)

    def facts() -> dict[str, Any]:
        return {
            "ready": True,
            "steps_per_call": slices.steps_per_call,
            "peak_bytes": peak_resident_bytes(),
            "fingerprint": work.fingerprint,
            "precision": monitor.work.precision,
            "precision_reason": monitor.work.precision_reason,
            "losses": slices.losses,
        }

    lead = plan.cpu.queue_size + 1
    slices = Slices(say, sys.stdin.readline, lead, facts)
    work.trainer.fit(
        work.data, work.batch_size, _FOREVER, seed=work.seed, monitor=monitor, on_losses=slices
    )


if __name__ == "__main__":
    sys.exit(main())
