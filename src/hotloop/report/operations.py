"""The operations of a step: their share of it, and a table."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree.ElementTree import Element

from ..units import format_rate, format_seconds, format_share
from .document import Document
from .elements import UNKNOWN, Child, bar, keyed, table, tag

# Each kind has its colour, and in the roofline its form of mark.
KINDS = ("product", "product and update", "convolution", "convolution backward")
_OTHER_KIND = 6
_REST = 8
_MOST_WORDS = 14


@dataclass(frozen=True)
class Operation:
    """One of the report's operations, as far as it can be read; ``TrainReport`` says what is what.

    Attributes:
        number: from 1, as chart and table name it.
        intensity: operations for each byte, by ``modelled_bytes``; ``None``: not recorded.
    """

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
        return KINDS.index(self.kind) + 1 if self.kind in KINDS else _OTHER_KIND


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


def operations_part(found: list[Operation]) -> list[Child]:
    """A mean step as a bar, and the table."""
    return [*_step(found), _table(found)] if found else []


def _step(found: list[Operation]) -> list[Child]:
    shares = [(o, o.time_share) for o in found if o.time_share]
    if not shares:
        return []
    known = sum(share for _, share in shares)
    # Timed alone, operations can take longer than in the step, which overlaps some of them.
    whole = max(1.0, known)
    words = [f"{o.number} {o.kind} {format_share(share)}" for o, share in shares[:_MOST_WORDS]]
    words.append(f"everything else {format_share(whole - known)}")
    parts = [*((o.colour, share) for o, share in shares), (_REST, whole - known)]
    return [
        tag("h3", "A mean step"),
        bar(f"A mean step: {', '.join(words)}", parts, whole, height=30),
    ]


def _table(found: list[Operation]) -> Element:
    rows: list[tuple[Child, ...]] = []
    for o in found:
        kind = o.kind if o.count == 1 else f"{o.count:,} x {o.kind}"
        rows.append(
            (
                keyed(o.colour, f"{o.number} {kind}"),
                o.shape,
                o.kernel,
                format_seconds(o.seconds) if o.seconds is not None else UNKNOWN,
                format_rate(o.flop_per_s, "FLOP") if o.flop_per_s else UNKNOWN,
                format_share(o.share_of_ceiling) if o.share_of_ceiling is not None else UNKNOWN,
                "not recorded" if o.intensity is None else f"{o.intensity:.3g}",
                format_share(o.time_share) if o.time_share is not None else UNKNOWN,
            )
        )
    if all(o.time_share is not None for o in found):
        rest = 1 - sum(o.time_share or 0.0 for o in found)
        empty = ("",) * 6
        rows.append((keyed(_REST, "everything else"), *empty, format_share(max(0.0, rest))))
    head = ("operation", "shape", "kernel", "one takes", "rate", "of ceiling", "FLOP a byte",
            "of a step")  # fmt: skip
    caption = "Operations of a step, each timed alone"
    return table(caption, head, rows, right=(3, 4, 5, 6, 7))
