"""Shares in proportion to rates, that settle; and what workers of given speeds would do."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotloop import BatchSizeAdjuster, GradientSynchronizer, InputError, LoadBalancer
from hotloop.parallel.simulate import simulate_step


@given(st.integers(1, 200), st.lists(st.floats(0.1, 100), min_size=1, max_size=12))
def test_shares_add_up_and_no_cut_ends_sooner(num_chunks: int, rates: list[float]) -> None:
    shares = BatchSizeAdjuster().shares(num_chunks, rates)
    assert sum(shares) == num_chunks
    assert min(shares) >= 0
    end = max(s / r for s, r in zip(shares, rates, strict=True))
    # Whoever ends last could not hand a chunk to another without that one ending as late.
    for rate, share in zip(rates, shares, strict=True):
        assert (share + 1) / rate >= end * (1 - 1e-9)


def test_shares_follow_rates() -> None:
    assert BatchSizeAdjuster().shares(14, [1, 2, 4]) == [2, 4, 8]


def test_small_gains_change_nothing() -> None:
    assert BatchSizeAdjuster(0.05).shares(40, [1.0, 1.02], [20, 20]) == [20, 20]


@pytest.mark.parametrize("seed", range(5))
def test_shares_settle_within_20_steps_and_stay(seed: int) -> None:
    draw = random.Random(seed)
    speeds = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 2.0]
    balancer = LoadBalancer(8, 128)
    history = []
    for _ in range(100):
        queue = balancer.balance_load()
        history.append(queue)
        for worker, (chunks, speed) in enumerate(zip(queue, speeds, strict=True)):
            # Rates that waver by 5 %, as measured ones do.
            balancer.record(worker, chunks, chunks / (speed * draw.uniform(0.95, 1.05)))
    for queue in history[20:]:
        ends = [q / s for q, s in zip(queue, speeds, strict=True)]
        assert max(ends) <= 1.15 * 128 / sum(speeds)
    changes = sum(a != b for a, b in itertools.pairwise(history[20:]))
    assert changes <= 16  # Noise of 5 % against a hysteresis of 5 %: rarely, not to and fro.


def test_a_slowed_worker_is_told() -> None:
    balancer = LoadBalancer(2, 8)
    for seconds in [1.0] * 5 + [4.0] * 20:
        balancer.record(0, 4, 1.0)
        balancer.record(1, 4, seconds)
    fast, slow = balancer.workers
    assert fast.slowdown == 1.0
    assert slow.slowdown == pytest.approx(0.25, abs=0.02)
    assert balancer.balance_load() == [7, 1]


def test_a_shared_core_and_a_slow_one_are_told_apart() -> None:
    balancer = LoadBalancer(2, 8)
    for seconds, cpu_s in [(1.0, 1.0)] * 3 + [(2.0, 1.0)] * 30:
        balancer.record(0, 4, seconds, cpu_s=seconds)
        balancer.record(1, 4, seconds, cpu_s=cpu_s)
    slow, shared = balancer.workers
    assert slow.slowdown == shared.slowdown == pytest.approx(0.5, abs=0.01)
    assert slow.cpu_share == 1.0
    assert shared.cpu_share == pytest.approx(0.5, abs=0.01)


def test_what_one_steals_another_loses() -> None:
    balancer = LoadBalancer(2, 8)
    balancer.record(0, 5, 1.0, stolen=1, begun=4)
    balancer.record(1, 3, 1.0, begun=4)
    assert [(w.stolen, w.lost) for w in balancer.workers] == [(1, 0), (0, 1)]


def test_a_worker_without_chunks_is_taken_for_an_average_one() -> None:
    balancer = LoadBalancer(3, 9)
    balancer.record(0, 3, 1.0)
    balancer.record(1, 3, 1.0)
    assert balancer.balance_load() == [3, 3, 3]


SPEEDS = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 2.0]


def test_unequal_workers_reach_nine_tenths_of_their_rates() -> None:
    chunks = 128
    equal = BatchSizeAdjuster().shares(chunks, [1.0] * 8)
    alone = simulate_step(SPEEDS, equal, steal_threshold=None)
    stealing = simulate_step(SPEEDS, equal, steal_threshold=1)
    cut = BatchSizeAdjuster().shares(chunks, SPEEDS)
    balanced = simulate_step(SPEEDS, cut, steal_threshold=None)
    # Equal parts: all wait for the slowest.
    assert chunks / alone.wall_s == pytest.approx(8 * min(SPEEDS))
    assert chunks / stealing.wall_s >= 0.9 * sum(SPEEDS)
    assert chunks / balanced.wall_s >= 0.9 * sum(SPEEDS)
    assert sum(balanced.chunks) == sum(stealing.chunks) == chunks
    assert sum(stealing.stolen) > 0
    assert sum(balanced.stolen) == 0


def test_a_threshold_keeps_last_chunks_at_home() -> None:
    step = simulate_step([1.0, 100.0], [4, 4], steal_threshold=3)
    assert step.chunks == (3, 5)
    assert simulate_step([1.0, 100.0], [4, 4], steal_threshold=5).stolen == (0, 0)


@pytest.mark.parametrize(("workers", "chunks"), [(0, 4), (2, 0)])
def test_a_balancer_needs_workers_and_chunks(workers: int, chunks: int) -> None:
    with pytest.raises(InputError, match="at least one worker and one chunk"):
        LoadBalancer(workers, chunks)


def test_rates_must_be_positive() -> None:
    with pytest.raises(InputError, match="above 0"):
        BatchSizeAdjuster().shares(4, [1.0, 0.0])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_aggregate_is_the_gradient_of_the_whole_batch(sizes: list[int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 5, requires_grad=True)
    x, y = torch.randn(sum(sizes), 5), torch.randn(sum(sizes), 3)

    def gradient(rows: slice) -> list[torch.Tensor]:
        loss = torch.nn.functional.mse_loss(x[rows] @ weight.t(), y[rows])
        return list(torch.autograd.grad(loss, [weight]))

    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    parts = [gradient(slice(a, a + n)) for a, n in zip(starts, sizes, strict=True)]
    (whole,) = GradientSynchronizer.aggregate(parts, sizes)
    torch.testing.assert_close(whole, gradient(slice(None))[0])
    assert torch.equal(whole, GradientSynchronizer.aggregate(parts, sizes)[0])


@pytest.mark.parametrize(
    ("gradients", "sizes"),
    [([], []), ([[torch.ones(2)]], [1, 2]), ([[torch.ones(2)]], [0]),
     ([[torch.ones(2)], [torch.ones(3)]], [1, 1])],
)  # fmt: skip
def test_aggregate_refuses_what_does_not_fit(
    gradients: list[list[torch.Tensor]], sizes: list[int]
) -> None:
    with pytest.raises(InputError):
        GradientSynchronizer.aggregate(gradients, sizes)
