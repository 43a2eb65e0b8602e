"""Memory: each component as predicted, what was measured, and both over time."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element

from ..units import format_bytes, format_share
from .document import Document
from .elements import UNKNOWN, Child, bar, facts, keyed, note, section, table, tag
from .phases import over_time, series

_COLOURS = {
    "model_parameters_bytes": 1,
    "batch_data_bytes": 2,
    "gradient_buffers_bytes": 3,
    "optimizer_state_bytes": 4,
    "working_memory_bytes": 6,
    "runtime_base_bytes": 8,
    "enclave_overhead_bytes": 7,
}
# What the tensor arena holds; its peak is measured.
_IN_ARENA = ("gradient_buffers_bytes", "optimizer_state_bytes", "working_memory_bytes")
_MEASURED = 5


def components(report: Document) -> list[tuple[str, str, int, float | None]]:
    """Key, title, colour and predicted bytes of each component of the budget."""
    return [
        (key, key.removesuffix("_bytes").replace("_", " ").capitalize(), _COLOURS.get(key, 5),
         size.amount())
        for key, size in report.pairs("budget")
        if key.endswith("_bytes") and key != "total_bytes"
    ]  # fmt: skip


def memory(report: Document) -> Element:
    """The section."""
    halves = [tag("div", half) for half in (_table(report), _over_time(report))]
    return section(
        "memory", "Memory, predicted and measured", *_bars(report),
        tag("div", halves, class_="halves"), _kernel_facts(report),
    )  # fmt: skip


def _bars(report: Document) -> list[Child]:
    parts = [(colour, size) for _, _, colour, size in components(report) if size]
    predicted = sum(size for _, size in parts)
    peak = report.amount("peak_resident_bytes")
    whole = max(predicted, peak or 0.0)
    if whole <= 0:
        return []
    said = "Predicted: " + ", ".join(
        f"{title} {format_bytes(size)}" for _, title, _, size in components(report) if size
    )
    rows = []
    if parts:
        rows.append(_bar_row("predicted", format_bytes(predicted), bar(said, parts, whole)))
    if peak is not None:
        drawn = bar(f"Measured peak: {format_bytes(peak)}", [(_MEASURED, peak)], whole)
        rows.append(_bar_row("measured peak", format_bytes(peak), drawn))
    return [tag("div", rows, class_="bars")]


def _bar_row(name: str, size: str, drawn: Element) -> Element:
    return tag("div", tag("span", name), tag("span", size, class_="figure"), drawn, class_="row")


def _table(report: Document) -> list[Child]:
    rows: list[tuple[Child, ...]] = []
    for key, title, colour, size in components(report):
        used = report.amount("used_bytes", key)
        rows.append(
            (keyed(colour, title), UNKNOWN if size is None else format_bytes(size),
             "–" if used is None else format_bytes(used))
        )  # fmt: skip
    sizes = {key: size for key, _, _, size in components(report)}
    held = [sizes.get(key) for key in _IN_ARENA]
    arena = report.amount("arena", "peak_top_bytes")
    if arena is not None:
        together = None if None in held else sum(size or 0.0 for size in held)
        rows.append(
            ("of these, in the tensor arena", UNKNOWN if together is None
             else format_bytes(together), format_bytes(arena))
        )  # fmt: skip
    total, peak = report.amount("budget", "total_bytes"), report.amount("peak_resident_bytes")
    rows.append(
        (keyed(_MEASURED, "in all"), UNKNOWN if total is None else format_bytes(total),
         UNKNOWN if peak is None else format_bytes(peak))
    )  # fmt: skip
    grid = table("Memory by component", ("component", "predicted", "measured"), rows,
                 right=(1, 2), total=True)  # fmt: skip
    said = ["the peak of the process in all"]
    said += ["the peak of the tensor arena"] if arena is not None else []
    said += ["components as counted at the end of the run"] if report.at("used_bytes") else []
    return [grid, note(f"Measured: {', '.join(said)}.")]


def _over_time(report: Document) -> list[Child]:
    predicted = report.amount("budget", "total_bytes")
    limit = report.amount("performance", "memory", "limit_bytes")
    points = series(report, "resident_bytes")
    top = max([size for _, size in points] + [predicted or 0.0])
    # A limit far above would press the course of the run into a line at the bottom.
    levels = ((predicted, "predicted"), (limit if limit and limit < 1.5 * top else None, "limit"))
    lines = [(size, f"{name}, {format_bytes(size)}") for size, name in levels if size]
    unit = 1024.0 ** math.floor(math.log(max(top, 1.0), 1024))
    drawn = over_time("memory-time", "Resident memory over time", "resident", _MEASURED, points,
                      format_bytes, lines, unit)  # fmt: skip
    if drawn is None:
        return [note(f"Memory over time: {UNKNOWN}; this report has no samples of it.")]
    return [drawn]


def _kernel_facts(report: Document) -> Element | None:
    """What the kernel and the pools counted beside."""
    stats = report.at("performance", "memory")
    rows: list[tuple[str, str]] = []
    if (minor := stats.count("minor_faults")) is not None:
        major = stats.count("major_faults")
        rows.append(("page faults", f"{minor:,}, {major or 0:,} of them read a file"))
    if (share := stats.amount("huge_page_share")) is not None:
        rows.append(("in huge pages", format_share(share)))
    if (share := stats.amount("numa_local_share")) is not None:
        rows.append(("on the nodes it runs on", format_share(share)))
    if (hits := stats.count("pool_hits")) is not None:
        misses, most = stats.count("pool_misses"), stats.count("pool_high_water")
        words = f"{hits:,} buffers lent at once, {misses or 0:,} waits"
        rows.append(("batch pool", words if most is None else f"{words}, {most:,} lent at most"))
    if swap := stats.amount("swap_bytes"):
        rows.append(("swapped out", format_bytes(swap)))
    if (available := stats.amount("available_bytes")) is not None:
        rows.append(("still to be had", format_bytes(available)))
    return facts(rows) if rows else None
