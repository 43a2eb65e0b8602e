"""``search``: successive halving, one group of choices after the other, under a time budget.

In each group all choices and what was chosen before are measured in rounds, each once a round and
in turning order, so that what slows the machine for a while slows all alike. After a rung the
slower half of the choices is dropped, and those left get twice as many rounds: Jamieson, Talwalkar
2016, "Non-stochastic best arm identification and hyperparameter optimization"; Li and others 2018,
"Hyperband". A choice is scored by the median over rounds of its time over that of the present
incumbent in the same round. Going group by group costs the sum of the groups' sizes, not their
product; what it can miss is a pair of choices of which each alone is a loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ..errors import InputError, RunError
from ..measure import Turns, always_valid_interval, now, there_and_back
from .candidate import PRESENT, Candidate, Group, key_of, text_of
from .journal import Journal

# Rounds of the first rung; each next rung has twice as many.
_FIRST_ROUNDS = 3
_MOST_ROUNDS = 40
# Candidates that are prepared in one go; after each, the time is looked at.
_TOGETHER = 2
_SPENT = "the time was spent"
# What is not faster by this much is not worth a changed line.
MIN_GAIN = 0.01


class Trial(Protocol):
    """How candidates are run; what the cost is (seconds for each sample) is the trial's affair."""

    def prepare(self, candidates: Sequence[Candidate]) -> dict[str, str]:
        """Get candidates ready; those that are stay so. Gives, by ``key_of``, why some cannot."""

    def measure(self, candidate: Candidate) -> float:
        """The cost of a prepared candidate in one slice, above 0; ``RunError`` if it fails."""

    def release(self, candidate: Candidate) -> None:
        """The candidate is not needed any more."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate in one group.

    Attributes:
        group: where it was tried.
        candidate: all its differences to the present plan.
        costs: of each round; empty: not measured.
        ratio: median over rounds of the incumbent's cost over its own: above 1 is faster; ``None``:
            not measured.
        outcome: ``"won"``, ``"kept"`` (the incumbent, none was faster), ``"lost"``, ``"failed"`` or
            ``"not tried"``.
        reason: of a failure, or why it was not tried.
    """

    group: str
    candidate: Candidate
    costs: tuple[float, ...] = ()
    ratio: float | None = None
    outcome: str = "lost"
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        cost = None
        if self.costs:
            low, high = min(self.costs), max(self.costs)
            cost = {"median": statistics.median(self.costs), "min": low, "max": high}
        return {
            "group": self.group,
            "candidate": dict(self.candidate),
            "cost_s": cost,
            "n": len(self.costs),
            "ratio": self.ratio,
            "outcome": self.outcome,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: differences to the present plan; empty: nothing was faster.
        units: of ``best``, what each group brought.
        tried: everything, in the order it was tried.
        elapsed_s: seconds, those of earlier sittings included.
    """

    best: Candidate
    units: dict[str, Candidate]
    tried: tuple[Tried, ...]
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """Where a search stands.

    Attributes:
        group: under way. number, groups: counted from 1, and how many. left: candidates left in it.
        best: the incumbent. elapsed_s, budget_s: seconds.
    """

    group: str
    number: int
    groups: int
    left: int
    best: Candidate
    elapsed_s: float
    budget_s: float


@dataclass
class _Arm:
    candidate: Candidate
    costs: list[float] = field(default_factory=list)
    logs: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        return statistics.median(self.logs)


def search(
    groups: Sequence[Group],
    trial: Trial,
    budget_s: float,
    *,
    present: Mapping[str, Any] | None = None,
    journal: Journal | None = None,
    on_progress: Callable[[SearchProgress], None] | None = None,
    clock: Callable[[], float] = now,
) -> SearchResult:
    """Choose in each group what costs least, given what was chosen in those before it.

    Args:
        groups: the one that matters most first.
        trial: prepares, measures and releases candidates.
        budget_s: a group is not begun, and no round, past this; the time left is shared by the
            number of choices. A group that has begun makes at least two rounds.
        present: values of the present plan: a knob that has its own value is no difference.
        journal: every round and every decision goes there; what it holds already is not measured
            again, and its seconds count as spent.
        on_progress: called before each round.
        clock: seconds, for tests.

    Raises:
        InputError: no time.
        RunError: the present plan itself cannot be run.
    """
    if not budget_s > 0:
        raise InputError("budget_s must be above 0", got=budget_s)
    now = present or {}
    return _Search(groups, trial, budget_s, now, journal or Journal(), on_progress, clock).run()


class _Search:
    def __init__(
        self,
        groups: Sequence[Group],
        trial: Trial,
        budget_s: float,
        present: Mapping[str, Any],
        journal: Journal,
        on_progress: Callable[[SearchProgress], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.groups, self.trial, self.budget_s, self.present = groups, trial, budget_s, present
        self.journal, self.on_progress, self.clock = journal, on_progress, clock
        self.began_s = clock() - journal.elapsed_s
        self.best: Candidate = PRESENT
        self.units: dict[str, Candidate] = {}
        self.tried: list[Tried] = []

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.began_s

    def run(self) -> SearchResult:
        for number, group in enumerate(self.groups):
            arms = self._arms(group)
            why = self._why_not(group, number, arms)
            if why is not None:
                for arm in arms[1:]:
                    self._note(group, arm, outcome="not tried", reason=why)
                continue
            self._group(group, number, arms)
        return SearchResult(
            best=self.best,
            units=self.units,
            tried=tuple(self.tried),
            elapsed_s=self.elapsed_s,
        )

    def _arms(self, group: Group) -> list[_Arm]:
        """The incumbent first, then every choice that differs from it and from each other."""
        found = {key_of(self.best): _Arm(self.best)}
        for choice in group.choices:
            candidate = {
                name: value
                for name, value in {**self.best, **choice}.items()
                if name not in self.present or self.present[name] != value
            }
            found.setdefault(key_of(candidate), _Arm(candidate))
        return list(found.values())

    def _why_not(self, group: Group, number: int, arms: list[_Arm]) -> str | None:
        if self.journal.winner(group.name) is not None:
            return None
        if len(arms) == 1:
            return "there is no other choice"
        why = group.unless(self.best)
        if why is None and self.elapsed_s >= self.budget_s:
            why = _SPENT
        return why

    def _group(self, group: Group, number: int, arms: list[_Arm]) -> None:
        weights = [len(g.choices) + 1 for g in self.groups[number:]]
        now_s = self.elapsed_s
        end_s = now_s + (self.budget_s - now_s) * weights[0] / sum(weights)
        decided = self.journal.winner(group.name)
        ready = self._prepared if decided is None else self._without_failed
        arms = ready(group, arms)
        winner, left, rung = arms[0], list(arms), 0
        rungs = max(1, math.ceil(math.log2(len(arms)))) if len(arms) > 1 else 0
        for rung in range(rungs):
            if len(left) == 1:
                break
            rounds = _FIRST_ROUNDS * 2**rung
            rung_end_s = now_s + (end_s - now_s) * (rung + 1) / rungs
            for turn in range(rounds):
                known = self.journal.round(group.name, rung, turn)
                if known is None and (
                    decided is not None or (turn >= 2 and self.elapsed_s >= rung_end_s)
                ):
                    break
                left = self._round(group, number, rung, turn, left, known)
            left = _halved(left)
        turn = _FIRST_ROUNDS * 2**rung
        while len(left) > 1:
            known = self.journal.round(group.name, rung, turn)
            out_of_time = decided is not None or self.elapsed_s >= end_s or turn >= _MOST_ROUNDS
            if known is None and (out_of_time or _is_clear(left[1])):
                break
            left = self._round(group, number, rung, turn, left, known)
            turn += 1
        if len(left) > 1 and left[1].logs and left[1].score < -math.log1p(MIN_GAIN):
            winner = left[1]
        if decided is not None:
            winner = next((a for a in arms if key_of(a.candidate) == key_of(decided)), winner)
        else:
            self.journal.add_winner(group.name, winner.candidate, self.elapsed_s)
        self._close(group, arms, winner)

    def _prepared(self, group: Group, arms: list[_Arm]) -> list[_Arm]:
        """Those that can be run; the present plan must be among them."""
        known = self.journal.failures(group.name)
        wanted = [a for a in arms if key_of(a.candidate) not in known]
        failures: dict[str, str] = {}
        late: list[_Arm] = []
        for start in range(0, len(wanted), _TOGETHER):
            some = wanted[start : start + _TOGETHER]
            if start and self.elapsed_s >= self.budget_s:
                late += some
            else:
                failures |= self.trial.prepare([a.candidate for a in some])
        for arm in late:
            self._note(group, arm, outcome="not tried", reason=_SPENT)
        arms = [a for a in arms if a not in late]
        if key_of(self.best) in failures:
            raise RunError(
                f"{text_of(self.best)} must run", got=failures[key_of(self.best)],
                next_step="make hotloop train run with it first",
            )  # fmt: skip
        for arm in arms:
            key = key_of(arm.candidate)
            if key in failures:
                self.journal.add_failure(group.name, arm.candidate, failures[key], self.elapsed_s)
        return self._without_failed(group, arms)

    def _without_failed(self, group: Group, arms: list[_Arm]) -> list[_Arm]:
        failures = self.journal.failures(group.name)
        for arm in arms:
            reason = failures.get(key_of(arm.candidate))
            if reason is not None:
                self._note(group, arm, outcome="failed", reason=reason)
        return [a for a in arms if key_of(a.candidate) not in failures]

    def _round(
        self,
        group: Group,
        number: int,
        rung: int,
        turn: int,
        arms: list[_Arm],
        known: dict[str, float] | None,
    ) -> list[_Arm]:
        """Measure each arm once, or take the round as known; gives those that did not fail."""
        if self.on_progress is not None:
            self.on_progress(
                SearchProgress(
                    group=group.name, number=number + 1, groups=len(self.groups), left=len(arms),
                    best=self.best, elapsed_s=self.elapsed_s, budget_s=self.budget_s,
                )
            )  # fmt: skip
        if known is None:
            known = self._measured(group, turn, arms)
            self.journal.add_round(group.name, rung, turn, known, self.elapsed_s)
        left = [a for a in arms if key_of(a.candidate) in known]
        incumbent = known[key_of(arms[0].candidate)]
        for arm in left:
            cost = known[key_of(arm.candidate)]
            arm.costs.append(cost)
            arm.logs.append(math.log(cost / incumbent))
        return left

    def _measured(self, group: Group, turn: int, arms: list[_Arm]) -> dict[str, float]:
        """Costs of one round by ``key_of``; arms that failed are noted and let go."""
        turns = Turns(
            {key_of(a.candidate): partial(self._cost, a.candidate) for a in arms},
            order=there_and_back, forgive=(RunError,), clock=self.clock,
        )  # fmt: skip
        played = turns.play(turn)
        for arm in arms:
            error = turns.failed.get(key_of(arm.candidate))
            if error is None:
                continue
            if arm is arms[0]:
                raise error
            self.journal.add_failure(group.name, arm.candidate, str(error), self.elapsed_s)
            self._note(group, arm, outcome="failed", reason=str(error))
            self.trial.release(arm.candidate)
        return {key: turn.answer for key, turn in played.items()}

    def _cost(self, candidate: Candidate) -> float:
        cost = self.trial.measure(candidate)
        if not (math.isfinite(cost) and cost > 0):
            raise RunError("a trial must give a cost above 0", got=cost)
        return cost

    def _close(self, group: Group, arms: list[_Arm], winner: _Arm) -> None:
        noted = {key_of(t.candidate) for t in self.tried if t.group == group.name}
        for arm in arms:
            if key_of(arm.candidate) in noted:
                continue
            outcome = "lost"
            if arm is winner:
                outcome = "kept" if arm is arms[0] else "won"
            if outcome == "lost" and not arm.logs:  # Decided by a sitting that had no time for it.
                self._note(group, arm, outcome="not tried", reason=_SPENT)
            else:
                self._note(group, arm, outcome=outcome)
            if arm is not winner and arm.candidate:
                self.trial.release(arm.candidate)
        if winner is not arms[0]:
            changed = {
                name: value
                for name, value in winner.candidate.items()
                if name not in self.best or self.best[name] != value
            }
            # A knob that a later group changes, or sets back, is not the earlier one's any more.
            kept = winner.candidate.keys() - changed.keys()
            self.units = {
                name: {k: v for k, v in unit.items() if k in kept}
                for name, unit in self.units.items()
            }
            self.units[group.name] = changed  # Empty where it only set knobs back.
            self.units = {name: unit for name, unit in self.units.items() if unit}
            self.best = winner.candidate

    def _note(self, group: Group, arm: _Arm, *, outcome: str, reason: str = "") -> None:
        self.tried.append(
            Tried(
                group=group.name,
                candidate=arm.candidate,
                costs=tuple(arm.costs),
                ratio=math.exp(-arm.score) if arm.logs else None,
                outcome=outcome,
                reason=reason,
            )
        )


def _halved(arms: list[_Arm]) -> list[_Arm]:
    """The incumbent and the faster half of the others."""
    others = sorted(arms[1:], key=lambda arm: arm.score)
    return [arms[0], *others[: math.ceil(len(others) / 2)]]


def _is_clear(arm: _Arm) -> bool:
    """Whether it is known on which side of the incumbent the arm is, or that they are alike."""
    _, low, high = always_valid_interval(arm.logs)
    limit = math.log1p(MIN_GAIN)
    return low > 0 or high < 0 or (-limit < low and high < limit)
