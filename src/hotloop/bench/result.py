"""Figures of a race: plain values, a table, JSON."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from .turns import summary


@dataclass(frozen=True)
class Timing:
    """One peer's epochs.

    Attributes:
        peer: its name.
        seconds: of each measured epoch.
        losses: mean loss of each epoch, the warm-up included.
        peak_bytes: most memory resident.
        missing: why it was not measured; ``None``: it was.
    """

    peer: str
    seconds: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    peak_bytes: int | None = None
    missing: str | None = None

    @property
    def median_s(self) -> float:
        """Median seconds of an epoch."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Race:
    """All peers on one model.

    Attributes:
        model, num_samples, batch_size, threads: the work.
        timings: one a peer.
        floor_s: seconds an epoch takes at the measured rates: arithmetic at the best matrix
            product rate and the optimizer's traffic at the bandwidth, whichever is longer.
        sum_floor_s: both, one after the other.
        rates: ``flop_per_s`` of the best matrix product and ``bytes_per_s`` of memory, float32, all
            threads, measured in turn with the peers: median, min, max, n.
        about: versions and machine.
    """

    model: str
    num_samples: int
    batch_size: int
    threads: int
    timings: tuple[Timing, ...]
    floor_s: float | None = None
    sum_floor_s: float | None = None
    rates: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[list[str]]:
        """Rows of the table, fastest first."""
        ran = sorted((t for t in self.timings if t.seconds), key=lambda t: t.median_s)
        written = next((t for t in ran if t.peer == "pytorch"), None)
        others = [t.median_s for t in ran if t.peer != "hotloop"]
        rows = []
        for t in ran:
            per_s = [self.num_samples / s for s in t.seconds]
            rows.append(
                [
                    t.peer,
                    f"{self.num_samples / t.median_s:,.0f}",
                    f"{min(per_s):,.0f} to {max(per_s):,.0f}",
                    str(len(t.seconds)),
                    "" if written is None else f"{written.median_s / t.median_s:.2f}",
                    f"{min(others) / t.median_s:.2f}" if others else "",
                    "" if self.floor_s is None else f"{self.floor_s / t.median_s:.0%}",
                    "" if t.peak_bytes is None else f"{t.peak_bytes / 2**20:,.0f}",
                    self.loss_verdict(t),
                ]
            )
        rows += [[t.peer, t.missing or "", *[""] * 7] for t in self.timings if not t.seconds]
        return rows

    def chart(self, width: int = 60) -> list[str]:
        """A bar for each peer and the floor, as long as its samples/s; lines of text."""
        rates = {t.peer: self.num_samples / t.median_s for t in self.timings if t.seconds}
        if self.floor_s is not None:
            rates["(floor)"] = self.num_samples / self.floor_s
        most, room = max(rates.values(), default=1.0), max(map(len, rates), default=0)
        return [
            f"{peer:<{room}}  {_bar(rate / most * width)} {rate:,.0f}"
            for peer, rate in sorted(rates.items(), key=lambda item: -item[1])
        ]

    def loss_verdict(self, timing: Timing) -> str:
        """Whether a peer learns as plain PyTorch does: mean loss of the second epoch within 2 %."""
        plain = next((t for t in self.timings if t.peer == "pytorch" and t.seconds), None)
        if plain is None or len(plain.losses) < 2 or len(timing.losses) < 2:
            return ""
        difference = timing.losses[1] / plain.losses[1] - 1
        return "as pytorch" if abs(difference) < 0.02 else f"{difference:+.1%}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        document = dataclasses.asdict(self)
        for timing, entry in zip(self.timings, document["timings"], strict=True):
            if timing.seconds:
                entry["samples_per_s"] = summary([self.num_samples / s for s in timing.seconds])
        return document


def _bar(cells: float) -> str:
    eighths = round(cells * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


COLUMNS = (
    "peer", "samples/s", "min to max", "n", "x pytorch", "x fastest peer", "of floor", "MiB",
    "loss",
)  # fmt: skip
