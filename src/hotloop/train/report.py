"""``TrainReport``: what a run did, as plain values."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from ..files import write_text_atomically
from ..machine import Ceilings, Machine
from ..memory import Budget
from ..monitor import Optimization, PerformanceReport
from .progress import EpochRecord

# Raised when a key of the JSON changes its meaning.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What one call of ``Trainer.fit`` did.

    Attributes:
        model: class name. parameters: how many. data: description. batch_size: samples a step.
        steps: optimizer steps of the whole run, resumed parts included.
        epochs: finished epochs. stopped: ``"epochs done"``, ``"target accuracy reached"``,
            ``"interrupted"`` or ``"max steps reached"``.
        train_loss: mean over the last finished epoch.
        validation_loss, validation_accuracy: after it; ``None``: not evaluated.
        history: one record an epoch. curve: ``(step, loss)`` over the run.
        samples_per_s: samples trained by this call over ``train_s``.
        train_s: seconds in batches and steps; wall_s: of the whole call.
        time_s: seconds by phase: data_wait, step, evaluate, checkpoint, prepare.
        flop_per_sample: training, forward and backward; ``None``: not countable.
        share_of_ceiling: ``flop_per_sample * samples_per_s`` over the measured float32 matrix
            product rate at this thread count; ``None``: not measured.
        ceiling_flop_per_s: that rate.
        budget: the prediction, in bytes by component.
        used_bytes: counted at the end, by the same names: parameters, batch data and optimizer
            state. ``arena`` has the rest of what a step takes.
        peak_resident_bytes: measured over this call.
        prediction_error: predicted over measured, less 1; ``None``: one of them is unknown.
        arena: use of the tensor arena in bytes; ``None``: the system allocator was used.
        path: how steps were run, and path_reason why. precision: of forward and backward.
        operations: matrix products and convolutions of the program, the longest first: kind,
            shape, count, kernel, ``s``, ``flop`` and ``modelled_bytes`` of one, ``flop_per_s``,
            ``share_of_ceiling``, ``time_share`` of a mean step, ``candidates_s``; timed alone
            (``step.operations``).
        plan: every knob as it was resolved. machine: ``Machine.to_dict``, and what it can do under
            ``ceilings`` (``None``: not measured). versions: what ran.
        checkpoint: folder of the last checkpoint; ``None``: none was asked for.
        notes: what the reader should know; one line each.
        performance: what the run did to the machine, from its first step to its last; ``None``:
            nobody looked. optimizations: what may help, the most worthwhile first.
    """

    model: str
    parameters: int
    data: str
    batch_size: int
    steps: int
    epochs: int
    stopped: str
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    history: tuple[EpochRecord, ...]
    curve: tuple[tuple[int, float], ...]
    samples_per_s: float | None
    train_s: float
    wall_s: float
    time_s: dict[str, float]
    flop_per_sample: float | None
    share_of_ceiling: float | None
    ceiling_flop_per_s: float | None
    budget: Budget
    peak_resident_bytes: int | None
    prediction_error: float | None
    arena: dict[str, int] | None
    path: str
    path_reason: str
    precision: str
    operations: tuple[dict[str, Any], ...]
    plan: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    checkpoint: str | None
    used_bytes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    performance: PerformanceReport | None = None
    optimizations: tuple[Optimization, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        document = dataclasses.asdict(self)
        document["budget"] = self.budget.to_dict()
        if self.performance is not None:
            document["performance"] = self.performance.to_dict()
        return {"format": FORMAT, **document}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as JSON, whole or not at all.

        Raises:
            StorageError: the file cannot be written.
        """
        path = Path(path)
        write_text_atomically(path, json.dumps(self.to_dict(), indent=2) + "\n")
        return path


def versions() -> dict[str, str]:
    """Versions that matter for speed and results."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }


def machine_document(machine: Machine, ceilings: Ceilings | None) -> dict[str, Any]:
    """The machine and its rates, as ``hotloop machine --ceilings --json`` prints them."""
    return {
        **machine.to_dict(),
        "ceilings": None if ceilings is None else ceilings.to_dict(),
    }
