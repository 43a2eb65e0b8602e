import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hotloop.data.idx import IdxFile, IdxSource, find_idx_pair, write_idx
from hotloop.errors import DataError

from .conftest import idx_bytes

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@settings(deadline=None)
@given(
    array=hnp.arrays(
        dtype=st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64]),
        shape=hnp.array_shapes(min_dims=1, max_dims=4, max_side=7),
        elements={"allow_nan": False},
    ),
    rows=st.integers(1, 8),
    gzipped=st.booleans(),
)
def test_what_is_written_is_read_in_chunks_of_any_size(tmp_path_factory, array, rows, gzipped):
    path = tmp_path_factory.mktemp("idx") / "file"
    write_idx(path, array)
    if not gzipped:
        path.write_bytes(gzip.decompress(path.read_bytes()))
    file = IdxFile.open(path)
    chunks = list(file.chunks(rows))
    assert file.shape == array.shape
    assert [len(c) for c in chunks[:-1]] == [rows] * (len(chunks) - 1)
    read = np.concatenate(chunks)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_images_get_a_channel_and_the_layout_of_torchvision_is_found(tmp_path, digits):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / IMAGES).write_bytes(idx_bytes(digits[0]))
    (raw / LABELS).write_bytes(idx_bytes(digits[1]))
    (raw / f"{LABELS}.gz").write_bytes(b"torchvision leaves the gzipped file beside the other")
    pair = find_idx_pair(tmp_path, "train")
    assert pair == (raw / IMAGES, raw / LABELS)
    source = IdxSource(*pair, num_classes=10)
    x, y = (np.concatenate(parts) for parts in zip(*source.chunks(), strict=True))
    assert source.x.shape == (1, 28, 28)
    np.testing.assert_array_equal(x[:, 0], digits[0])
    np.testing.assert_array_equal(y, digits[1])
    assert find_idx_pair(tmp_path, "test") is None


def damaged(tmp_path, content, name=IMAGES):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(IdxFile.open(path).chunks(7))
    text = one_line(error)
    assert str(path) in text
    return text


def test_truncated_or_long_files_are_refused(tmp_path, digits):
    whole = idx_bytes(digits[0])
    assert "truncated" in damaged(tmp_path, whole[:-1])
    assert "trailing" in damaged(tmp_path, whole + b"\0")
    assert "truncated" in damaged(tmp_path, whole[:3])
    assert "truncated" in damaged(tmp_path, whole[:9])
    assert "truncated" in damaged(tmp_path, b"")
    assert "truncated" in damaged(tmp_path, gzip.compress(whole)[:-2000])
    assert "truncated" in damaged(tmp_path, gzip.compress(whole)[:-8])
    assert "truncated" in damaged(tmp_path, gzip.compress(whole[:-1]))
    assert "trailing" in damaged(tmp_path, gzip.compress(whole + b"\0"))
    assert "truncated" in damaged(tmp_path, gzip.compress(whole)[:5])


def test_every_truncation_of_a_small_gzip_file_is_refused(tmp_path, digits):
    whole = gzip.compress(idx_bytes(digits[1]))
    for length in range(len(whole)):
        damaged(tmp_path, whole[:length])


def test_a_flipped_bit_in_a_gzip_file_is_refused(tmp_path, digits):
    whole = bytearray(gzip.compress(idx_bytes(digits[0])))
    whole[len(whole) // 2] ^= 0x10
    assert "gzip" in damaged(tmp_path, bytes(whole))


def test_wrong_magic_is_refused(tmp_path, digits):
    whole = idx_bytes(digits[0])
    assert "not an IDX file" in damaged(tmp_path, b"\x01" + whole[1:])
    assert "not an IDX file" in damaged(tmp_path, whole[:2] + b"\x07" + whole[3:])
    assert "not an IDX file" in damaged(tmp_path, whole[:3] + b"\x00" + whole[4:])
    assert "not an IDX file" in damaged(tmp_path, whole[:3] + b"\xff" + whole[4:])
    assert "89 50 4e 47" in damaged(tmp_path, b"\x89PNG and so on")


def test_a_header_that_lies_about_gigabytes_is_refused_before_anything_is_allocated(tmp_path):
    lie = struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**20, 2**20) + bytes(100)
    assert "truncated" in damaged(tmp_path, lie)
    assert "truncated" in damaged(tmp_path, gzip.compress(lie))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no-such-file does not exist"):
        IdxFile.open(tmp_path / "no-such-file")


def source_error(tmp_path, images, labels, **options):
    (tmp_path / IMAGES).write_bytes(idx_bytes(images))
    (tmp_path / LABELS).write_bytes(idx_bytes(labels))
    with pytest.raises(DataError) as error:
        list(IdxSource(tmp_path / IMAGES, tmp_path / LABELS, **options).chunks())
    return one_line(error)


def test_files_that_do_not_belong_together_are_refused(tmp_path, digits):
    images, labels = digits
    assert "40 images and 39 labels" in source_error(tmp_path, images, labels[:-1])
    assert "one integer label" in source_error(tmp_path, images, labels.reshape(20, 2))
    labels = labels.copy()
    labels[33] = 10
    text = source_error(tmp_path, images, labels, num_classes=10)
    assert "10 for sample 33" in text
    assert LABELS in text


def test_half_a_pair_and_two_sets_are_refused(tmp_path, idx_folder):
    (idx_folder / f"{LABELS}.gz").rename(tmp_path / "away")
    with pytest.raises(DataError, match="no labels"):
        find_idx_pair(idx_folder, "train")
    (idx_folder / "other-train-labels-idx1-ubyte.gz").touch()
    (idx_folder / "third-train-labels-idx1-ubyte.gz").touch()
    with pytest.raises(DataError, match="one file of train labels"):
        find_idx_pair(idx_folder, "train")
    assert find_idx_pair(tmp_path / "nowhere", "train") is None
