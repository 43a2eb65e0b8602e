"""The roofline: each operation of the step under what the machine can do, both axes logarithmic.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from ...units import format_rate, format_seconds, format_share
from ..document import Document
from .chart import Axis, Frame, Point, Size, chart, text
from .elements import UNKNOWN, Child, bar, note, section, swatch, table, tag
from .headline import flop_rate
from .phases import short_rate

_KINDS = ("product", "product and update", "convolution", "convolution backward")
_OTHER_KIND = 5
_MOST_LABELS = 14


@dataclass(frozen=True)
class Operation:
    """One row of the report's operations, as far as it can be read."""

    number: int
    kind: str
    shape: str
    kernel: str
    count: int
    seconds: float | None
    flop_per_s: float | None
    intensity: float | None
    share_of_ceiling: float | None
    time_share: float | None

    @property
    def colour(self) -> int:
        """Of its kind, in chart and table."""
        return _KINDS.index(self.kind) + 1 if self.kind in _KINDS else _OTHER_KIND


def operations(report: Document) -> list[Operation]:
    """Operations in the order of the report, the longest first."""
    found = []
    for number, row in enumerate(report.items("operations"), start=1):
        flop, moved = row.amount("flop"), row.amount("modelled_bytes")
        found.append(
            Operation(
                number=number,
                kind=row.text("kind") or "operation",
                shape=row.text("shape") or "",
                kernel=row.text("kernel") or "",
                count=row.count("count") or 1,
                seconds=row.amount("s"),
                flop_per_s=row.amount("flop_per_s") or None,
                intensity=flop / moved if flop and moved else None,
                share_of_ceiling=row.amount("share_of_ceiling"),
                time_share=row.amount("time_share"),
            )
        )
    return found


@dataclass(frozen=True)
class Roof:
    """A limit: FLOP/s, or bytes/s where ``memory``; and what it is."""

    rate: float
    name: str
    memory: bool


def roofs(report: Document, machine: Document) -> list[Roof]:
    """Measured limits at the run's thread count; at the best count where that was not measured."""
    threads = report.count("plan", "parallel", "num_workers") or report.count(
        "plan", "cpu", "num_threads"
    )
    found = []
    for dtype in ("float32", "bfloat16"):
        best = _best(machine, "matmul", "flop_per_s", threads, dtype=dtype)
        if best is not None:
            found.append(Roof(best[0], f"{dtype}, {format_rate(best[0], 'FLOP')}", False))
    ceiling = report.amount("ceiling_flop_per_s")
    if ceiling and not any(roof.name.startswith("float32") for roof in found):
        found.insert(0, Roof(ceiling, f"float32, {format_rate(ceiling, 'FLOP')}", False))
    best = _best(machine, "bandwidth", "bytes_per_s", threads)
    if best is not None:
        found.append(Roof(best[0], f"memory, {format_rate(best[0], 'B')}", True))
    return found


def _best(
    machine: Document, kind: str, rate: str, threads: int | None, dtype: str | None = None
) -> tuple[float, int | None] | None:
    rows = [
        (value, row.count("num_threads"))
        for row in machine.items("ceilings", kind)
        if (value := row.amount(rate, "median")) and (dtype is None or row.text("dtype") == dtype)
    ]
    at_threads = [row for row in rows if row[1] == threads]
    return max(at_threads or rows, key=lambda row: row[0], default=None)


def roofline(report: Document, machine: Document) -> Element:
    """The section: chart, what the marks mean, and the operations as a table."""
    found, limits = operations(report), roofs(report, machine)
    parts: list[Child] = []
    if not found:
        parts.append(note(_why_none(report)))
    parts += _drawing(report, found, limits)
    if found:
        parts += _step_bar(found)
        parts.append(_table(found))
    return section("roofline", "The step against the machine", parts)


def _why_none(report: Document) -> str:
    path = report.text("path")
    reason = {
        "parallel": "operations of workers overlap, and are not timed apart",
        "plain": "a plain step is not taken apart",
    }.get(path or "", "the report has none")
    return f"Operations of the step: {UNKNOWN} ({reason})."


