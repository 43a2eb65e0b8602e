"""A report as one self-contained HTML page: a pure function of the report and the machine.

document     reads any JSON without failing
elements     trees of HTML and SVG; what is put in is escaped on the way out
chart        axes, lines and marks
headline, suggestions, phases, roofline, memory, learning, workers, counters, machine, plan
             one section each
placement    who is pinned where
style.css    the look, in light, dark and print
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any
from xml.etree.ElementTree import Element

from .counters import counters
from .document import Document, printable
from .elements import html, tag
from .headline import header
from .learning import learning
from .machine import machine as machine_section
from .memory import memory
from .phases import phases
from .plan import notes, plan
from .roofline import roofline
from .suggestions import lead, suggestions
from .workers import workers

__all__ = ["render_page"]


def render_page(report: Mapping[str, Any], machine: Mapping[str, Any] | None = None) -> str:
    """The page. Whatever the report holds, this does not fail: what is unknown is said to be.

    Args:
        report: ``TrainReport.to_dict()``, or what was read from its JSON.
        machine: ``Machine.to_dict()`` with ``ceilings``; the report's own when ``None``.

    Returns:
        HTML that loads nothing: no script, no font, no picture; a content security policy forbids
        them.
    """
    document = Document(report)
    described = Document(machine) if machine is not None else document.at("machine")
    sections = [
        suggestions(document),
        phases(document),
        roofline(document, described),
        memory(document),
        learning(document),
        workers(document),
        counters(document),
        machine_section(document, described),
        plan(document),
        notes(document),
    ]
    shown = [part for part in sections if part is not None]
    body = tag("body", header(document), lead(document), _contents(shown), tag("main", shown))
    return html(tag("html", _head(document), body, lang="en"))


def _contents(sections: list[Element]) -> Element:
    links = [
        tag("li", tag("a", part[0].text or "", href=f"#{part.get('id')}")) for part in sections
    ]
    return tag("nav", tag("ul", links), aria_label="Sections")


@cache
def _style() -> str:
    return resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def _head(document: Document) -> Element:
    # Not through tag(), which would put it on one line: the policy names the hash of exactly this.
    style = Element("style")
    style.text = _style()
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy + "form-action 'none'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{printable(document.text('model') or 'Unnamed model')}: hotloop report"),
        # An empty icon: without one, browsers ask the server for it.
        tag("link", rel="icon", href="data:,"),
        style,
    )
