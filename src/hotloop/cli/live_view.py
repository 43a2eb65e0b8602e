"""A run as it goes, in the terminal: progress, phases, CPUs, memory, and what may help."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import InputError
from ..monitor import Optimization, PerformanceMonitor, PerformanceReport, suggest
from ..units import format_bytes, format_rate, format_seconds, format_share

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..train import Progress

# The sampling thread draws, so that the step's thread never does.
_DRAW_EVERY_S = 1.0
_BAR = 24
_SHOWN = 3
_PHASES = {
    "data_wait_s": "waiting for data",
    "compute_s": "compute",
    "synchronize_s": "waiting for workers",
    "update_s": "update",
    "checkpoint_s": "checkpoints",
    "other_s": "evaluation",
}


def live_view(
    report: PerformanceReport,
    progress: Progress | None = None,
    suggestions: list[Optimization] | None = None,
) -> RenderableType:
    """One picture of a run, for rich to draw."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)

    def row(name: str, share: float | None, text: str) -> None:
        table.add_row(name, _bar(share), text)

    if progress is not None:
        total = progress.total_steps
        done = None if total is None else progress.step / max(1, total)
        of_all = "" if total is None else f" of {total:,}"
        row("steps", done, f"{progress.step:,}{of_all}, "
            f"{format_seconds(progress.remaining_s)} left, loss {progress.loss:.4f}")  # fmt: skip
    last = report.samples[-1] if report.samples else None
    rate = report.step.samples_per_s if last is None else last.samples_per_s
    table.add_row("rate", "", format_rate(rate, "samples"))
    spent_s = report.step.train_s + report.step.checkpoint_s + report.step.other_s
    for name, title in _PHASES.items():
        seconds = getattr(report.step, name)
        if seconds:
            row(title, seconds / spent_s, f"{format_share(seconds / spent_s)} of the time")
    for core in report.cpu.cores[:16]:
        if core.idle is None:
            continue
        own = "" if core.own is None else f", {format_share(core.own)} by this run"
        row(f"CPU {core.cpu}", 1 - core.idle, f"{format_share(1 - core.idle)} busy{own}")
    memory = report.memory
    if memory.resident_bytes is not None:
        limit = memory.limit_bytes
        share = memory.resident_bytes / limit if limit else None
        row("memory", share, f"{format_bytes(memory.resident_bytes)} of {format_bytes(limit)}, "
            f"peak {format_bytes(memory.peak_resident_bytes)}")  # fmt: skip
    lines: list[RenderableType] = [table]
    for item in (suggestions or [])[:_SHOWN]:
        lines.append(Text(f"may help: {item.title}", style="bold"))
        lines.append(Text(f"          {change_text(item)}", style="dim"))
    return Group(*lines)


def change_text(item: Optimization) -> str:
    """What to do, in one line."""
    if item.change.plan is not None:
        return "plan: " + ", ".join(f"{knob} = {value}" for knob, value in item.change.plan.items())
    return item.change.command or ""


@contextlib.contextmanager
def live(monitor: PerformanceMonitor) -> Iterator[Callable[[Progress], None]]:
    """Draws ``monitor`` on stderr while the context lasts; gives the function for ``on_progress``.

    Raises:
        InputError: stderr is no terminal.
    """
    if not sys.stderr.isatty():
        raise InputError("--live draws on a terminal", next_step="leave --live out")
    from rich.console import Console
    from rich.live import Live

    latest: list[Progress] = []

    def note(progress: Progress) -> None:
        latest[:] = [progress]

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as screen:

        def draw() -> None:
            report = monitor.collect_metrics(whole=False)
            found = suggest(report, monitor.machine)
            now = latest[0] if latest else None
            screen.update(live_view(report, now, found), refresh=True)

        monitor.every(_DRAW_EVERY_S, draw)
        yield note


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    full = round(_BAR * min(max(share, 0.0), 1.0))
    return "█" * full + "░" * (_BAR - full)
