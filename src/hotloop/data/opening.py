"""One door to all kinds of data."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..sealed import Sealed
from .array_tree import array_rows, is_arrays
from .arrays import ArraySource
from .idx import IdxSource, find_idx_pair
from .image_folder import ImageFolderSource, find_classes
from .mnist import NORMALIZE, load_mnist
from .npz import NpzSource
from .pack import MMAP_ABOVE_BYTES, pack
from .pack_rows import pack_rows
from .packed import PackedDataset
from .rows_source import RowSource, SampleRows, vectorized
from .samples import SampleReader, is_map_style
from .source import SampleSource
from .tables import TABLE_SUFFIXES, TableSource
from .transforms import Transform

_KINDS = (
    "mnist, a .npz, .parquet, .arrow, .feather or .csv file, or a folder with IDX files or with "
    "images by class"
)

_NO_SAMPLES = (str, os.PathLike, Sealed, torch.Tensor, np.ndarray, PackedDataset, tuple)


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
    image_size: tuple[int, int] | None = None,
    folder: str | Path | Sealed | None = None,
    allow_download: bool = True,
) -> PackedDataset:
    """Read data of any supported kind, check it, and pack it once.

    Args:
        data: ``(X, Y)`` NumPy or torch arrays; any other trees of arrays ``(x, y)`` or ``(x,)``,
            or a dict of arrays, kept in their types; a map-style Dataset whose samples are
            tensors, arrays and numbers of one shape, kept in their types; a path to a file or a
            folder (``docs/data.md``); ``"mnist"``; a ``Sealed`` file or folder
            (``docs/sealed-files.md``), of which nothing plain goes to a file;
            or a dataset that is packed already, whose storage is shared.
        split: ``"train"`` or ``"test"``, where the data has both (folders, some NPZ, MNIST).
        num_samples: default all; fewer takes the first so many; more only for ``"mnist"``.
        transforms: applied to batches; default none, but for ``"mnist"`` its normalization and for
            a packed dataset the ones it has.
        seed: of random transforms and distortions.
        mmap_above_bytes: larger samples go to a file instead of memory.
        storage_folder: where that file is made; default the cache folder.
        label_column: the target column of a table.
        image_size: height and width that images of a folder are resized to; default: they must
            have one size.
        folder: where the IDX files of ``"mnist"`` are; default the places ``load_mnist`` names.
        allow_download: whether ``"mnist"`` may be fetched.

    Raises:
        DataError: the data is missing, damaged, or of no supported kind.
        MissingExtraError: a table without pyarrow, images without Pillow.
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
    if isinstance(data, Sealed) or isinstance(folder, Sealed):
        mmap_above_bytes = sys.maxsize
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
    shared: dict[str, Any] = {
        "num_samples": num_samples,
        "transforms": transforms or (),
        "seed": seed,
        "mmap_above_bytes": mmap_above_bytes,
        "storage_folder": storage_folder,
    }
    rows = _row_source(data)
    if rows is not None:
        return pack_rows(rows, **shared)
    return pack(_source(data, split, label_column, image_size), **shared)


def is_sample_source(data: Any) -> bool:
    """Whether data is a dataset that is asked for its samples one by one."""
    if isinstance(data, _NO_SAMPLES):
        return False
    if isinstance(data, Mapping) or _is_array_pair(data):
        return False
    if isinstance(data, torch.utils.data.Dataset):
        return True
    # A data frame answers to a column's name, not to a number.
    return is_map_style(data) and not hasattr(data, "columns")


def _is_array_pair(data: Any) -> bool:
    """Whether data is two arrays, whose values are converted."""
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(part, torch.Tensor | np.ndarray) for part in data)
    )


def _row_source(data: Any) -> RowSource | None:
    """Rows that are packed as they are; ``None``: data of another kind."""
    if not _is_array_pair(data) and is_arrays(data):
        return array_rows(data)
    if not is_sample_source(data):
        return None
    reader = SampleReader(data)
    rows = vectorized(reader)
    if rows is not None:
        return rows
    if reader.looks_random():
        raise DataError(
            "samples that are packed must stay the same when they are read again",
            got=f"a {reader.name} that draws random numbers",
            next_step="pass it to Trainer.fit, or put what is random into transforms",
        )
    return SampleRows(reader)


def _names(folder: Sealed) -> str:
    return ", ".join(path.name for path in folder.iterdir())


def _source(
    data: Any, split: str, label_column: str | None, image_size: tuple[int, int] | None
) -> SampleSource:
    if isinstance(data, str | os.PathLike | Sealed):
        path = data if isinstance(data, Sealed) else Path(data)
        return _file_source(path, split, label_column, image_size)
    if isinstance(data, tuple | list):
        if len(data) != 2:
            raise DataError("arrays must come as a pair (X, Y)", got=f"{len(data)} items")
        return ArraySource(data[0], data[1])
    if isinstance(data, torch.Tensor | np.ndarray):
        raise DataError(
            "arrays must come as a pair (X, Y)",
            got=f"one {type(data).__qualname__}",
            next_step="pass the targets too, or (X,) where the loss needs none",
        )
    next_step = None
    if hasattr(data, "columns"):
        next_step = "of a data frame pass (df[features].to_numpy(), df[label].to_numpy())"
    elif hasattr(data, "dataset"):
        next_step = "what is packed by itself has no order: pass the loader's dataset"
    raise DataError(
        f"data must be arrays, a torch Dataset, for Trainer.fit a DataLoader too, or a path: "
        f"{_KINDS}",
        got=type(data).__qualname__,
        next_step=next_step,
    )


def _file_source(
    path: Path | Sealed, split: str, label_column: str | None, image_size: tuple[int, int] | None
) -> SampleSource:
    if path.is_dir():
        pair = find_idx_pair(path, split)
        if pair is not None:
            return IdxSource(*pair)
        if isinstance(path, Sealed):
            raise DataError(f"{path} must hold IDX files of the {split} split", got=_names(path))
        classes = find_classes(path, split)
        if classes is not None:
            return ImageFolderSource(classes, image_size=image_size)
        raise DataError(
            f"{path} must hold IDX files of images and labels of the {split} split, or a folder "
            "of images for each class",
            next_step="name them as MNIST does, train-images-idx3-ubyte and so on",
        )
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzSource(path, split=split)
    if suffix in TABLE_SUFFIXES:
        return TableSource(path, label_column=label_column)
    if not path.exists():
        raise DataError(f"{path} does not exist", next_step=f"pass {_KINDS}")
    raise DataError(f"{path} is of no known kind", next_step=f"pass {_KINDS}")
