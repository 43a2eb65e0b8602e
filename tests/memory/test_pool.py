import gc
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hotloop.errors import InputError, PoolError
from hotloop.memory import BatchLayout, BufferState, MemoryPool
from support import examples

LAYOUTS = (BatchLayout(4, (3, 5), torch.float32), BatchLayout(4, (), torch.int64))


@st.composite
def batch_layouts(draw):
    num_rows = draw(st.integers(1, 6))
    shapes = draw(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4))
    return [
        BatchLayout(
            num_rows,
            tuple(shape),
            draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.int64])),
            draw(st.sampled_from([16, 64, 128, 16384])),
        )
        for shape in shapes
    ]


@given(batch_layouts(), st.integers(1, 4))
def test_tensors_are_aligned_and_share_no_byte(layouts, num_buffers):
    pool = MemoryPool(layouts, num_buffers)
    assert pool.total_bytes == MemoryPool.predict_bytes(layouts, num_buffers)
    buffers = [pool.acquire() for _ in range(num_buffers)]
    tensors = [tensor for buffer in buffers for tensor in buffer.tensors]
    for buffer in buffers:
        for layout, tensor in zip(layouts, buffer.tensors, strict=True):
            assert tensor.data_ptr() % layout.line_bytes == 0
            assert tensor.shape == (layout.num_rows, *layout.row_shape)
            if layout.num_rows > 1:
                second_row = tensor[1].data_ptr() - tensor.data_ptr()
                assert second_row == layout.stride_bytes
        spread = max(t.data_ptr() for t in buffer.tensors) - buffer.tensors[0].data_ptr()
        assert spread < MemoryPool.predict_bytes(layouts, 1)
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    for value, tensor in enumerate(tensors):
        assert (tensor == value).all()


class LendingMachine(RuleBasedStateMachine):
    """The pool against a set of loans kept by hand."""

    NUM_BUFFERS = 3

    def __init__(self):
        super().__init__()
        self.pool = MemoryPool(LAYOUTS, self.NUM_BUFFERS)
        self.lent = {}
        self.returned = []
        self.next_mark = self.hits = self.misses = self.high_water = 0

    @rule(timeout_s=st.sampled_from([0.0, 0.0005]))
    def acquire(self, timeout_s):
        buffer = self.pool.acquire(timeout_s)
        if len(self.lent) == self.NUM_BUFFERS:
            self.misses += 1
            assert buffer is None
            return
        self.hits += 1
        assert buffer.state is BufferState.IN_USE
        assert buffer.num_rows == buffer.capacity == 4
        assert buffer.index not in {b.index for b in self.lent.values()}
        for tensor in buffer.tensors:
            tensor.fill_(self.next_mark)
        self.lent[self.next_mark] = buffer
        self.next_mark += 1
        self.high_water = max(self.high_water, len(self.lent))

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def release(self, data):
        buffer = self.lent.pop(data.draw(st.sampled_from(sorted(self.lent))))
        self.pool.release(buffer)
        assert buffer.state is BufferState.FREE
        self.returned.append(buffer)

    @precondition(lambda self: self.returned)
    @rule(data=st.data())
    def release_again(self, data):
        buffer = data.draw(st.sampled_from(self.returned))
        with pytest.raises(PoolError, match="released once"):
            self.pool.release(buffer)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), num_rows=st.integers(0, 4))
    def resize(self, data, num_rows):
        buffer = self.lent[data.draw(st.sampled_from(sorted(self.lent)))]
        buffer.resize(num_rows)
        assert [len(rows) for rows in buffer.rows()] == [num_rows, num_rows]
        buffer.resize(4)

    @invariant()
    def what_is_lent_is_untouched(self):
        for mark, buffer in self.lent.items():
            assert all((tensor == mark).all() for tensor in buffer.rows())

    @invariant()
    def counters_agree(self):
        stats = self.pool.stats()
        assert stats.in_use == len(self.lent)
        assert (stats.hits, stats.misses) == (self.hits, self.misses)
        assert stats.high_water == self.high_water


TestLending = LendingMachine.TestCase
TestLending.settings = settings(max_examples=examples(40), stateful_step_count=30, deadline=None)


def test_the_buffer_released_last_is_lent_first():
    pool = MemoryPool(LAYOUTS, 3)
    first, second = pool.acquire(), pool.acquire()
    pool.release(second)
    pool.release(first)
    assert pool.acquire().tensors is first.tensors


