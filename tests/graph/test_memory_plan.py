"""Offsets of temporaries: those that live at once lie apart, and memory is used again."""

from hypothesis import given
from hypothesis import strategies as st

from hotloop.graph.memory_plan import LINE_BYTES, Lifetime, plan_offsets


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
