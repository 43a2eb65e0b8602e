"""A report in Prometheus' text format, and a server of it on this host alone.

The format is a few lines of text (prometheus.io, "Exposition formats", text version 0.0.4), and the
standard library serves it: a client library would bring a registry of its own beside ours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from ..errors import InputError
from .metrics import PerformanceReport
from .monitor import PerformanceMonitor

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOOPBACK = "127.0.0.1"

# Name after ``hotloop_``, kind, path in the report, help.
_METRICS: tuple[tuple[str, str, str, str], ...] = (
    ("steps_total", "counter", "step.steps", "Optimizer steps."),
    ("samples_total", "counter", "step.samples", "Samples trained."),
    ("samples_per_second", "gauge", "step.samples_per_s", "Samples over training time."),
    ("median_call_seconds", "gauge", "step.median_call_s", "One call of the step."),
    ("checkpoints_total", "counter", "step.checkpoints", "Checkpoints written."),
    ("cpu_user_seconds_total", "counter", "cpu.user_s", "CPU time in user mode."),
    ("cpu_system_seconds_total", "counter", "cpu.system_s", "CPU time in the kernel."),
    ("cpu_children_seconds_total", "counter", "cpu.children_s", "CPU time of child processes."),
    ("cpu_others_seconds_total", "counter", "cpu.others_s", "CPU time of others on our CPUs."),
    ("cpu_steal_seconds_total", "counter", "cpu.steal_s", "CPU time the hypervisor took."),
    ("cpu_run_delay_seconds_total", "counter", "cpu.run_delay_s", "Threads waited for a CPU."),
    ("cpu_fraction", "gauge", "cpu.cpu_fraction", "Use of the usable CPUs, 0 to 1."),
    ("cpu_usable", "gauge", "cpu.usable_cpus", "CPUs that can run at once."),
    ("cpu_throttled_periods_total", "counter", "cpu.throttled_periods", "Quota periods stopped."),
    ("cpu_throttled_seconds_total", "counter", "cpu.throttled_s", "Time stopped by the quota."),
    ("cpu_migrations_total", "counter", "cpu.migrations", "Changes of CPU."),
    ("cpu_frequency_hertz", "gauge", "cpu.frequency_hz", "Mean over the usable CPUs."),
    ("memory_resident_bytes", "gauge", "memory.resident_bytes", "Resident memory."),
    ("memory_peak_resident_bytes", "gauge", "memory.peak_resident_bytes", "Its peak."),
    ("memory_minor_faults_total", "counter", "memory.minor_faults", "Page faults."),
    ("memory_major_faults_total", "counter", "memory.major_faults", "That waited for storage."),
    ("memory_huge_page_share", "gauge", "memory.huge_page_share", "Of anonymous memory."),
    ("memory_numa_local_share", "gauge", "memory.numa_local_share", "Of resident memory."),
    ("memory_swap_bytes", "gauge", "memory.swap_bytes", "Swapped out."),
    ("memory_swap_in_bytes_total", "counter", "memory.swap_in_bytes", "Read back, machine-wide."),
    ("memory_limit_bytes", "gauge", "memory.limit_bytes", "Limit of this process."),
    ("pool_hits_total", "counter", "memory.pool_hits", "Batch buffers lent at once."),
    ("pool_misses_total", "counter", "memory.pool_misses", "Waits for a batch buffer."),
    ("arena_peak_bytes", "gauge", "memory.arena_peak_bytes", "Peak of the tensor arena."),
    ("cycles_total", "counter", "cache.cycles", "Processor cycles, counted."),
    ("instructions_total", "counter", "cache.instructions", "Instructions, counted."),
    ("cache_references_total", "counter", "cache.cache_references", "Counted."),
    ("cache_misses_total", "counter", "cache.cache_misses", "Counted."),
    ("sampling_seconds_total", "counter", "sampling_s", "CPU time of the monitor's thread."),
)  # fmt: skip
_PHASES = ("data_wait", "compute", "synchronize", "update", "checkpoint", "other")


def prometheus_text(report: PerformanceReport) -> str:
    """The report as metrics; what is not known is left out."""
    lines: list[str] = []
    for name, kind, path, text in _METRICS:
        value = _at(report, path)
        if value is not None:
            lines += header_lines(name, kind, text)
            lines.append(f"hotloop_{name} {number_text(value)}")
    lines += header_lines("phase_seconds_total", "counter", "Time by phase of the loop.")
    for phase in _PHASES:
        seconds = getattr(report.step, f"{phase}_s")
        if seconds is not None:
            lines.append(f'hotloop_phase_seconds_total{{phase="{phase}"}} {number_text(seconds)}')
    for name, text, rows in _families(report):
        if rows:
            lines += header_lines(name, "gauge", text)
            lines += [f"hotloop_{name}{{{labels}}} {number_text(value)}" for labels, value in rows]
    return "\n".join(lines) + "\n"


def _families(report: PerformanceReport) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    cores = report.cpu.cores
    yield "core_busy", "Use of each CPU by everybody, 0 to 1.", [
        (f'cpu="{c.cpu}"', 1.0 - c.idle - (c.iowait or 0.0)) for c in cores if c.idle is not None
    ]  # fmt: skip
    yield "core_own", "Use of each CPU by this process, 0 to 1.", [
        (f'cpu="{c.cpu}"', c.own) for c in cores if c.own is not None
    ]  # fmt: skip
    yield "cache_working_set_bytes", "Of a step, modelled against each level.", [
        (f'level="{level.level}"', level.working_set_bytes)
        for level in report.cache.levels
        if level.working_set_bytes is not None
    ]  # fmt: skip
    yield "worker_chunks", "Chunks run by each worker.", [
        (f'worker="{w.worker}"', w.chunks) for w in report.workers
    ]  # fmt: skip
    yield "worker_wait_seconds", "Time each worker waited for others.", [
        (f'worker="{w.worker}"', w.wait_s) for w in report.workers
    ]  # fmt: skip


class MetricsServer:
    """Serves ``/metrics`` of a monitor on the loopback interface, in a thread of its own.

    A scrape makes a report, which takes half a millisecond; nothing is done between scrapes.

    Args:
        monitor: whose reports. port: 0: any that is free.

    Attributes:
        port: where it listens.

    Raises:
        InputError: the port is taken, or not allowed.
    """

    def __init__(self, monitor: PerformanceMonitor, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.split("?")[0] != "/metrics":
                    self.send_error(404, "only /metrics is here")
                    return
                body = b""
                if monitor.has_report:
                    body = prometheus_text(monitor.collect_metrics(whole=False)).encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: a scrape is no news."""

        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                "the port of the metrics must be free",
                got=f"{port}: {error}",
                next_step="choose another with --metrics-port, or 0 for any",
            ) from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.5},
            name="hotloop-metrics", daemon=True,
        )  # fmt: skip

    def __enter__(self) -> MetricsServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def header_lines(name: str, kind: str, text: str) -> list[str]:
    """The two comment lines before a metric; ``name`` without its prefix."""
    return [f"# HELP hotloop_{name} {text}", f"# TYPE hotloop_{name} {kind}"]


def _at(report: PerformanceReport, path: str) -> Any:
    value: Any = report
    for name in path.split("."):
        value = getattr(value, name)
    return value


def number_text(value: float) -> str:
    """A value as the format writes it."""
    if isinstance(value, int):
        return str(value)
    return repr(float(value)) if math.isfinite(value) else "NaN"
