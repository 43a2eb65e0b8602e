"""``Optimization``: a change that may help, the evidence, and the proof once there is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .record import Record

State = Literal["hypothesis", "proven", "regression"]
Kind = Literal["problem", "opportunity"]


@dataclass(frozen=True, kw_only=True)
class Evidence(Record):
    """What was seen and against what.

    Attributes:
        metric: dotted name in the report, such as ``"cpu.throttled_periods"``.
        value: what it was. threshold: what it is held against.
        threshold_source: where the threshold comes from: a measurement of this project (its file)
            or documentation.
        text: one sentence for a person.
    """

    metric: str
    value: float | int | str | None
    threshold: float | int | str | None
    threshold_source: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Change(Record):
    """What to do; one of the two is given, or both where they are the same change.

    Attributes:
        plan: knobs by dotted name, as ``Plan.replace`` takes them; ``None``: no knob does it.
        command: what to type, or the line of the script to change; ``None``: the plan does it.
    """

    plan: dict[str, Any] | None = None
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Proof(Record):
    """What a paired, interleaved measurement said.

    Attributes:
        median_ratio: throughput with the change over without, median of the pairs.
        low, high: confidence interval of it. confidence: such as 0.95.
        n: pairs.
        numerics: how the results compare, such as ``"losses equal to 1.2e-7"``.
    """

    median_ratio: float
    low: float
    high: float
    confidence: float
    n: int
    numerics: str


@dataclass(frozen=True, kw_only=True)
class Optimization(Record):
    """One suggestion.

    Attributes:
        name: of the rule, such as ``"oversubscription"``. title: what is wrong, one line.
        evidence: why it is suggested. change: what to do.
        exact: whether results stay those of the plain program to float32 rounding.
        expected_gain: throughput after over before, less 1 (0.2: a fifth faster); ``None``: not
            known. gain_source: where that figure comes from.
        state: ``"hypothesis"`` until it is measured; then ``"proven"`` (the interval lies above
            1), ``"regression"`` (below 1), or a hypothesis still.
        proof: the measurement; ``None``: there is none.
        kind: ``"problem"``: the report shows a loss; ``"opportunity"``: it shows none, but machine
            and plan leave something untried.
    """

    name: str
    title: str
    evidence: Evidence
    change: Change = field(default_factory=Change)
    exact: bool = True
    expected_gain: float | None = None
    gain_source: str = "not known"
    state: State = "hypothesis"
    proof: Proof | None = None
    kind: Kind = "problem"
