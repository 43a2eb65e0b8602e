"""The report of a loop that has ended."""

from __future__ import annotations

from ..machine import Ceilings, Machine
from ..memory import Budget
from .loop import TrainLoop
from .memory_use import MemoryUse
from .report import TrainReport, machine_document, versions


def report_of(
    loop: TrainLoop,
    budget: Budget,
    ceilings: Ceilings | None,
    machine: Machine,
    used: MemoryUse,
    notes: list[str],
) -> TrainReport:
    """Everything the run knew."""
    state = loop.state
    per_s = loop.samples_per_s
    flop = None
    if budget.flop_per_step is not None:
        flop = budget.flop_per_step / loop.identity.batch_size
    ceiling = None
    if ceilings is not None:
        ceiling = ceilings.best_matmul_flop_per_s("float32", loop.num_threads)
    known = budget.runtime_base_bytes is not None and budget.working_memory_bytes is not None
    last = state.history[-1] if state.history else None
    monitor = loop.monitor
    step_s = None
    if loop.samples_trained:
        calls = loop.samples_trained / loop.identity.batch_size
        step_s = loop.watch.seconds.get("step", 0.0) / calls
    operations = tuple(o.to_dict(step_s, ceiling) for o in loop.step.operations())
    if monitor is not None:
        # Workers and programs begin with the third step.
        path, reason = loop.step.path, loop.step.reason
        monitor.describe(operations=operations, path=path, path_reason=reason)
    return TrainReport(
        model=type(loop.model).__name__,
        parameters=sum(p.numel() for p in loop.model.parameters()),
        data=loop.identity.data,
        batch_size=loop.identity.batch_size,
        steps=state.step,
        epochs=state.epoch,
        stopped=state.stopped or "",
        train_loss=last.train_loss if last else None,
        validation_loss=last.validation_loss if last else None,
        validation_accuracy=last.validation_accuracy if last else None,
        history=tuple(state.history),
        curve=tuple(state.curve),
        samples_per_s=per_s,
        train_s=loop.train_s,
        wall_s=loop.watch.total_s,
        time_s=dict(loop.watch.seconds),
        flop_per_sample=flop,
        share_of_ceiling=flop * per_s / ceiling if flop and per_s and ceiling else None,
        ceiling_flop_per_s=ceiling,
        budget=budget,
        used_bytes=used.components,
        peak_resident_bytes=used.peak_resident_bytes,
        prediction_error=used.prediction_error(budget.total_bytes if known else None),
        arena=used.arena,
        path=loop.step.path,
        path_reason=loop.step.reason,
        precision=loop.step.precision,
        operations=operations,
        plan=loop.plan.to_dict(),
        machine=machine_document(machine, ceilings),
        versions=versions(),
        checkpoint=None if loop.checkpoint is None else str(loop.checkpoint),
        notes=tuple(notes),
        performance=None if monitor is None else monitor.collect_metrics(),
        optimizations=() if monitor is None else tuple(monitor.suggest_optimizations()),
    )
