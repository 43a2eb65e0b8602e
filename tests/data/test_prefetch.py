import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.data import GlobalSampler, Prefetcher, RandomFlip, open_dataset
from hotloop.errors import DataError, PlanError, PoolError, RunError
from hotloop.memory import MemoryPool
from support import examples


@pytest.fixture(scope="module")
def data():
    x = torch.arange(50 * 12).view(50, 1, 3, 4).float()
    return open_dataset((x, torch.arange(50)), transforms=[RandomFlip()])


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


class Failing:
    """A dataset that fails in the batch that holds one sample."""

    def __init__(self, at, error):
        self.at, self.error = at, error

    def gather(self, indices, x_out, y_out, *, epoch=0, training=False):
        if self.at in indices.tolist():
            raise self.error
        y_out.copy_(indices)


@settings(max_examples=examples(40), deadline=None)
@given(
    batch_size=st.integers(1, 20),
    queue_size=st.integers(1, 5),
    num_buffers=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_batches_come_in_order_and_are_those_gathered_directly(
    data, batch_size, queue_size, num_buffers, epoch
):
    sampler = GlobalSampler(50, batch_size, seed=4)
    with MemoryPool(data.layouts(batch_size), num_buffers) as pool:
        seen = 0
        options = {"epoch": epoch, "training": True}
        with Prefetcher(
            data, sampler.batches(epoch), pool, queue_size=queue_size, **options
        ) as prefetcher:
            for buffer, indices in zip(prefetcher, sampler.batches(epoch), strict=True):
                x, y = torch.empty(len(indices), 1, 3, 4), torch.empty_like(indices)
                data.gather(indices, x, y, **options)
                assert buffer.num_rows == len(indices)
                assert torch.equal(buffer.rows()[0], x)
                assert torch.equal(buffer.rows()[1], y)
                pool.release(buffer)
                seen += 1
        assert seen == sampler.num_batches
        assert pool.stats().in_use == 0
        assert next(prefetcher, None) is None


def test_the_queue_is_bounded(data):
    batches = iter(GlobalSampler(50, 5, seed=0).batches(0))
    taken = []

    def watched():
        for batch in batches:
            taken.append(batch)
            yield batch

    pool = MemoryPool(data.layouts(5), 10)
    with Prefetcher(data, watched(), pool, queue_size=3) as prefetcher:
        deadline = time.monotonic() + 5
        while pool.stats().in_use < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        # Three in the queue and one that waits for room.
        assert pool.stats().in_use == len(taken) == 4
        pool.release(next(prefetcher))
    assert pool.stats().in_use == 0


@pytest.mark.parametrize("error", [DataError("a bad sample"), KeyError(7), KeyboardInterrupt()])
def test_an_error_in_the_thread_is_raised_after_the_good_batches(data, error):
    pool = MemoryPool(data.layouts(10), 4)
    seen = []
    with Prefetcher(Failing(25, error), torch.arange(50).split(10), pool) as prefetcher:
        for _ in range(2):
            buffer = next(prefetcher)
            seen += buffer.rows()[1].tolist()
            pool.release(buffer)
        with pytest.raises(type(error)) as raised:
            next(prefetcher)
    assert raised.value is error
    assert seen == list(range(20))
    assert pool.stats().in_use == 0


def test_errors_of_the_batches_and_of_the_pool_reach_the_consumer(data):
    def batches():
        yield torch.arange(4)
        raise ZeroDivisionError("in the sampler")

    pool = MemoryPool(data.layouts(4), 3)
    with Prefetcher(data, batches(), pool) as prefetcher:
        pool.release(next(prefetcher))
        with pytest.raises(ZeroDivisionError):
            next(prefetcher)
        with pytest.raises(StopIteration):
            next(prefetcher)
    with (
        Prefetcher(data, [torch.arange(5)], pool) as prefetcher,
        pytest.raises(DataError, match="buffers of 4 rows"),
    ):
        next(prefetcher)
    assert pool.stats().in_use == 0
    pool.close()
    with Prefetcher(data, [torch.arange(4)], pool) as prefetcher, pytest.raises(PoolError):
        next(prefetcher)


@pytest.mark.parametrize("consumed", [0, 1, 4])
@pytest.mark.parametrize("num_buffers", [1, 2, 8])
def test_leaving_early_stops_the_thread_and_gives_all_buffers_back(data, consumed, num_buffers):
    pool = MemoryPool(data.layouts(5), num_buffers)
    with Prefetcher(data, GlobalSampler(50, 5, seed=0).batches(0), pool) as prefetcher:
        for _ in range(consumed):
            pool.release(next(prefetcher))
    assert pool.stats().in_use == 0
    assert next(prefetcher, None) is None
    prefetcher.close()


def test_leaving_while_the_consumer_holds_every_buffer(data):
    pool = MemoryPool(data.layouts(5), 2)
    with Prefetcher(data, GlobalSampler(50, 5, seed=0).batches(0), pool) as prefetcher:
        held = [next(prefetcher), next(prefetcher)]
    assert pool.stats().in_use == 2
    for buffer in held:
        pool.release(buffer)


def test_an_error_of_the_consumer_leaves_nothing_behind(data):
    pool = MemoryPool(data.layouts(5), 3)

    def train():
        with Prefetcher(data, GlobalSampler(50, 5, seed=0).batches(0), pool) as prefetcher:
            pool.release(next(prefetcher))
            raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        train()
    assert pool.stats().in_use == 0


def test_waiting_is_counted(data):
    gate = threading.Event()

    def late():
        gate.wait()
        yield torch.arange(5)

    pool = MemoryPool(data.layouts(5), 1)
    with Prefetcher(data, late(), pool) as prefetcher:
        threading.Timer(0.05, gate.set).start()
        pool.release(next(prefetcher))
        assert prefetcher.num_waits == 1
        assert prefetcher.wait_s > 0.01


def test_the_thread_starts_no_team_of_its_own_and_leaves_the_others_alone(data):
    before = torch.get_num_threads()
    inside = []

    class Asking:
        def gather(self, indices, x_out, y_out, *, epoch=0, training=False):
            inside.append(torch.get_num_threads())

    pool = MemoryPool(data.layouts(5), 2)
    with Prefetcher(Asking(), [torch.arange(5)], pool) as prefetcher:
        pool.release(next(prefetcher))
    assert inside == [1]
    assert torch.get_num_threads() == before
    other = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert other == [before]


def test_misuse_is_refused(data):
    pool = MemoryPool(data.layouts(5), 2)
    with pytest.raises(PlanError, match="queue_size must be at least 1; got 0"):
        Prefetcher(data, [], pool, queue_size=0)
    prefetcher = Prefetcher(data, [], pool)
    with pytest.raises(RunError, match="with block"):
        next(prefetcher)
    with prefetcher:
        assert list(prefetcher) == []
    with pytest.raises(RunError, match="entered once"):
        prefetcher.__enter__()
