"""What would help next: each suggestion with its evidence, the change, and how far it is proven."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from .document import Document
from .elements import Child, facts, note, section, tag

# What the reader is told of each state.
STATES = {
    "proven": "proven here",
    "hypothesis": "hypothesis, not measured here",
    "unclear": "measured: no clear difference",
    "regression": "measured: slower",
}
_ORDER = tuple(STATES)
KINDS = {"problem": "a loss that was seen", "opportunity": "no loss was seen: something untried"}


def state(optimization: Document) -> str:
    """Key of ``STATES``: what the interval of the proof says; a hypothesis where there is none."""
    said = optimization.text("state")
    low, high = optimization.number("proof", "low"), optimization.number("proof", "high")
    if low is None or high is None or low > high:
        return "hypothesis"
    if said == "proven" and low > 1:
        return "proven"
    if said == "regression" and high < 1:
        return "regression"
    return "unclear" if low <= 1 <= high else "hypothesis"


def ordered(report: Document) -> list[Document]:
    """Proven ones first, regressions last; otherwise as the report has them."""
    return sorted(report.items("optimizations"), key=lambda o: _ORDER.index(state(o)))


def gain(optimization: Document) -> str | None:
    """Measured gain, else the expected one, in words; ``None``: not known."""
    if ratio := _proof_words(optimization):
        return ratio
    expected = optimization.number("expected_gain")
    return None if expected is None else f"{expected * 100:+.0f} % expected"


def change_lines(report: Document, optimization: Document, arrow: str = "→") -> list[str]:
    """The change as ``knob: before → after`` lines and as what to type."""
    lines = []
    for name, value in optimization.pairs("change", "plan"):
        part, _, knob = name.partition(".")
        before = report.at("plan", part, knob).shown() if report.at("plan", part) else "?"
        if before != value.shown():
            lines.append(f"{name}: {before} {arrow} {value.shown()}")
    return lines + [c for c in (optimization.text("change", "command"),) if c]


def lead(report: Document) -> Element | None:
    """The first suggestion in one line below the headline; ``None``: there is none to follow."""
    found = [o for o in ordered(report) if state(o) in ("proven", "hypothesis")]
    if not found:
        return None
    first = found[0]
    told = STATES[state(first)].capitalize() + (f": {words}." if (words := gain(first)) else ".")
    link = tag("a", first.text("title") or "a suggestion", href="#next")
    return tag("p", tag("strong", "Next: "), link, f". {told}", class_="lead")


def suggestions(report: Document) -> Element:
    """The section."""
    title = "What would help next"
    if not isinstance(report.value, dict) or "optimizations" not in report.value:
        return section("next", title, note("This report has no suggestions recorded."))
    found = ordered(report)
    if not found:
        return section("next", title, tag("p", "Nothing was found that would help."))
    cards = [_card(report, optimization) for optimization in found]
    return section("next", title, tag("ol", cards, class_="cards"))


def _card(report: Document, optimization: Document) -> Element:
    key = state(optimization)
    exact = optimization.flag("exact")
    rows: list[tuple[str, Child]] = [("evidence", _evidence(optimization))]
    if (kind := KINDS.get(optimization.text("kind") or "")) is not None:
        rows.append(("kind", kind))
    lines = change_lines(report, optimization)
    if lines:
        rows.append(("change", [tag("code", line, class_="typed") for line in lines]))
    if exact is not None:
        rows.append(("results", "stay exact" if exact else "may differ: check the accuracy"))
    expected = optimization.number("expected_gain")
    source = optimization.text("gain_source")
    told = "not known" if expected is None else f"{expected * 100:+.0f} %"
    rows.append(("expected", told if source in (None, told) else f"{told} ({source})"))
    words = _proof_words(optimization)
    if words is not None:
        numerics = optimization.text("proof", "numerics")
        drawn = _interval(optimization, words)
        rows.append(("measured", [drawn, words, f"; {numerics}" if numerics else None]))
    head = tag("h3", optimization.text("title") or optimization.text("name") or "Suggestion")
    badge = tag("p", STATES[key], class_=f"badge {key}")
    return tag("li", head, badge, facts(rows), class_="card")


def _evidence(optimization: Document) -> list[Child]:
    evidence = optimization.at("evidence")
    text, metric = evidence.text("text"), evidence.text("metric")
    told = text is not None and text != optimization.text("title")
    parts: list[Child] = [tag("span", text, class_="said") if told else None]
    if metric:
        against = ""
        if evidence.at("threshold"):
            against = f", held against {evidence.shown('threshold')}"
            source = evidence.text("threshold_source")
            against += f" ({source})" if source else ""
        parts.append(
            tag(
                "span", tag("code", metric), f" = {evidence.shown('value')}{against}", class_="said"
            )
        )
    return parts if any(part is not None for part in parts) else ["not recorded"]


def _proof_words(optimization: Document) -> str | None:
    proof = optimization.at("proof")
    ratio, low, high = (proof.amount(key) for key in ("median_ratio", "low", "high"))
    if ratio is None or low is None or high is None:
        return None
    confidence, pairs = proof.amount("confidence"), proof.count("n")
    level = f"{confidence * 100:g} % interval " if confidence is not None else ""
    number = f", {pairs:,} pairs" if pairs is not None else ""
    return f"{ratio:.3f} times as fast ({level}{low:.3f} to {high:.3f}{number})"


def _interval(optimization: Document, words: str) -> Element:
    """The confidence interval of the ratio against 1, which means no change."""
    proof = optimization.at("proof")
    ratio, low, high = (proof.amount(key) or 0.0 for key in ("median_ratio", "low", "high"))
    start, end = min(0.95, low, ratio), max(1.05, high, ratio)
    margin = 0.08 * (end - start)
    start, end = start - margin, end + margin

    def at(value: float) -> str:
        return f"{100 * (value - start) / (end - start):.2f}%"

    colour = "good" if low > 1 else "bad" if high < 1 else "open"
    return tag(
        "svg",
        tag("text", "as fast as before", x=at(1), y=12, text_anchor="middle", class_="tick"),
        tag("line", x1="0%", x2="100%", y1=29, y2=29, class_="grid"),
        tag("line", x1=at(1), x2=at(1), y1=18, y2=40, class_="axis"),
        tag("line", x1=at(low), x2=at(high), y1=29, y2=29, class_=f"interval {colour}"),
        tag("circle", cx=at(ratio), cy=29, r=5, class_=f"estimate {colour}"),
        class_="bar", width="100%", height=42, role="img",
        aria_label=f"Throughput with the change over without: {words}; 1 means no change",
    )  # fmt: skip