def _drawing(report: Document, found: list[Operation], limits: list[Roof]) -> list[Child]:
    placed = [o for o in found if o.intensity and o.flop_per_s]
    whole = flop_rate(report)
    if not limits and not placed:
        return [note(f"Ceilings: {UNKNOWN}. hotloop machine --ceilings measures them.")]
    described = "; ".join(
        f"{o.number}: {o.kind} {o.shape}, {format_rate(o.flop_per_s, 'FLOP')} at "
        f"{o.intensity:.3g} FLOP a byte"
        for o in placed[:_MOST_LABELS]
    )
    said = f"Ceilings: {', '.join(roof.name for roof in limits) or UNKNOWN}. {described}."
    figure = chart("roofline", "Roofline: rate of each operation over its arithmetic intensity",
                   said, lambda size: _draw(size, placed, limits, whole))  # fmt: skip
    remarks = [
        "Higher is faster; further right, more arithmetic for each byte. ",
        "Hollow marks: the intensity is modelled, each operand read and each result written once. "
        if placed else None,
        "A mark above the memory line found its operands in a cache. " if placed else None,
        None if any(roof.memory for roof in limits)
        else f"Memory bandwidth: {UNKNOWN} (hotloop machine --ceilings). ",
        f"{len(found) - len(placed)} operations without recorded bytes are only in the table. "
        if len(placed) < len(found) else None,
    ]  # fmt: skip
    return [figure, _legend(placed), note(remarks)]


def _legend(placed: list[Operation]) -> Element | None:
    kinds = {o.kind if o.kind in _KINDS else "other": o.colour for o in placed}
    items = [
        tag("li", tag("svg", _mark(8, 8, colour, 5), width=16, height=16, class_="swatch",
                      aria_hidden="true"), kind)
        for kind, colour in sorted(kinds.items(), key=lambda pair: pair[1])
    ]  # fmt: skip
    return tag("ul", items, class_="legend") if items else None


def _draw(
    size: Size, placed: list[Operation], limits: list[Roof], whole: float | None
) -> list[Element]:
    points = [(o.intensity or 0.0, o.flop_per_s or 0.0) for o in placed]
    peak = max((roof.rate for roof in limits if not roof.memory), default=None)
    bandwidth = max((roof.rate for roof in limits if roof.memory), default=None)
    rates = [y for _, y in points] + [rate for rate in (peak, whole) if rate]
    ridge = peak / bandwidth if peak and bandwidth else None
    across = [x for x, _ in points] + ([ridge * 4, ridge / 16] if ridge else [])
    across, rates = across or [0.1, 100.0], rates or [bandwidth or 1.0]
    x = Axis(min(across) / 2, max(across) * 2, "FLOP a byte", lambda v: f"{v:g}", log=True)
    low = min([*rates, *([bandwidth * x.low] if bandwidth else [])]) / 1.6
    y = Axis(low, max(rates) * 2.2, "FLOP/s", short_rate, log=True)
    frame = Frame(size, x, y)
    marks = [*frame.axes(), *_limits(frame, limits)]
    if whole and y.low <= whole <= y.high:
        at = frame.at(x.low, whole)
        marks.append(frame.line([(x.low, whole), (x.high, whole)], "whole"))
        marks.append(
            text(at[0] + 6, at[1] - 5, f"whole step, {format_rate(whole, 'FLOP')}", "label")
        )
    pixels = [frame.at(*point) for point in points]
    for operation, (px, py) in reversed(list(zip(placed, pixels, strict=True))):
        marks.append(_mark(px, py, operation.colour, 6))
    labels = _labels(pixels[:_MOST_LABELS], size)
    for operation, place in zip(placed, labels, strict=False):
        if place is not None:
            marks.append(text(*place, str(operation.number), "number", anchor="middle"))
    return marks


