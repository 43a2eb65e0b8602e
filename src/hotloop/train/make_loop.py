"""Fifth stage of a run: the loop, where a checkpoint left it or at its beginning."""

from __future__ import annotations

from ..data import PackedBatches
from ..memory import MemoryPool
from ..plan import Plan
from .build_step import BuiltStep
from .feeding import Feed, LoadedFeed, PackedFeed
from .interrupt import StopRequest
from .loop import TrainLoop
from .monitoring import monitor_of
from .predict import Prediction
from .progress import RunState, Stopwatch
from .request import FitRequest
from .resolve import Resolved
from .run_context import threads_of
from .run_data import RunData
from .snapshot import RunIdentity, restore


def make_loop(
    request: FitRequest,
    run: Resolved,
    data: RunData,
    predicted: Prediction,
    built: BuiltStep,
    watch: Stopwatch,
    stop: StopRequest,
    notes: list[str],
) -> TrainLoop:
    """The loop, ready to run; ``notes`` get a line on what it resumes."""
    parts, plan = request.parts, predicted.plan
    shows = run.hosts is None or run.hosts.rank == 0
    pool = None
    if built.layouts is not None:
        pool = MemoryPool(built.layouts, built.num_buffers, huge_pages=plan.memory.huge_pages)
    loop = TrainLoop(
        model=parts.model,
        loss_fn=parts.loss_fn,
        optimizer=parts.optimizer,
        scheduler=parts.scheduler,
        scheduler_interval=parts.scheduler_interval,
        step=built.step,
        steps_per_call=built.steps_per_call,
        batches=data.batches,
        validation=data.validation,
        feed=_feed(request, run, data, plan, built, pool),
        pool=pool,
        plan=plan,
        num_threads=threads_of(plan),
        identity=_identity(request, data),
        state=RunState(),
        store=run.store,
        watch=watch,
        stop=stop,
        epochs=request.epochs,
        max_steps=request.max_steps,
        target_accuracy=request.target_accuracy,
        on_progress=request.on_progress if shows else None,
        hosts=run.hosts,
        monitor=monitor_of(request.monitor, request.machine),
        on_losses=request.on_losses,
        tuned=run.tuned,
    )
    if run.found is not None:
        loop.state = restore(
            run.found,
            parts.model,
            parts.loss_fn,
            parts.optimizer,
            parts.scheduler,
            loop.identity,
            data.batches.load_state_dict,
        )
        if data.batches.restarts:
            loop.state.restart_epoch()
        loop.checkpoint, loop.saved_step = run.found.path, run.found.step
        notes.append(f"resumed at step {run.found.step} from {run.found.path}")
        before = run.found.document["num_threads"]
        if before != loop.num_threads:
            notes.append(
                f"resumed with {loop.num_threads} threads after {before}: sums are taken in "
                "another order, so the last bits differ from an uninterrupted run"
            )
    elif loop.store is not None:
        # What a checkpoint cannot hold is told now, not hours into the run.
        loop.store.check(*loop.snapshot())
    if run.hosts is not None:
        run.hosts.same_model(parts.model, parts.optimizer, parts.loss_fn)
        run.hosts.asked_to_stop = lambda: stop.requested
    return loop


def _feed(
    request: FitRequest,
    run: Resolved,
    data: RunData,
    plan: Plan,
    built: BuiltStep,
    pool: MemoryPool | None,
) -> Feed:
    if isinstance(data.batches, PackedBatches):
        assert pool is not None
        return PackedFeed(
            batches=data.batches,
            pool=pool,
            plan=plan,
            steps_per_call=built.steps_per_call,
            max_steps=request.max_steps,
            hosts=run.hosts,
        )
    return LoadedFeed(data.batches)


def _identity(request: FitRequest, data: RunData) -> RunIdentity:
    scheduler = request.parts.scheduler
    return RunIdentity(
        seed=request.seed,
        batch_size=data.batch_size,
        num_samples=data.batches.num_samples,
        drop_last=data.batches.drop_last,
        data=data.batches.description,
        optimizer=type(request.parts.optimizer).__name__,
        scheduler=None if scheduler is None else type(scheduler).__name__,
    )
