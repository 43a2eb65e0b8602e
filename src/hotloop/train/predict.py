"""Third stage of a run: its memory predicted, and what would fail later, before any is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import BudgetError
from ..memory import Budget, largest_micro_batch
from ..memory.budget import model_bytes
from ..plan import Plan
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
    plan, budget = _fitting_budget(request, run, data)
    check_labels(request.parts.loss_fn, budget.output_shape, data.labels)
    check_lone_sample(request.parts.model, data, plan.memory.micro_batch_size)
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
    try:
        budget = Budget.predict(parts.model, example, size, "train", plan, **options)
    except Exception as error:
        # What cannot be traced may still train; what cannot is told by its first step.
        return plan, _unknown(request, plan, data, error)
    limit = plan.memory_limit_bytes(request.machine)
    if limit is None or budget.total_bytes <= limit:
        return plan, budget
    best = largest_micro_batch(parts.model, example, size, limit, plan, **options)
    if best is None or not request.fit_memory:
        budget.require_fit(limit, None if best is None else best[0])
    assert best is not None
    return plan.replace({"memory.micro_batch_size": best[0]}), best[1]


def _unknown(request: FitRequest, plan: Plan, data: RunData, error: Exception) -> Budget:
    """A budget of what can be counted."""
    if isinstance(error, BudgetError):
        raise error
    model = request.parts.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    reason = " ".join(str(error).split())[:200]
    return Budget(
        phase="train",
        batch_size=data.batch_size,
        micro_batch_size=min(plan.memory.micro_batch_size or data.batch_size, data.batch_size),
        model_parameters_bytes=model_bytes(model),
        batch_data_bytes=data.resident_bytes,
        gradient_buffers_bytes=sum(p.numel() * p.itemsize for p in trainable),
        optimizer_state_bytes=0,
        working_memory_bytes=None,
        runtime_base_bytes=None,
        enclave_overhead_bytes=plan.memory.enclave_overhead_bytes or 0,
        flop_per_step=None,
        output_shape=None,
        assumptions=(
            "memory is not predicted, because the step cannot be traced: "
            f"{type(error).__name__}: {reason}",
        ),
    )
