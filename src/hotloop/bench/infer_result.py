"""Figures of the inference race: plain values, a table, JSON."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from .turns import summary

# Largest difference to eager PyTorch over the largest value: float32 in another order of additions,
# and convolutions by Winograd's algorithm, stay well below.
MAX_ERROR = 1e-3
HOTLOOP = ("hotloop", "hotloop-export")
# The performance guide's CPU inference: batch size, samples/s, GB.
GUIDE = ((1, 120, 0.5), (32, 2_800, 0.7), (64, 5_200, 0.9))


@dataclass(frozen=True)
class InferTiming:
    """One peer's rounds.

    Attributes:
        peer: its name.
        samples_per_s: of each round. p50_s, p99_s: of a call, in each round.
        error: largest difference to eager PyTorch's outputs over the largest value.
        accuracy: share of MNIST's test digits told right; ``None``: not asked for.
        resident_bytes: after the last round. peak_bytes: most, preparation included.
        settings: it ran with. torch_imported: by its process.
        prepared_s: from the model to the first answers.
        missing: why it was not measured; ``None``: it was.
    """

    peer: str
    samples_per_s: tuple[float, ...] = ()
    p50_s: tuple[float, ...] = ()
    p99_s: tuple[float, ...] = ()
    error: float | None = None
    accuracy: float | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    torch_imported: bool | None = None
    prepared_s: float | None = None
    missing: str | None = None

    @property
    def median_per_s(self) -> float:
        """Median samples/s of the rounds."""
        return statistics.median(self.samples_per_s)

    @property
    def wrong(self) -> bool:
        """Whether its outputs are not those of eager PyTorch."""
        return self.error is not None and not self.error <= MAX_ERROR


@dataclass(frozen=True)
class InferRace:
    """All peers on one model at one batch size.

    Attributes:
        model, sample_shape, batch_size, threads: the work.
        goal: ``"latency"``: one call at a time; ``"throughput"``: as many as a peer likes.
        max_accuracy_loss: allowed to hotloop; ``None``: float32 for all.
        eager_accuracy: of the trained float32 model on the test digits; ``None``: not trained.
        timings: one a peer.
        about: versions and machine.
    """

    model: str
    sample_shape: tuple[int, ...]
    batch_size: int
    threads: int
    goal: str
    timings: tuple[InferTiming, ...]
    max_accuracy_loss: float | None = None
    eager_accuracy: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def ran(self) -> list[InferTiming]:
        """Peers with right outputs, fastest first."""
        good = [t for t in self.timings if t.samples_per_s and not t.wrong]
        return sorted(good, key=lambda t: -t.median_per_s)

    def fastest_peer(self) -> InferTiming | None:
        """The fastest with right outputs that is not hotloop."""
        return next((t for t in self.ran() if t.peer not in HOTLOOP), None)

    def ratios(self, timing: InferTiming) -> list[float]:
        """Samples/s over those of the fastest peer, round by round; empty: there is none."""
        other = self.fastest_peer()
        if other is None:
            return []
        rounds = zip(timing.samples_per_s, other.samples_per_s, strict=False)
        return [mine / theirs for mine, theirs in rounds]

    def rows(self) -> list[list[str]]:
        """Rows of the table, fastest first; the wrong and the missing last, named."""
        rows = []
        eager = next((t for t in self.ran() if t.peer == "pytorch"), None)
        fastest = self.fastest_peer()
        for t in self.ran():
            settings = ", ".join(f"{name} {value}" for name, value in t.settings.items())
            rows.append(
                [
                    t.peer,
                    f"{t.median_per_s:,.0f}",
                    f"{min(t.samples_per_s):,.0f} to {max(t.samples_per_s):,.0f}",
                    str(len(t.samples_per_s)),
                    f"{statistics.median(t.p50_s) * 1e3:.3g}",
                    f"{statistics.median(t.p99_s) * 1e3:.3g}",
                    "" if eager is None else f"{t.median_per_s / eager.median_per_s:.2f}",
                    "" if fastest is None else f"{t.median_per_s / fastest.median_per_s:.2f}",
                    "" if t.resident_bytes is None else f"{t.resident_bytes / 2**20:,.0f}",
                    "" if t.error is None else f"{t.error:.0e}",
                    "" if t.accuracy is None else f"{t.accuracy:.2%}",
                    settings,
                ]
            )
        rest = len(COLUMNS) - 2
        for t in self.timings:
            if t.wrong:
                rows.append([t.peer, f"wrong: off by {t.error:.1g}", *[""] * rest])
            elif not t.samples_per_s:
                rows.append([t.peer, t.missing or "", *[""] * rest])
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        document = dataclasses.asdict(self)
        fastest = self.fastest_peer()
        document["fastest_peer"] = None if fastest is None else fastest.peer
        for timing, entry in zip(self.timings, document["timings"], strict=True):
            if not timing.samples_per_s:
                continue
            entry["rounds_samples_per_s"] = entry.pop("samples_per_s")
            entry["samples_per_s"] = summary(timing.samples_per_s)
            entry["p50_s"], entry["p99_s"] = summary(timing.p50_s), summary(timing.p99_s)
            entry["wrong"] = timing.wrong
            if fastest is not None:
                entry["of_fastest_peer"] = {
                    "of_medians": timing.median_per_s / fastest.median_per_s,
                    "of_rounds": summary(self.ratios(timing)),
                }
        return document


COLUMNS = (
    "peer", "samples/s", "min to max", "n", "p50 ms", "p99 ms", "x eager", "x fastest peer", "MiB",
    "error", "accuracy", "settings",
)  # fmt: skip
