import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.data import GlobalSampler
from hotloop.errors import DataError, PlanError

sizes = {
    "num_samples": st.integers(1, 300),
    "batch_size": st.integers(1, 320),
    "seed": st.integers(-(2**40), 2**70),
    "epoch": st.integers(0, 10_000),
}


@settings(deadline=None)
@given(**sizes, shuffle=st.booleans(), data=st.data())
def test_every_sample_once_an_epoch_and_any_tail_can_be_resumed(
    num_samples, batch_size, seed, epoch, shuffle, data
):
    sampler = GlobalSampler(num_samples, batch_size, seed=seed, shuffle=shuffle)
    batches = list(sampler.batches(epoch))
    assert len(batches) == sampler.num_batches == -(-num_samples // batch_size)
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    joined = torch.cat(batches)
    assert joined.dtype == torch.int64
    assert sorted(joined.tolist()) == list(range(num_samples))
    assert torch.equal(joined, sampler.order(epoch))
    if not shuffle:
        assert joined.tolist() == list(range(num_samples))
    start = data.draw(st.integers(0, sampler.num_batches))
    # A new sampler, as after a restart, and no epoch before it.
    again = GlobalSampler(num_samples, batch_size, seed=seed, shuffle=shuffle)
    tail = list(again.batches(epoch, start_batch=start))
    assert len(tail) == len(batches) - start
    assert all(torch.equal(a, b) for a, b in zip(tail, batches[start:], strict=True))


@settings(deadline=None)
@given(**sizes)
def test_drop_last_leaves_out_only_the_smaller_batch(num_samples, batch_size, seed, epoch):
    if num_samples < batch_size:
        with pytest.raises(DataError):
            GlobalSampler(num_samples, batch_size, seed=seed, drop_last=True)
        return
    kept = list(GlobalSampler(num_samples, batch_size, seed=seed, drop_last=True).batches(epoch))
    every = list(GlobalSampler(num_samples, batch_size, seed=seed).batches(epoch))
    assert {len(batch) for batch in kept} == {batch_size}
    assert torch.equal(torch.cat(kept), torch.cat(every)[: len(kept) * batch_size])


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
def test_epochs_and_seeds_differ_and_the_global_generator_is_left_alone(seed, epoch):
    before = torch.get_rng_state()
    orders = [
        GlobalSampler(100, 10, seed=s).order(e)
        for s, e in ((seed, epoch), (seed, epoch + 1), (seed + 1, epoch), (epoch, seed))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    different = {tuple(order.tolist()) for order in orders}
    assert len(different) == (4 if seed != epoch else 3)


def test_bad_sizes_are_refused():
    with pytest.raises(PlanError, match="batch_size must be at least 1; got 0"):
        GlobalSampler(10, 0, seed=0)
    with pytest.raises(DataError):
        GlobalSampler(0, 1, seed=0)
    for start in (-1, 5):
        with pytest.raises(DataError, match="between 0 and the 4 batches"):
            GlobalSampler(10, 3, seed=0).batches(0, start)