def test_a_second_release_is_caught_even_when_lent_again():
    pool = MemoryPool(LAYOUTS, 1)
    first = pool.acquire()
    pool.release(first)
    second = pool.acquire()
    assert second.tensors is first.tensors
    with pytest.raises(PoolError, match="released once"):
        pool.release(first)
    assert pool.stats().in_use == 1
    assert second.state is BufferState.IN_USE


def test_a_buffer_of_another_pool_is_refused():
    here, there = MemoryPool(LAYOUTS, 1), MemoryPool(LAYOUTS, 1)
    buffer = there.acquire()
    with pytest.raises(PoolError, match="pool that lent it"):
        here.release(buffer)
    assert buffer.state is BufferState.IN_USE
    there.release(buffer)


def test_a_waiter_gets_the_buffer_that_another_thread_releases():
    pool = MemoryPool(LAYOUTS, 1)
    held = pool.acquire()
    held.tensors[0].fill_(3)
    got = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(None)))
    waiter.start()
    while not pool.stats().waits:
        time.sleep(0.001)
    pool.release(held)
    waiter.join(10)
    assert got[0].tensors is held.tensors
    assert (got[0].tensors[0] == 3).all()
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.waits) == (1, 1, 1)
    assert stats.wait_s > 0


def test_a_wait_ends_with_none_and_is_counted():
    pool = MemoryPool(LAYOUTS, 1)
    pool.acquire()
    assert pool.acquire() is None
    assert pool.acquire(0.002) is None
    stats = pool.stats()
    assert (stats.misses, stats.waits) == (2, 1)
    assert stats.wait_s >= 0.001


def test_closing_wakes_waiters_and_leaves_lent_memory_alone():
    pool = MemoryPool(LAYOUTS, 1)
    held = pool.acquire()
    errors = []

    def wait():
        try:
            pool.acquire(float("inf"))
        except PoolError as error:
            errors.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not pool.stats().waits:
        time.sleep(0.001)
    pool.close()
    pool.close()
    waiter.join(10)
    assert errors == ["a closed pool lends no buffers."]
    with pytest.raises(PoolError, match="closed"):
        pool.acquire()
    images = held.tensors[0]
    pool.release(held)
    dropped = weakref.ref(pool)
    held = pool = None
    gc.collect()
    assert dropped() is None
    images.fill_(5)
    assert (images == 5).all()


def test_threads_never_share_a_buffer():
    """8 threads, 3 buffers: a thread that meets a foreign mark in its buffer has been robbed."""
    num_loans = 150
    torn = []

    def work(mark):
        for _ in range(num_loans):
            buffer = pool.acquire(None)
            for tensor in buffer.tensors:
                tensor.fill_(mark)
            if not all((tensor == mark).all() for tensor in buffer.tensors):
                torn.append(mark)
            pool.release(buffer)

    with MemoryPool(LAYOUTS, 3) as pool:
        threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stats = pool.stats()
    assert torn == []
    assert stats.in_use == 0
    assert stats.hits + stats.misses == 8 * num_loans
    assert 1 <= stats.high_water <= 3
    assert stats.misses == stats.waits


@pytest.mark.parametrize(
    ("layouts", "num_buffers", "rule"),
    [
        ([], 1, "at least one BatchLayout"),
        (LAYOUTS, 0, "num_buffers"),
        ([LAYOUTS[0], BatchLayout(5, (), torch.int64)], 1, "same num_rows"),
    ],
)
def test_pools_that_make_no_sense_are_refused(layouts, num_buffers, rule):
    with pytest.raises(InputError, match=rule):
        MemoryPool(layouts, num_buffers)
    with pytest.raises(InputError, match=rule):
        MemoryPool.predict_bytes(layouts, num_buffers)


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_timeouts_that_make_no_sense_are_refused(timeout_s):
    with pytest.raises(InputError, match="timeout_s"):
        MemoryPool(LAYOUTS, 1).acquire(timeout_s)


@pytest.mark.parametrize("num_rows", [-1, 5])
def test_a_buffer_cannot_hold_more_rows_than_it_has(num_rows):
    buffer = MemoryPool(LAYOUTS, 1).acquire()
    with pytest.raises(InputError, match="capacity 4"):
        buffer.num_rows = num_rows
    assert buffer.num_rows == 4
    assert "BatchBuffer 0 (in use, 4 rows)" in repr(buffer)


def test_filling_one_buffer_is_no_change_of_another_to_autograd():
    pool = MemoryPool([BatchLayout(2, (3,), torch.float32)], num_buffers=2)
    in_use, filling = pool.acquire(), pool.acquire()
    weight = torch.ones(3, requires_grad=True)
    loss = (in_use.tensors[0] * weight).sum()
    filling.tensors[0].fill_(5.0)
    loss.backward()
    assert weight.grad is not None
