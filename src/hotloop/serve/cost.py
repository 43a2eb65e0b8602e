"""What a call of the engine costs by the size of its batch, learned while serving."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass

# A size not seen for this long is believed no more than the straight line through the others.
_HALF_LIFE_S = 20.0
_LINE_FORGET = 0.98
_LINE_WEIGHT = 0.5
_STEP = 0.15
# A smaller batch with a rate this near to the best answers sooner for the same work.
_RATE_TOLERANCE = 0.02
# Above this share of busy time the queue grows without end.
_BUSY = 0.9


@dataclass
class _Size:
    mean_s: float = 0.0
    weight: float = 0.0
    seen_s: float = 0.0


class CostCurve:
    """Seconds of a call as a function of rows: means of the sizes seen, a line between and beyond.

    Both are forgotten exponentially, so that a machine that got slower, or a size that was slow
    once beside a neighbour, is seen as it is now. Not thread-safe: the batcher's lock guards it.

    Args:
        max_rows: of a batch.
    """

    def __init__(self, max_rows: int) -> None:
        sizes = {1, max_rows}
        size = 1
        while size < max_rows:
            sizes.update({size, min(max_rows, size * 3 // 2)})
            size *= 2
        self.max_rows = max_rows
        self.sizes = sorted(sizes)
        self._seen = [_Size() for _ in self.sizes]
        self._anchors: dict[int, float] = {}
        self._sums = [0.0] * 5
        self._tail = 1.25
        self._cost: list[float] | None = None
        self._updates = 0

    def anchor(self, rows: int, seconds: float) -> None:
        """A call measured before serving: it holds the line where nothing else has been seen.

        Of several with as many rows the shortest counts.
        """
        self._anchors[rows] = min(seconds, self._anchors.get(rows, seconds))
        self._cost = None

    def add(self, rows: int, seconds: float, now: float) -> None:
        """One call was measured."""
        expected = self.cost_s(rows) if self.is_known else seconds
        at = self._index(rows)
        size = self._seen[at]
        size.weight = min(1.0, size.weight * 0.5 ** ((now - size.seen_s) / _HALF_LIFE_S) + _STEP)
        step = max(_STEP, _STEP / size.weight)
        size.mean_s += min(1.0, step) * (seconds - size.mean_s)
        size.seen_s = now
        self._sums = [_LINE_FORGET * s for s in self._sums]
        for i, value in enumerate((1.0, rows, rows * rows, seconds, rows * seconds)):
            self._sums[i] += value
        if expected > 0:
            # The 99th percentile of seen over expected: up by 99 parts as often as down by one.
            self._tail += 0.02 * (0.99 if seconds / expected > self._tail else -0.01)
            self._tail = min(3.0, max(1.0, self._tail))
        self._updates += 1
        if self._updates < 32 or self._updates % 8 == 0:
            self._cost = None

    @property
    def is_known(self) -> bool:
        """Whether any call was measured."""
        return bool(self._anchors) or self._updates > 0

    def cost_s(self, rows: int) -> float:
        """Expected seconds of a call with ``rows``; 0 before any was measured."""
        if not self.is_known:
            return 0.0
        costs = self._costs()
        if rows >= self.max_rows:
            return costs[-1] * rows / self.max_rows
        at = bisect.bisect_left(self.sizes, rows)
        if self.sizes[at] == rows:
            return costs[at]
        low, high = self.sizes[at - 1], self.sizes[at]
        return costs[at - 1] + (costs[at] - costs[at - 1]) * (rows - low) / (high - low)

    def high_s(self, rows: int) -> float:
        """Seconds that 99 of 100 such calls stay below."""
        return self.cost_s(rows) * self._tail

    def best_rows(self, target_s: float, rate_per_s: float = 0.0, num_instances: int = 1) -> int:
        """The smallest batch with (nearly) the highest rate among those that keep the target.

        A request waits for the call before its own at most, so two calls must fit. Where batches
        that keep it cannot keep up with the rows that arrive, the target is lost to the queue and
        smaller ones would only lose more: then the highest rate of all is taken.

        Args:
            target_s: latency that 99 of 100 answers should keep.
            rate_per_s: rows that arrive. num_instances: calls at the same time.
        """
        if not self.is_known:
            return 1
        costs = self._costs()
        every = range(len(costs))
        fitting = [i for i in every if 2 * costs[i] * self._tail <= target_s] or [0]
        best = self._fastest(fitting)
        if rate_per_s * self.cost_s(best) > _BUSY * best * num_instances:
            return self._fastest(every)
        return best

    def _fastest(self, among: Iterable[int]) -> int:
        costs = self._costs()
        rates = {self.sizes[i]: self.sizes[i] / costs[i] for i in among}
        enough = max(rates.values()) * (1 - _RATE_TOLERANCE)
        return next(rows for rows, rate in rates.items() if rate >= enough)

    def smallest_sustaining(self, rate_per_s: float, num_instances: int, limit: int) -> int:
        """The smallest batch that keeps the instances idle a fifth of the time at this rate."""
        costs = self._costs()
        for size, cost in zip(self.sizes, costs, strict=True):
            if size >= limit:
                break
            if rate_per_s * cost <= 0.8 * size * num_instances:
                return size
        return limit

    def table(self) -> list[tuple[int, float]]:
        """Rows and expected seconds, for those who look."""
        return list(zip(self.sizes, self._costs(), strict=True)) if self.is_known else []

    def _index(self, rows: int) -> int:
        return min(bisect.bisect_left(self.sizes, rows), len(self.sizes) - 1)

    def _costs(self) -> list[float]:
        if self._cost is None:
            intercept, slope = self._line()
            now = max(size.seen_s for size in self._seen)
            costs = []
            for rows, size in zip(self.sizes, self._seen, strict=True):
                line = intercept + slope * rows
                weight = size.weight * 0.5 ** ((now - size.seen_s) / _HALF_LIFE_S)
                weight = weight / (weight + _LINE_WEIGHT * _STEP)
                costs.append(max(1e-7, weight * size.mean_s + (1 - weight) * line))
            # More rows never cost less: a small dip is noise.
            for i in range(len(costs) - 2, -1, -1):
                costs[i] = min(costs[i], costs[i + 1])
            self._cost = costs
        return self._cost

    def _line(self) -> tuple[float, float]:
        n, x, xx, y, xy = self._sums
        for rows, seconds in self._anchors.items():
            n, x, xx = n + 1, x + rows, xx + rows * rows
            y, xy = y + seconds, xy + rows * seconds
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-9 * max(1.0, n * xx) else math.nan
        if not slope >= 0:
            # One size alone: half of the cost is taken for fixed.
            slope = 0.5 * y / x if math.isnan(slope) else 0.0
        return max(0.0, (y - slope * x) / n), slope