def _limits(frame: Frame, limits: list[Roof]) -> list[Element]:
    marks = []
    peak = max((roof.rate for roof in limits if not roof.memory), default=None)
    bandwidth = max((roof.rate for roof in limits if roof.memory), default=None)
    right = frame.size.width - frame.size.right
    for roof in limits:
        if roof.memory:
            end = min(frame.x.high, (peak or frame.y.high) / roof.rate)
            start = max(frame.x.low, frame.y.low / roof.rate)
            if start < end:
                marks.append(
                    frame.line([(start, start * roof.rate), (end, end * roof.rate)], "roof")
                )
                px, py = frame.at(start, start * roof.rate)
                marks.append(text(px + 16, py - 4, roof.name, "label"))
        else:
            start = frame.x.low if bandwidth is None else max(frame.x.low, roof.rate / bandwidth)
            marks.append(frame.line([(start, roof.rate), (frame.x.high, roof.rate)], "roof"))
            _, py = frame.at(start, roof.rate)
            marks.append(text(right - 2, py - 6, roof.name, "label", anchor="end"))
    return marks


def _mark(x: float, y: float, colour: int, r: float) -> Element:
    """A hollow mark; its form says the kind as its colour does."""
    class_ = f"mark line{colour}"
    if colour == 1:
        return tag("circle", cx=x, cy=y, r=r, class_=class_)
    if colour == 2:
        return tag("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, class_=class_)
    corners = {
        3: [(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
        4: [(0.0, -1.2), (1.2, 0.9), (-1.2, 0.9)],
    }.get(colour, [(-1.2, -0.9), (1.2, -0.9), (0.0, 1.2)])
    steps = " L ".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in corners)
    return tag("path", d=f"M {steps} Z", class_=class_)


def _labels(pixels: Sequence[Point], size: Size) -> list[Point | None]:
    """Where the number of each mark goes: the first free place around it, or nowhere."""
    taken = [(x, y - 4.0) for x, y in pixels]
    places: list[Point | None] = []
    for px, py in pixels:
        place = None
        for radius in (15, 23):
            for eighth in (7, 1, 5, 3, 6, 2, 0, 4):
                angle = eighth * math.pi / 4
                x, y = px + radius * math.cos(angle), py + 4 + radius * math.sin(angle)
                inside = (
                    size.left + 6 < x < size.width - 6 and size.top < y < size.height - size.bottom
                )
                if inside and all(
                    abs(x - ox) > 13 or abs(y - 4 - oy) > 13
                    for ox, oy in taken
                    if (ox, oy) != (px, py - 4.0)
                ):
                    place = (x, y)
                    break
            if place is not None:
                taken.append((place[0], place[1] - 4))
                break
        places.append(place)
    return places


def _step_bar(found: list[Operation]) -> list[Child]:
    shares = [(o, o.time_share) for o in found if o.time_share]
    if not shares:
        return []
    known = sum(share for _, share in shares)
    whole = max(1.0, known)
    parts = [(o.colour, share) for o, share in shares]
    said = "A mean step: " + ", ".join(
        f"{o.number} {format_share(share)}" for o, share in shares[:_MOST_LABELS]
    )
    rest = max(0.0, whole - known)
    said += f", everything else {format_share(rest)}"
    return [tag("h3", "A mean step"), bar(said, [*parts, (8, rest)], whole, height=30)]


def _table(found: list[Operation]) -> Element:
    rows: list[tuple[Child, ...]] = []
    for o in found:
        kind = o.kind if o.count == 1 else f"{o.count:,} x {o.kind}"
        rows.append(
            (
                [swatch(o.colour), f"{o.number} {kind}"], o.shape, o.kernel,
                format_seconds(o.seconds) if o.seconds is not None else UNKNOWN,
                format_rate(o.flop_per_s, "FLOP") if o.flop_per_s else UNKNOWN,
                format_share(o.share_of_ceiling) if o.share_of_ceiling is not None else UNKNOWN,
                "not recorded" if o.intensity is None else f"{o.intensity:.3g}",
                format_share(o.time_share) if o.time_share is not None else UNKNOWN,
            )
        )  # fmt: skip
    if all(o.time_share is not None for o in found):
        rest = 1 - sum(o.time_share or 0.0 for o in found)
        rows.append(
            ([swatch(8), "everything else"], "", "", "", "", "", "", format_share(max(0.0, rest)))
        )
    head = ("operation", "shape", "kernel", "one takes", "rate", "of ceiling", "FLOP a byte",
            "of a step")  # fmt: skip
    return table("Operations of a step, each timed alone", head, rows, right=(3, 4, 5, 6, 7))
