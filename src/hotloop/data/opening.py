"""One door to all kinds of data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .arrays import ArraySource
from .idx import IdxSource, find_idx_pair
from .mnist import NORMALIZE, load_mnist
from .npz import NpzSource
from .pack import MMAP_ABOVE_BYTES, pack
from .packed import PackedDataset
from .parquet import ParquetSource
from .source import SampleSource
from .torch_dataset import TorchDatasetSource
from .transforms import Transform

_KINDS = "mnist, a .npz or .parquet file, or a folder with IDX files"


def open_dataset(
    data: Any,
    *,
    split: str = "train",
    num_samples: int | None = None,
    transforms: Sequence[Transform] | None = None,
    seed: int = 0,
    mmap_above_bytes: int = MMAP_ABOVE_BYTES,
    storage_folder: Path | None = None,
    label_column: str | None = None,
    folder: str | Path | None = None,
    allow_download: bool = True,
) -> PackedDataset:
    """Read data of any supported kind, check it, and pack it once.

    Args:
        data: ``(X, Y)`` NumPy or torch arrays; a torch map-style Dataset of ``(x, y)`` pairs; a
            path to an ``.npz`` or ``.parquet`` file or to a folder with IDX files; ``"mnist"``; or
            a dataset that is packed already, whose storage is shared.
        split: ``"train"`` or ``"test"``, where the data has both (IDX folders, some NPZ, MNIST).
        num_samples: default all; fewer takes the first so many; more only for ``"mnist"``.
        transforms: applied to batches; default none, but for ``"mnist"`` its normalization and for
            a packed dataset the ones it has.
        seed: of random transforms and distortions.
        mmap_above_bytes: larger samples go to a file instead of memory.
        storage_folder: where that file is made; default the cache folder.
        label_column: the target column of a Parquet file.
        folder: where the IDX files of ``"mnist"`` are; default the places ``load_mnist`` names.
        allow_download: whether ``"mnist"`` may be fetched.

    Raises:
        DataError: the data is missing, damaged, or of no supported kind.
        MissingExtraError: Parquet without pyarrow.
        StorageError: the packed samples could not be written.
    """
    if split not in ("train", "test"):
        raise DataError("split must be train or test", got=repr(split))
    if isinstance(data, PackedDataset):
        if transforms is None and num_samples in (None, data.num_samples):
            return data
        if transforms is None:
            return data.with_transforms(data.transforms, num_samples=num_samples)
        return data.with_transforms(transforms, seed=seed, num_samples=num_samples)
    if isinstance(data, str) and data == "mnist":
        return load_mnist(
            "train" if split == "train" else "test",
            num_samples=num_samples,
            folder=folder,
            allow_download=allow_download,
            transforms=(NORMALIZE,) if transforms is None else transforms,
            seed=seed,
            mmap_above_bytes=mmap_above_bytes,
            storage_folder=storage_folder,
        )
    return pack(
        _source(data, split, label_column),
        num_samples=num_samples,
        transforms=transforms or (),
        seed=seed,
        mmap_above_bytes=mmap_above_bytes,
        storage_folder=storage_folder,
    )


def _source(data: Any, split: str, label_column: str | None) -> SampleSource:
    if isinstance(data, str | os.PathLike):
        return _file_source(Path(data), split, label_column)
    if isinstance(data, tuple | list):
        if len(data) != 2:
            raise DataError("arrays must come as a pair (X, Y)", got=f"{len(data)} items")
        return ArraySource(data[0], data[1])
    if isinstance(data, torch.Tensor | np.ndarray):
        raise DataError(
            "arrays must come as a pair (X, Y)",
            got=f"one {type(data).__qualname__}",
            next_step="pass the targets too",
        )
    if isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
        x, y = data.tensors  # Reading its samples one by one would give the same, slowly.
        return ArraySource(x, y)
    if isinstance(data, torch.utils.data.Dataset) or hasattr(data, "__getitem__"):
        return TorchDatasetSource(data)
    raise DataError(
        f"data must be (X, Y) arrays, a torch Dataset, or a path: {_KINDS}",
        got=type(data).__qualname__,
    )


def _file_source(path: Path, split: str, label_column: str | None) -> SampleSource:
    if path.is_dir():
        pair = find_idx_pair(path, split)
        if pair is None:
            raise DataError(
                f"{path} must hold IDX files of images and labels of the {split} split",
                next_step="name them as MNIST does, train-images-idx3-ubyte and so on",
            )
        return IdxSource(*pair)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzSource(path, split=split)
    if suffix in (".parquet", ".pq"):
        return ParquetSource(path, label_column=label_column)
    if not path.exists():
        raise DataError(f"{path} does not exist", next_step=f"pass {_KINDS}")
    raise DataError(f"{path} is of no known kind", next_step=f"pass {_KINDS}")
