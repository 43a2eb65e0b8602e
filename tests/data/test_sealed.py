"""Sealed data sets: the same samples as plain ones, and nothing plain on the disk."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from hotloop import open_dataset
from hotloop.data.idx import write_idx
from hotloop.errors import HotloopError, SealedError
from hotloop.sealed import Sealed, SealingKey, seal
from support.sealing import damaged

pytest.importorskip("cryptography", reason="pip install 'hotloop[enclave]'")

KEY = SealingKey(bytes(range(32)))
X = np.random.default_rng(0).integers(0, 255, (300, 12), np.uint8)
Y = np.arange(300) % 7


def _npz(path):
    np.savez(path, x=X, y=Y)


def _compressed(path):
    np.savez_compressed(path, x=X, y=Y)


def _table():
    pa = pytest.importorskip("pyarrow", reason="pip install 'hotloop[parquet]'")
    return pa.table({**{f"f{i}": X[:, i].astype("f4") for i in range(12)}, "label": Y})


def _parquet(path):
    table = _table()
    import pyarrow.parquet as parquet

    parquet.write_table(table, path, row_group_size=100)


def _csv(path):
    table = _table()
    import pyarrow.csv as csv

    csv.write_csv(table, path)


def _arrow(path):
    table = _table()
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _stream(path):
    table = _table()
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


KINDS = [("a.npz", _npz), ("b.npz", _compressed), ("a.parquet", _parquet), ("a.csv", _csv),
         ("a.arrow", _arrow), ("b.feather", _stream)]  # fmt: skip


def _batch(dataset):
    outs = [torch.empty((len(dataset), *s), dtype=d) for s, d in
            zip(dataset.row_shapes, dataset.row_dtypes, strict=True)]  # fmt: skip
    dataset.gather(torch.arange(len(dataset)), *outs)
    return outs


def _same(plain, sealed):
    with_both = zip(_batch(open_dataset(plain)), _batch(sealed), strict=True)
    assert all(torch.equal(a, b) for a, b in with_both)


@pytest.mark.parametrize(("name", "write"), KINDS, ids=[name for name, _ in KINDS])
def test_each_kind_of_file(tmp_path, name, write):
    path, target = tmp_path / name, tmp_path / f"{name}.sealed"
    write(path)
    seal(path, target, KEY)
    dataset = open_dataset(Sealed(target, KEY), mmap_above_bytes=0)
    assert not dataset.is_mapped
    _same(path, dataset)
    with pytest.raises(SealedError):
        open_dataset(Sealed(target, SealingKey(bytes(32))))
    with pytest.raises(SealedError):
        open_dataset(Sealed(path, KEY))


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_of_idx_files(tmp_path, packed):
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, array in (("images", X.reshape(300, 3, 4)), ("labels", Y.astype(np.uint8))):
        path = folder / f"train-{name}-idx{array.ndim}-ubyte.gz"
        write_idx(path, array)
        if not packed:
            import gzip

            (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    seal(folder, tmp_path / "sealed", KEY)
    _same(folder, open_dataset(Sealed(tmp_path / "sealed", KEY)))
    with pytest.raises(HotloopError, match="IDX files of the test split"):
        open_dataset(Sealed(tmp_path / "sealed", KEY), split="test")


@pytest.mark.parametrize(("name", "write"), KINDS, ids=[name for name, _ in KINDS])
def test_a_damaged_one_is_one_line(tmp_path, name, write):
    import random

    draw = random.Random(name)
    path, target = tmp_path / name, tmp_path / f"{name}.sealed"
    write(path)
    seal(path, target, KEY)
    seal(path, tmp_path / "other.sealed", KEY)
    data, other = target.read_bytes(), (tmp_path / "other.sealed").read_bytes()
    for _ in range(20):
        target.write_bytes(damaged(data, other, draw))
        if target.read_bytes() == data:
            continue
        with pytest.raises(SealedError) as caught:
            open_dataset(Sealed(target, KEY))
        assert "\n" not in str(caught.value)


SCRIPT = """
import sys
from pathlib import Path
import hotloop, torch
from hotloop.sealed import Sealed, read_key
key = read_key(sys.argv[2])
data = Sealed(Path(sys.argv[1]), key)
model = torch.nn.Linear(12, 7)
torch.nn.init.constant_(model.weight, 0.123456)
trainer = hotloop.Trainer(model, torch.nn.functional.cross_entropy,
                          torch.optim.SGD(model.parameters(), 0.0))
trainer.fit(data, 100, 2, checkpoint_dir=Sealed(Path(sys.argv[3]), key), monitor=False)
"""


@pytest.mark.full
def test_nothing_plain_is_written(tmp_path):
    """Every byte that a run writes to a file, as the system sees it, is looked through."""
    if shutil.which("strace") is None:
        pytest.skip("apt-get install strace")
    marked = X.copy()
    marked[:] = np.frombuffer(b"plain secret", np.uint8)
    np.savez(tmp_path / "a.npz", x=marked, y=Y)
    seal(tmp_path / "a.npz", tmp_path / "a.npz.sealed", KEY)
    (tmp_path / "key").write_text(KEY.secret.hex() + "\n")
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "a.npz").unlink()
    trace = tmp_path / "trace"
    calls = "trace=write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range"
    command = ["strace", "-f", "-qq", "-xx", "-s", "2000000", "-e", calls, "-o", str(trace),
               sys.executable, "-c", SCRIPT, str(tmp_path / "a.npz.sealed"),
               str(tmp_path / "key"), str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "ptrace" in done.stderr:
        pytest.skip("strace may not be used here")
    assert done.returncode == 0, done.stderr
    written = trace.read_text()
    weight = np.float32(0.123456).tobytes() * 4
    as_hex = ["".join(f"\\x{byte:02x}" for byte in text) for text in (b"plain secret", weight)]
    # The trace does have what a checkpoint writes.
    assert list((tmp_path / "run").glob("step-*/model.safetensors.sealed"))
    assert len(written) > 4 * 12 * 7 * 4
    assert not any(text in written for text in as_hex)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != trace:
            assert b"plain secret" not in path.read_bytes()
            assert weight not in path.read_bytes()
