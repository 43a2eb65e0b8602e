"""Flags that let others look at a run while it goes: a terminal, Prometheus, files."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..machine import Machine
from ..monitor import PerformanceMonitor

if TYPE_CHECKING:
    from ..train import Progress

_LINES_EVERY_S = 1.0
_EVENTS_EVERY_S = 2.0


def add_watch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group of flags."""
    group = parser.add_argument_group("watch", "what the run does to the machine, while it goes")
    group.add_argument("--live", action="store_true", help="draw it in the terminal")
    group.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="serve Prometheus metrics at http://127.0.0.1:PORT/metrics; 0: any free port",
    )
    group.add_argument(
        "--metrics-file", type=Path, metavar="FILE", help="append a line of JSON each second"
    )
    group.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write TensorBoard event files"
    )
    group.add_argument(
        "--no-monitor",
        dest="monitor",
        action="store_false",
        help="look at nothing, suggest nothing",
    )


@contextlib.contextmanager
def watching(
    args: argparse.Namespace, machine: Machine, say: Callable[[str], None]
) -> Iterator[tuple[PerformanceMonitor | None, Callable[[Progress], None] | None]]:
    """The monitor of a run, and what draws its progress; ``None`` where nobody looks.

    Raises:
        InputError: ``--no-monitor`` beside a flag that needs it; the port is taken.
        MissingExtraError: tensorboardX is not installed. StorageError: a file cannot be opened.
    """
    wanted = args.live or None, args.metrics_port, args.metrics_file, args.tensorboard
    if not args.monitor:
        if any(flag is not None for flag in wanted):
            raise InputError("--no-monitor leaves nothing to watch", next_step="leave it out")
        yield None, None
        return
    monitor = PerformanceMonitor(machine)
    show: Callable[[Progress], None] | None = None
    with contextlib.ExitStack() as stack:
        if args.metrics_file is not None:
            from ..monitor.sinks import JsonLines

            lines = JsonLines(args.metrics_file, monitor)
            stack.callback(lines.close)
            monitor.every(_LINES_EVERY_S, lines.write)
        if args.tensorboard is not None:
            from ..monitor.sinks import TensorBoardLog

            log = TensorBoardLog(args.tensorboard, monitor)
            stack.callback(log.close)
            monitor.every(_EVENTS_EVERY_S, log.write)
        if args.metrics_port is not None:
            from ..monitor.prometheus import LOOPBACK, MetricsServer

            server = stack.enter_context(MetricsServer(monitor, args.metrics_port))
            say(f"hotloop: metrics at http://{LOOPBACK}:{server.port}/metrics")
        if args.live:
            from .live_view import live

            show = stack.enter_context(live(monitor))
        yield monitor, show
        if monitor.has_report and (failure := monitor.collect_metrics().notes):
            print(f"hotloop: {failure[0]}", file=sys.stderr)
