"""``FitRequest``: what one call of ``Trainer.fit`` was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.batch import ToBatch
from ..machine import Ceilings, Machine
from ..monitor import PerformanceMonitor
from ..plan import Plan
from ..sealed import Sealed
from .arguments import check_arguments
from .parts import TrainingParts
from .progress import Progress


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """The trainer's own values and the arguments of ``fit``; see ``Trainer`` for each.

    Attributes:
        asked: the plan as the trainer has it, not resolved.
    """

    parts: TrainingParts
    asked: Plan
    machine: Machine
    ceilings: Ceilings | None
    data: Any
    validation: Any
    batch_size: int | None
    epochs: int
    seed: int
    drop_last: bool
    to_batch: ToBatch | None
    target_accuracy: float | None
    max_steps: int | None
    checkpoint_dir: Path | Sealed | None
    resume: bool
    fit_memory: bool
    on_progress: Callable[[Progress], None] | None
    monitor: PerformanceMonitor | bool
    on_losses: Callable[[list[float]], None] | None

    def check(self) -> None:
        """Raises InputError where an argument is outside its rule."""
        check_arguments(
            self.batch_size, self.epochs, self.target_accuracy, self.max_steps, self.validation
        )

    def agreed(self) -> dict[str, Any]:
        """What all hosts of a run must have been told alike."""
        parts = self.parts
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "drop_last": self.drop_last,
            "target_accuracy": self.target_accuracy,
            "resume": self.resume,
            "checkpoint_dir": self.checkpoint_dir is not None,
            **parts.limits,
            "scheduler": type(parts.scheduler).__name__,
            "scheduler_interval": parts.scheduler_interval,
        }
