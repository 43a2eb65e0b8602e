"""``tune``: search the plan on a user's own model and data, prove what is kept, remember it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import open_dataset
from ..errors import InputError, ModelError, RunError
from ..files import write_text_atomically
from ..machine import Machine
from ..machine.ceilings import installed_torch_version
from ..measure import Comparison
from ..plan import Plan
from ..tuning import (
    BATCH_SIZE,
    PRECISION,
    PRESENT,
    Candidate,
    Group,
    Journal,
    LrRule,
    SearchProgress,
    SearchResult,
    key_of,
    knobs_of,
    search,
    space_of,
    text_of,
)
from ..tuning.journal import journal_path
from ..tuning.remembered import remember
from ..version import VERSION
from .proof import Proven, prove
from .trainer import Trainer
from .trials import SLICE_S, PlanTrials, Source, pickled_source, refuse_inside_a_trial
from .tune_result import Line, TuneResult

# Of the budget, what the search may take; the rest proves what it found.
_SEARCH_SHARE = 0.6
_OVERALL = "the plan"


@dataclass(frozen=True, kw_only=True)
class TuneProgress:
    """Where tuning stands: one line for people, and seconds."""

    text: str
    elapsed_s: float
    budget_s: float


def tune(
    trainer: Trainer,
    data: Any,
    batch_size: int = 64,
    *,
    budget_s: float = 120.0,
    allow_precision: bool = False,
    seed: int = 0,
    save: str | os.PathLike[str] | None = None,
    on_progress: Callable[[TuneProgress], None] | None = None,
) -> Plan:
    """The fastest plan found for this trainer, its data and this machine, by measurement.

    Candidates train copies of the model in fresh processes, in turn; ``trainer`` is not changed. A
    knob is changed only where it was proven faster than without it (``prove``); results stay equal
    to float32 rounding. What is found is remembered: ``Trainer`` with ``Plan.auto()`` uses it for
    the same model, batch size and machine. A search that was cut off goes on where it was.

    In a script: call it under ``if __name__ == "__main__":``, as with ``multiprocessing``.

    Args:
        trainer: its plan is the present plan. data, batch_size, seed: as for ``Trainer.fit``.
        budget_s: seconds in all, but for the candidate under way.
        allow_precision: whether bfloat16 may be tried; it changes results.
        save: write the plan here as TOML, each line with its proof.
        on_progress: told what is going on.

    Raises:
        ModelError: the model cannot be pickled, or is on a GPU.
        InputError, DataError: an argument outside its rule; data that cannot be used.
        RunError: the present plan cannot be run.
    """
    refuse_inside_a_trial()
    if batch_size < 1:
        raise InputError("batch_size must be a whole number of at least 1", got=repr(batch_size))
    device = next(trainer.model.parameters()).device
    if device.type != "cpu":
        raise ModelError(
            "tuning searches how a processor is used; the model must be on it", got=device,
            next_step="model.to('cpu')",
        )  # fmt: skip
    present = trainer.plan.resolve(trainer.machine, trainer.ceilings)
    dataset = open_dataset(data, seed=seed, mmap_above_bytes=present.memory.mmap_above_bytes)
    with tempfile.TemporaryDirectory(prefix="hotloop-tune-") as folder:
        source = pickled_source(trainer, dataset, batch_size, seed, Path(folder))
        result = tune_source(
            source,
            present,
            trainer.machine,
            budget_s=budget_s,
            allow_precision=allow_precision,
            on_progress=on_progress,
        )
    if save is not None:
        path = Path(save)
        if path.suffix == ".json":
            result.plan.save(path)
        else:
            write_text_atomically(path, result.toml(heading(result, trainer.machine)))
    return result.plan


def heading(result: TuneResult, machine: Machine) -> list[str]:
    """The first lines of a tuned plan's file."""
    return [
        f"hotloop {VERSION} tune, {time.strftime('%Y-%m-%d')}, torch {installed_torch_version()}, "
        f"{machine.cpu_model or 'this machine'}, {machine.usable_cpus} CPUs, "
        f"batch {result.batch_size}.",
        f"{result.summary()[:1].upper()}{result.summary()[1:]}.",
    ]


