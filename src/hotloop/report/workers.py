"""Balance of the workers: what each did with its time."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from ..units import format_seconds, format_share
from .document import Document
from .elements import Child, bar, keyed, note, section, table, tag

_PHASES = (("busy_s", "busy", 1), ("update_s", "updating", 7), ("wait_s", "waiting", 6))
# Below, a worker's core is throttled or shared (``WorkerStats.slowdown``).
_SLOW = 0.9


def workers(report: Document) -> Element | None:
    """The section; ``None`` for a run without workers."""
    found = report.items("performance", "workers")
    asked = report.count("plan", "parallel", "num_workers")
    if not found:
        if asked is None:
            return None
        return section(
            "workers",
            "Balance of the workers",
            note(f"{asked:,} workers; what each did is not recorded in this report."),
        )
    seconds = [[worker.amount(key) or 0.0 for key, _, _ in _PHASES] for worker in found]
    whole = max(sum(row) for row in seconds)
    rows: list[Child] = []
    for at, (worker, spent) in enumerate(zip(found, seconds, strict=True)):
        name = _name(worker, at)
        said = f"{name}: " + ", ".join(
            f"{title} {format_seconds(s)}" for (_, title, _), s in zip(_PHASES, spent, strict=True)
        )
        parts = [(colour, s) for (_, _, colour), s in zip(_PHASES, spent, strict=True)]
        drawn = bar(said, parts, whole)
        busy = format_share(spent[0] / sum(spent)) if sum(spent) else "idle"
        rows.append(
            tag("div", tag("span", name), tag("span", f"{busy} busy", class_="figure"), drawn,
                class_="row")
        )  # fmt: skip
    legend = tag("ul", [tag("li", keyed(colour, title)) for _, title, colour in _PHASES],
                 class_="legend")  # fmt: skip
    return section("workers", "Balance of the workers", tag("div", rows, class_="bars"), legend,
                   _table(found), *_slow(found))  # fmt: skip


def _name(worker: Document, at: int) -> str:
    number, cpu = worker.count("worker"), worker.count("cpu")
    name = f"worker {at if number is None else number}"
    return name if cpu is None else f"{name}, CPU {cpu}"


def _table(found: list[Document]) -> Element:
    rows = []
    for at, worker in enumerate(found):
        rate, slowdown = worker.amount("rate_per_s"), worker.amount("slowdown")
        rows.append(
            (
                _name(worker, at), _count(worker, "chunks"), _count(worker, "stolen"),
                *(format_seconds(worker.amount(key)) for key, _, _ in _PHASES),
                "–" if rate is None else f"{rate:,.0f}",
                "–" if slowdown is None else format_share(slowdown),
            )
        )  # fmt: skip
    head = ("worker", "chunks", "stolen", *(title for _, title, _ in _PHASES), "chunks/s",
            "of its best")  # fmt: skip
    return table("Workers", head, rows, right=tuple(range(1, 8)))


def _count(worker: Document, key: str) -> str:
    value = worker.count(key)
    return "–" if value is None else f"{value:,}"


def _slow(found: list[Document]) -> list[Element]:
    slow = [
        _name(worker, at)
        for at, worker in enumerate(found)
        if (worker.amount("slowdown") or 1.0) < _SLOW
    ]
    if not slow:
        return []
    return [note(f"Slower than at their best: {', '.join(slow)}. The core is throttled or shared.")]
