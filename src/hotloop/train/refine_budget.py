"""The budget of a run once its step is made: that of the compiled graph, not of PyTorch's step."""

from __future__ import annotations

import dataclasses

from ..memory import Budget, MemoryPool, TensorArena
from ..memory.budget import resident_beside, traced, working_bytes
from .build_step import BuiltStep
from .predict import Prediction
from .request import FitRequest
from .run_data import RunData


def refine_budget(
    request: FitRequest,
    data: RunData,
    predicted: Prediction,
    built: BuiltStep,
    arena: TensorArena | None,
) -> Budget:
    """The budget of the report: as predicted, with the pool and the step that were made.

    The compiled step was run once, on zeros, by the process that compiled it. What the run does
    beside it as PyTorch does counts too, by the larger of the two: a last, smaller batch, with
    gradients of its own, and evaluation.

    Args:
        arena: of the run; what timing the step's kernels took of it stays.
    """
    pool_bytes = MemoryPool.predict_bytes(built.layouts, built.num_buffers)
    budget = dataclasses.replace(
        predicted.budget, batch_data_bytes=pool_bytes + data.resident_bytes
    )
    compiled = built.step.working_bytes
    if compiled is None or budget.working_memory_bytes is None:
        return budget
    gradients, needs = 0, [compiled]
    if not built.step.makes_many:
        # Sums of gradients stay beside whatever else the run does, and the optimizer's own update
        # takes what it takes in a plain step.
        gradients = budget.gradient_buffers_bytes
        needs.append(budget.working_memory_bytes)
    needs += _needs_of_plain_parts(request, data, predicted)
    held, probed = data.resident_bytes, 0
    if arena is not None:
        # What timing kernels and probing a precision took of it.
        stats = arena.stats()
        needs.append(stats.peak_top_bytes - budget.optimizer_state_bytes - gradients)
        held += stats.touched_bytes
    elif predicted.plan.step.precision == "auto":
        probed = budget.model_parameters_bytes
    return dataclasses.replace(
        budget,
        gradient_buffers_bytes=gradients,
        working_memory_bytes=max(needs) + probed,
        # Capturing, and timing kernels for the first time, leave more than was rehearsed.
        runtime_base_bytes=resident_beside(request.parts.model, held),
    )


def _needs_of_plain_parts(request: FitRequest, data: RunData, predicted: Prediction) -> list[int]:
    """Bytes of a last, smaller batch and of an evaluation, where the run comes to them."""
    batches, left = divmod(data.dataset.num_samples, request.batch_size)
    if request.max_steps is not None and request.max_steps < batches + (left > 0):
        return []

    def plain(batch_size: int, phase: str) -> int:
        micro = predicted.plan.memory.micro_batch_size or batch_size
        trace = traced(
            request.parts.model,
            data.example,
            batch_size,
            phase,
            loss_fn=request.parts.loss_fn,
            optimizer=request.parts.optimizer,
            micro=min(micro, batch_size),
        )
        return working_bytes(trace) + trace.gradient_bytes

    needs = [plain(left, "train")] if left else []
    if data.validation is not None:
        needs.append(plain(request.batch_size, "infer"))
    return needs
