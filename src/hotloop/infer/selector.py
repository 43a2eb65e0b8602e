"""One race of ``compile_inference``: candidates built, checked against eager, timed in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import HotloopError, InputError, MissingExtraError, ModelError
from ..machine import Machine
from ..measure import Candidate, Standing, now, race, steadiest
from ..measure.neighbours import busy_elsewhere_s
from ..plan import Plan
from .artifacts import ArtifactBuilder
from .capture import batch_of
from .check import Bounds, accuracy_loss, difference, fresh_inputs
from .engine import Engine, first_line
from .memory import predicted_memory
from .report import InferenceReport, RaceRow, Setting
from .runner import EngineAdapter, InferenceRunner
from .signature import Signature, arguments, flatten

# A second engine holds a second copy of the weights: only where it is faster by this much.
_WORTH_ANOTHER = 1.01
# Share of the budget after which no compiler is started.
_COMPILE_UNTIL = 0.5


class Samples:
    """Real samples: flat inputs, and labels where there are some."""

    def __init__(
        self, samples: Any, signature: Signature, example: list[torch.Tensor], bounds: Bounds
    ) -> None:
        self.labels: torch.Tensor | None = None
        self.inputs: list[torch.Tensor] | None = None
        count = len(signature.inputs)
        if samples is None:
            if bounds.max_accuracy_loss is not None:
                raise InputError(
                    "max_accuracy_loss needs samples", next_step="pass samples=(x, labels)"
                )
            self.inputs = example if bounds.allow_lower else None
            return
        leaves, labels = _with_labels(samples, signature)
        device = example[0].device
        values = [torch.as_tensor(v).detach().to(device) for v in leaves]
        self.labels = None if labels is None else torch.as_tensor(labels).to(device)
        fits = len(values) == count and all(
            spec.fits(v) for v, spec in zip(values, signature.inputs, strict=True)
        )
        rows = {len(value) for value in values if value.dim()}
        if self.labels is not None:
            rows.add(len(self.labels))
        if not fits or len(rows) != 1 or not min(rows):
            raise InputError(
                "samples must be inputs of the model, with or without labels behind them",
                got=", ".join(f"{v.dtype} {list(v.shape)}" for v in values),
                next_step="; ".join(spec.text() for spec in signature.inputs),
            )
        self.inputs = values

    def batches(self, fixed: int | None) -> list[list[torch.Tensor]]:
        """All samples; with a fixed size, whole batches of it alone."""
        assert self.inputs is not None
        count = len(self.inputs[0])
        size = fixed or 64
        end = count - count % size if fixed else count
        return [[t[i : i + size] for t in self.inputs] for i in range(0, end, size)]


def _with_labels(samples: Any, signature: Signature) -> tuple[list[Any], Any]:
    """The inputs in samples, and the labels behind them; ``None``: there are none."""
    args, kwargs = arguments(samples)
    leaves = signature.leaves_of(args, kwargs)
    if leaves is not None or len(args) < 2 or kwargs:
        return leaves or flatten((args, kwargs), "samples")[0], None
    x = args[0] if len(args) == 2 else args[:-1]
    leaves = signature.leaves_of(*arguments(x))
    return leaves or flatten(x, "samples")[0], args[-1]


@dataclass
class EngineSelector:
    """Candidates of one call: built, checked and raced.

    Attributes:
        artifacts: makes the candidates. goal, bounds, plan: of ``compile_inference``.
        sizes: of batches. samples: for bounds.
        budget_s: to spend, from ``start_s`` on. tell: is told what is being done.
        engines: those that may race.
        errors: of candidates: difference from eager, accuracy loss.
    """

    artifacts: ArtifactBuilder
    goal: str
    sizes: list[int]
    bounds: Bounds
    samples: Samples
    budget_s: float
    start_s: float
    tell: Callable[[str], None]
    plan: Plan | None
    engines: dict[Setting, Engine] = field(default_factory=dict)
    errors: dict[Setting, tuple[float | None, float | None]] = field(default_factory=dict)
    _wanted: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)
    _scores: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _writes: bool = False  # Whether the model writes into its input.

    def select(self, settings: list[Setting], *, required: bool) -> InferenceReport:
        """Race all; the report."""
        report = InferenceReport(goal=self.goal)
        refused: dict[Setting, str] = {}
        # Compilers last: the budget is spent on what is cheap to try first.
        for setting in sorted(settings, key=self.artifacts.must_compile):
            reason = self._admit(setting, required)
            if reason is not None:
                refused[setting] = reason
                report.rows += [self._row(setting, size, excluded=reason) for size in self.sizes]
        if not self.engines:
            raise ModelError(
                "one engine at least must run the model",
                got="; ".join(sorted(set(refused.values()))),
                next_step="name another engine",
            )
        chosen: list[Setting] = []
        race_start, busy_start = now(), busy_elsewhere_s()
        for size in self._in_order():
            self.tell(f"racing at batch {size}")
            rows, winner = self._race(size, chosen)
            report.rows += rows
            if winner is not None:
                report.winners[size] = winner
                if winner not in chosen:
                    chosen.append(winner)
        if not report.winners:
            raise ModelError("the model must run at one of the batch sizes", got=self.sizes)
        report.race_s = now() - race_start
        busy_end = busy_elsewhere_s()
        if busy_start is not None and busy_end is not None:
            report.other_load = max(0.0, busy_end - busy_start) / report.race_s
        report.winners = dict(sorted(report.winners.items()))
        order = {setting: i for i, setting in enumerate(settings)}
        report.rows.sort(key=lambda row: (row.batch_size, order[row.setting]))
        return report

    def recall(self, winners: dict[int, Setting]) -> InferenceReport | None:
        """The remembered winners, built and checked again; ``None``: one no longer holds."""
        report = InferenceReport(goal=self.goal, winners=winners, from_cache=True)
        for setting in dict.fromkeys(winners.values()):
            if self._admit(setting, False, patient=True) is not None:
                return None
            if any(self._is_fixed(setting, size) for size, s in winners.items() if s == setting):
                return None
        if all(self._fixed(setting) is not None for setting in winners.values()):
            return None  # What answers the other sizes was not remembered.
        for size, setting in winners.items():
            row = self._row(setting, size)
            row.won = True
            report.rows.append(row)
        return report

    def runner(self, report: InferenceReport) -> InferenceRunner:
        """Keeps the winners, lets all others go."""
        exact = {n: s for n, s in report.winners.items() if self._fixed(s) is not None}
        ranges = {n: s for n, s in report.winners.items() if n not in exact}
        other = None if ranges else self._for_other_sizes(report)
        if other is not None:
            ranges = {1: other}
            report.notes.append(f"batch sizes that were not raced: {other.title}")
        kept = {*exact.values(), *ranges.values()}
        for setting in [s for s in self.engines if s not in kept]:
            self.engines.pop(setting).close()
        primary = report.winners.get(self._in_order()[0]) or next(iter(report.winners.values()))
        report.elapsed_s = now() - self.start_s
        report.memory = predicted_memory(self.artifacts, list(kept), max(report.winners), self.plan)
        return InferenceRunner(
            self.engines,
            ranges,
            self.artifacts.signature,
            report,
            primary=primary,
            exact=exact,
            artifacts=self.artifacts,
        )

    def _for_other_sizes(self, report: InferenceReport) -> Setting | None:
        """The fastest that takes any batch size, where all winners are graphs for one."""
        free = [
            row
            for row in report.rows
            if row.median_s is not None
            and row.setting in self.engines
            and self._fixed(row.setting) is None
        ]
        return min(free, key=lambda row: row.median_s or 0.0).setting if free else None

    def _in_order(self) -> list[int]:
        """The batch size that the goal is about comes first."""
        return sorted(self.sizes, reverse=self.goal == "throughput")

    def _row(self, setting: Setting, size: int, excluded: str | None = None) -> RaceRow:
        error, loss = self.errors.get(setting, (None, None))
        return RaceRow(
            setting=setting, batch_size=size, error=error, accuracy_loss=loss, excluded=excluded
        )

    def _fixed(self, setting: Setting) -> int | None:
        """The one batch size an engine takes; ``None``: any."""
        return self.artifacts.fixed_batch_of(setting)

    def _is_fixed(self, setting: Setting, size: int) -> bool:
        return self._fixed(setting) not in (None, size)

    def _admit(self, setting: Setting, required: bool, *, patient: bool = False) -> str | None:
        """Build and check a candidate; ``None``, or why it cannot race."""
        spent = now() - self.start_s
        late = not patient and spent > _COMPILE_UNTIL * self.budget_s
        if late and self.artifacts.must_compile(setting):
            return f"not compiled: {spent:.0f} s of {self.budget_s:.0f} s were spent"
        only_eager = self.artifacts.signature.only_eager
        as_written = setting.engine == "eager" and setting.layout == "as given"
        if only_eager is not None and not (as_written and setting.precision == "float32"):
            return only_eager
        self.tell(f"building {setting.title}")
        try:
            engine = self.artifacts.build(setting)
        except MissingExtraError as error:
            if required:
                raise
            return str(error)
        except HotloopError as error:
            return str(error)
        try:
            reason = self._check(setting, engine)
        except Exception as error:  # Whatever a backend raises, it must not end the others' race.
            reason = f"{type(error).__name__}: {first_line(error)}"
        if reason is not None:
            engine.close()
            return reason
        self.engines[setting] = engine
        return None

    def _check(self, setting: Setting, engine: Engine) -> str | None:
        """Compare with eager on fresh inputs of several sizes; the reason if it may not win."""
        if self.artifacts.signature.only_eager is not None:
            self.errors[setting] = (None, None)  # It is eager, and may not answer twice alike.
            return None
        alike = any(
            (s.engine, s.precision, s.layout) == (setting.engine, setting.precision, setting.layout)
            for s in self.engines
        )
        fixed = self._fixed(setting)
        sizes = [fixed] if fixed else [3] if alike else sorted({1, 3, *self.sizes})
        lower = setting.precision != "float32"
        worst = 0.0
        for size in sizes:
            inputs, want = self._want(size, real=lower)
            if not want:
                continue  # Eager does not take this size.
            error, why = difference(_answer(engine, inputs), want)
            if why:
                return f"batch {size}: {why}"
            worst = max(worst, error)
        loss = (
            self._loss(engine, fixed)
            if lower and self.bounds.max_accuracy_loss is not None
            else None
        )
        self.errors[setting] = (worst, loss)
        limit = self.bounds.max_error if lower else self.artifacts.float32_error
        if limit is not None and not worst <= limit:
            return f"error {worst:.1e} is above {limit:.1e}"
        bound = self.bounds.max_accuracy_loss
        if lower and bound is not None and (loss is None or not loss <= bound):
            return f"accuracy loss {loss} is above {bound}" if loss is not None else "no scores"
        return None

    def _want(self, size: int, *, real: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Inputs of this size and what eager makes of them; empty where it refuses the size."""
        if (size, real) not in self._wanted:
            specs = self.artifacts.signature.inputs
            inputs = fresh_inputs(self.artifacts.example, specs, size, seed=size)
            if real and self.samples.inputs is not None and len(self.samples.inputs[0]) >= size:
                # Ranges of int8 come from samples: noise of the example's spread lies outside.
                inputs = [t[-size:].contiguous() for t in self.samples.inputs]
            want = self._eager(inputs)
            if not want and size == batch_of(self.artifacts.example):
                # Whole numbers in another order may say something else: lengths, offsets.
                inputs = self.artifacts.example
                want = self._eager(inputs)
            self._wanted[size, real] = inputs, want
        return self._wanted[size, real]

    def _eager(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """What eager makes of a copy of the inputs; nothing where it refuses them."""
        given = [tensor.clone() for tensor in inputs]
        try:
            with torch.inference_mode():
                want = self.artifacts.signature.call(self.artifacts.model, given)
        except Exception:
            return []
        self._writes |= difference(given, inputs)[0] > 0
        return want

    def _loss(self, engine: Engine, fixed: int | None) -> float | None:
        batches = self.samples.batches(fixed)
        if not batches:
            return None
        if fixed not in self._scores:
            with torch.inference_mode():
                model, signature = self.artifacts.model, self.artifacts.signature
                scores = [signature.call(model, batch)[0] for batch in batches]
            self._scores[fixed] = torch.cat(scores)
        want = self._scores[fixed]
        if want.dim() < 2:
            return None
        got = torch.cat([_answer(engine, batch)[0] for batch in batches])
        labels = self.samples.labels
        return accuracy_loss(got, want, None if labels is None else labels[: len(want)])

    def _race(self, size: int, chosen: list[Setting]) -> tuple[list[RaceRow], Setting | None]:
        inputs, want = self._want(size, real=False)
        settings = [s for s in self.engines if not self._is_fixed(s, size)]
        if not want:
            settings = []
        rows = [self._row(setting, size) for setting in settings]
        if not settings:
            return rows, None
        cpus = Machine.probe().cpu_ids
        candidates = {
            s: Candidate(
                [_caller(self.engines[s], inputs, self._writes)] * s.num_instances,
                cpus if s.num_instances > 1 and s.num_threads == 1 else (),
            )
            for s in settings
        }
        share = max(1.0, 0.4 * self.budget_s / len(self.sizes))
        best, found = race(candidates, by_p99=self.goal == "latency" and size == 1, budget_s=share)
        if self.goal == "throughput":
            best = steadiest(found)
        for setting in settings:
            near = found[setting].median_s <= _WORTH_ANOTHER * found[best].median_s
            if setting in chosen and near and found[setting].dropped is None:
                best = setting
                break
        for row in rows:
            _fill(row, found[row.setting])
            row.won = row.setting == best
        return rows, best


def _fill(row: RaceRow, standing: Standing) -> None:
    """The timings of a candidate into its row."""
    row.median_s, row.p99_s, row.n = standing.median_s, standing.p99_s, standing.n
    row.min_s, row.max_s = standing.least_s, standing.most_s
    if standing.dropped is not None:
        row.excluded = f"slower, dropped after {standing.dropped} rounds"


def _answer(engine: Engine, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return EngineAdapter(engine).tensors([tensor.clone() for tensor in inputs])


def _caller(engine: Engine, inputs: list[torch.Tensor], writes: bool) -> Callable[[], object]:
    """A call as the runner makes it: tensors in, tensors out; on a GPU to the end of its work.

    Args:
        writes: give each call a copy, because the model writes into its input.
    """
    adapter = EngineAdapter(engine)
    wait = getattr(engine, "wait", None)
    if wait is not None:
        return lambda: (adapter.tensors(inputs), wait())
    if writes:
        return lambda: adapter.tensors([tensor.clone() for tensor in inputs])
    if len(inputs) == len(engine.outputs) == 1:
        return lambda: adapter.tensor(inputs[0])
    return lambda: adapter.tensors(inputs)
