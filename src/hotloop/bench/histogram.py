"""A histogram of times in buckets whose width grows with the value: under 1 % off at any size.

Below 256 us a bucket is a microsecond wide; above, each doubling has 128 buckets, as in
HdrHistogram with two significant digits. Adding is a few integer operations and takes no memory.
"""

from __future__ import annotations

from typing import Any

_SUB = 128
# Up to 2**36 us, 19 hours.
_BUCKETS = _SUB * 30
_TOLD = (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999)


class LatencyHistogram:
    """Counts of times in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.total_s = 0.0
        self.min_s = float("inf")
        self.max_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one time; a negative one is a time of 0."""
        value = int(seconds * 1e6) if seconds > 0 else 0
        shift = value.bit_length() - 8
        index = value if shift <= 0 else shift * _SUB + (value >> shift)
        self._counts[min(index, _BUCKETS - 1)] += 1
        self.count += 1
        self.total_s += seconds
        if seconds < self.min_s:
            self.min_s = seconds
        if seconds > self.max_s:
            self.max_s = seconds

    def merge(self, other: LatencyHistogram) -> None:
        """Count all that the other has counted."""
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.count += other.count
        self.total_s += other.total_s
        self.min_s = min(self.min_s, other.min_s)
        self.max_s = max(self.max_s, other.max_s)

    @property
    def mean_s(self) -> float | None:
        """Mean of all times; ``None``: there are none."""
        return self.total_s / self.count if self.count else None

    def quantile_s(self, share: float) -> float | None:
        """The time that ``share`` of all times do not exceed; ``None``: there are none.

        It is the end of a bucket: never below the true one, and less than 1 % or 1 us above.
        """
        if not self.count:
            return None
        wanted = max(1.0, share * self.count)
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return min(_end_s(index), self.max_s)
        return self.max_s

    def above(self, seconds: float) -> int:
        """How many times are longer, by whole buckets: those that end after ``seconds``."""
        return sum(
            count for index, count in enumerate(self._counts) if count and _end_s(index) > seconds
        )

    def buckets(self) -> list[tuple[float, int]]:
        """``(end in seconds, count)`` of each bucket that is not empty, in order."""
        return [(_end_s(i), count) for i, count in enumerate(self._counts) if count]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "count": self.count,
            "mean_s": self.mean_s,
            "min_s": self.min_s if self.count else None,
            "max_s": self.max_s if self.count else None,
            "quantiles_s": {str(share): self.quantile_s(share) for share in _TOLD},
        }

    def chart(self, width: int = 50) -> list[str]:
        """Lines of text: a bar for each doubling of the time."""
        doublings: dict[int, int] = {}
        for end_s, count in self.buckets():
            power = max(0, int(end_s * 1e6) - 1).bit_length()
            doublings[power] = doublings.get(power, 0) + count
        if not doublings:
            return []
        most = max(doublings.values())
        return [
            f"< {2**power / 1e3:>10,.3f} ms  {doublings.get(power, 0):>9,}  "
            + "█" * round(doublings.get(power, 0) / most * width)
            for power in range(min(doublings), max(doublings) + 1)
        ]


def _end_s(index: int) -> float:
    if index < 2 * _SUB:
        return (index + 1) / 1e6
    shift = index // _SUB - 1
    return ((index % _SUB + _SUB + 1) << shift) / 1e6
