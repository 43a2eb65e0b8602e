"""The progress of training: a bar in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..units import format_rate, format_seconds

if TYPE_CHECKING:
    from ..train import Progress


@contextlib.contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Gives the function to call with each ``Progress``; ``None`` when quiet. Goes to stderr."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _line_an_epoch()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}{task.fields[of_all]} steps"),
            TextColumn("{task.fields[figures]}"),
        )
        with Bar(*columns, console=Console(stderr=True), expand=True) as bar:
            task = bar.add_task("train", total=None, epoch="-", figures="", of_all="")

            def show(progress: Progress) -> None:
                bar.update(
                    task,
                    completed=progress.step,
                    total=progress.total_steps,
                    epoch=f"{progress.epoch + 1}/{progress.epochs}",
                    figures=_figures(progress),
                    of_all="" if progress.total_steps is None else f"/{progress.total_steps}",
                )

            yield show


def _figures(progress: Progress) -> str:
    parts = [format_rate(progress.samples_per_s, "samples"), f"loss {progress.loss:.4f}"]
    if progress.validation_accuracy is not None:
        parts.append(f"accuracy {progress.validation_accuracy:.2%}")
    if progress.total_steps is not None:
        parts.append(f"{format_seconds(progress.remaining_s)} left")
    return ", ".join(parts)


def _line_an_epoch() -> Callable[[Progress], None]:
    shown = 0

    def show(progress: Progress) -> None:
        nonlocal shown
        if progress.epochs_done > shown:
            shown = progress.epochs_done
            epoch = f"epoch {shown}/{progress.epochs}"
            print(f"hotloop: {epoch}: {_figures(progress)}", file=sys.stderr, flush=True)

    return show