def tune_source(
    source: Source,
    present: Plan,
    machine: Machine,
    *,
    budget_s: float = 120.0,
    allow_precision: bool = False,
    batch_sizes: Sequence[int] = (),
    lr_rule: LrRule = "none",
    space: Sequence[Group] | None = None,
    journal: Path | None = None,
    fresh: bool = False,
    keep: bool = True,
    slice_s: float = SLICE_S,
    on_progress: Callable[[TuneProgress], None] | None = None,
) -> TuneResult:
    """Search, prove, remember; see ``tune``.

    Args:
        source: the work, for processes of trials.
        present: the plan to start from, resolved.
        batch_sizes: others to try; the cost is then seconds a sample. lr_rule: of their rate.
        space: what to search instead of ``space_of``.
        journal: the file an unfinished search goes on from; default one in the cache.
        fresh: start anew. keep: whether the result is remembered.
        slice_s: seconds of one measurement.

    Raises:
        InputError: an argument outside its rule, or a journal of another search.
        RunError: the present plan cannot be run.
    """
    if not budget_s > 0:
        raise InputError("budget_s must be above 0", got=budget_s, next_step="pass --budget-s 120")
    tuner = _Tuner(source, present, machine, budget_s, on_progress)
    with PlanTrials(
        source,
        present,
        lr_rule=lr_rule,
        check_results=True,
        slice_s=slice_s,
        on_start=tuner.starting,
    ) as trials:
        trials.require([PRESENT])
        if space is None:
            space = space_of(
                machine,
                present,
                batch_size=source.batch_size,
                batch_sizes=batch_sizes,
                allow_precision=allow_precision,
                makes_many=lambda candidate: trials.makes_many(candidate),
            )
        return tuner.run(trials, space, lr_rule, journal, fresh, keep)


