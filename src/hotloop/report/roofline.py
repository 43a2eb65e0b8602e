"""The roofline: each operation of the step under what the machine can do, both axes logarithmic.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from ..units import format_rate
from .chart import WIDE, Axis, Frame, Point, Size, chart, text
from .document import Document
from .elements import UNKNOWN, Child, note, section, tag
from .headline import flop_rate
from .operations import KINDS, Operation, operations, operations_part
from .phases import short_rate

_MOST_LABELS = 14
# Pixels that a number beside a mark keeps free around itself.
_CLEAR = 13


@dataclass(frozen=True)
class Roof:
    """A measured limit.

    Attributes:
        rate: FLOP/s, or bytes/s where ``memory``. name: ``"float32"``, ``"memory"``, ...
        num_threads: with which it was measured; ``None``: not known.
    """

    rate: float
    name: str
    num_threads: int | None
    memory: bool = False

    @property
    def words(self) -> str:
        """Name and rate."""
        return f"{self.name}, {format_rate(self.rate, 'B' if self.memory else 'FLOP')}"


def roofs(report: Document, machine: Document) -> list[Roof]:
    """Limits at the run's thread count; at the best count where that was not measured."""
    threads = report.count("plan", "parallel", "num_workers")
    threads = report.count("plan", "cpu", "num_threads") if threads is None else threads
    found = []
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in machine.items("ceilings", "matmul") if row.text("dtype") == dtype]
        found.append(_best(rows, "flop_per_s", threads, dtype))
    ceiling = report.amount("ceiling_flop_per_s")
    if ceiling and found[0] is None:
        found[0] = Roof(ceiling, "float32", threads)
    rows = machine.items("ceilings", "bandwidth")
    found.append(_best(rows, "bytes_per_s", threads, "memory", memory=True))
    return [roof for roof in found if roof is not None]


def _best(
    rows: Sequence[Document], key: str, threads: int | None, name: str, *, memory: bool = False
) -> Roof | None:
    known = [
        Roof(rate, name, row.count("num_threads"), memory)
        for row in rows
        if (rate := row.amount(key, "median"))
    ]
    same = [roof for roof in known if roof.num_threads == threads]
    return max(same or known, key=lambda roof: roof.rate, default=None)


def roofline(report: Document, machine: Document) -> Element:
    """The section: chart, what the marks mean, and the operations as a table."""
    found, limits = operations(report), roofs(report, machine)
    parts: list[Child] = [] if found else [note(_why_none(report))]
    parts += _drawing(report, found, limits)
    return section("roofline", "The step against the machine", parts, operations_part(found))


def _why_none(report: Document) -> str:
    reason = {
        "parallel": "operations of workers overlap, and are not timed apart",
        "plain": "a plain step is not taken apart",
    }.get(report.text("path") or "", "the report has none")
    return f"Operations of the step: {UNKNOWN} ({reason})."


def _drawing(report: Document, found: list[Operation], limits: list[Roof]) -> list[Child]:
    placed = [o for o in found if o.intensity and o.flop_per_s]
    whole = flop_rate(report)
    if not limits and not placed:
        return [note(f"Ceilings: {UNKNOWN}. hotloop machine --ceilings measures them.")]
    marks = [
        f"{o.number}: {o.kind} {o.shape}, {format_rate(o.flop_per_s, 'FLOP')} at "
        f"{o.intensity:.3g} FLOP a byte"
        for o in placed[:_MOST_LABELS]
    ]
    ceilings = [f"Ceilings: {'; '.join(map(_told, limits)) or UNKNOWN}"]
    figure = chart(
        "roofline",
        "Roofline: rate of each operation over its arithmetic intensity",
        f"{'. '.join([*ceilings, *marks])}.",
        lambda size: _draw(size, placed, limits, whole),
    )
    return [figure, _legend(placed), note(*_remarks(found, placed, limits))]


def _told(roof: Roof) -> str:
    if roof.num_threads is None:
        return roof.words
    return f"{roof.words} with {roof.num_threads} thread{'s' if roof.num_threads != 1 else ''}"


def _remarks(found: list[Operation], placed: list[Operation], limits: list[Roof]) -> list[str]:
    said = ["Higher is faster; further right, more arithmetic for each byte."]
    if placed:
        said.append(
            "Hollow marks: the intensity is modelled, each operand read and each result written "
            "once. A mark above the memory line found its operands in a cache."
        )
    if limits:
        said.append(f"Lines, measured: {'; '.join(map(_told, limits))}.")
    if not any(roof.memory for roof in limits):
        said.append(f"Memory bandwidth: {UNKNOWN} (hotloop machine --ceilings).")
    if len(placed) < len(found):
        said.append(f"Only in the table, without recorded bytes: {len(found) - len(placed)}.")
    return [" ".join(said)]


def _legend(placed: list[Operation]) -> Element | None:
    kinds = {o.kind if o.kind in KINDS else "other": o.colour for o in placed}
    items = []
    for kind, colour in sorted(kinds.items(), key=lambda pair: pair[1]):
        drawn = tag("svg", _mark(7, 7, colour, 5), width=14, height=14, class_="swatch",
                    aria_hidden="true")  # fmt: skip
        items.append(tag("li", tag("span", drawn, tag("span", kind), class_="keyed")))
    return tag("ul", items, class_="legend") if items else None


