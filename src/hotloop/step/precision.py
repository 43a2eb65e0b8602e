"""``precision="auto"``: bfloat16 where a probe shows that it learns alike and is faster."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..measure import Turns

# Batches as a step is called with: ``(x, y)`` or ``(x,)``.
Batches = Callable[[], Iterable[tuple[Any, ...]]]
# Model, loss function and optimizer.
Three = tuple[nn.Module, Callable[..., Any], torch.optim.Optimizer]
Make = Callable[[Three, str], Any]

PROBE_STEPS = 32
# Losses are compared as means over so many steps, by this relative difference at most.
WINDOW_STEPS = 8
BOUND = 0.02
# Below this gain nothing is won that noise could not have made.
_LEAST_GAIN = 1.05


@dataclass(frozen=True)
class Verdict:
    """What the probe found.

    Attributes:
        accepted: whether bfloat16 is used.
        deviation: largest relative difference of the mean losses of a window.
        speedup: seconds of a float32 step over seconds of a bfloat16 step, medians.
    """

    accepted: bool
    deviation: float
    speedup: float

    @property
    def reason(self) -> str:
        """One clause for the report."""
        word = "bfloat16" if self.accepted else "float32"
        return (
            f"precision auto is {word}: over {PROBE_STEPS} probe steps losses in bfloat16 differ by"
            f" {self.deviation:.1%} at most (bound {BOUND:.0%}), and a step is {self.speedup:.2f}"
            " times as fast"
        )


def probe(make: Make, three: Three, batches: Batches) -> Verdict:
    """Train copies of model, loss and optimizer in both precisions on the same batches.

    One copy at a time. torch's random state, the model, a loss module and the optimizer stay as
    they are.

    Args:
        make: gives the step of the copies in a precision.
        batches: gives batches of the compiled shape; taken from the start again where they end.
    """
    losses, seconds = {}, {}
    for precision in ("float32", "bfloat16"):
        losses[precision], seconds[precision] = _trained(make, three, batches, precision)
    exact, rounded = _windows(losses["float32"]), _windows(losses["bfloat16"])
    deviation = max(
        abs(b - a) / max(abs(a), 1e-12) if math.isfinite(a) and math.isfinite(b) else math.inf
        for a, b in zip(exact, rounded, strict=True)
    )
    speedup = seconds["float32"] / seconds["bfloat16"]
    return Verdict(deviation <= BOUND and speedup >= _LEAST_GAIN, deviation, speedup)


def _trained(
    make: Make,
    three: Three,
    batches: Batches,
    precision: str,
) -> tuple[list[float], float]:
    """Losses of the probe's steps and the median seconds of one."""
    losses, seconds = [], []
    with torch.random.fork_rng(devices=[]):
        # One copy of all, so that the copied optimizer holds the copied parameters.
        step = make(copy.deepcopy(three), precision)
        torch.manual_seed(0)
        fed = _again(batches)
        for played in Turns({precision: lambda: step(*next(fed)).item()}, rounds=PROBE_STEPS):
            losses.append(played[precision].answer)
            seconds.append(played[precision].median_s)
    return losses, statistics.median(seconds)


def _again(batches: Batches) -> Iterator[tuple[Any, ...]]:
    while True:
        yield from batches()


def _windows(losses: list[float]) -> list[float]:
    return [
        statistics.fmean(losses[at : at + WINDOW_STEPS])
        for at in range(0, len(losses), WINDOW_STEPS)
    ]
