"""Charts with two axes as SVG: scales, ticks, the frame, lines and marks.

A chart is drawn twice, for a wide and for a narrow page, and the style sheet shows one of them: a
drawing that is scaled down to a phone has letters nobody can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from .elements import tag

Point = tuple[float, float]


@dataclass(frozen=True)
class Size:
    """A drawing in pixels and the space its axes take."""

    name: str
    width: float
    height: float
    left: float
    right: float = 14
    top: float = 30
    bottom: float = 46
    ticks: int = 6


WIDE = Size("wide", 816, 420, left=66, ticks=7)
NARROW = Size("narrow", 340, 300, left=62, ticks=5)
# One of several beside each other, which a narrow page puts below each other: one drawing does.
SMALL = Size("small", 388, 270, left=66, ticks=5)


@dataclass(frozen=True)
class Axis:
    """One axis: its range (low below high; above 0 when ``log``), what it says, how figures read.

    Attributes:
        whole: ticks only at whole numbers. unit: ticks at round multiples of it, as of a MiB.
    """

    low: float
    high: float
    label: str
    show: Callable[[float], str]
    log: bool = False
    whole: bool = False
    unit: float = 1.0

    def ticks(self, most: int) -> list[float]:
        """Round values in the range, about ``most`` of them."""
        if self.log:
            return self._log_ticks(most)
        low, high = self.low / self.unit, self.high / self.unit
        step = 10.0 ** math.floor(math.log10((high - low) / most))
        step *= next(f for f in (1, 2, 5, 10, 20) if (high - low) / (step * f) <= most)
        step = (max(step, 1.0) if self.whole else step) * self.unit
        first, last = math.ceil(self.low / step), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        first = math.floor(math.log10(self.low))
        decades = range(first, math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            values = [f * 10.0**d for d in decades for f in factors]
            inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(inside) <= most + 1:
                return inside
        return inside[:: math.ceil(len(inside) / most)]


@dataclass(frozen=True)
class Frame:
    """Where data lies in a drawing."""

    size: Size
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> Point:
        """The pixel of a pair of values."""
        size = self.size
        across, up = _fraction(self.x, x), _fraction(self.y, y)
        width = size.width - size.left - size.right
        height = size.height - size.top - size.bottom
        return size.left + across * width, size.top + (1 - up) * height

    def line(self, points: Iterable[Point], class_: str) -> Element:
        """A line through pairs of values."""
        pixels = [self.at(*point) for point in points]
        steps = " L ".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
        return tag("path", d=f"M {steps}", class_=f"line {class_}")

    def axes(self) -> list[Element]:
        """Grid lines, ticks and what the axes say."""
        size = self.size
        bottom, right = size.height - size.bottom, size.width - size.right
        marks = []
        for value in self.x.ticks(size.ticks):
            x, _ = self.at(value, self.y.low)
            marks.append(tag("line", x1=x, x2=x, y1=size.top, y2=bottom, class_="grid"))
            marks.append(text(x, bottom + 17, self.x.show(value), "tick", anchor="middle"))
        for value in self.y.ticks(size.ticks):
            _, y = self.at(self.x.low, value)
            marks.append(tag("line", x1=size.left, x2=right, y1=y, y2=y, class_="grid"))
            marks.append(text(size.left - 7, y + 4, self.y.show(value), "tick", anchor="end"))
        marks.append(tag("line", x1=size.left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        marks.append(text(right, size.height - 8, self.x.label, "name", anchor="end"))
        marks.append(text(4, 14, self.y.label, "name"))
        return marks


def _fraction(axis: Axis, value: float) -> float:
    if axis.log:
        low, high = math.log10(axis.low), math.log10(axis.high)
        value = math.log10(max(value, 1e-300))
    else:
        low, high = axis.low, axis.high
    return min(1.0, max(0.0, (value - low) / (high - low)))


def text(
    x: float,
    y: float,
    words: str,
    class_: str,
    *,
    anchor: str | None = None,
    degrees: float | None = None,
) -> Element:
    """Words in a drawing; ``anchor`` is ``"middle"`` or ``"end"``, ``degrees`` turns clockwise."""
    turn = f"rotate({degrees:.1f} {x:.1f} {y:.1f})" if degrees is not None else None
    return tag("text", words, x=x, y=y, class_=class_, text_anchor=anchor, transform=turn)


def chart(
    key: str,
    title: str,
    description: str,
    draw: Callable[[Size], Sequence[Element]],
    sizes: Sequence[Size] = (WIDE, NARROW),
) -> Element:
    """A figure with its title below, drawn once for each size.

    Args:
        key: no other chart of the page has it.
        description: what the picture shows, for those who do not see it.
    """
    drawings = []
    for size in sizes:
        name = f"{key}-{size.name}"
        drawings.append(
            tag(
                "svg",
                tag("title", title, id=f"{name}-title"),
                tag("desc", description, id=f"{name}-desc"),
                draw(size),
                class_=f"chart {size.name}",
                viewBox=f"0 0 {size.width:g} {size.height:g}",
                role="img",
                aria_labelledby=f"{name}-title {name}-desc",
            )
        )
    return tag("figure", drawings, tag("figcaption", title))


def room_above(values: Iterable[float], *, share: float = 0.08) -> float:
    """A top of an axis from 0 with some room over the greatest value."""
    return max(max(values, default=0.0) * (1 + share), 1e-12)


def key_line(frame: Frame, row: int, words: str, class_: str) -> list[Element]:
    """A line of a legend at the top right of the frame: a piece of the line, and what it is."""
    right, y = frame.size.width - frame.size.right - 4, frame.size.top + 12 + 17 * row
    sample = tag("line", x1=right - 22, x2=right, y1=y - 4, y2=y - 4, class_=f"line {class_}")
    return [sample, text(right - 29, y, words, "label", anchor="end")]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about ``most`` of the points, evenly, the last one always."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept
