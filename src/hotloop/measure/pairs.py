"""A rule for programs and plans: the ratio of A and B, in pairs, until the answer is clear."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError, RunError
from .clock import now
from .interval import always_valid_interval
from .turns import Turns, there_and_back

Verdict = Literal["proven", "regression", "no difference"]
# Fewer pairs give no interval worth the name, more than the second nobody waits for.
MIN_PAIRS, MAX_PAIRS = 4, 400


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What paired measurements of A and B said.

    Attributes:
        verdict: ``"proven"``: B is faster, the interval lies above 1. ``"regression"``: B is
            slower, it lies below. ``"no difference"``: it holds 1; ``stopped`` says whether that is
            known (``"within the margin"``) or all that could be shown in the time.
        ratio: A's time over B's, geometric mean of the pairs: above 1 where B is faster.
        median_ratio: median of the pairs.
        low, high: interval of the ratio, always valid at ``confidence`` (``interval``).
        n: pairs.
        a_s, b_s: least, median and greatest seconds of A and of B.
        stopped: ``"clear"``, ``"within the margin"``, ``"time"`` or ``"pairs"``.
        elapsed_s: seconds it took.
        ratios: of each pair.
    """

    verdict: Verdict
    ratio: float
    median_ratio: float
    low: float
    high: float
    confidence: float
    n: int
    a_s: tuple[float, float, float]
    b_s: tuple[float, float, float]
    stopped: str
    elapsed_s: float
    ratios: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; bounds that are not known yet are ``None``."""
        document = dataclasses.asdict(self)
        for name in ("low", "high"):
            if not math.isfinite(document[name]):
                document[name] = None
        return {key: list(v) if isinstance(v, tuple) else v for key, v in document.items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Comparison:
        """What ``to_dict`` wrote."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in document.items()
        }
        values["low"] = 0.0 if values["low"] is None else values["low"]
        values["high"] = math.inf if values["high"] is None else values["high"]
        return cls(**values)

    def text(self) -> str:
        """Such as ``"1.31 times (95 % interval 1.27 to 1.36, 8 pairs)"``."""
        high = f"{self.high:.3f}" if math.isfinite(self.high) else "unknown"
        low = f"{self.low:.3f}" if self.low > 0 else "unknown"
        return (
            f"{self.ratio:.3f} times ({self.confidence * 100:g} % interval {low} to {high}, "
            f"{self.n} pairs)"
        )


def compare(
    trial_a: Callable[[], float],
    trial_b: Callable[[], float],
    *,
    budget_s: float = 60.0,
    confidence: float = 0.95,
    margin: float = 0.02,
    min_pairs: int = MIN_PAIRS,
    max_pairs: int = MAX_PAIRS,
    on_pair: Callable[[int, float, float, float], None] | None = None,
    clock: Callable[[], float] = now,
) -> Comparison:
    """Measure A and B in turn, A B, B A, A B, ..., until the answer is clear or the time is up.

    The order turns from pair to pair, and looks are taken after whole A B B A: what drifts evenly
    falls out of the mean. The interval holds at all looks together, so stopping at the first clear
    one does not find differences that are not there more often than ``1 - confidence``.

    Args:
        trial_a, trial_b: each runs a slice of the same work and gives its seconds, above 0.
        budget_s: no pair is begun that would end later; ``min_pairs`` are made in any case.
        margin: an interval inside 1/(1 + margin) .. 1 + margin ends it: the same for all purposes.
        min_pairs, max_pairs: at least 2; rounded up to even numbers.
        on_pair: called after each pair with their number and the ratio, its low and high.
        clock: seconds, for tests.

    Raises:
        InputError: an argument outside its rule.
        RunError: a trial gave no positive, finite number.
    """
    if not 0 < confidence < 1:
        raise InputError("confidence must be above 0 and below 1", got=confidence)
    if margin < 0:
        raise InputError("margin must be at least 0", got=margin)
    if min_pairs < 2 or max_pairs < min_pairs:
        raise InputError("min_pairs must be at least 2 and at most max_pairs", got=min_pairs)
    logs: list[float] = []
    seconds: dict[str, list[float]] = {"a": [], "b": []}
    turns = Turns({"a": trial_a, "b": trial_b}, order=there_and_back, clock=clock)
    stopped = None
    for pair in turns:
        for name, turn in pair.items():
            seconds[name].append(_checked(turn.answer))
        logs.append(math.log(seconds["a"][-1] / seconds["b"][-1]))
        mean, low, high = always_valid_interval(logs, confidence)
        if on_pair is not None:
            on_pair(len(logs), math.exp(mean), math.exp(low), _exp(high))
        if len(logs) % 2 or len(logs) < min_pairs:
            continue
        stopped = _why_stop(low, high, margin)
        if stopped is None and len(logs) >= max_pairs:
            stopped = "pairs"
        if stopped is None and turns.would_pass(budget_s, rounds=2):
            stopped = "time"
        if stopped is not None:
            break
    assert stopped is not None
    return Comparison(
        verdict="proven" if low > 0 else "regression" if high < 0 else "no difference",
        ratio=math.exp(mean),
        median_ratio=math.exp(statistics.median(logs)),
        low=math.exp(low),
        high=_exp(high),
        confidence=confidence,
        n=len(logs),
        a_s=_summary(seconds["a"]),
        b_s=_summary(seconds["b"]),
        stopped=stopped,
        elapsed_s=turns.elapsed_s,
        ratios=tuple(math.exp(value) for value in logs),
    )


def _why_stop(low: float, high: float, margin: float) -> str | None:
    """What the interval of the logarithm says, if it says anything."""
    limit = math.log1p(margin)
    if low > 0 or high < 0:
        return "clear"
    return "within the margin" if -limit < low and high < limit else None


def _checked(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise RunError("a trial must give seconds above 0", got=seconds)
    return seconds


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _summary(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)
