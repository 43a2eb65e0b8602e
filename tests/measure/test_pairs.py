"""The paired comparison on made-up trials whose truth is known."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.errors import InputError, RunError
from hotloop.measure import Comparison, compare
from hotloop.measure.interval import half_width

RUNS = 200


def clock_of(seconds_per_call=1.0):
    ticks = itertools.count()
    return lambda: next(ticks) * seconds_per_call


class Pair:
    """Two trials on one machine: B takes 1/gain of A, with noise, outliers and drift of both."""

    def __init__(self, gain, *, noise=0.03, drift=0.0, walk=0.0, outliers=0.0, seed=0):
        self.gain, self.noise, self.drift, self.walk = gain, noise, drift, walk
        self.outliers, self.random = outliers, random.Random(seed)
        self.calls, self.level = 0, 0.0

    def _seconds(self, true_s):
        self.calls += 1
        self.level += self.random.gauss(self.drift, self.walk)
        extra = self.random.expovariate(1.0) if self.random.random() < self.outliers else 0.0
        return true_s * math.exp(self.level + self.random.gauss(0, self.noise) + extra)

    def a(self):
        return self._seconds(1.0)

    def b(self):
        return self._seconds(1.0 / self.gain)


def compared(gain, seed, *, max_pairs=40, **noise):
    pair = Pair(gain, seed=seed, **noise)
    return compare(pair.a, pair.b, budget_s=1e9, max_pairs=max_pairs, clock=clock_of())


NOISE = st.fixed_dictionaries(
    {
        "noise": st.floats(0.005, 0.2),
        "drift": st.floats(-0.02, 0.02),
        "walk": st.floats(0.0, 0.05),
        "outliers": st.floats(0.0, 0.2),
    }
)


def too_many(level):
    """The count that ``RUNS`` draws of probability ``level`` pass once in 10,000 times."""
    return RUNS * level + 3.8 * math.sqrt(RUNS * level * (1 - level))


@settings(max_examples=15, derandomize=True)
@given(noise=NOISE)
def test_equals_are_not_told_apart_more_often_than_alpha_says(noise):
    verdicts = [compared(1.0, seed, **noise).verdict for seed in range(RUNS)]
    assert sum(v != "no difference" for v in verdicts) <= too_many(0.05)


@settings(max_examples=15, derandomize=True)
@given(noise=NOISE, gain=st.floats(0.5, 2.0))
def test_the_interval_holds_the_truth_wherever_it_stopped(noise, gain):
    found = [compared(gain, seed, **noise) for seed in range(RUNS)]
    missed = sum(not c.low <= gain <= c.high for c in found)
    assert missed <= too_many(0.05)


def test_a_plain_t_interval_that_is_looked_at_would_find_what_is_not_there():
    """What the always-valid interval is for: the same looks at a 95 % t interval fail."""
    quantiles = {4: 3.182, 6: 2.571, 8: 2.365, 10: 2.262, 12: 2.201, 14: 2.160, 16: 2.131}
    false = 0
    for seed in range(RUNS):
        draw = random.Random(seed)
        values = [draw.gauss(0, 1) for _ in range(16)]
        for n, quantile in quantiles.items():
            standard_error = statistics.stdev(values[:n]) / math.sqrt(n)
            if abs(statistics.fmean(values[:n])) > quantile * standard_error:
                false += 1
                break
    assert false > too_many(0.05)


def test_a_clear_gain_is_proven_soon_and_a_loss_is_a_regression():
    gain = compared(1.3, 1, noise=0.02)
    assert (gain.verdict, gain.stopped) == ("proven", "clear")
    assert gain.n <= 8
    assert 1 < gain.low < 1.3 < gain.high
    loss = compared(0.8, 1, noise=0.02)
    assert loss.verdict == "regression"
    assert loss.high < 1


def test_alike_within_the_margin_ends_early():
    alike = compared(1.001, 3, noise=0.005, max_pairs=400)
    assert (alike.verdict, alike.stopped) == ("no difference", "within the margin")
    assert alike.n < 40


def test_even_drift_falls_out():
    """A machine that slows by 5 % a slice, no noise: the ratio is exact."""
    found = compared(1.5, 0, noise=0.0, drift=0.05)
    assert found.ratio == pytest.approx(1.5)


def test_the_time_is_kept_and_the_least_pairs_are_made():
    pair, now_s = Pair(1.0, noise=0.3), 0.0

    def taking(trial):
        def run():
            nonlocal now_s
            now_s += 1.0
            return trial()

        return run

    found = compare(taking(pair.a), taking(pair.b), budget_s=21.0, clock=lambda: now_s)
    assert found.stopped == "time"
    # Whole A B B A, of which no other would have ended in time.
    assert (found.elapsed_s, found.n) == (20, 10)
    least = compare(pair.a, pair.b, budget_s=1e-9)
    assert least.n == 4


def test_order_turns_from_pair_to_pair():
    calls = []

    def trial(name):
        return lambda: calls.append(name) or 1.0 + 0.1 * len(calls)

    compare(trial("a"), trial("b"), budget_s=0.0)
    assert "".join(calls) == "abbaabba"


def test_it_is_told_after_each_pair_and_survives_json():
    seen = []
    pair = Pair(1.2)
    found = compare(pair.a, pair.b, on_pair=lambda *row: seen.append(row))
    assert [row[0] for row in seen] == list(range(1, found.n + 1))
    assert seen[-1][1] == pytest.approx(found.ratio)
    assert seen[0][2:] == (0.0, math.inf)
    assert Comparison.from_dict(found.to_dict()) == found
    assert "pairs)" in found.text()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_trial_must_give_seconds(seconds):
    with pytest.raises(RunError, match="seconds above 0"):
        compare(lambda: seconds, lambda: 1.0)


@pytest.mark.parametrize(
    "wrong", [{"confidence": 1.0}, {"margin": -0.1}, {"min_pairs": 1}, {"max_pairs": 3}]
)
def test_arguments_outside_their_rule_are_refused(wrong):
    with pytest.raises(InputError):
        compare(lambda: 1.0, lambda: 1.0, **wrong)


@given(n=st.integers(2, 400), confidence=st.floats(0.5, 0.999))
def test_more_confidence_is_wider_and_more_data_is_narrower(n, confidence):
    width = half_width(n, 1.0, confidence)
    assert width >= half_width(n, 1.0, confidence - 0.1)
    assert width >= half_width(n + 1, 1.0, confidence)
    assert half_width(n, 2.0, confidence) == pytest.approx(2 * width) or math.isinf(width)
