"""Files of other programs: the values that NumPy, pyarrow and gzip give, or one line."""

import decimal
import gzip
import json
import zlib

import numpy as np
import pytest
import torch

from hotloop.data import open_dataset
from hotloop.data.idx import IdxFile
from hotloop.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = 12
LABEL = np.arange(ROWS) % 3
VALUE = np.linspace(-2, 2, ROWS)


def read(path, **options):
    data = open_dataset(path, **options)
    x = torch.empty(ROWS, *data.sample_shape, dtype=data.sample_dtype)
    y = torch.empty(ROWS, *data.target_shape, dtype=data.target_dtype)
    data.gather(torch.arange(ROWS), x, y)
    return x.numpy(), y.numpy()


def written(tmp_path, columns, metadata=None, **options):
    table = pa.table({**columns, "label": LABEL})
    if metadata is not None:
        table = table.replace_schema_metadata({b"pandas": json.dumps(metadata).encode()})
    pq.write_table(table, tmp_path / "table.parquet", **options)
    return tmp_path / "table.parquet"


@pytest.mark.parametrize(
    ("metadata", "features"),
    [
        ({"index_columns": ["__index_level_0__"], "columns": []}, ["a", "id"]),
        ({"index_columns": ["id", "__index_level_0__"], "columns": []}, ["a"]),
        ({"index_columns": [{"kind": "range", "start": 0}]}, ["a", "id", "__index_level_0__"]),
        ({"index_columns": []}, ["a", "id", "__index_level_0__"]),
        (None, ["a", "id", "__index_level_0__"]),
    ],
)
def test_an_index_of_pandas_is_no_feature(tmp_path, metadata, features):
    columns = {"a": VALUE, "id": np.arange(ROWS), "__index_level_0__": np.arange(ROWS)[::-1].copy()}
    x, y = read(written(tmp_path, columns, metadata))
    assert x.shape == (ROWS, len(features))
    np.testing.assert_allclose(x, np.stack([columns[f] for f in features], 1), rtol=1e-6)
    np.testing.assert_array_equal(y, LABEL)


DECIMALS = [decimal.Decimal(n).scaleb(-2) for n in range(-6, 6)]
COLUMNS = {
    "decimal": pa.array(DECIMALS, pa.decimal128(7, 2)),
    "wide decimal": pa.array(DECIMALS, pa.decimal256(50, 2)),
    "dictionary": pa.array(VALUE.tolist()).dictionary_encode(),
    "half": pa.array(VALUE.astype(np.float16)),
    "boolean": pa.array((LABEL > 1).tolist()),
    "unsigned": pa.array(np.arange(ROWS, dtype=np.uint64)),
    "list": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2.0 * ROWS)), 2),
    "list of any length": pa.array(np.arange(2.0 * ROWS).reshape(ROWS, 2).tolist()),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("rows", [ROWS, 5])
def test_columns_of_numbers_are_pyarrows(tmp_path, kind, rows):
    column = COLUMNS[kind]
    x, y = read(written(tmp_path, {"a": column}, row_group_size=rows))
    expected = np.array([np.asarray(v, float) for v in column.to_pylist()]).reshape(ROWS, -1)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    np.testing.assert_array_equal(y, LABEL)


