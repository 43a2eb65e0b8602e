"""Folders of IDX files for the tests, and real MNIST where the machine has it."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from hotloop.data import mnist

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = [REPOSITORY.parent / "shared" / "data" / "mnist"]
if os.environ.get("HOTLOOP_DATA"):
    REAL.insert(0, Path(os.environ["HOTLOOP_DATA"]))


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("HOTLOOP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))
    monkeypatch.setattr(mnist, "_unreachable", {})


@pytest.fixture(scope="session")
def real_mnist() -> Path:
    for folder in REAL:
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    pytest.skip("needs the full MNIST: set HOTLOOP_DATA to a folder with its IDX files")


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def digits():
    """40 random images and labels."""
    rng = np.random.default_rng(3)
    return (
        rng.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        rng.integers(0, 10, 40, dtype=np.uint8),
    )


@pytest.fixture
def idx_folder(tmp_path, digits):
    """A folder with a training and a test pair, gzipped."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for split in ("train", "t10k"):
        for kind, array in zip(("images-idx3", "labels-idx1"), digits, strict=True):
            path = folder / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx_bytes(array)))
    return folder
