"""Where reports go while a run is under way: lines of JSON, and TensorBoard's event files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, StorageError
from .metrics import PerformanceReport
from .monitor import PerformanceMonitor

# What grows with the run or never changes is left to the report at its end.
_LEFT_OUT = ("samples", "plan", "work", "hot_spots", "notes")


def json_line(report: PerformanceReport, time_s: float) -> str:
    """A report as one line of JSON, without what grows with the run.

    Args:
        time_s: seconds since 1970, for ``time_s`` of the line.
    """
    document: dict[str, Any] = {"time_s": time_s, **report.to_dict()}
    for name in _LEFT_OUT:
        del document[name]
    del document["cpu"]["threads"]
    last = report.samples[-1] if report.samples else None
    document["now"] = None if last is None else last.to_dict()
    return json.dumps(document)


class JsonLines:
    """Appends one line a call to a file; ``monitor.every(1.0, lines.write)``.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], monitor: PerformanceMonitor) -> None:
        self.path, self._monitor = Path(path), monitor
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise StorageError(
                f"{path} could not be opened for metrics", got=error.strerror,
                next_step="choose another with --metrics-file",
            ) from error  # fmt: skip

    def write(self) -> None:
        """Append the report of now."""
        self._file.write(json_line(self._monitor.collect_metrics(whole=False), time.time()) + "\n")

    def close(self) -> None:
        """Close the file. Twice is allowed."""
        self._file.close()


class TensorBoardLog:
    """Writes scalars to an event file; ``monitor.every(2.0, log.write)``.

    Args:
        folder: where TensorBoard looks (``tensorboard --logdir``).

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], monitor: PerformanceMonitor) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise MissingExtraError("--tensorboard", "tensorboardX", "tensorboard") from None
        self._monitor = monitor
        self._writer: Any = SummaryWriter(str(folder))

    def write(self) -> None:
        """Add the scalars of now, at the present step."""
        report = self._monitor.collect_metrics(whole=False)
        for name, value in scalars(report).items():
            self._writer.add_scalar(name, value, report.step.steps)
        self._writer.flush()

    def add_loss(self, step: int, loss: float) -> None:
        """Add a point of the loss."""
        self._writer.add_scalar("train/loss", loss, step)

    def close(self) -> None:
        """Close the file. Twice is allowed."""
        self._writer.close()


def scalars(report: PerformanceReport) -> dict[str, float]:
    """What is worth a curve, by name; what is not known is left out."""
    step, cpu, memory = report.step, report.cpu, report.memory
    last = report.samples[-1] if report.samples else None
    train_s = step.train_s or 1.0
    named: dict[str, float | None] = {
        "train/samples_per_s": None if last is None else last.samples_per_s,
        "train/median_call_s": step.median_call_s,
        "phase/data_wait_share": step.data_wait_s / train_s,
        "phase/synchronize_share": step.synchronize_s / train_s,
        "phase/checkpoint_s": step.checkpoint_s,
        "cpu/fraction": None if last is None else last.cpu_fraction,
        "cpu/run_delay_s": cpu.run_delay_s,
        "cpu/others_s": cpu.others_s,
        "cpu/throttled_periods": cpu.throttled_periods,
        "memory/resident_bytes": memory.resident_bytes,
        "memory/minor_faults": memory.minor_faults,
        "memory/swap_bytes": memory.swap_bytes,
    }
    return {name: float(value) for name, value in named.items() if value is not None}
