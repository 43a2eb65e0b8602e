"""Where a run stands: what is counted, what a checkpoint holds of it, what a progress bar shows."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

# Points of the loss curve kept; past twice as many, every other one is dropped.
_CURVE_POINTS = 1000


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch.

    Attributes:
        epoch: counted from 0.
        steps: optimizer steps since the start of the run.
        train_loss: mean over the samples of the epoch, each before its update.
        validation_loss, validation_accuracy: after the epoch; ``None``: not evaluated, or the
            targets are not classes.
        learning_rate: of the first parameter group in the epoch's last step.
        train_s: seconds of training in the epoch, evaluation and checkpoints left out.
        samples_per_s: samples over ``train_s``.
    """

    epoch: int
    steps: int
    train_loss: float
    validation_loss: float | None
    validation_accuracy: float | None
    learning_rate: float
    train_s: float
    samples_per_s: float


@dataclass
class RunState:
    """What a checkpoint must hold besides tensors, to go on exactly where it was.

    Attributes:
        step: optimizer steps done. epoch: the epoch under way. batch: batches of it done.
        loss_sum: of the epoch, weighted by samples. samples: of the epoch.
        train_s: seconds of the epoch.
        history: finished epochs.
        curve: ``[step, loss]`` at ``curve_stride`` steps.
        stopped: why the run ended; ``None`` while it goes on.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    samples: int = 0
    train_s: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    curve_stride: int = 1
    stopped: str | None = None

    def note_step(self, loss: float, num_samples: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.batch += 1
        self.loss_sum += loss * num_samples
        self.samples += num_samples
        if self.step % self.curve_stride == 0:
            self.curve.append((self.step, loss))
            if len(self.curve) > 2 * _CURVE_POINTS:
                self.curve_stride *= 2
                self.curve = [p for p in self.curve if p[0] % self.curve_stride == 0]

    def finish_epoch(
        self, *, learning_rate: float, loss: float | None, accuracy: float | None
    ) -> None:
        """Record the epoch under way and begin the next."""
        self.history.append(
            EpochRecord(
                epoch=self.epoch,
                steps=self.step,
                train_loss=self.loss_sum / self.samples,
                validation_loss=loss,
                validation_accuracy=accuracy,
                learning_rate=learning_rate,
                train_s=self.train_s,
                samples_per_s=self.samples / self.train_s,
            )
        )
        self.epoch += 1
        self.batch = self.samples = 0
        self.loss_sum = self.train_s = 0.0

    def restart_epoch(self) -> None:
        """Forget what was done of the epoch under way: its batches come again."""
        self.batch = self.samples = 0
        self.loss_sum = self.train_s = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        document = dataclasses.asdict(self)
        document["curve"] = [list(point) for point in self.curve]
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> RunState:
        """What ``to_dict`` wrote."""
        history = [EpochRecord(**record) for record in document["history"]]
        curve = [(int(step), float(loss)) for step, loss in document["curve"]]
        return cls(**{**document, "history": history, "curve": curve})


@dataclass(frozen=True)
class Progress:
    """What a progress bar needs, about ten times a second.

    Attributes:
        step, total_steps: optimizer steps done and in the whole run; ``None``: not known.
        epoch, epochs: the epoch under way, from 0, and their number.
        epochs_done: finished epochs.
        loss: of the last batch.
        samples_per_s: over this call of ``fit``; ``None`` at its start.
        remaining_s: at that rate; ``None`` at its start, or not known.
        validation_accuracy: of the last finished epoch, if evaluated.
    """

    step: int
    total_steps: int | None
    epoch: int
    epochs: int
    epochs_done: int
    loss: float
    samples_per_s: float | None
    remaining_s: float | None
    validation_accuracy: float | None


class Stopwatch:
    """Seconds by phase; phases do not overlap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._lap = self._started

    def lap(self, phase: str) -> float:
        """Count what passed since the last lap to ``phase``; returns it."""
        now = time.perf_counter()
        passed = now - self._lap
        self.seconds[phase] = self.seconds.get(phase, 0.0) + passed
        self._lap = now
        return passed

    @property
    def total_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started