def _draw(
    size: Size, placed: list[Operation], limits: list[Roof], whole: float | None
) -> list[Element]:
    frame = _frame(size, placed, limits, whole)
    marks = [*frame.axes(), *_roof_marks(frame, limits)]
    if whole and frame.y.low <= whole <= frame.y.high:
        marks.append(frame.line([(frame.x.low, whole), (frame.x.high, whole)], "whole"))
        left, y = frame.at(frame.x.low, whole)
        words = _fitting(size, "whole step", f"whole step, {format_rate(whole, 'FLOP')}")
        marks.append(text(left + 6, y + 16, words, "label"))
    pixels = [frame.at(o.intensity or 0.0, o.flop_per_s or 0.0) for o in placed]
    # The longest last: on top of the others.
    for operation, (x, y) in reversed(list(zip(placed, pixels, strict=True))):
        marks.append(_mark(x, y, operation.colour, 6))
    places = _free_places(pixels[:_MOST_LABELS], size)
    for operation, place in zip(placed, places, strict=False):
        if place is not None:
            marks.append(text(*place, str(operation.number), "number", anchor="middle"))
    return marks


def _frame(size: Size, placed: list[Operation], limits: list[Roof], whole: float | None) -> Frame:
    """Axes that show all marks and the ridge, where memory and arithmetic limit alike."""
    across = [o.intensity for o in placed if o.intensity]
    up = [o.flop_per_s for o in placed if o.flop_per_s]
    peaks = [roof.rate for roof in limits if not roof.memory]
    bandwidth = max((roof.rate for roof in limits if roof.memory), default=None)
    up += [*peaks, *([whole] if whole else [])]
    if bandwidth:
        ridges = [peak / bandwidth for peak in peaks] or [1.0]
        across += [min(ridges) / 16, max(ridges) * 4]
        up = up or [bandwidth]
    across = across or [0.1, 100.0]
    x = Axis(min(across) / 2, max(across) * 2, "FLOP a byte", lambda v: f"{v:g}", log=True)
    least = min([*up, *([bandwidth * x.low] if bandwidth else [])])
    return Frame(size, x, Axis(least / 1.6, max(up) * 2.2, "FLOP/s", short_rate, log=True))


def _roof_marks(frame: Frame, limits: list[Roof]) -> list[Element]:
    """The lines; their names stand at the left, where hardly an operation can be."""
    marks = []
    x, y = frame.x, frame.y
    peak = max((roof.rate for roof in limits if not roof.memory), default=y.high)
    bandwidth = max((roof.rate for roof in limits if roof.memory), default=None)
    for roof in limits:
        name = _fitting(frame.size, roof.name, roof.words)
        if roof.memory:
            first, last = max(x.low, y.low / roof.rate), min(x.high, peak / roof.rate)
            if first < last:
                ends = [(at, at * roof.rate) for at in (first, last)]
                marks.append(frame.line(ends, "roof"))
                marks.append(_along(frame.at(*ends[0]), frame.at(*ends[1]), name))
        else:
            ridge = x.low if bandwidth is None else roof.rate / bandwidth
            ridge = min(max(ridge, x.low), x.high)
            marks.append(frame.line([(x.low, roof.rate), (ridge, roof.rate)], "beyond"))
            marks.append(frame.line([(ridge, roof.rate), (x.high, roof.rate)], "roof"))
            left, up = frame.at(x.low, roof.rate)
            marks.append(text(left + 6, up - 6, name, "label"))
    return marks


def _fitting(size: Size, short: str, long: str) -> str:
    return long if size is WIDE else short


def _along(start: Point, end: Point, words: str) -> Element:
    """Words just above a line, turned as it is."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    x = start[0] + 14 * math.cos(angle) + 7 * math.sin(angle)
    y = start[1] + 14 * math.sin(angle) - 7 * math.cos(angle)
    return text(x, y, words, "label", degrees=math.degrees(angle))


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


def _free_places(pixels: Sequence[Point], size: Size) -> list[Point | None]:
    """Where the number of each mark goes: the first free place around it, or nowhere."""
    taken = list(pixels)
    places: list[Point | None] = []
    for own, (px, py) in enumerate(pixels):
        others = [point for at, point in enumerate(taken) if at != own]
        place = next(
            (
                (x, y)
                for radius in (15, 23)
                for eighth in (7, 1, 5, 3, 6, 2, 0, 4)
                for x, y in [_around(px, py, radius, eighth)]
                if size.left + 6 < x < size.width - 6
                and size.top < y < size.height - size.bottom
                and all(abs(x - ox) > _CLEAR or abs(y - oy) > _CLEAR for ox, oy in others)
            ),
            None,
        )
        if place is not None:
            taken.append(place)
            # Letters stand on their base line, half a letter below the middle.
            place = (place[0], place[1] + 4)
        places.append(place)
    return places


def _around(x: float, y: float, radius: float, eighth: int) -> Point:
    angle = eighth * math.pi / 4
    return x + radius * math.cos(angle), y + radius * math.sin(angle)
