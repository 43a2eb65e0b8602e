"""The budget of a run once its step is compiled: that of the graph, not of PyTorch's own step."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..memory import Budget, TensorArena
from ..memory.budget import resident_beside, traced, working_bytes
from ..plan import Plan
from ..step import TrainStep
from ..step.step import LossFn


def planned(
    budget: Budget,
    step: TrainStep,
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    example: tuple[torch.Tensor, torch.Tensor],
    plan: Plan,
    *,
    last_batch_size: int,
    evaluates: bool,
    data_resident_bytes: int,
    arena: TensorArena | None,
) -> Budget:
    """``budget`` with the memory of the compiled step where that was measured.

    The step itself was run once, on zeros, by the process that compiled it. What the run does
    beside it as PyTorch does counts too, by the larger of the two: a last, smaller batch, with
    gradients of its own, and evaluation.

    Args:
        budget: of the plain step.
        step: as made. model, loss_fn, optimizer, example, plan: as for ``Budget.predict``.
        last_batch_size: of the batch of another size that the run comes to; 0: none.
        evaluates: whether the run comes to an evaluation.
        data_resident_bytes: as for ``Budget.predict``.
        arena: of the run; what timing the step's kernels took of it stays.
    """
    compiled = step.working_bytes
    if compiled is None or budget.working_memory_bytes is None:
        return budget
    gradients, needs = 0, [compiled]
    if not step.makes_many:
        # Sums of gradients stay beside whatever else the run does, and the optimizer's own update
        # takes what it takes in a plain step.
        gradients = budget.gradient_buffers_bytes
        needs.append(budget.working_memory_bytes)

    def plain(batch_size: int, phase: str) -> int:
        trace = traced(
            model,
            example,
            batch_size,
            phase,
            loss_fn=loss_fn,
            optimizer=optimizer,
            micro=min(plan.memory.micro_batch_size or batch_size, batch_size),
        )
        return working_bytes(trace) + trace.gradient_bytes

    if last_batch_size:
        needs.append(plain(last_batch_size, "train"))
    if evaluates:
        needs.append(plain(budget.batch_size, "infer"))
    held, probed = data_resident_bytes, 0
    if arena is not None:
        # What timing kernels and probing a precision took of it.
        stats = arena.stats()
        needs.append(stats.peak_top_bytes - budget.optimizer_state_bytes - gradients)
        held += stats.touched_bytes
    elif plan.step.precision == "auto":
        probed = budget.model_parameters_bytes
    return dataclasses.replace(
        budget,
        gradient_buffers_bytes=gradients,
        working_memory_bytes=max(needs) + probed,
        # Capturing, and timing kernels for the first time, leave more than was rehearsed.
        runtime_base_bytes=resident_beside(model, held),
    )
