"""Offsets of temporaries: those that live at once lie apart, and memory is used again."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotloop.graph.memory_plan import LINE_BYTES, Block, Lifetime, plan_offsets
from hotloop.memory import TensorArena
from hotloop.monitor import resident_bytes
from hotloop.units import MIB


@st.composite
def lifetimes(draw):
    first = draw(st.integers(0, 30))
    return Lifetime(draw(st.integers(0, 5000)), first, first + draw(st.integers(0, 12)))


def peak(blocks):
    """The most bytes that live at once."""
    return max(
        (sum(b.size_bytes for b in blocks if b.first <= at <= b.last) for at in range(50)),
        default=0,
    )


@given(st.lists(lifetimes(), max_size=30))
def test_blocks_that_live_at_once_lie_apart(blocks):
    offsets, total = plan_offsets(blocks)
    assert len(offsets) == len(blocks)
    assert all(offset % LINE_BYTES == 0 for offset in offsets)
    ends = [offset + b.size_bytes for offset, b in zip(offsets, blocks, strict=True)]
    for number, one in enumerate(blocks):
        for other in range(number):
            met = one.first <= blocks[other].last and blocks[other].first <= one.last
            if met and one.size_bytes and blocks[other].size_bytes:
                apart = ends[number] <= offsets[other] or ends[other] <= offsets[number]
                assert apart, (number, other)
    assert max(ends, default=0) <= total
    assert peak(blocks) <= total
    # Never more than each block in a place of its own.
    assert total <= sum(-(-b.size_bytes // LINE_BYTES) * LINE_BYTES for b in blocks)


def test_memory_is_used_again():
    chain = [Lifetime(1000, at, at + 1) for at in range(20)]
    _, total = plan_offsets(chain)
    assert total == 2 * 1024


def test_nothing_needs_nothing():
    assert plan_offsets([]) == ([], 0)


def _touch(memory):
    numpy.frombuffer(memory, numpy.uint8)[:] = 1


@pytest.mark.usefixtures("arena_available")
def test_a_block_takes_no_second_room_where_small_tensors_part_the_arena():
    if resident_bytes() is None:
        pytest.skip("resident memory is not told here")
    with TensorArena():
        low = torch.ones(64 * MIB, dtype=torch.uint8)
        wall = torch.full((MIB,), 7, dtype=torch.uint8)
        del low
        before = resident_bytes()
        block = Block()
        for _ in range(2):
            _touch(block.reserve(96 * MIB))
            # The room below is too small for it; its pages are given back.
            assert resident_bytes() - before < 48 * MIB
            block.release()
            _touch(torch.ones(64 * MIB, dtype=torch.uint8).numpy())
            assert resident_bytes() - before < 16 * MIB
        assert bool((wall == 7).all())


@pytest.mark.usefixtures("arena_available")
def test_lent_pages_are_others_until_the_block_is_used_again():
    if resident_bytes() is None:
        pytest.skip("resident memory is not told here")
    with TensorArena():
        block = Block()
        _touch(block.reserve(96 * MIB))
        before = resident_bytes()
        beside = torch.full((MIB,), 7, dtype=torch.uint8)
        block.lend_pages()
        assert before - resident_bytes() > 80 * MIB
        memory = block.reserve(96 * MIB)
        assert not numpy.frombuffer(memory, numpy.uint8)[4096:-4096].any()
        _touch(memory)
        assert bool((beside == 7).all())
