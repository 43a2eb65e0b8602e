"""``TuneResult``: what tuning tried, what won, what lost, and the plan file with the proof."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from ..tuning import BATCH_SIZE, Tried, plan_with_comments, text_of
from .proof import Proven


@dataclass(frozen=True, kw_only=True)
class Line:
    """Knobs that one group of choices brought, and what they are worth.

    Attributes:
        group: such as ``"cores"``. knobs: by dotted name.
        proven: the plan with them against the plan without; ``None``: it could not be measured.
        kept: whether they are in the plan. reason: why not.
    """

    group: str
    knobs: dict[str, Any]
    proven: Proven | None
    kept: bool
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "group": self.group,
            "knobs": self.knobs,
            "proof": None if self.proven is None else self.proven.to_dict(),
            "kept": self.kept,
            "reason": self.reason,
        }

    def text(self) -> str:
        """One sentence."""
        if self.proven is None:
            return f"not in the plan: {self.reason}"
        found = self.proven.comparison
        text = f"{found.verdict}: {found.text()} with it, {self.proven.numerics}"
        return text if self.kept else f"{text}; {self.reason}"


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What tuning found.

    Attributes:
        plan: the present plan with the knobs that were proven.
        present: the plan it started from, threads resolved.
        best: the proven knobs by dotted name; empty: the present plan stays.
        batch_size: samples a step; another than the present one only where that was allowed.
        learning_rate_factor: by what the learning rate is to be multiplied for it.
        lines: what the search chose, kept or not.
        overall: the plan against the present plan; ``None``: they are the same.
        tried: all candidates, in order.
        elapsed_s, budget_s: seconds.
        remembered: whether runs with ``plan = "auto"`` use it.
        notes: what the reader should know; one line each.
    """

    plan: Plan
    present: Plan
    best: dict[str, Any]
    batch_size: int
    learning_rate_factor: float
    lines: tuple[Line, ...]
    overall: Proven | None
    tried: tuple[Tried, ...]
    elapsed_s: float
    budget_s: float
    remembered: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "plan": self.plan.to_dict(),
            "present": self.present.to_dict(),
            "best": self.best,
            "batch_size": self.batch_size,
            "learning_rate_factor": self.learning_rate_factor,
            "lines": [line.to_dict() for line in self.lines],
            "overall": None if self.overall is None else self.overall.to_dict(),
            "tried": [tried.to_dict() for tried in self.tried],
            "elapsed_s": self.elapsed_s,
            "budget_s": self.budget_s,
            "remembered": self.remembered,
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """One sentence on the plan against the present plan."""
        if self.overall is None:
            return "nothing that was tried is proven faster than the present plan"
        found = self.overall.comparison
        return f"{found.verdict}: {found.text()} the present plan, {self.overall.numerics}"

    def toml(self, heading: Sequence[str] = ()) -> str:
        """The plan as a file whose lines carry their proof as comments."""
        comments: dict[str, str] = {}
        for tried in self.tried:
            for name in tried.candidate:
                if name != BATCH_SIZE:
                    comments[name] = f"Kept: {self._others(name)}."
        for line in self.lines:
            for name in line.knobs:
                if name != BATCH_SIZE:
                    comments[name] = f"{text_of(line.knobs)}: {line.text()}."
        return plan_with_comments(self.plan, comments, [*heading, *self._of_the_batch()])

    def _of_the_batch(self) -> list[str]:
        if BATCH_SIZE not in self.best:
            return []
        return [
            f"For --batch-size {self.batch_size}, the learning rate multiplied by "
            f"{self.learning_rate_factor:g}: not part of a plan, pass them too."
        ]

    def _others(self, knob: str) -> str:
        """What the other values of a knob that was not changed came to."""
        told = {}
        for tried in self.tried:
            if knob not in tried.candidate or tried.outcome == "kept":
                continue
            what = text_of({knob: tried.candidate[knob]})
            if tried.ratio is not None:
                told[what] = f"{what} {tried.ratio:.2f} times"
            else:
                told.setdefault(what, f"{what} {tried.outcome} ({tried.reason})")
        return "; ".join(told.values()) or "no other value was tried"


def rate_of(tried: Tried) -> float | None:
    """Samples a second of a candidate, median of its rounds; ``None``: it was not measured."""
    return 1 / statistics.median(tried.costs) if tried.costs else None
