"""Losses of the same steps under two plans: equal to rounding, or not."""

from __future__ import annotations

import math

# Relative, of the first loss; float32 has 6e-8. Training makes more of it with each step: where a
# gradient is near 0, Adam turns its last bits into a step of full size.
ROUNDING, ROUNDING_GROWTH = 1e-4, 2.0


def loss_difference(a: list[float], b: list[float]) -> tuple[float, int]:
    """Greatest relative difference over the steps that both have, and how many those are."""
    found = _differences(a, b)
    return max(found, default=math.nan), len(found)


def equal_to_rounding(a: list[float], b: list[float]) -> bool:
    """Whether losses of the same steps differ by no more than rounding may have become by then."""
    found = _differences(a, b)
    bounds = (ROUNDING * ROUNDING_GROWTH**step for step in range(len(found)))
    return bool(found) and all(d <= bound for d, bound in zip(found, bounds, strict=True))


def _differences(a: list[float], b: list[float]) -> list[float]:
    scale = max((abs(x) for x in a), default=0.0) * 1e-6  # A loss that reached 0 has no relation.
    return [
        abs(x - y) / max(abs(x), abs(y), scale) if x != y else 0.0
        for x, y in zip(a, b, strict=False)
    ]
