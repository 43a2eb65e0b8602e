"""The learning curve of a report as a picture."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import MissingExtraError, StorageError
from .report import TrainReport

# Fraction of the way a smoothed point moves to the next loss: the noise of single batches hides
# the course of thousands of them.
_SMOOTHING = 0.05


def save_curve(report: TrainReport, path: str | os.PathLike[str]) -> Path:
    """Draw loss by step, and validation accuracy by epoch where there is one.

    The format follows the file name: ``.png`` or ``.svg``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("drawing the learning curve", "matplotlib", "plot") from None
    path = Path(path)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [step for step, _ in report.curve]
    losses = [loss for _, loss in report.curve]
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="loss, each batch")
    axes.plot(steps, _smoothed(losses), color="#1f4e8c", linewidth=1.6, label="loss, smoothed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    evaluated = [
        (record.steps, record.validation_accuracy)
        for record in report.history
        if record.validation_accuracy is not None
    ]
    if evaluated:
        right = axes.twinx()
        right.plot(*zip(*evaluated, strict=True), "o-", color="#c2571a", label="accuracy, test")
        right.set_ylabel("accuracy")
        least = min(accuracy for _, accuracy in evaluated)
        right.set_ylim(max(0.0, 1 - 2 * (1 - least)) if least < 1 else 0.9, 1.0)
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels, loc="center right")
    axes.set_title(f"{report.data}\nbatch {report.batch_size}", fontsize=9)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path} could not be written", got=error.strerror, next_step="choose another folder"
        ) from error
    return path


def _smoothed(values: list[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        last = smooth[-1] if smooth else value
        smooth.append(last + _SMOOTHING * (value - last))
    return smooth
