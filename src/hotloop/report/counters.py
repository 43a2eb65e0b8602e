"""What the kernel and the processor counted over the run: CPU time, waiting, caches."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from ..units import format_bytes, format_seconds, format_share
from .document import Document
from .elements import UNKNOWN, Child, facts, note, section, table

_MOST_ROWS = 12


def counters(report: Document) -> Element | None:
    """The section; ``None`` for a report without a monitor's figures."""
    performance = report.at("performance")
    if not performance:
        return None
    rows = _processor(performance.at("cpu"))
    parts: list[Child] = [facts(rows) if rows else note(f"Processor time: {UNKNOWN}.")]
    parts += _others(performance.at("cpu"))
    parts += _caches(performance.at("cache"))
    parts += _hot_spots(performance)
    sampling, duration = performance.amount("sampling_s"), performance.amount("duration_s")
    if sampling is not None and duration:
        parts.append(
            note(f"Watching took {format_seconds(sampling)} of CPU time in "
                 f"{format_seconds(duration)}: {sampling / duration:.2%}.")
        )  # fmt: skip
    return section("counters", "Processor and caches", parts)


def _processor(cpu: Document) -> list[tuple[str, str]]:
    rows = []
    if (share := cpu.amount("cpu_fraction")) is not None:
        rows.append(("use of the usable CPUs", format_share(share)))
    for key, title in (
        ("user_s", "user"), ("system_s", "system"), ("children_s", "child processes"),
        ("others_s", "other processes"), ("steal_s", "taken by the hypervisor"),
        ("run_delay_s", "threads waited for a CPU"),
    ):  # fmt: skip
        if (seconds := cpu.amount(key)) is not None:
            rows.append((title, format_seconds(seconds)))
    if (throttled := cpu.count("throttled_periods")) is not None:
        periods, lost = cpu.count("periods"), cpu.amount("throttled_s")
        of = "" if periods is None else f" of {periods:,} periods"
        cost = "" if lost is None else f", {format_seconds(lost)}"
        rows.append(("throttled by the quota", f"{throttled:,}{of}{cost}"))
    own, forced = cpu.count("voluntary_switches"), cpu.count("involuntary_switches")
    if own is not None and forced is not None:
        rows.append(("context switches", f"{own + forced:,}, {forced:,} of them forced"))
    if (moved := cpu.count("migrations")) is not None:
        rows.append(("changes of CPU", f"{moved:,}"))
    frequency, most = cpu.amount("frequency_hz"), cpu.amount("max_frequency_hz")
    if frequency:
        of = "" if not most else f" of {most / 1e9:.2f}"
        rows.append(("clock", f"{frequency / 1e9:.2f}{of} GHz"))
    return rows


def _others(cpu: Document) -> list[Child]:
    """Who else used the CPUs."""
    rows = [
        (
            other.text("name") or "unnamed",
            _number(other, "process"),
            format_seconds(other.amount("cpu_s")),
            _number(other, "cpu"),
        )
        for other in cpu.items("others")[:_MOST_ROWS]
    ]
    head = ("process", "number", "CPU time", "seen on CPU")
    return [table("Other processes on these CPUs", head, rows, right=(1, 2, 3))] if rows else []


def _number(record: Document, key: str) -> str:
    value = record.count(key)
    return "–" if value is None else str(value)


_WAITING = {"data_wait": "while the step waited for data", "step": "in the step"}


def _hot_spots(performance: Document) -> list[Child]:
    """Where Python code was seen, which a step should not wait for."""
    rows = []
    for spot in performance.items("hot_spots")[:_MOST_ROWS]:
        place = spot.text("file") or "?"
        line, share = spot.count("line"), spot.amount("share")
        rows.append(
            (
                spot.text("function") or "?",
                place if line is None else f"{place}:{line}",
                _WAITING.get(spot.text("phase") or "", "–"),
                UNKNOWN if share is None else format_share(share),
            )
        )
    head = ("function", "where", "when", "of the looks then")
    return [table("Python code that was seen running", head, rows, right=(3,))] if rows else []


def _caches(cache: Document) -> list[Child]:
    source = cache.text("source")
    if source not in ("measured", "modelled"):
        return [note(f"Caches: {UNKNOWN}.")]
    rows = []
    for level in cache.items("levels"):
        size, needed = level.amount("size_bytes"), level.amount("working_set_bytes")
        fits, misses = level.flag("fits"), level.count("misses")
        rows.append(
            (
                f"L{level.count('level') or '?'}",
                UNKNOWN if size is None else format_bytes(size),
                UNKNOWN if needed is None else format_bytes(needed),
                UNKNOWN if fits is None else "yes" if fits else "no",
                UNKNOWN if misses is None else f"{misses:,}",
            )
        )
    head = ("cache", "size", "a step touches (modelled)", "fits", "misses (counted)")
    parts: list[Child] = []
    if rows:
        parts.append(table(f"Caches, {source}", head, rows, right=(1, 2, 3, 4)))
    cycles, done = cache.amount("cycles"), cache.amount("instructions")
    if cycles and done is not None:
        parts.append(note(f"{done / cycles:.2f} instructions a cycle, counted."))
    reason = cache.text("reason")
    if source == "modelled":
        parts.append(note(f"Hardware counters: {UNKNOWN}" + (f" ({reason})." if reason else ".")))
    return parts
