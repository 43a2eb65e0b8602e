"""HTML and SVG as trees of elements: what is put in is escaped on the way out.

Nobody joins text to markup here, so that no name, note or path of a report can become markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

from .document import printable, printable_part

Child: TypeAlias = "Element | str | Iterable[Child] | None"
UNKNOWN = "not measured"


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Element:
    """An element.

    Args:
        children: elements and text, alone or in lists; ``None`` is left out.
        attributes: ``class_`` and ``for_`` lose their underscore, others have theirs turned into
            hyphens; ``None`` is left out; numbers are written with two decimals at most.
    """
    element = Element(name)
    for key, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
            element.set(key.rstrip("_").replace("_", "-"), printable(text))
    for child in _flat(children):
        if isinstance(child, str):
            text = printable_part(child)
            if len(element):
                element[-1].tail = (element[-1].tail or "") + text
            else:
                element.text = (element.text or "") + text
        else:
            element.append(child)
    return element


def _flat(children: Iterable[Child]) -> Iterable[Element | str]:
    for child in children:
        if isinstance(child, str | Element):
            yield child
        elif child is not None:
            yield from _flat(child)


def html(root: Element) -> str:
    """A whole document."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def section(key: str, title: str, *children: Child) -> Element:
    """A part of the page with its heading, which the page's list of contents leads to."""
    heading = tag("h2", title, id=f"{key}-title")
    return tag("section", heading, children, id=key, aria_labelledby=f"{key}-title")


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    right: Sequence[int] = (),
    total: bool = False,
) -> Element:
    """A table whose first column names the rows; in a frame that scrolls by itself when narrow.

    Args:
        right: columns of figures, aligned to the right. total: the last row is set apart.
    """
    body = []
    for row in rows:
        cells = [
            tag(
                "td" if at else "th",
                cell,
                class_="figure" if at in right else None,
                scope=None if at else "row",
            )
            for at, cell in enumerate(row)
        ]
        body.append(tag("tr", cells))
    if total and body:
        body[-1].set("class", "total")
    heads = [
        tag("th", text, scope="col", class_="figure" if at in right else None)
        for at, text in enumerate(head)
    ]
    grid = tag("table", tag("caption", caption), tag("thead", tag("tr", heads)), tag("tbody", body))
    # Reachable by keyboard, because what does not fit is reached by scrolling.
    dense = " dense" if len(head) > 6 else ""
    return tag("div", grid, class_=f"scroll{dense}", tabindex="0", role="region",
               aria_label=caption)  # fmt: skip


def facts(rows: Iterable[tuple[str, Child]]) -> Element:
    """Names with their values, as a description list."""
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows]
    return tag("dl", pairs, class_="facts")


def keyed(colour: int, name: str) -> Element:
    """A name with the mark that ties it to its colour in the chart beside it."""
    mark = tag("rect", width=12, height=12, rx=2, class_=f"fill{colour}")
    drawn = tag("svg", mark, width=12, height=12, class_="swatch", aria_hidden="true")
    return tag("span", drawn, tag("span", name), class_="keyed")


def bar(
    label: str, parts: Sequence[tuple[int, float]], whole: float, *, height: int = 22
) -> Element:
    """One stacked bar as wide as its place: ``parts`` are colour and amount, ``whole`` the width.

    Args:
        label: what a screen reader says instead of the picture.
    """
    # Percentages of the drawing's own width: it follows the page without being scaled.
    at, marks = 0.0, []
    for colour, amount in parts:
        width = 100 * max(0.0, amount) / whole if whole > 0 else 0.0
        width = min(width, 100 - at)
        if width > 0:
            marks.append(
                tag("rect", x=f"{at:.3f}%", width=f"{width:.3f}%", height=height,
                    class_=f"part fill{colour}")
            )  # fmt: skip
        at += width
    return tag(
        "svg", marks, class_="bar", width="100%", height=height, role="img", aria_label=label
    )


def note(*children: Child) -> Element:
    """A quiet remark below a chart or table."""
    return tag("p", children, class_="note")
