"""Third stage of a run: its memory predicted, and what would fail later, before any is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..memory import Budget, largest_micro_batch
from ..plan import Plan
from .first_step import check_targets
from .labels import check_labels
from .lone_sample import check_lone_sample
from .request import FitRequest
from .resolve import Resolved
from .run_data import RunData


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is known of a run before its step is made.

    Attributes:
        plan: with the micro-batch that fits. budget: of the plain step.
    """

    plan: Plan
    budget: Budget


def predict(request: FitRequest, run: Resolved, data: RunData) -> Prediction:
    """Predict memory, and refuse what cannot fit.

    Raises:
        BudgetError: predicted not to fit the memory limit.
        ModelError: the model cannot take the data.
    """
    check_targets(request.parts.loss_fn, data.batch)
    check_lone_sample(request.parts.model, data, run.plan.memory.micro_batch_size)
    plan, budget = _fitting_budget(request, run, data)
    check_labels(request.parts.loss_fn, budget.output_shape, data.labels)
    return Prediction(plan=plan, budget=budget)


def _fitting_budget(request: FitRequest, run: Resolved, data: RunData) -> tuple[Plan, Budget]:
    plan, parts = run.plan, request.parts

    options: dict[str, Any] = {
        "loss_fn": parts.loss_fn,
        "optimizer": parts.optimizer,
        "data_resident_bytes": data.resident_bytes,
        "machine": request.machine,
    }
    size, example = data.batch_size, data.example
    budget = Budget.predict(parts.model, example, size, "train", plan, **options)
    limit = plan.memory_limit_bytes(request.machine)
    if limit is None or budget.total_bytes <= limit:
        return plan, budget
    best = largest_micro_batch(parts.model, example, size, limit, plan, **options)
    if best is None or not request.fit_memory:
        budget.require_fit(limit, None if best is None else best[0])
    assert best is not None
    return plan.replace({"memory.micro_batch_size": best[0]}), best[1]
