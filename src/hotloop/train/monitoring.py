"""What the monitor is told of a run: its work, its plan, its pool, its workers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..machine import Ceilings, Machine
from ..memory import Budget, TensorArena
from ..monitor import PerformanceMonitor, WorkerUse
from ..parallel import ParallelStep
from .loop import TrainLoop

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def monitor_of(wanted: PerformanceMonitor | bool, machine: Machine) -> PerformanceMonitor | None:
    """The monitor given, a new one, or none."""
    if isinstance(wanted, bool):
        return PerformanceMonitor(machine) if wanted else None
    return wanted


def run_monitored(
    loop: TrainLoop,
    budget: Budget,
    arena: TensorArena | None,
    ceilings: Ceilings | None,
    machine: Machine,
) -> None:
    """``loop.run()`` with its monitor, if it has one, looking on."""
    monitor = loop.monitor
    if monitor is None:
        loop.run()
        return
    _describe(monitor, loop, budget, arena, ceilings or machine.cached_ceilings())
    # One that runs already looks at more than this call.
    with contextlib.nullcontext() if monitor.is_running else monitor:
        loop.run()


def _describe(
    monitor: PerformanceMonitor,
    loop: TrainLoop,
    budget: Budget,
    arena: TensorArena | None,
    ceilings: Ceilings | None,
) -> None:
    step, plan, model = loop.step, loop.plan, loop.model
    steps_per_call, num_threads = loop.steps_per_call, loop.num_threads
    working = budget.working_memory_bytes or 0
    layouts = loop.pool.layouts if loop.pool is not None else ()
    batch_bytes = sum(layout.total_bytes for layout in layouts) // steps_per_call
    used = 1 if isinstance(step, ParallelStep) else num_threads
    queued = plan.cpu.queue_size * batch_bytes if steps_per_call == 1 else None
    monitor.describe(
        batch_size=loop.identity.batch_size,
        steps_per_call=steps_per_call,
        num_threads=used,
        path=step.path,
        path_reason=step.reason,
        precision=step.precision,
        precision_reason=step.precision_reason,
        flop_per_step=budget.flop_per_step,
        step_bytes=budget.model_parameters_bytes
        + budget.gradient_buffers_bytes
        + budget.optimizer_state_bytes
        + working
        + batch_bytes,
        batch_bytes=batch_bytes,
        queue_bytes=queued,
        learning_rate=float(loop.optimizer.param_groups[0]["lr"]),
        parameter_bytes=budget.model_parameters_bytes,
        has_convolutions=any(isinstance(m, _CONVOLUTIONS) for m in model.modules()),
        num_samples=loop.batches.num_samples,
        **_ceilings(ceilings, num_threads),
    )
    if isinstance(step, ParallelStep):
        plan = plan.replace({"parallel.chunk_size": step.chunk_size})
        parallel = step
        monitor.observe(workers=lambda: workers_of(parallel))

    def arena_use() -> tuple[int, int]:
        assert arena is not None
        stats = arena.stats()
        return stats.peak_live_bytes, stats.capacity_bytes

    monitor.observe(
        plan=plan.to_dict(),
        pool=None if loop.pool is None else loop.pool.stats,
        arena=None if arena is None else arena_use,
    )


def workers_of(step: ParallelStep) -> Sequence[WorkerUse]:
    """What each worker did, and where it is pinned."""
    # Pinned to one CPU, or free on several.
    cpus = [s.cpu_ids[0] if len(s.cpu_ids) == 1 else None for s in step.placements]
    return [
        WorkerUse(
            worker=number,
            chunks=stats.chunks,
            stolen=stats.stolen,
            busy_s=stats.busy_s,
            wait_s=stats.wait_s,
            update_s=stats.update_s,
            rate_per_s=stats.rate_per_s,
            slowdown=stats.slowdown,
            cpu=cpus[number],
        )
        for number, stats in enumerate(step.workers)
    ]


def _ceilings(ceilings: Ceilings | None, num_threads: int) -> dict[str, Any]:
    if ceilings is None:
        return {}
    return {
        "ceiling_flop_per_s": ceilings.best_matmul_flop_per_s("float32", num_threads),
        "ceiling_bfloat16_flop_per_s": ceilings.best_matmul_flop_per_s("bfloat16", num_threads),
        "ceiling_bytes_per_s": ceilings.best_bandwidth_bytes_per_s(num_threads),
    }
