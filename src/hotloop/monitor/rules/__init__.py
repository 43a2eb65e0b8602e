"""``suggest``: what may help, from a report and a machine alone.

One rule is one small function in one of the tables ``*_rules.RULES``; it looks at ``Facts`` and
gives an ``Optimization`` or ``None``. Problems (the report shows a loss) come before opportunities
(it shows none), urgent ones first, then by expected gain.
"""

from __future__ import annotations

from ...machine import Machine
from ..metrics import PerformanceReport
from ..optimization import Optimization
from . import cpu_rules, data_rules, memory_rules, step_rules, worker_rules
from .facts import Facts, Rule

RULES: tuple[Rule, ...] = (
    *memory_rules.RULES,
    *cpu_rules.RULES,
    *worker_rules.RULES,
    *data_rules.RULES,
    *step_rules.RULES,
)
# Without them the run may not end at all.
URGENT = ("swap", "memory-limit")

__all__ = ["RULES", "URGENT", "Facts", "Rule", "suggest"]


def suggest(report: PerformanceReport, machine: Machine) -> list[Optimization]:
    """All that the rules find, the most worthwhile first; pure, nothing is measured."""
    facts = Facts(report, machine)
    found = [item for rule in RULES if (item := rule(facts)) is not None]

    def rank(item: Optimization) -> tuple[bool, bool, float]:
        return item.kind == "opportunity", item.name not in URGENT, -(item.expected_gain or 0.0)

    return sorted(found, key=rank)  # Stable: the tables' order decides between equals.
