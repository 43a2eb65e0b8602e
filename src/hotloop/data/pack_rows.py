"""Packing as it is: samples that are trees, each tensor in its own column and type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import DataError
from .labels import LabelCounter, counts_labels
from .packed import PackedDataset
from .rows_source import NotPackable, RowSource
from .storage import make_column
from .transforms import Transform


def pack_rows(
    source: RowSource,
    *,
    mmap_above_bytes: int,
    num_samples: int | None = None,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
    storage_folder: Path | None = None,
) -> PackedDataset:
    """Read a source once, chunk by chunk, into one column for each tensor of a sample.

    Args:
        source: the rows. mmap_above_bytes: larger columns go to a file instead of memory.
        num_samples: how many to keep, from the first; default all.
        transforms: of samples that are one float32 tensor. seed: of the random ones.
        storage_folder: where the files are made; default the cache folder.

    Raises:
        NotPackable: a sample is not like the first. DataError: one cannot be read, or too few.
        StorageError: the rows could not be written.
    """
    total = _check_total(source, num_samples)
    columns = [
        make_column(
            total,
            spec.shape,
            spec.dtype,
            in_file=total * spec.row_bytes > mmap_above_bytes,
            folder=storage_folder,
        )
        for spec in source.specs
    ]
    place = _label_place(source)
    labels = LabelCounter()
    start = 0
    for chunk in source.chunks():
        count = min(len(chunk[0]), total - start)
        for number, (column, rows) in enumerate(zip(columns, chunk, strict=True)):
            rows = rows.detach()[:count].resolve_conj().resolve_neg()
            column.append(rows)
            if number == place:
                labels.look(rows.numpy(), start)
        start += count
        if start == total:
            break
    if start < total:
        raise NotPackable(f"{source.description} must yield {total} samples", got=start)
    fewer = total < source.num_samples
    return PackedDataset(
        *columns,
        structure=source.structure,
        num_samples=total,
        num_classes=None if place is None else labels.num_classes,
        labels=None if place is None else labels.first,
        value_scale=None,
        table=source.table,
        description=f"first {total:,} of {source.description}" if fewer else source.description,
        transforms=transforms,
        seed=seed,
    )


def _check_total(source: RowSource, num_samples: int | None) -> int:
    if num_samples is None:
        return source.num_samples
    if not 1 <= num_samples <= source.num_samples:
        raise DataError(
            f"num_samples must be between 1 and the {source.num_samples} there are",
            got=num_samples,
        )
    return num_samples


def _label_place(source: RowSource) -> int | None:
    """Which tensor has the class labels: the target, where it is one tensor of whole numbers."""
    parts = source.structure.parts
    if len(parts) != 2 or parts[1].kind is not None:
        return None
    dtype = source.specs[-1].dtype
    unsigned = (torch.uint16, torch.uint32, torch.uint64)
    return len(source.specs) - 1 if counts_labels(dtype) and dtype not in unsigned else None
