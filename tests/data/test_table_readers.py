"""NPZ, Parquet and torch Datasets."""

import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from hotloop.data import open_dataset
from hotloop.data import source as source_module
from hotloop.errors import DataError, MissingExtraError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

X = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 4, 500)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Many chunks, so that what happens between them is tested."""
    monkeypatch.setattr(source_module, "CHUNK_BYTES", 1000)


def contents(data):
    x = torch.empty(data.num_samples, *data.sample_shape, dtype=data.sample_dtype)
    y = torch.empty(data.num_samples, *data.target_shape, dtype=data.target_dtype)
    data.gather(torch.arange(data.num_samples), x, y)
    return x.numpy(), y.numpy()


def same(data, x=X, y=Y):
    got_x, got_y = contents(data)
    np.testing.assert_array_equal(got_x, x)
    np.testing.assert_array_equal(got_y, y)
    return True


def refused(data, **options):
    with pytest.raises(DataError) as error:
        open_dataset(data, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


# NPZ


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "names",
    [("x", "y"), ("X", "Y"), ("X", "y"), ("images", "labels"), ("data", "target"),
     ("features", "labels"), ("x_train", "y_train"), ("train_images", "train_labels")],
)  # fmt: skip
def test_npz(tmp_path, save, names):
    save(tmp_path / "a.npz", **dict(zip(names, (X, Y), strict=True)))
    assert same(open_dataset(tmp_path / "a.npz"))
    assert same(open_dataset(str(tmp_path / "a.npz"), num_samples=77), X[:77], Y[:77])


def test_npz_by_position_with_a_test_split_and_column_major(tmp_path):
    np.savez(tmp_path / "a.npz", np.asfortranarray(X), Y.astype(">i4"))
    assert same(open_dataset(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3])
    assert same(open_dataset(tmp_path / "b.npz", split="test"), X[:3], Y[:3])


def test_npz_mistakes(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, pixels=X, classes=Y)
    assert "got classes, pixels" in refused(path)
    np.savez(path, x=X, y=Y[:-1])
    assert "500 and 499" in refused(path)
    np.savez(path, x=np.array([{}, []], dtype=object), y=Y[:2], allow_pickle=True)
    assert "never unpickled" in refused(path)
    np.savez(path, x=np.float32(1), y=Y)
    assert "first dimension" in refused(path)
    path.write_bytes(b"not a zip file")
    assert "NPZ" in refused(path)
    path.write_bytes(b"")
    assert "NPZ" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array")
        archive.writestr("y.npy", b"no array")
    assert "NPZ" in refused(path)
    spoiled = X.copy()
    spoiled[321, 2] = np.nan
    np.savez(path, x=spoiled, y=Y)
    assert "nan in sample 321" in refused(path)


def test_a_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=X, y=Y)
    whole = bytearray(path.read_bytes())
    whole[6000] ^= 1
    path.write_bytes(whole)
    assert "damaged" in refused(path)
    path.write_bytes(whole[:-3000])
    assert "NPZ" in refused(path)
    for extra, word in ((-8, "ends inside"), (8, "trailing")):
        buffers = {}
        for name, array in (("x", X), ("y", Y)):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array)
            buffers[name] = buffer.getvalue()
        buffers["y"] = buffers["y"][:extra] if extra < 0 else buffers["y"] + bytes(extra)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in buffers.items():
                archive.writestr(f"{name}.npy", content)
        assert word in refused(path)


# Parquet


def table(**columns):
    return pa.table({**{f"f{k}": X[:, k] for k in range(6)}, **columns})


@pytest.mark.parametrize("label", ["label", "target", "y"])
def test_parquet(tmp_path, label):
    pq.write_table(table(**{label: Y}), tmp_path / "a.parquet", row_group_size=90)
    data = open_dataset(tmp_path / "a.parquet")
    assert same(data)
    assert data.num_classes == 4


def test_parquet_label_column_of_any_name_and_place(tmp_path):
    path = tmp_path / "a.pq"
    pq.write_table(pa.table({"price": X[:, 0], "a": Y, "b": X[:, 1]}), path)
    data = open_dataset(path, label_column="price")
    assert data.target_dtype == torch.float32
    assert same(data, np.column_stack([Y.astype(np.float32), X[:, 1]]), X[:, 0])


@pytest.mark.parametrize("fixed", [True, False])
def test_parquet_lists_become_vectors(tmp_path, fixed):
    path = tmp_path / "a.parquet"
    kind = pa.list_(pa.uint8(), 12) if fixed else pa.list_(pa.uint8())
    pixels = np.random.default_rng(2).integers(0, 256, (500, 12), dtype=np.uint8)
    lists = pa.array(pixels.tolist(), kind)
    pq.write_table(pa.table({"label": Y, "pixels": lists}), path, row_group_size=90)
    data = open_dataset(path)
    assert data.sample_shape == (12,)
    assert same(data, pixels.astype(np.float32) / 255)
    pq.write_table(pa.table({"label": Y, "p": lists, "f": X[:, 0]}), path)
    assert same(
        open_dataset(path), np.column_stack([pixels.astype(np.float32), X[:, 0]]).astype(np.float32)
    )


def test_parquet_mistakes(tmp_path):
    path = tmp_path / "a.parquet"

    def wrong(columns, **options):
        pq.write_table(pa.table(columns), path)
        return refused(path, **options)

    text = wrong({"a": Y, "b": Y})
    assert "label column" in text
    assert "columns a, b" in text
    assert "named 'c'" in wrong({"a": Y, "label": Y}, label_column="c")
    assert "feature columns beside" in wrong({"label": Y})
    assert "'a'" in wrong({"label": Y[:2], "a": ["x", "y"]})
    with_null = [0.5, None, 1.0]
    assert "row 1" in wrong({"label": Y[:3], "a": with_null})
    assert "row 1" in wrong({"label": pa.array([0, None, 1]), "a": X[:3, 0]})
    lists = pa.array([[1.0, 2.0], [3.0, None], [4.0, 5.0]])
    assert "row 1" in wrong({"label": Y[:3], "a": lists})
    ragged = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0]])
    assert "1 in row 2" in wrong({"label": Y[:3], "a": ragged})
    assert "nan in sample 2" in wrong({"label": Y[:3], "a": [1.0, 2.0, float("nan")]})
    assert "-1 for sample 1" in wrong({"label": [0, -1, 2], "a": [1.0, 2.0, 3.0]})
    assert "at least 1 sample" in wrong({"label": Y[:0], "a": Y[:0]})
    path.write_bytes(b"PAR1 but not really PAR1")
    assert "Parquet" in refused(path)
    assert "does not exist" in refused(tmp_path / "b.parquet")
    pq.write_table(table(label=Y), path, compression="gzip")
    whole = bytearray(path.read_bytes())
    whole[200:260] = bytes(60)
    path.write_bytes(whole)
    assert str(path) in refused(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hotloop\[parquet\]'"):
        open_dataset(tmp_path / "a.parquet")


# torch Datasets


class Pairs(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs
        self.reads = []

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.pairs[index]


def test_a_torch_dataset_is_read_once_in_order():
    dataset = Pairs([(torch.from_numpy(x), int(y)) for x, y in zip(X, Y, strict=True)])
    assert same(open_dataset(dataset))
    assert dataset.reads[-500:] == list(range(500))
    assert len(dataset.reads) < 530  # Some were read twice before, to see that they stay the same.
    assert same(open_dataset(torch.utils.data.Subset(dataset, range(10, 20))), X[10:20], Y[10:20])
    tensors = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    assert same(open_dataset(tensors))


def test_datasets_of_arrays_numbers_and_half_precision():
    assert same(open_dataset(Pairs(list(zip(X, X[:, 0], strict=True)))), X, X[:, 0])
    half = [(torch.tensor([1.5, 2.5], dtype=torch.bfloat16), torch.tensor(1))] * 3
    packed = open_dataset(Pairs(half))
    x, y = torch.empty(3, 2, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int64)
    packed.gather(torch.arange(3), x, y)
    assert x.tolist() == [[1.5, 2.5]] * 3
    assert y.tolist() == [1, 1, 1]
    numbers = Pairs([(1.5, 0), (2.5, 1)])
    assert same(open_dataset(numbers), np.float32([1.5, 2.5]), [0, 1])


def test_torch_dataset_mistakes():
    good = (torch.zeros(3), 0)
    assert "[4] at entry 2" in refused(Pairs([good, good, (torch.zeros(4), 0)]))
    assert "one shape and type" in refused(Pairs([good, (torch.zeros(3).double(), 0)] * 40))
    assert "must make a batch" in refused(Pairs([(object(), 0)]))
    assert "hold tensors, arrays or numbers" in refused(Pairs(["text"]))
    assert "an empty Pairs" in refused(Pairs([]))

    class Broken(Pairs):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("disk on\nfire")
            return good

    assert "Broken[1] must be readable; got OSError: disk on fire" in refused(Broken([0, 0]))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([good])

    class NoLength(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return good

    assert "map-style" in refused(Stream())
    assert "map-style" in refused(NoLength())


def test_names_beyond_ascii_in_another_locale(tmp_path):
    csv, feather = pytest.importorskip("pyarrow.csv"), pytest.importorskip("pyarrow.feather")
    table = pa.table({"\u00e4": [1.5, 2.0], "label": [0, 1]})
    pq.write_table(table, tmp_path / "d\u00e4ta.parquet")
    csv.write_csv(table, tmp_path / "d\u00e4ta.csv")
    feather.write_feather(table, tmp_path / "d\u00e4ta.arrow")
    code = (
        "import sys; from pathlib import Path; from hotloop.data.tables import TableSource\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    x, y = next(iter(TableSource(path).chunks())); print(path.suffix, x.sum(), y.sum())"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{s} 3.5 1" for s in (".arrow", ".csv", ".parquet")]