REFUSED = {
    "text": pa.array(["a"] * ROWS),
    "text as a dictionary": pa.array(["a"] * ROWS).dictionary_encode(),
    "null": pa.array([1, None] * (ROWS // 2)),
    "null in a dictionary": pa.array([1.0, None] * (ROWS // 2)).dictionary_encode(),
    "null in a list": pa.array([[1.0, None]] * ROWS),
    "nulls alone": pa.nulls(ROWS),
    "time": pa.array(np.arange(ROWS).astype("datetime64[s]")),
    "duration": pa.array(np.arange(ROWS).astype("timedelta64[s]")),
    "bytes": pa.array([b"ab"] * ROWS),
    "struct": pa.array([{"a": 1}] * ROWS),
    "lists that differ": pa.array([[1.0]] * (ROWS - 1) + [[1.0, 2.0]]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_columns_that_hold_no_numbers_are_named(tmp_path, kind):
    with pytest.raises(DataError, match=r"\ba\b") as told:
        read(written(tmp_path, {"a": REFUSED[kind]}))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8", "<f2", ">i2", "<i8", ">u4", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_type_and_order(tmp_path, dtype, order):
    values = np.arange(ROWS * 3).reshape(ROWS, 3) % 7
    array = np.array(values, dtype=dtype, order=order)
    np.savez(tmp_path / "d.npz", x=array[:, ::-1], y=LABEL.astype(">i4"))
    x, y = read(tmp_path / "d.npz")
    expected = array[:, ::-1].astype(np.float64) / (255 if dtype == "u1" else 1)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    np.testing.assert_array_equal(y, LABEL)


@pytest.mark.parametrize(
    "array",
    [
        np.ones((ROWS, 2), complex), np.array([["a", "b"]] * ROWS),
        np.arange(2 * ROWS).reshape(ROWS, 2).astype("datetime64[D]"),
        np.zeros(ROWS, [("a", "f4"), ("b", "i4")]), np.array([object()] * ROWS),
    ],
    ids=["complex", "text", "time", "record", "object"],
)  # fmt: skip
def test_arrays_that_hold_no_numbers_are_refused(tmp_path, array):
    np.savez(tmp_path / "d.npz", x=array, y=LABEL)
    with pytest.raises(DataError) as told:
        read(tmp_path / "d.npz")
    assert "\n" not in str(told.value)


def read_idx(path):
    return np.concatenate(list(IdxFile.open(path).chunks(7)))


# ---- gzip ----------------------------------------------------------------------------------------

IDX = b"\0\0\x08\x01" + (200).to_bytes(4, "big") + bytes(range(200))


def member(data, *, flags=0, fields=b"", level=6):
    """A member of a gzip file with optional fields of its header (RFC 1952)."""
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff" + fields
    if flags & 2:
        head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little")
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    body = packer.compress(data) + packer.flush()
    size = (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return head + body + zlib.crc32(data).to_bytes(4, "little") + size


FILES = {
    "one member": member(IDX),
    "two": member(IDX[:50]) + member(IDX[50:]),
    "cut in the header": member(IDX[:3]) + member(IDX[3:9]) + member(IDX[9:]),
    "an empty one between": member(IDX[:50]) + member(b"") + member(IDX[50:]),
    "one for each byte": b"".join(member(IDX[n : n + 1]) for n in range(len(IDX))),
    "stored": member(IDX, level=0),
    "a name": member(IDX, flags=8, fields=b"labels\0"),
    "all fields": member(
        IDX[:70], flags=2 + 4 + 8 + 16, fields=b"\4\0BC\0\0" + b"name\0" + b"comment\0"
    ) + member(IDX[70:]),
    "zeros behind": member(IDX) + bytes(512),
    "zeros behind two": member(IDX[:50]) + member(IDX[50:]) + bytes(3),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_gzip_files_of_several_members(tmp_path, kind):
    path = tmp_path / "labels.gz"
    path.write_bytes(FILES[kind])
    assert gzip.decompress(FILES[kind]) == IDX
    np.testing.assert_array_equal(read_idx(path), np.arange(200, dtype=np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        member(IDX[:50]) + member(IDX[50:])[:-4], member(IDX[:50]) + member(IDX[50:])[:-9],
        member(IDX) + b"rubbish", member(IDX) + b"\0\0rubbish", member(IDX) + member(b"x"),
        member(IDX[:50]) + member(IDX[50:-1]), member(IDX[:50]),
    ],
    ids=["no size", "no end", "rubbish", "behind zeros", "too long", "too short", "one missing"],
)  # fmt: skip
def test_gzip_files_with_an_end_missing_or_more_behind_are_refused(tmp_path, data):
    path = tmp_path / "labels.gz"
    path.write_bytes(data)
    with pytest.raises(DataError) as told:
        read_idx(path)
    assert "\n" not in str(told.value)
