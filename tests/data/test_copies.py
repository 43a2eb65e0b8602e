"""A packed dataset written to a folder and opened again gives the same batches."""

import functools

import numpy as np
import pytest
import torch

from hotloop.data import Normalize, RandomAffine, open_dataset
from hotloop.data.copies import load_packed, save_packed
from hotloop.errors import DataError, StorageError


def batch(dataset, indices, training=True):
    x = torch.empty(len(indices), *dataset.sample_shape, dtype=dataset.sample_dtype)
    y = torch.empty(len(indices), *dataset.target_shape, dtype=dataset.target_dtype)
    dataset.gather(torch.tensor(indices), x, y, epoch=3, training=training)
    return x, y


def bytes_of_images(n=1500):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), rng.integers(0, 10, n)


def floats(n=1500):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 5)).astype(np.float32), rng.normal(size=(n, 2)).astype(np.float32)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    ("make", "transforms"),
    [(bytes_of_images, (Normalize(0.1, 0.3), RandomAffine())), (floats, ())],
)
def test_the_copy_gives_the_same_batches(tmp_path, make, transforms, in_file):
    dataset = open_dataset(
        make(), transforms=transforms, seed=7, mmap_above_bytes=0 if in_file else 2**30
    )
    assert save_packed(dataset, tmp_path / "copy") == 1500
    copy = load_packed(tmp_path / "copy")
    assert (copy.num_classes, copy.description) == (dataset.num_classes, dataset.description)
    assert copy.is_mapped == dataset.is_mapped
    for training in (False, True):
        for a, b in zip(
            batch(dataset, [0, 7, 1499], training), batch(copy, [0, 7, 1499], training), strict=True
        ):
            assert torch.equal(a, b)


def test_of_a_large_one_the_first_samples_are_copied(tmp_path):
    dataset = open_dataset(floats())
    count = save_packed(dataset, tmp_path, most_bytes=28 * 100)
    copy = load_packed(tmp_path)
    assert count == copy.num_samples == 100
    assert torch.equal(batch(copy, [99])[0], batch(dataset, [99])[0])


def test_damage_and_what_cannot_be_copied_is_told(tmp_path):
    dataset = open_dataset(floats())
    save_packed(dataset, tmp_path / "a")
    (tmp_path / "a" / "0.rows").write_bytes(b"1234")
    with pytest.raises(StorageError, match="must be whole"):
        load_packed(tmp_path / "a")
    with pytest.raises(StorageError, match="must be whole"):
        load_packed(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="writable"):
        save_packed(dataset, tmp_path / "file" / "below")

    class Local(Normalize):
        hook = functools.partial(lambda: None)

    images = open_dataset(bytes_of_images(), transforms=(Local(0.0, 1.0),))
    with pytest.raises(DataError, match="picklable"):
        save_packed(images, tmp_path / "b")
