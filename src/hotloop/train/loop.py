"""The loop of a run: batches, steps, evaluation, checkpoints, and when to stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Batches
from ..data.batch import Batch
from ..data.hashing import mix
from ..errors import DataError, DivergedError, HotloopError
from ..machine.threads import num_threads
from ..memory import MemoryPool
from ..monitor import PerformanceMonitor
from ..monitor.recorder import Phase, StepRecorder
from ..parallel import Hosts
from ..plan import Plan
from ..step import NO_TARGET, TrainStep
from ..step.check import LossFn
from .checkpoint import CheckpointStore
from .evaluate import Evaluation, evaluate
from .feeding import Call, Feed
from .first_step import does_not_fit
from .interrupt import StopRequest
from .progress import Progress, RunState, Stopwatch
from .snapshot import RunIdentity, Snapshot, snapshot

# A progress bar that is drawn more often costs more than it tells.
_PROGRESS_EVERY_S = 0.1


@dataclass
class TrainLoop:
    """One run from the state it is given to a reason to stop; see ``Trainer.fit``.

    Attributes:
        state: where the run stands; moves on in place.
        checkpoint: folder of the last checkpoint, if any.
        saved_step: step of that checkpoint.
    """

    model: nn.Module
    loss_fn: LossFn
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scheduler_interval: str
    step: TrainStep
    batches: Batches
    validation: Batches | None
    feed: Feed
    pool: MemoryPool | None
    plan: Plan
    num_threads: int
    identity: RunIdentity
    state: RunState
    store: CheckpointStore | None
    watch: Stopwatch
    stop: StopRequest
    epochs: int
    steps_per_call: int = 1
    max_steps: int | None = None
    target_accuracy: float | None = None
    on_progress: Callable[[Progress], None] | None = None
    checkpoint: Path | None = None
    saved_step: int | None = None
    hosts: Hosts | None = None
    monitor: PerformanceMonitor | None = None
    on_losses: Callable[[list[float]], None] | None = None
    tuned: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.samples_trained = 0
        self._first_step = self.state.step
        self._saved_at_s = self._shown_at_s = time.monotonic()

    @property
    def train_s(self) -> float:
        """Seconds spent on batches and steps."""
        return self.watch.seconds.get("data_wait", 0.0) + self.watch.seconds.get("step", 0.0)

    @property
    def samples_per_s(self) -> float | None:
        """Samples of this loop over ``train_s``; ``None`` before the first."""
        return self.samples_trained / self.train_s if self.samples_trained else None

    def run(self) -> None:
        """Train until a reason to stop, which is then in ``state.stopped``.

        Raises:
            DivergedError: the loss became NaN or infinite.
            StorageError: a checkpoint could not be written.
        """
        state = self.state
        if state.stopped != "target accuracy reached":
            state.stopped = None
        self.watch.lap("prepare")
        while state.stopped is None:
            if state.epoch >= self.epochs:
                state.stopped = "epochs done"
            elif self.max_steps is not None and state.step >= self.max_steps:
                state.stopped = "max steps reached"
            elif self._stopping:
                state.stopped = "interrupted"
            else:
                self._epoch()
        if self.saved_step != state.step:
            self._save()

    def _epoch(self) -> None:
        """Train to the end of the epoch under way, or to a reason to stop inside it."""
        state, lap = self.state, self.watch.lap
        # What nobody looks at is recorded too: it costs less than asking each time.
        recorder = self.monitor.recorder if self.monitor is not None else StepRecorder()
        left = True
        with contextlib.ExitStack() as stack:
            recorder.waiting = True
            for call in self.feed.calls(state, stack):
                recorder.waiting = False
                waited_s = lap("data_wait")
                state.train_s += waited_s
                losses = self._checked_steps(call)
                call.release()
                count = call.num_samples
                for loss in losses:
                    if not math.isfinite(loss):
                        raise self._diverged(loss)
                    state.note_step(loss, count // len(losses))
                self.samples_trained += count
                step_s = lap("step")
                state.train_s += step_s
                recorder.record(count, steps=len(losses), data_wait_s=waited_s, compute_s=step_s)
                self._show(losses[-1])
                if self.on_losses is not None:
                    self.on_losses(losses)
                if self._stopping or state.step == self.max_steps:
                    break
                if state.batch != self.batches.num_batches and self._save_is_due():
                    self._save()
                recorder.waiting = True
            else:
                left = False
        recorder.waiting = False
        if not left or state.batch == self.batches.num_batches:
            self._finish_epoch()

    def _checked_steps(self, call: Call) -> list[float]:
        """Losses of the steps of a call; of the very first, what goes wrong is explained."""
        if self.state.step > self._first_step:
            return self._steps(call.batch, call.steps)
        try:
            return self._steps(call.batch, call.steps)
        except HotloopError:
            raise
        except Exception as error:
            told = does_not_fit(error, self.model, self.loss_fn, call.batch)
            if told is None:
                raise
            raise told from error

    def _steps(self, batch: Batch, count: int) -> list[float]:
        """Losses of the ``count`` steps on a batch."""
        every_step = self.scheduler is not None and self.scheduler_interval == "step"
        if count > 1:
            rates = None
            if every_step:
                # The rates of all these steps, before any of them is made.
                rates = []
                for _ in range(count):
                    rates.append([float(g["lr"]) for g in self.optimizer.param_groups])
                    self.optimizer._opt_called = True  # type: ignore[attr-defined]
                    self.scheduler.step()
            x, y = batch if len(batch) == 2 else (batch[0], NO_TARGET)
            losses = self.step.many(x, y, count, rates)
            assert losses is not None, "steps_per_call is above 1 only where many() works"
            return [float(loss) for loss in losses.tolist()]
        if self.hosts is not None and self.hosts.rank:
            # Host 0's generator is in the checkpoint; the others' numbers are of the step alone.
            torch.manual_seed(mix(self.identity.seed, self.state.step, self.hosts.rank) >> 1)
        loss = self.step(*batch).item()
        if every_step:
            self.scheduler.step()
        return [loss]

    def _finish_epoch(self) -> None:
        state = self.state
        if not state.samples:
            raise DataError(
                "every epoch must have at least 1 batch",
                got=f"none in epoch {state.epoch} of {self.batches.description}",
            )
        result: Evaluation | None = None
        if self.validation is not None:
            threads = num_threads(self.plan.parallel.num_workers or self.num_threads)
            with threads, self.step.memory_lent():
                result = evaluate(
                    self.model,
                    self.loss_fn,
                    self.validation,
                    self.pool,
                    queue_size=self.plan.cpu.queue_size,
                )
            self._spent("other", self.watch.lap("evaluate"))
        if self.hosts is not None and result is not None:
            mine = result  # Unlike machines may differ in the last bit, and then in what follows.
            result = self.hosts.first(lambda: mine)
        accuracy = result.accuracy if result else None
        state.finish_epoch(
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            loss=result.loss if result else None,
            accuracy=accuracy,
        )
        self._step_scheduler()
        if self.target_accuracy is not None and (accuracy or 0.0) >= self.target_accuracy:
            state.stopped = "target accuracy reached"
        self._save()
        self._show(state.history[-1].train_loss, now_s=math.inf)

    def _step_scheduler(self) -> None:
        if self.scheduler is None or self.scheduler_interval != "epoch":
            return
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            last = self.state.history[-1]
            watched = last.validation_loss
            self.scheduler.step(last.train_loss if watched is None else watched)
        else:
            self.scheduler.step()

    @property
    def _stopping(self) -> bool:
        """With several hosts, what they agreed on in the last step."""
        return self.stop.requested if self.hosts is None else self.hosts.stopping

    def _save_is_due(self) -> bool:
        config = self.plan.checkpoint
        if config.every_steps is not None and self.state.step % config.every_steps == 0:
            return True
        return 0 < config.every_s <= time.monotonic() - self._saved_at_s

    def _save(self) -> None:
        if self.store is None:
            return
        tensors, document = self.snapshot()
        self.checkpoint = self.store.save(self.state.step, tensors=tensors, document=document)
        self.saved_step = self.state.step
        self._saved_at_s = time.monotonic()
        self._spent("checkpoint", self.watch.lap("checkpoint"))

    def snapshot(self) -> Snapshot:
        """The run as it stands, for a checkpoint."""
        return snapshot(
            self.model,
            self.loss_fn,
            self.optimizer,
            self.scheduler,
            self.state,
            self.identity,
            {
                "num_threads": self.num_threads,
                "path": self.step.path,
                "precision": self.step.precision,
                "tuned": self.tuned,
                "programs": self.step.progress,
            },
            self.batches.state_dict(mid_epoch=self.state.batch > 0),
        )

    def _spent(self, phase: Phase, seconds: float) -> None:
        if self.monitor is not None:
            self.monitor.recorder.add(phase, seconds)

    def _show(self, loss: float, now_s: float | None = None) -> None:
        if self.on_progress is None:
            return
        now_s = time.monotonic() if now_s is None else now_s
        if now_s - self._shown_at_s < _PROGRESS_EVERY_S:
            return
        self._shown_at_s = time.monotonic()
        state, rate = self.state, self.samples_per_s
        total_steps = self._total_steps()
        left = None
        if total_steps is not None:
            left = (total_steps - state.step) * self.identity.batch_size
        self.on_progress(
            Progress(
                step=state.step,
                total_steps=total_steps,
                epoch=min(state.epoch, self.epochs - 1),
                epochs=self.epochs,
                epochs_done=state.epoch,
                loss=loss,
                samples_per_s=rate,
                remaining_s=left / rate if rate and left is not None else None,
                validation_accuracy=state.history[-1].validation_accuracy
                if state.history
                else None,
            )
        )

    def _total_steps(self) -> int | None:
        """Of the whole run; ``None``: not known."""
        batches = self.batches.num_batches
        if batches is None:
            return self.max_steps
        total = self.epochs * batches
        return total if self.max_steps is None else min(total, self.max_steps)

    def _diverged(self, loss: float) -> DivergedError:
        kept = "" if self.checkpoint is None else f"; the last checkpoint is {self.checkpoint}"
        rate = self.optimizer.param_groups[0]["lr"]
        return DivergedError(
            "the loss must stay finite",
            got=f"{loss} at step {self.state.step + 1}, learning rate {rate:g}{kept}",
            next_step="lower the learning rate, or clip gradients",
        )