class _Tuner:
    def __init__(
        self,
        source: Source,
        present: Plan,
        machine: Machine,
        budget_s: float,
        on_progress: Callable[[TuneProgress], None] | None,
    ) -> None:
        self.source, self.present, self.machine = source, present, machine
        self.budget_s, self.on_progress = budget_s, on_progress
        self.began_s = time.monotonic()
        self.notes: list[str] = []

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    def say(self, text: str) -> None:
        if self.on_progress is not None:
            self.on_progress(
                TuneProgress(text=text, elapsed_s=self.elapsed_s, budget_s=self.budget_s)
            )

    def starting(self, what: str) -> None:
        self.say(f"starting {what}")

    def run(
        self,
        trials: PlanTrials,
        space: Sequence[Group],
        lr_rule: LrRule,
        path: Path | None,
        fresh: bool,
        keep: bool,
    ) -> TuneResult:
        self.trials = trials
        self.journal = self._open_journal(space, lr_rule, path, fresh)
        try:
            # What an earlier sitting took counts as spent.
            self.began_s -= self.journal.elapsed_s
            found = search(
                space,
                trials,
                self.budget_s * _SEARCH_SHARE,
                present={BATCH_SIZE: self.source.batch_size, **knobs_of(self.present)},
                journal=self.journal,
                on_progress=self._searching,
                clock=lambda: self.elapsed_s,
            )
            lines, best, overall = self._prove(found)
        finally:
            self.journal.close()
        candidate = dict(best)
        plan = trials.plan_of(candidate)
        remembered = keep and self._remember(space, candidate, plan, overall)
        if self.journal.path is not None:
            self.journal.path.unlink(missing_ok=True)
        return TuneResult(
            plan=plan,
            present=self.present,
            best=candidate,
            batch_size=trials.batch_size_of(candidate),
            learning_rate_factor=trials.lr_factor_of(candidate),
            lines=tuple(lines),
            overall=overall,
            tried=found.tried,
            elapsed_s=self.elapsed_s,
            budget_s=self.budget_s,
            remembered=remembered,
            notes=tuple(self.notes),
        )

    def _open_journal(
        self, space: Sequence[Group], lr_rule: str, path: Path | None, fresh: bool
    ) -> Journal:
        machine = self.machine.fingerprint()
        model = self.trials.facts[key_of(PRESENT)].fingerprint
        identity = {
            "machine": machine,
            "model": model,
            "versions": [VERSION, installed_torch_version()],
            "present": self.present.to_dict(),
            "space": [[g.name, [dict(c) for c in g.choices]] for g in space],
            "lr_rule": lr_rule,
            "budget_s": self.budget_s,
        }
        if path is None:
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            with contextlib.suppress(OSError):
                path = journal_path(machine, model, digest[:12])
        if path is not None and fresh:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        journal = Journal(path, identity)
        if journal.records:
            self.notes.append(f"went on with a search cut off after {journal.elapsed_s:.0f} s")
            self.say(self.notes[-1])
        return journal

    def _searching(self, progress: SearchProgress) -> None:
        self.say(
            f"{progress.group} ({progress.number} of {progress.groups}): {progress.left} left, "
            f"best so far: {text_of(progress.best)}"
        )

    def _prove(self, found: SearchResult) -> tuple[list[Line], Candidate, Proven | None]:
        """Take each group's knobs out again, the last found first; what is not missed stays out."""
        current, lines = dict(found.best), list[Line]()
        overall: Proven | None = None
        units = list(reversed(found.units.items()))
        for number, (group, knobs) in enumerate(units):
            without = {k: v for k, v in current.items() if k not in knobs}
            left = len(units) - number + (1 if without else 0)
            proven, reason = self._proven(group, current, without, left)
            kept = proven is not None and proven.comparison.verdict == "proven"
            lines.append(
                Line(
                    group=group, knobs=dict(knobs), proven=proven, kept=kept,
                    reason="" if kept else reason,
                )
            )  # fmt: skip
            if kept and not without:
                overall = proven
            current, loser = (current, without) if kept else (without, current)
            if loser:
                self.trials.release(loser)
        if current and overall is None:
            overall, reason = self._proven(_OVERALL, current, PRESENT, 1)
            if overall is None or overall.comparison.verdict == "regression":
                self.notes.append(
                    "each line was proven, but not the whole: the present plan stays"
                    + (f" ({reason})" if overall is None else "")
                )
                lines = [dataclasses.replace(e, kept=False, reason="not kept") for e in lines]
                current, overall = {}, None
        return lines[::-1], current, overall

    def _proven(
        self, name: str, change: Candidate, against: Candidate, left: int
    ) -> tuple[Proven | None, str]:
        """The proof, or why there is none; from the journal where an earlier sitting made it."""
        keys = {"name": name, "change": dict(change), "against": dict(against)}
        known = self.journal.find("proof", **keys)
        if known is None:
            self.say(f"proving {name}: {text_of(change)}")
            try:
                self.trials.require([against, change])
                proven = prove(
                    self.trials,
                    change,
                    against=against,
                    budget_s=max(1.0, (self.budget_s - self.elapsed_s) / left),
                )
                known = {"proven": _to_journal(proven)}
            except RunError as error:
                known = {"proven": None, "reason": str(error)}
            self.journal.add("proof", self.elapsed_s, **keys, **known)
        if known["proven"] is None:
            return None, known["reason"]
        return _from_journal(known["proven"]), "taken out again"

    def _remember(
        self, space: Sequence[Group], best: Candidate, plan: Plan, overall: Proven | None
    ) -> bool:
        # Plans are taken over unasked by "auto", so one that changes results is not remembered.
        if PRECISION in best or (overall is not None and overall.exact is False):
            self.notes.append(
                "not remembered for plan auto, which is exact: pass --plan with the file"
            )
            return False
        searched = {name for group in space for choice in group.choices for name in choice}
        now = knobs_of(plan)
        knobs = {name: now[name] for name in sorted(searched - {BATCH_SIZE, PRECISION})}
        proof = "nothing tried was faster than the plan it began with"
        if overall is not None:
            proof = overall.comparison.text()
        fingerprint = self.trials.fingerprint_of(best)
        return remember(self.machine.fingerprint(), fingerprint, knobs, proof)


def _to_journal(proven: Proven) -> dict[str, Any]:
    return {
        "change": proven.change,
        "comparison": proven.comparison.to_dict(),
        "loss_difference": proven.loss_difference,
        "steps": proven.steps,
        "exact": proven.exact,
        "precision_reason": proven.precision_reason,
    }


def _from_journal(document: dict[str, Any]) -> Proven:
    return Proven(**{**document, "comparison": Comparison.from_dict(document["comparison"])})
