"""What the race found, as plain values. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..units import format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One engine with all that is chosen about it: enough to make it again.

    Attributes:
        engine: see ``Engine.name``. precision: see ``Engine.precision``.
        num_threads: inside one call. num_instances: calls at the same time.
        layout: ``"as given"``, or ``"channels_last"`` for images (eager).
        spinning: whether idle threads of ONNX Runtime look for work before they sleep.
    """

    engine: str
    precision: str = "float32"
    num_threads: int = 1
    num_instances: int = 1
    layout: str = "as given"
    spinning: bool = True

    @property
    def title(self) -> str:
        """Short text, such as ``onnxruntime int8, 2 threads``."""
        parts = [self.engine + ("" if self.precision == "float32" else f" {self.precision}")]
        if self.num_instances > 1:
            parts.append(f"{self.num_instances} instances")
        parts.append(f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}")
        if self.layout != "as given":
            parts.append(self.layout)
        if not self.spinning:
            parts.append("no spinning")
        return ", ".join(parts)


@dataclass(kw_only=True)
class RaceRow:
    """One candidate at one batch size.

    Attributes:
        setting: what was raced.
        batch_size: samples of a call.
        median_s, min_s, max_s: seconds of a call (with several instances: wall seconds over calls);
            ``None``: not timed. Median over rounds of the median inside a round.
        p99_s: the same of the 99th percentile inside a round.
        n: calls timed.
        error: largest difference from eager over the largest value of eager.
        accuracy_loss: eager's accuracy less this one's on the samples; without labels, the share
            of samples whose class is another.
        excluded: why it could not win; ``None``: it could.
        won: whether it did.
    """

    setting: Setting
    batch_size: int
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    p99_s: float | None = None
    n: int = 0
    error: float | None = None
    accuracy_loss: float | None = None
    excluded: str | None = None
    won: bool = False


@dataclass(kw_only=True)
class InferenceReport:
    """What ``compile_inference`` found.

    Attributes:
        goal: ``"latency"`` or ``"throughput"``.
        rows: every candidate at every batch size.
        winners: batch size -> setting. Sizes between go to the nearest below or at it.
        from_cache: whether the winners were remembered from an earlier race on this machine.
        elapsed_s: seconds of the whole call.
        race_s: seconds of the race alone.
        other_load: CPUs that other processes kept busy meanwhile; ``None``: unknown.
        memory: bytes by component, see ``docs/infer.md``; ``None`` where unknown.
        notes: what was left out, one line each.
    """

    goal: str
    rows: list[RaceRow] = field(default_factory=list)
    winners: dict[int, Setting] = field(default_factory=dict)
    from_cache: bool = False
    elapsed_s: float = 0.0
    race_s: float = 0.0
    other_load: float | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        document = dataclasses.asdict(self)
        document["winners"] = [
            {"batch_size": size, **dataclasses.asdict(setting)}
            for size, setting in self.winners.items()
        ]
        return document

    def text(self) -> str:
        """The table, one line a candidate, the fastest first."""
        lines = []
        for size in sorted({row.batch_size for row in self.rows}):
            lines.append(f"batch {size}:")
            rows = [row for row in self.rows if row.batch_size == size]
            rows.sort(key=lambda r: (not r.won, r.median_s is None, r.median_s or 0.0))
            lines += [f"  {_line(row)}" for row in rows]
        if not self.rows:
            lines = [f"batch {size}: {s.title}" for size, s in self.winners.items()]
        if self.from_cache:
            lines.append("remembered from an earlier race on this machine; checked again")
        lines += self.notes
        for name, value in self.memory.items():
            if name.endswith("_bytes") and value is not None:
                title = name.removesuffix("_bytes").replace("_", " ")
                lines.append(f"memory  {title:32} {format_bytes(value)}")
        return "\n".join(lines)


def _line(row: RaceRow) -> str:
    mark = "*" if row.won else " "
    text = f"{mark} {row.setting.title:42}"
    if row.median_s is not None and row.min_s is not None and row.max_s is not None:
        text += f" {format_seconds(row.median_s):>9} ({format_seconds(row.min_s)}"
        text += f" to {format_seconds(row.max_s)}, n={row.n})"
    if row.error is not None:
        text += f" error {row.error:.1e}"
    if row.accuracy_loss is not None:
        text += f" accuracy loss {row.accuracy_loss:.4f}"
    if row.excluded:
        text += f" out: {row.excluded}"
    return text
