"""Fourth stage of a run: its step, and how many steps one call of it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..data import PackedBatches
from ..data.batch import Batch
from ..memory import BatchLayout, pool_buffers
from ..parallel import ParallelStep
from ..step import TrainStep, compile_step
from ..units import MIB
from .hosts import step_of
from .predict import Prediction
from .request import FitRequest
from .resolve import Resolved
from .run_data import RunData, first_batches

# One call of the fast path makes so many steps at most, on so many bytes of batches, which are
# filled between two calls.
_MOST_STEPS = 16
_CALL_BYTES = 4 * MIB
_CALL_BUFFERS = 1


@dataclass(frozen=True, kw_only=True)
class BuiltStep:
    """The step of a run and the buffers it is fed from.

    Attributes:
        layouts: of one buffer: the batches of ``steps_per_call`` steps; ``None``: there is no
            pool.
        num_buffers: of the pool.
    """

    step: TrainStep
    steps_per_call: int
    layouts: tuple[BatchLayout, ...] | None
    num_buffers: int

    @property
    def faults(self) -> list[str]:
        """What went wrong with workers so far."""
        return self.step.faults if isinstance(self.step, ParallelStep) else []


def build_step(
    request: FitRequest, run: Resolved, data: RunData, predicted: Prediction
) -> BuiltStep:
    """Make the step; where one call makes several steps, a buffer holds the batches of all."""
    step = _make_step(request, run, data, predicted)
    if run.found is not None:
        step.go_on(run.found.document.get("programs"))
    layouts, size = data.layouts, data.batch_size
    if layouts is None or not isinstance(data.batches, PackedBatches):
        return BuiltStep(step=step, steps_per_call=1, layouts=None, num_buffers=0)
    if step.makes_many:
        bytes_of_batch = sum(layout.total_bytes for layout in layouts)
        steps_per_call = max(1, min(_MOST_STEPS, _CALL_BYTES // bytes_of_batch))
        if steps_per_call > 1:
            return BuiltStep(
                step=step,
                steps_per_call=steps_per_call,
                layouts=data.batches.dataset.layouts(
                    size * steps_per_call, line_bytes=data.line_bytes
                ),
                num_buffers=_CALL_BUFFERS,
            )
    return BuiltStep(
        step=step, steps_per_call=1, layouts=layouts, num_buffers=pool_buffers(predicted.plan)
    )


def _make_step(
    request: FitRequest, run: Resolved, data: RunData, predicted: Prediction
) -> TrainStep:
    plan, parts = predicted.plan, request.parts
    three = parts.model, parts.loss_fn, parts.optimizer
    if run.hosts is not None:
        return step_of(run.hosts, *three, data.batch, plan, request.machine, parts.limits)
    if plan.parallel.num_workers is not None:
        return ParallelStep(*three, data.batch, plan, machine=request.machine, **parts.limits)

    def batches() -> Iterator[Batch]:
        return first_batches(data, plan)

    return compile_step(
        *three,
        data.batch,
        plan,
        batches=batches,
        **parts.limits,
    )
