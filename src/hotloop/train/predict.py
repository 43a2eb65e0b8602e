"""Third stage of a run: its memory predicted, before any of it is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..memory import Budget, largest_micro_batch
from ..parallel import default_chunk_size
from ..plan import Plan
from ..step.check import check_classes
from ..step.path_choice import PathChoice, choose_path, plain_run_s
from ..step.rehearsal import rehearse_capture
from .request import FitRequest
from .resolve import Resolved
from .run_context import threads_of
from .run_data import RunData


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is known of a run before its step is made.

    Attributes:
        plan: with the micro-batch that fits. budget: of the plain step.
        expected_s: seconds the run would take on the plain path; ``None``: not countable.
    """

    plan: Plan
    budget: Budget
    expected_s: float | None


def predict(request: FitRequest, run: Resolved, data: RunData) -> Prediction:
    """Predict memory and time, and refuse what cannot fit.

    Raises:
        BudgetError: predicted not to fit the memory limit.
        ModelError: the model cannot take the data.
    """
    plan, budget = _fitting_budget(request, run, data)
    check_classes(request.parts.loss_fn, budget.output_shape, data.num_classes)
    expected_s = _expected_s(request, run.plan, data, budget.flop_per_step)
    return Prediction(plan=plan, budget=budget, expected_s=expected_s)


def _fitting_budget(request: FitRequest, run: Resolved, data: RunData) -> tuple[Plan, Budget]:
    plan, parts = run.plan, request.parts

    def rehearsal(flop_per_step: int | None) -> None:
        expected_s = _expected_s(request, plan, data, flop_per_step)
        # Capturing takes memory of its own, on the CPU.
        on_cpu = parts.device.type == "cpu"
        if on_cpu and _choose_path(request, run, data, expected_s).uses_compiler:
            rehearse_capture()

    options: dict[str, Any] = {
        "loss_fn": parts.loss_fn,
        "optimizer": parts.optimizer,
        "data_resident_bytes": data.resident_bytes,
        "machine": request.machine,
        "rehearsal": rehearsal,
    }
    size, example = request.batch_size, data.example
    budget = Budget.predict(parts.model, example, size, "train", plan, **options)
    limit = plan.memory_limit_bytes(request.machine)
    if limit is None or budget.total_bytes <= limit:
        return plan, budget
    best = largest_micro_batch(parts.model, example, size, limit, plan, **options)
    if best is None or not request.fit_memory:
        budget.require_fit(limit, None if best is None else best[0])
    assert best is not None
    return plan.replace({"memory.micro_batch_size": best[0]}), best[1]


def _choose_path(
    request: FitRequest, run: Resolved, data: RunData, expected_s: float | None
) -> PathChoice:
    chunk_size = None
    if run.plan.parallel.num_workers is not None:
        default = default_chunk_size(request.batch_size, request.machine.usable_cpus)
        chunk_size = run.plan.parallel.chunk_size or default
    return choose_path(
        request.parts.model,
        *data.batch,
        run.plan,
        expected_s=expected_s,
        chunk_size=chunk_size,
        several_hosts=run.hosts is not None,
    )


def _expected_s(
    request: FitRequest, plan: Plan, data: RunData, flop_per_step: int | None
) -> float | None:
    steps = request.epochs * data.num_batches(request.batch_size)
    if request.max_steps is not None:
        steps = min(steps, request.max_steps)
    return plain_run_s(steps, flop_per_step, threads_of(plan))
