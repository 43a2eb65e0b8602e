"""How it was run: every knob of the plan, what the reader should know, and what was installed."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from .document import Document
from .elements import Child, facts, note, section, tag


def plan(report: Document) -> Element:
    """Every knob as it was resolved, by part."""
    parts = [
        tag("div", tag("h3", part), facts((knob, value.shown()) for knob, value in knobs.pairs()))
        for part, knobs in report.pairs("plan")
    ]
    shown = tag("div", parts, class_="columns") if parts else note("The plan is not recorded.")
    return section("plan", "The plan", shown)


def notes(report: Document) -> Element:
    """Notes of the run, of the monitor and of the budget; versions; files."""
    lines = [
        text
        for path in (("notes",), ("performance", "notes"), ("budget", "assumptions"))
        for item in report.items(*path)
        if (text := item.text())
    ]
    reason = report.text("path_reason")
    if reason:
        lines.insert(0, f"Path {report.text('path') or 'of the steps'}: {reason}.")
    parts: list[Child] = [
        tag("ul", [tag("li", line) for line in lines]) if lines else note("Nothing to note.")
    ]
    rows = [(name, version.shown()) for name, version in report.pairs("versions")]
    for title, path in (
        ("machine fingerprint", ("machine", "fingerprint")), ("checkpoint", ("checkpoint",)),
    ):  # fmt: skip
        if text := report.text(*path):
            rows.append((title, text))
    if rows:
        parts.append(facts(rows))
    return section("notes", "Notes", parts)
