"""``Trainer``: from data to a trained model, inside a known memory, resumable at any step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..machine import Ceilings, Machine
from ..monitor import PerformanceMonitor
from ..plan import Plan
from ..sealed import Sealed
from ..step.check import LossFn, check_parts
from .parts import TrainingParts
from .progress import Progress, Stopwatch
from .report import TrainReport
from .request import FitRequest
from .run import run_fit


class Trainer:
    """Trains a model on data of any kind.

    Args:
        model: any ``torch.nn.Module``, on the CPU or on one CUDA device.
        loss_fn: ``loss_fn(model(x), y)`` gives a scalar, a mean over the samples; where the data
            has no ``y``, ``loss_fn(model(x))``.
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
        batch_size: int | None = None,
        epochs: int = 1,
        *,
        validation: Any = None,
        seed: int = 0,
        drop_last: bool = False,
        to_batch: Callable[[Any], Any] | None = None,
        target_accuracy: float | None = None,
        max_steps: int | None = None,
        checkpoint_dir: str | os.PathLike[str] | Sealed | None = None,
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
            data: ``(X, Y)`` or other trees of arrays, a map-style or iterable Dataset, a
                DataLoader, a function that yields the batches of an epoch, a path, ``"mnist"``, or
                a ``PackedDataset`` (``docs/data.md``). A batch of two parts is ``x`` and ``y``;
                anything else is ``x``, and the loss is ``loss_fn(answer)``.
            batch_size: samples of a step, default 64; the last step of an epoch may have fewer.
                Left out where the data comes in batches.
            epochs: of the whole run, those before a resume included.
            validation: the same kinds; evaluated after each epoch.
            drop_last: leave out the last batch of an epoch where it is smaller.
            to_batch: makes ``(x, y)`` or ``(x,)`` of what a loader gives for a batch, as in
                ``lambda b: (b["image"], b["label"])``.
            seed: of shuffling, augmentation and the model's own randomness (dropout).
            target_accuracy: stop after the epoch in which validation reaches it, 0 to 1.
            max_steps: stop after so many optimizer steps of the whole run.
            checkpoint_dir: where checkpoints go; none are written when ``None``. ``Sealed``: sealed
                ones (``docs/sealed-files.md``), which go with sealed or in-memory data.
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
        request = FitRequest(
            parts=self.parts,
            asked=self.plan,
            machine=self.machine,
            ceilings=self.ceilings,
            data=data,
            validation=validation,
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            drop_last=drop_last,
            to_batch=to_batch,
            target_accuracy=target_accuracy,
            max_steps=max_steps,
            checkpoint_dir=_place(checkpoint_dir),
            resume=resume,
            fit_memory=fit_memory,
            on_progress=on_progress,
            monitor=monitor,
            on_losses=on_losses,
        )
        request.check()
        return run_fit(request, watch)


def _place(folder: str | os.PathLike[str] | Sealed | None) -> Path | Sealed | None:
    return folder if folder is None or isinstance(folder, Sealed) else Path(folder)
