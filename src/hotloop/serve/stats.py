"""Counts of a server, kept by the loop's thread alone and written as Prometheus' text."""

from __future__ import annotations

import bisect
import collections
import time
from collections.abc import Iterable

from ..monitor import resident_bytes
from ..monitor.prometheus import header_lines, number_text

LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0,
    5.0, 10.0,
)  # fmt: skip
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_RECENT = 512


class Histogram:
    """Counts by upper bound, as Prometheus has them."""

    __slots__ = ("bounds", "count", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """One more value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value
        self.count += 1

    def lines(self, name: str, labels: str = "") -> list[str]:
        """Its lines in the text format."""
        lines, below = [], 0
        more = f"{labels}," if labels else ""
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            below += count
            edge = "+Inf" if bound is None else number_text(bound)
            lines.append(f'hotloop_{name}_bucket{{{more}le="{edge}"}} {below}')
        tail = f"{{{labels}}}" if labels else ""
        lines.append(f"hotloop_{name}_sum{tail} {number_text(self.total)}")
        lines.append(f"hotloop_{name}_count{tail} {self.count}")
        return lines


class Stats:
    """What the server has done so far."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.latency = Histogram(LATENCY_BUCKETS_S)
        self.queue_wait = Histogram(LATENCY_BUCKETS_S)
        self.batch_rows = Histogram(ROW_BUCKETS)
        self.engine_time = Histogram(LATENCY_BUCKETS_S)
        self.rows = 0
        self.reloads = 0
        self.reload_failures = 0
        # For the page: newest last.
        self.recent_latency_s: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self.recent_rows: collections.deque[int] = collections.deque(maxlen=_RECENT)

    def batch(self, rows: int, engine_s: float, waits_s: list[float]) -> None:
        """A call of the engine is done."""
        self.rows += rows
        self.batch_rows.add(rows)
        self.recent_rows.append(rows)
        self.engine_time.add(engine_s)
        for wait in waits_s:
            self.queue_wait.add(wait)

    def answered(self, route: str, status: int, latency_s: float) -> None:
        """A request was answered."""
        self.requests[route, status] += 1
        if status == 200 and route in ("infer", "predict"):
            self.latency.add(latency_s)
            self.recent_latency_s.append(latency_s)

    def percentiles_s(self) -> dict[str, float | None]:
        """Of the latest answers."""
        ordered = sorted(self.recent_latency_s)
        if not ordered:
            return {"p50": None, "p99": None}
        return {
            "p50": ordered[len(ordered) // 2],
            "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        }

    def prometheus(self, gauges: Iterable[tuple[str, str, float]]) -> bytes:
        """All counts, and the gauges given as name, help and value."""
        lines = header_lines("serve_requests_total", "counter", "Requests answered.")
        lines += [
            f'hotloop_serve_requests_total{{route="{route}",code="{code}"}} {count}'
            for (route, code), count in sorted(self.requests.items())
        ]
        lines += header_lines("serve_dropped_total", "counter", "Requests refused or not run, why.")
        lines += [
            f'hotloop_serve_dropped_total{{reason="{reason}"}} {count}'
            for reason, count in sorted(self.dropped.items())
        ]
        for name, count, text in (
            ("serve_rows_total", self.rows, "Rows the engine answered."),
            ("serve_reloads_total", self.reloads, "Models loaded while serving."),
            ("serve_reload_failures_total", self.reload_failures, "Models that could not be."),
        ):
            lines += [*header_lines(name, "counter", text), f"hotloop_{name} {count}"]
        for name, histogram, text in (
            ("serve_latency_seconds", self.latency, "First byte of a request to its answer."),
            ("serve_queue_seconds", self.queue_wait, "Waiting before the call of the engine."),
            ("serve_batch_rows", self.batch_rows, "Rows of a call."),
            ("serve_engine_seconds", self.engine_time, "A call of the engine."),
        ):
            lines += [*header_lines(name, "histogram", text), *histogram.lines(name)]
        resident = resident_bytes()
        if resident is not None:
            gauges = [*gauges, ("memory_resident_bytes", "Resident memory.", resident)]
        for name, text, value in gauges:
            lines += [*header_lines(name, "gauge", text), f"hotloop_{name} {number_text(value)}"]
        return ("\n".join(lines) + "\n").encode()
