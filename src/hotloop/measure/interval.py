"""A confidence interval for a mean that holds at every look, so that one may stop when one likes.

A t interval holds for a number of observations fixed beforehand. Who looks after every pair and
stops at the first interval clear of zero finds a difference between equals far more often than
the level says. This one is wider by a factor of about 1.7 and holds for all looks together.

Robbins' mixture of likelihood ratios for normal observations of unknown variance, with the effect
in units of the standard deviation drawn from a normal distribution. The ratio is a martingale under
"no effect", so Ville's inequality bounds the chance that it ever reaches 1/alpha.
Robbins 1970, "Statistical methods related to the law of the iterated logarithm"; Lai 1976, "On
confidence sequences"; Lindon, Ham, Tingley, Bojinov 2022, "Anytime-valid inference in linear
models"; Wang, Ramdas 2025, "Anytime-valid t-tests and confidence sequences for Gaussian means with
unknown variance".

The logarithm of a ratio of two times measured next to each other is close to symmetric even where
times have a long tail; for symmetric long tails a t statistic errs to the safe side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# The mixture is the narrowest for effects of about 2 standard deviations of one observation:
# 1 / 0.25 is the variance of the normal that effects are drawn from.
_PRECISION = 0.25


def half_width(count: int, deviation: float, confidence: float = 0.95) -> float:
    """Half of the interval's width; infinite for fewer than two observations, or too few to tell.

    Args:
        count: observations. deviation: their standard deviation (of a sample: n - 1).
        confidence: chance that the interval holds the mean at all looks, above 0 and below 1.
    """
    if count < 2:
        return math.inf
    ratio = _PRECISION / (_PRECISION + count)
    level = ((1 - confidence) * math.sqrt(ratio)) ** (2 / count)
    if level <= ratio:
        return math.inf
    t_squared = (count - 1) * (1 - level) / (level - ratio)
    return deviation * math.sqrt(t_squared / count)


def always_valid_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """``(mean, low, high)`` of at least one observation; see the module."""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    half = half_width(len(values), deviation, confidence)
    return mean, mean - half, mean + half
