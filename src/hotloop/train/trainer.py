"""``Trainer``: from data to a trained model, inside a known memory, resumable at any step."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import GlobalSampler, PackedDataset, open_dataset
from ..errors import CheckpointError, InputError
from ..machine import Ceilings, Machine
from ..memory import BatchLayout, Budget, MemoryPool, largest_micro_batch, pool_buffers
from ..monitor import PerformanceMonitor, peak_resident_bytes, reset_peak_resident
from ..parallel import Hosts, ParallelStep, joined
from ..plan import AUTO, Plan
from ..step import TrainStep, compile_step
from ..step.check import check_classes, check_parts
from ..step.cuda import page_locked
from ..step.precision import Batches
from ..step.rehearsal import rehearse_capture
from ..step.step import LossFn, why_plain
from ..units import MIB
from .arguments import check_alike, check_arguments
from .checkpoint import Checkpoint, CheckpointStore
from .hosts import newest_of, plan_of, step_of
from .loop import TrainLoop
from .loop_report import report_of
from .observed import monitor_of, run_observed
from .parts import TrainingParts
from .planned import planned
from .progress import Progress, RunState, Stopwatch
from .report import TrainReport
from .snapshot import RunIdentity, restore
from .surroundings import surroundings, threads_of
from .tuned import with_tuned

# One call of the compiled step makes so many steps at most, on so many bytes of batches, which are
# filled between two calls.
_MOST_STEPS = 16
_CALL_BYTES = 4 * MIB
_CALL_BUFFERS = 1
# Plain PyTorch on one core of a recent server, and what a step costs beside its arithmetic.
_NOMINAL_FLOP_PER_S = 40e9
_NOMINAL_STEP_S = 0.5e-3


class Trainer:
    """Trains a model on packed data.

    Args:
        model: any ``torch.nn.Module``, on the CPU or on one CUDA device.
        loss_fn: ``loss_fn(model(x), y)`` gives a scalar, a mean over the samples.
        optimizer: any ``torch.optim`` optimizer on the model's parameters but those that need
            a closure.
        plan: how the machine is used; the defaults when ``None``.
        scheduler: a ``torch.optim.lr_scheduler``; stepped as ``scheduler_interval`` says, and
            ``ReduceLROnPlateau`` with the validation loss (else the training loss).
        scheduler_interval: ``"epoch"`` or ``"step"``.
        clip_norm, clip_value: limits of the gradient, as for ``compile_step``.
        ceilings: measured rates (``Machine.ceilings``) for the report and for ``auto`` threads.
        machine: probed when ``None``.

    Raises:
        ModelError: model, loss or optimizer cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        plan: Plan | None = None,
        *,
        scheduler: Any = None,
        scheduler_interval: str = "epoch",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        ceilings: Ceilings | None = None,
        machine: Machine | None = None,
    ) -> None:
        check_parts(model, loss_fn, optimizer)
        if scheduler_interval not in ("epoch", "step"):
            raise InputError(
                "scheduler_interval must be 'epoch' or 'step'", got=repr(scheduler_interval)
            )
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.plan = plan or Plan()
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.ceilings = ceilings
        self.machine = machine or Machine.probe()

    @property
    def parts(self) -> TrainingParts:
        """What it trains, as one value."""
        return TrainingParts(
            self.model,
            self.loss_fn,
            self.optimizer,
            self.scheduler,
            self.scheduler_interval,
            self.clip_norm,
            self.clip_value,
        )

    def fit(
        self,
        data: Any,
        batch_size: int = 64,
        epochs: int = 1,
        *,
        validation: Any = None,
        seed: int = 0,
        target_accuracy: float | None = None,
        max_steps: int | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        fit_memory: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        monitor: PerformanceMonitor | bool = True,
        on_losses: Callable[[list[float]], None] | None = None,
    ) -> TrainReport:
        """Train in place and report.

        The order of samples is a function of ``seed`` and the epoch. torch's random state is
        seeded from ``seed`` for the run and is afterwards what it was. Ctrl-C or SIGTERM ends
        the run after the step under way, with a checkpoint.

        Args:
            data: ``(X, Y)`` arrays, a torch Dataset, a path, ``"mnist"``, or a ``PackedDataset``.
            batch_size: samples of a step; the last step of an epoch may have fewer.
            epochs: of the whole run, those before a resume included.
            validation: the same kinds; evaluated after each epoch.
            seed: of shuffling, augmentation and the model's own randomness (dropout).
            target_accuracy: stop after the epoch in which validation reaches it, 0 to 1.
            max_steps: stop after so many optimizer steps of the whole run.
            checkpoint_dir: where checkpoints go; none are written when ``None``.
            resume: go on from the newest whole checkpoint there; start anew if there is none.
            fit_memory: where the batch cannot fit, take the largest micro-batch that does.
            on_progress: called about ten times a second.
            monitor: looks at the machine meanwhile, for ``report.performance`` and
                ``report.optimizations``; one of yours, a new one, or ``False``: none.
            on_losses: called after each call of the step with the loss of each step it made.

        Raises:
            InputError: an argument outside its rule. DataError, ModelError: see their names.
            BudgetError: predicted not to fit the memory limit; nothing was allocated.
            CheckpointError: ``resume`` from a checkpoint of another model or run, or a new run
                in a folder that has checkpoints.
            DivergedError: the loss became NaN or infinite. StorageError: a checkpoint could not
                be written; the ones before it are whole.
        """
        watch = Stopwatch()
        check_arguments(batch_size, epochs, target_accuracy, max_steps, validation)
        timeout_s = self.plan.parallel.host_timeout_s
        with joined(timeout_s, next(self.model.parameters()).device) as hosts:
            if hosts is not None:
                hosts.agree(
                    seed=seed,
                    epochs=epochs,
                    max_steps=max_steps,
                    target_accuracy=target_accuracy,
                    resume=resume,
                    checkpoint_dir=checkpoint_dir is not None,
                    clip_norm=self.clip_norm,
                    clip_value=self.clip_value,
                    scheduler=type(self.scheduler).__name__,
                    scheduler_interval=self.scheduler_interval,
                )
            store, found = self._open_store(checkpoint_dir, resume, hosts)
            plan = self._resolve(found)
            if hosts is not None:
                plan = plan_of(hosts, plan, batch_size, self.machine)
            above = plan.memory.mmap_above_bytes
            dataset = open_dataset(data, seed=seed, mmap_above_bytes=above)
            tested = None
            if validation is not None:
                tested = open_dataset(validation, split="test", seed=seed, mmap_above_bytes=above)
                check_alike(dataset, tested)
            example = dataset.example()
            tuned = None
            if hosts is None:
                plan, tuned = with_tuned(
                    self.parts, self.machine, self.plan, plan, found, batch_size, example
                )
            line_bytes = plan.memory.line_bytes or 64
            layouts = dataset.layouts(batch_size, line_bytes=line_bytes)
            # Rows are padded to the line: the graph is made for the strides of the buffers.
            shapes = tuple(
                layout.view(torch.empty(layout.total_bytes, dtype=torch.uint8, device="meta"))
                for layout in layouts
            )
            expected_s = functools.partial(
                _expected_s, dataset, batch_size, epochs, max_steps, threads_of(plan)
            )

            def load(flop_per_step: int | None) -> None:
                if self._captures(shapes, plan, expected_s(flop_per_step)):
                    rehearse_capture()

            plan, budget = self._budget(
                example, dataset, tested, batch_size, plan, fit_memory, load
            )
            classes = [d.num_classes for d in (dataset, tested) if d and d.num_classes]
            check_classes(self.loss_fn, budget.output_shape, max(classes, default=None))
            if hosts is not None:
                hosts.agree(
                    samples=dataset.num_samples,
                    validation_samples=None if tested is None else tested.num_samples,
                )
            identity = RunIdentity(
                seed=seed,
                batch_size=batch_size,
                num_samples=dataset.num_samples,
                data=dataset.description,
                optimizer=type(self.optimizer).__name__,
                scheduler=None if self.scheduler is None else type(self.scheduler).__name__,
            )
            notes = [*budget.assumptions, *(found.skipped if found else ())]
            notes += [tuned.note] if tuned else []
            reset_peak_resident()
            with surroundings(self.model, self.machine, plan, seed, notes) as (stop, arena):
                step = self._make_step(
                    shapes,
                    plan,
                    expected_s(budget.flop_per_step),
                    lambda: _first_batches(dataset, layouts, plan, seed),
                    hosts,
                )
                num_buffers, steps_per_call = pool_buffers(plan), 1
                if step.makes_many:
                    bytes_of_batch = sum(layout.total_bytes for layout in layouts)
                    steps_per_call = max(1, min(_MOST_STEPS, _CALL_BYTES // bytes_of_batch))
                if steps_per_call > 1:
                    less = MemoryPool.predict_bytes(layouts, num_buffers)
                    num_buffers = _CALL_BUFFERS
                    layouts = dataset.layouts(batch_size * steps_per_call, line_bytes=line_bytes)
                    more = MemoryPool.predict_bytes(layouts, num_buffers) - less
                    budget = dataclasses.replace(
                        budget, batch_data_bytes=budget.batch_data_bytes + more
                    )
                batches, left = divmod(dataset.num_samples, batch_size)
                whole_epoch = max_steps is None or max_steps >= batches + (left > 0)
                budget = planned(
                    budget,
                    step,
                    self.model,
                    self.loss_fn,
                    self.optimizer,
                    example,
                    plan,
                    last_batch_size=left if whole_epoch else 0,
                    evaluates=whole_epoch and tested is not None,
                    data_resident_bytes=_resident_bytes(dataset, tested),
                    arena=arena,
                )
                pool = MemoryPool(layouts, num_buffers, huge_pages=plan.memory.huge_pages)
                loop = TrainLoop(
                    model=self.model,
                    optimizer=self.optimizer,
                    scheduler=self.scheduler,
                    scheduler_interval=self.scheduler_interval,
                    step=step,
                    steps_per_call=steps_per_call,
                    dataset=dataset,
                    validation=tested,
                    pool=pool,
                    plan=plan,
                    num_threads=threads_of(plan),
                    identity=identity,
                    state=RunState(),
                    store=store,
                    watch=watch,
                    stop=stop,
                    epochs=epochs,
                    max_steps=max_steps,
                    target_accuracy=target_accuracy,
                    on_progress=on_progress if hosts is None or hosts.rank == 0 else None,
                    hosts=hosts,
                    monitor=monitor_of(monitor, self.machine),
                    on_losses=on_losses,
                    tuned=tuned.knobs if tuned else None,
                )
                if found is not None:
                    self._restore(loop, found, notes)
                if hosts is not None:
                    hosts.same_model(self.model, self.optimizer)
                    hosts.asked_to_stop = lambda: stop.requested
                with pool, page_locked(pool.memory, step.device):
                    run_observed(loop, budget, arena, self.ceilings, self.machine)
                if isinstance(step, ParallelStep):
                    notes += step.faults
                if hosts is not None:
                    notes.append(
                        f"host {hosts.rank} of {hosts.count}; chunks of each: {hosts.shares}"
                    )
                peak = peak_resident_bytes()
                arena_use = None if arena is None else dataclasses.asdict(arena.stats())
            return report_of(loop, budget, self.ceilings, self.machine, peak, arena_use, notes)

    def _captures(
        self, example: tuple[torch.Tensor, ...], plan: Plan, expected_s: float | None
    ) -> bool:
        """Whether the step will be captured for the compiler, which takes memory of its own."""
        if next(self.model.parameters()).device.type != "cpu":
            return False
        if plan.parallel.num_workers is not None:
            return plan.step.compile != "off"
        x, y = example
        return why_plain(self.model, x, y, plan, expected_s) is None

    def _make_step(
        self,
        example: tuple[torch.Tensor, ...],
        plan: Plan,
        expected_s: float | None,
        batches: Batches,
        hosts: Hosts | None = None,
    ) -> TrainStep:
        parts = self.model, self.loss_fn, self.optimizer
        limits: Any = {"clip_norm": self.clip_norm, "clip_value": self.clip_value}
        if hosts is not None:
            return step_of(hosts, *parts, example, plan, self.machine, limits)
        if plan.parallel.num_workers is not None:
            x, y = example
            return ParallelStep(*parts, x, y, plan, machine=self.machine, **limits)
        return compile_step(*parts, example, plan, expected_s=expected_s, batches=batches, **limits)

    def _restore(self, loop: TrainLoop, found: Checkpoint, notes: list[str]) -> None:
        loop.state = restore(found, self.model, self.optimizer, self.scheduler, loop.identity)
        loop.checkpoint, loop.saved_step = found.path, found.step
        notes.append(f"resumed at step {found.step} from {found.path}")
        before = found.document["num_threads"]
        if before != loop.num_threads:
            notes.append(
                f"resumed with {loop.num_threads} threads after {before}: sums are taken in "
                "another order, so the last bits differ from an uninterrupted run"
            )

    def _open_store(
        self, folder: str | os.PathLike[str] | None, resume: bool, hosts: Hosts | None = None
    ) -> tuple[CheckpointStore | None, Checkpoint | None]:
        if folder is None:
            if resume:
                raise InputError("resume needs checkpoint_dir", next_step="pass checkpoint_dir=...")
            return None, None
        store = CheckpointStore(Path(folder), keep_last=self.plan.checkpoint.keep_last)

        def latest() -> Checkpoint | None:
            found = store.latest()
            if found is not None and not resume:
                raise CheckpointError(
                    f"{folder} already holds a run, at step {found.step}",
                    next_step="resume it, or choose another folder",
                )
            return found

        if hosts is None:
            return store, latest()
        return store if hosts.rank == 0 else None, newest_of(hosts, store, latest)

    def _resolve(self, found: Checkpoint | None) -> Plan:
        """The plan for this machine; a resumed run keeps its thread count unless told otherwise."""
        plan = self.plan
        if found is not None and plan.cpu.num_threads == AUTO:
            # Another number of threads adds in another order: the last bits would differ.
            plan = plan.replace({"cpu.num_threads": int(found.document["num_threads"])})
        if found is not None and plan.step.compile == "auto":
            # So would the other path's.
            compiled = found.document.get("path") != "plain"
            plan = plan.replace({"step.compile": "always" if compiled else "off"})
        if found is not None and plan.step.precision == "auto":
            plan = plan.replace({"step.precision": found.document.get("precision", "float32")})
        return plan.resolve(self.machine, self.ceilings)

    def _budget(
        self,
        example: tuple[torch.Tensor, torch.Tensor],
        dataset: PackedDataset,
        validation: PackedDataset | None,
        batch_size: int,
        plan: Plan,
        fit_memory: bool,
        rehearsal: Callable[[int | None], None],
    ) -> tuple[Plan, Budget]:
        options: dict[str, Any] = {
            "loss_fn": self.loss_fn,
            "optimizer": self.optimizer,
            "data_resident_bytes": _resident_bytes(dataset, validation),
            "machine": self.machine,
            "rehearsal": rehearsal,
        }
        budget = Budget.predict(self.model, example, batch_size, "train", plan, **options)
        limit = plan.memory_limit_bytes(self.machine)
        if limit is None or budget.total_bytes <= limit:
            return plan, budget
        best = largest_micro_batch(self.model, example, batch_size, limit, plan, **options)
        if best is None or not fit_memory:
            budget.require_fit(limit, None if best is None else best[0])
        assert best is not None
        return plan.replace({"memory.micro_batch_size": best[0]}), best[1]


def _resident_bytes(dataset: PackedDataset, validation: PackedDataset | None) -> int:
    return dataset.resident_bytes + (validation.resident_bytes if validation else 0)


def _first_batches(
    dataset: PackedDataset, layouts: Sequence[BatchLayout], plan: Plan, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The whole batches of epoch 0, one after the other in the same memory."""
    batch_size, micro = layouts[0].num_rows, plan.memory.micro_batch_size
    x, y = (layout.view(torch.empty(layout.total_bytes, dtype=torch.uint8)) for layout in layouts)
    for indices in GlobalSampler(dataset.num_samples, batch_size, seed=seed).batches(0, 0):
        if len(indices) < batch_size:
            # A dataset smaller than one batch: its samples again.
            indices = torch.cat([indices] * -(-batch_size // len(indices)))[:batch_size]
        dataset.gather(indices, x, y, epoch=0, training=True)
        yield x[:micro], y[:micro]


def _expected_s(
    dataset: PackedDataset,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    num_threads: int,
    flop_per_step: int | None,
) -> float | None:
    """Seconds of the run on the plain path, for the choice of path; ``None``: not countable.

    A nominal rate, not a measured one: the same run must take the same path every time.
    """
    if flop_per_step is None:
        return None
    steps = epochs * -(-dataset.num_samples // batch_size)
    if max_steps is not None:
        steps = min(steps, max_steps)
    per_step = flop_per_step / (_NOMINAL_FLOP_PER_S * num_threads) + _NOMINAL_STEP_S
    return steps * per_step
