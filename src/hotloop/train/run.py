"""A run from a request to its report, stage by stage."""

from __future__ import annotations

import contextlib

from ..monitor import reset_peak_resident
from ..parallel import joined
from ..step.cuda import page_locked
from .build_step import build_step
from .evaluate import told_of
from .loop_report import report_of
from .make_loop import make_loop
from .memory_use import memory_use
from .monitoring import run_monitored
from .predict import predict
from .progress import Stopwatch
from .refine_budget import refine_budget
from .report import TrainReport
from .request import FitRequest
from .resolve import resolve
from .run_context import run_context
from .run_data import open_data
from .tuned import with_tuned


def run_fit(request: FitRequest, watch: Stopwatch) -> TrainReport:
    """Resolve, open the data, predict, build the step, loop, report; see ``Trainer.fit``."""
    model, machine = request.parts.model, request.machine
    with joined(request.asked.parallel.host_timeout_s, request.parts.device) as hosts:
        run = resolve(request, hosts)
        data = open_data(request, run)
        run = with_tuned(request, run, data)
        predicted = predict(request, run, data)
        notes = [*predicted.budget.assumptions, *run.notes, *data.batches.notes]
        if data.validation is not None:
            notes += told_of(request.parts.loss_fn)
        reset_peak_resident()
        with run_context(model, machine, predicted.plan, request.seed, notes) as context:
            built = build_step(request, run, data, predicted)
            budget = refine_budget(data, predicted, built)
            loop = make_loop(request, run, data, predicted, built, watch, context.stop, notes)
            with contextlib.ExitStack() as stack:
                if loop.pool is not None:
                    stack.enter_context(loop.pool)
                    stack.enter_context(page_locked(loop.pool.memory, built.step.device))
                run_monitored(loop, budget, context.arena, request.ceilings, machine)
            notes += built.faults + run.shares + built.step.notes
            used = memory_use(loop, context.arena, data.resident_bytes)
        return report_of(loop, budget, request.ceilings, machine, used, notes)
