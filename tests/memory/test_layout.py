import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotloop.errors import InputError
from hotloop.memory import BatchLayout
from hotloop.memory.arena import Arena

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128]

layouts = st.builds(
    BatchLayout,
    num_rows=st.integers(1, 9),
    row_shape=st.lists(st.integers(1, 7), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    line_bytes=st.sampled_from([16, 64, 128, 256, 8192]),
)


def aligned_block(layout: BatchLayout) -> torch.Tensor:
    return Arena(layout.total_bytes, align_bytes=layout.line_bytes).block


@given(layouts)
def test_start_and_stride_are_aligned_and_rows_lie_inside(layout):
    block = aligned_block(layout)
    tensor = layout.view(block)
    assert tensor.shape == (layout.num_rows, *layout.row_shape)
    assert tensor.dtype == layout.dtype
    assert tensor.data_ptr() == block.data_ptr()
    assert layout.total_bytes % layout.line_bytes == 0
    for row in range(layout.num_rows):
        start = tensor[row].data_ptr() - block.data_ptr()
        assert start == row * layout.stride_bytes
        assert start + layout.row_bytes <= layout.total_bytes
        assert tensor[row].is_contiguous()
        if layout.row_shape:
            assert start % layout.line_bytes == 0


@given(layouts)
def test_rows_do_not_overlap_and_padding_is_never_written(layout):
    block = aligned_block(layout)
    tensor = layout.view(block)
    for row in range(layout.num_rows):
        before = block.clone()
        tensor[row].fill_(True)
        ours = slice(row * layout.stride_bytes, row * layout.stride_bytes + layout.row_bytes)
        before[ours] = block[ours]
        assert torch.equal(before, block)
    assert (tensor == 1).all()


@given(layouts)
def test_padding_is_less_than_a_line_a_row(layout):
    assert 0 <= layout.stride_bytes - layout.row_bytes < layout.line_bytes
    tight = layout.num_rows * math.prod(layout.row_shape) * layout.dtype.itemsize
    assert tight <= layout.total_bytes < tight + (layout.num_rows + 1) * layout.line_bytes


def test_scalars_are_packed_and_images_keep_their_lines():
    labels = BatchLayout(64, (), torch.int64)
    assert (labels.stride_bytes, labels.total_bytes) == (8, 512)
    assert labels.view(aligned_block(labels)).is_contiguous()
    images = BatchLayout(64, (1, 28, 28), torch.float32)
    assert (images.row_bytes, images.stride_bytes) == (3136, 3136)
    assert images.view(aligned_block(images)).is_contiguous()
    odd = BatchLayout(64, (10,), torch.float32)
    assert (odd.row_bytes, odd.stride_bytes, odd.total_bytes) == (40, 64, 4096)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"num_rows": 0}, "num_rows"),
        ({"row_shape": (3, 0)}, "row_shape"),
        ({"line_bytes": 48}, "power of two"),
        ({"line_bytes": 0}, "power of two"),
        ({"line_bytes": 2}, "at least the 4 bytes"),
    ],
)
def test_sizes_outside_their_rule_are_refused(change, rule):
    arguments = {"num_rows": 4, "row_shape": (3,), "dtype": torch.float32} | change
    with pytest.raises(InputError, match=rule):
        BatchLayout(**arguments)


def test_unfit_blocks_are_refused():
    layout = BatchLayout(4, (3,), torch.float32)
    block = Arena(1024).block
    with pytest.raises(InputError, match="256 bytes"):
        layout.view(block[:255])
    with pytest.raises(InputError, match="line of 64"):
        layout.view(block[4:])
    with pytest.raises(InputError, match="uint8"):
        layout.view(block.view(torch.float32))
    with pytest.raises(InputError, match="one-dimensional"):
        layout.view(block.view(2, 512))
