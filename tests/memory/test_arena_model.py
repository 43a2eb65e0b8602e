"""The model of the arena: worked examples, invariants, and the arena itself."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.errors import InputError
from hotloop.memory.arena_model import ArenaModel
from hotloop.memory.tensor_arena import TensorArena, tensor_arena
from support import examples

PAGE = 4096
# Few distinct sizes, so that equal holes, exact fits and splits all happen.
SIZES = st.one_of(
    st.sampled_from([0, 1, 1023, 1024, 4096, 8192, 12288, 65536, 200_000]),
    st.integers(0, 100_000),
)
STEPS = st.lists(st.one_of(SIZES, st.tuples(st.integers(0, 1000))), max_size=60)


def model(**options) -> ArenaModel:
    return ArenaModel(**{"threshold_bytes": 1024, **options})


def test_blocks_follow_one_another_rounded_up():
    m = model()
    handles = [m.malloc(n) for n in (4096, 4097, 1024)]
    assert [m.offset(h) for h in handles] == [0, PAGE, 3 * PAGE]
    assert m.top_bytes == m.live_bytes == 4 * PAGE


def test_the_smallest_hole_that_fits_is_taken_and_the_lowest_of_equals():
    m = model()
    sizes = [3, 1, 2, 1, 3, 1, 2, 1]
    blocks = [m.malloc(n * PAGE) for n in sizes]
    for hole in (0, 2, 4, 6):  # holes of 3, 2, 3, 2 pages
        m.free(blocks[hole])
    assert m.offset(m.malloc(2 * PAGE)) == 4 * PAGE
    assert m.offset(m.malloc(1 * PAGE)) == 11 * PAGE  # what is left of the other hole of 2
    assert m.offset(m.malloc(3 * PAGE)) == 0


def test_neighbours_join_and_the_end_joins_the_wilderness():
    m = model()
    a, b, c, d = (m.malloc(PAGE) for _ in range(4))
    m.free(a)
    m.free(c)
    m.free(b)
    assert m.offset(m.malloc(3 * PAGE)) == 0
    m.free(d)
    assert m.top_bytes == 3 * PAGE
    assert m.peak_top_bytes == 4 * PAGE


def test_the_wilderness_is_used_last_and_ends():
    m = model(capacity_bytes=4 * PAGE)
    a, b = m.malloc(2 * PAGE), m.malloc(PAGE)
    m.free(a)
    c = m.malloc(PAGE)
    assert m.offset(c) == 0
    too_much = m.malloc(2 * PAGE)
    assert m.offset(too_much) is None
    assert (m.num_fallbacks, m.outside_bytes) == (1, 2 * PAGE)
    for handle in (b, c, too_much):
        m.free(handle)
    assert (m.live_bytes, m.top_bytes, m.outside_bytes) == (0, 0, 0)


def test_small_requests_stay_outside():
    m = model()
    m.free(m.malloc(1023))
    assert (m.num_allocations, m.num_fallbacks, m.peak_outside_bytes) == (0, 0, 1023)


def test_peaks_start_again():
    m = model()
    a, b = m.malloc(PAGE), m.malloc(PAGE)
    m.free(b)
    m.reset_peak()
    assert m.peak_top_bytes == m.peak_live_bytes == PAGE
    m.free(a)


@pytest.mark.parametrize(
    "options",
    [{"threshold_bytes": -1}, {"granularity_bytes": 100}, {"granularity_bytes": 0},
     {"capacity_bytes": 0}],
)  # fmt: skip
def test_sizes_out_of_rule_are_refused(options):
    with pytest.raises(InputError):
        ArenaModel(**options)
    with pytest.raises(InputError):
        TensorArena(**options)


def test_a_handle_is_freed_once():
    m = model()
    handle = m.malloc(PAGE)
    m.free(handle)
    with pytest.raises(InputError, match="in use"):
        m.free(handle)
    with pytest.raises(InputError, match="at least 0"):
        m.malloc(-1)


@given(STEPS)
def test_blocks_never_overlap_and_nothing_is_lost(steps):
    m = model()
    live = {}
    for step in steps:
        if isinstance(step, tuple):
            if live:
                handle = list(live)[step[0] % len(live)]
                del live[handle]
                m.free(handle)
        else:
            handle = m.malloc(step)
            live[handle] = step
        spans = sorted(
            (m.offset(h), -(-n // PAGE) * PAGE) for h, n in live.items() if m.offset(h) is not None
        )
        ends = [0] + [offset + size for offset, size in spans]
        assert all(offset >= end for (offset, _), end in zip(spans, ends, strict=False))
        assert m.top_bytes == ends[-1]
        assert m.live_bytes == sum(size for _, size in spans)
        assert m.outside_bytes == sum(n for h, n in live.items() if m.offset(h) is None)
    for handle in live:
        m.free(handle)
    assert (m.live_bytes, m.top_bytes, m.outside_bytes) == (0, 0, 0)


needs_arena = pytest.mark.usefixtures("arena_available")


@needs_arena
@settings(max_examples=examples(100))
@given(STEPS, st.sampled_from([64, 4096]), st.sampled_from([256 * 1024, 64 * 1024**2]))
def test_the_arena_puts_real_tensors_where_the_model_says(steps, granularity, capacity):
    options = {
        "threshold_bytes": 1024, "granularity_bytes": granularity, "capacity_bytes": capacity,
    }  # fmt: skip
    m = ArenaModel(**options)
    live: dict[int, torch.Tensor] = {}
    with tensor_arena(**options) as arena:
        if arena.stats().num_live:
            gc.collect()
        before = arena.stats()
        assert before.live_bytes == 0, "another test left tensors in the arena"
        arena.reset_peak()
        for step in steps:
            if isinstance(step, tuple):
                if live:
                    handle = list(live)[step[0] % len(live)]
                    del live[handle]
                    m.free(handle)
            else:
                handle = m.malloc(step)
                live[handle] = torch.empty(step, dtype=torch.uint8)
                assert arena.offset(live[handle]) == m.offset(handle)
            stats = arena.stats()
            assert (stats.live_bytes, stats.top_bytes) == (m.live_bytes, m.top_bytes)
            assert stats.free_bytes == m.top_bytes - m.live_bytes
        live.clear()
    after = arena.stats()
    assert (after.peak_live_bytes, after.peak_top_bytes) == (m.peak_live_bytes, m.peak_top_bytes)
    assert after.num_allocations - before.num_allocations == m.num_allocations
    assert after.num_fallbacks - before.num_fallbacks == m.num_fallbacks
    assert (after.live_bytes, after.top_bytes, after.num_live) == (0, 0, 0)


@needs_arena
def test_training_steps_replayed_on_the_model_end_at_the_same_offsets():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(16 * 13 * 13, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters())
    x, y = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    gc.collect()
    with tensor_arena() as arena:
        assert arena.stats().live_bytes == 0
        arena.reset_peak()
        with arena.recording() as events:
            for _ in range(3):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
        peak = arena.stats().peak_top_bytes
    assert len(events) > 40
    m, at = ArenaModel(), {}
    for offset, num_bytes in events:
        if num_bytes is None:
            m.free(at.pop(offset))
        else:
            at[offset] = m.malloc(num_bytes)
            assert m.offset(at[offset]) == offset
    assert m.peak_top_bytes == peak > 0
