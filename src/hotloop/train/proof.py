"""``prove``: a change of the plan against the present plan, on a user's own model and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PlanError
from ..measure import Comparison, compare
from ..monitor.optimization import Optimization, Proof
from ..tuning import PRESENT, Candidate, key_of, knobs_of
from .losses import ROUNDING, equal_to_rounding, loss_difference
from .trials import PlanTrials


@dataclass(frozen=True, kw_only=True)
class Proven:
    """What the measurement said of a change.

    Attributes:
        change: knobs by dotted name.
        comparison: of times. Its verdict is ``"proven"`` only where the interval lies above 1.
        loss_difference: greatest relative difference between the losses of the first steps;
            ``None``: they cannot be compared (another batch size).
        steps: how many steps those were.
        exact: whether the losses are the same to float32 rounding; ``None``: not known.
        precision_reason: where the change is one of precision, what decided the precision.
    """

    change: dict[str, Any]
    comparison: Comparison
    loss_difference: float | None
    steps: int
    exact: bool | None
    precision_reason: str | None = None

    @property
    def numerics(self) -> str:
        """For people: how the results compare."""
        if self.loss_difference is None:
            text = "another batch size: losses cannot be compared"
        elif self.loss_difference == 0:
            text = f"losses of {self.steps} steps equal to the last bit"
        else:
            how = "NOT equal: they differ by"
            if self.exact:
                grown = self.loss_difference > ROUNDING
                how = "equal to rounding, which grew to" if grown else "equal to"
            text = f"losses of {self.steps} steps {how} {self.loss_difference:.1e}"
        return text if self.precision_reason is None else f"{text}; {self.precision_reason}"

    def proof(self) -> Proof:
        """As a suggestion carries it."""
        found = self.comparison
        return Proof(
            median_ratio=found.median_ratio,
            low=found.low,
            high=found.high,
            confidence=found.confidence,
            n=found.n,
            numerics=self.numerics,
        )

    def applied_to(self, suggestion: Optimization) -> Optimization:
        """The suggestion with this proof, and the state that follows."""
        states: dict[str, Any] = {"proven": "proven", "regression": "regression"}
        return dataclasses.replace(
            suggestion,
            state=states.get(self.comparison.verdict, "hypothesis"),
            exact=suggestion.exact if self.exact is None else self.exact,
            proof=self.proof(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "change": self.change,
            "verdict": self.comparison.verdict,
            "comparison": self.comparison.to_dict(),
            "loss_difference": self.loss_difference,
            "steps_compared": self.steps,
            "exact": self.exact,
            "numerics": self.numerics,
            "precision_reason": self.precision_reason,
        }


def prove(
    trials: PlanTrials,
    change: Mapping[str, Any],
    *,
    against: Candidate = PRESENT,
    budget_s: float = 60.0,
    confidence: float = 0.95,
    margin: float = 0.02,
    on_pair: Callable[[int, float, float, float], None] | None = None,
) -> Proven:
    """Run a change and what it is held against in turn, each in its own fresh process.

    Args:
        trials: of the user's work. change: knobs of the changed plan by dotted name.
        against: knobs of the other, by default the present plan.
        budget_s: seconds of measuring; what starting takes comes on top.
        confidence, margin, on_pair: see ``compare``.

    Raises:
        PlanError: a knob that does not exist, or nothing changes.
        RunError: one of the two cannot be run.
    """
    with_it, without = dict(change), dict(against)
    if knobs_of(trials.plan_of(with_it)) == knobs_of(trials.plan_of(without)) and (
        trials.batch_size_of(with_it) == trials.batch_size_of(without)
    ):
        raise PlanError(
            "a change must change something", got=_listed(change),
            next_step="name another value, or another present plan with --plan",
        )  # fmt: skip
    trials.require([without, with_it])
    found = compare(
        lambda: trials.measure(without),
        lambda: trials.measure(with_it),
        budget_s=budget_s,
        confidence=confidence,
        margin=margin,
        on_pair=on_pair,
    )
    difference, steps, exact = None, 0, None
    if trials.batch_size_of(with_it) == trials.batch_size_of(without):
        losses = trials.losses[key_of(without)], trials.losses[key_of(with_it)]
        difference, steps = loss_difference(*losses)
        exact = equal_to_rounding(*losses)
    return Proven(
        change=with_it, comparison=found, loss_difference=difference, steps=steps, exact=exact,
        precision_reason=_precision(trials, with_it, without),
    )  # fmt: skip


def _precision(trials: PlanTrials, with_it: Candidate, without: Candidate) -> str | None:
    """What decided the precision where the two sides name different ones."""
    asked = [trials.plan_of(side).step.precision for side in (without, with_it)]
    if asked[0] == asked[1]:
        return None
    used, reason = trials.precision_of(with_it)
    return reason or f"computed in {used} as the plan says, which nothing has probed"


def _listed(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in change.items()) or "no knob"
