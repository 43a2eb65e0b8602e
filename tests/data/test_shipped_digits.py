import gzip
import hashlib
import importlib.util
import json

import numpy as np
import pytest

from hotloop.data import load_mnist
from hotloop.data.idx import IdxSource, find_idx_pair
from hotloop.data.mnist import FILES, SHIPPED_FOLDER
from hotloop.errors import DataError

from .conftest import REPOSITORY

MANIFEST = json.loads((SHIPPED_FOLDER / "manifest.json").read_text())


def script():
    path = REPOSITORY / "scripts" / "make_digits.py"
    spec = importlib.util.spec_from_file_location("make_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def labels_of(folder, split):
    images, labels = find_idx_pair(folder, split)
    return np.concatenate([y for _, y in IdxSource(images, labels).chunks()])


def test_the_files_are_those_of_the_manifest():
    names = {file.name for files in FILES.values() for file in files}
    assert set(MANIFEST["files"]) == names
    total = 0
    for name, entry in MANIFEST["files"].items():
        data = (SHIPPED_FOLDER / name).read_bytes()
        total += len(data)
        assert len(data) == entry["size_bytes"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert hashlib.sha256(gzip.decompress(data)).hexdigest() == entry["unpacked_sha256"]
    assert total == MANIFEST["total_bytes"] <= 2_500_000


def test_provenance_states_origin_and_licence():
    text = (SHIPPED_FOLDER / "PROVENANCE.md").read_text()
    for words in ("LeCun", "Cortes", "Burges", "Share Alike 3.0", "make_digits.py"):
        assert words in text


@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 2_000)])
def test_the_shipped_digits_load_with_every_class(split, count):
    data = load_mnist(split, prefer="shipped")
    assert (data.num_samples, data.sample_shape, data.num_classes) == (count, (1, 28, 28), 10)
    assert "shipped" in data.description
    counts = np.bincount(labels_of(SHIPPED_FOLDER, split))
    assert counts.min() > 0.08 * count


def test_the_script_makes_the_same_files_from_the_full_set(real_mnist, tmp_path):
    make_digits = script()
    manifest = make_digits.make(real_mnist, tmp_path)
    for name, entry in manifest["files"].items():
        # Another zlib may pack otherwise; the content must be the same.
        assert entry["unpacked_sha256"] == MANIFEST["files"][name]["unpacked_sha256"]
    for split, count in make_digits.COUNTS.items():
        full, chosen = labels_of(real_mnist, split), labels_of(tmp_path, split)
        shares = np.bincount(full) / len(full) * count
        assert np.abs(np.bincount(chosen) - shares).max() < 1


def test_the_script_refuses_what_is_not_mnist(idx_folder, tmp_path):
    with pytest.raises(DataError, match="SHA-256"):
        script().make(idx_folder, tmp_path / "out")
