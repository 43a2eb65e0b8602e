"""A packed dataset in a folder, so that another process can open the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, StorageError
from ..units import MIB
from .packed import PackedDataset
from .storage import Column, make_column

_ROWS_AT_A_TIME = 1024


def save_packed(dataset: PackedDataset, folder: Path, *, most_bytes: int = 512 * MIB) -> int:
    """Write rows as stored, and the transforms, below ``folder``; gives the number of samples.

    Args:
        most_bytes: of a larger dataset the first samples that fit are written.

    Raises:
        DataError: a transform of the dataset cannot be pickled.
        StorageError: the folder cannot be written.
    """
    columns = dataset.columns
    row_bytes = sum(c.storage_bytes // c.num_rows for c in columns)
    count = max(1, min(dataset.num_samples, most_bytes // row_bytes))
    about: dict[str, Any] = {
        "num_samples": count,
        "num_classes": dataset.num_classes,
        "value_scale": dataset.value_scale,
        "labels": dataset.labels,
        "table": dataset.table,
        "structure": dataset.structure,
        "description": dataset.description,
        "transforms": dataset.transforms,
        "seed": dataset.seed,
        "columns": [(c.row_shape, c.dtype, c.resident_bytes == 0) for c in columns],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, column in enumerate(columns):
            with (folder / f"{number}.rows").open("wb") as file:
                for rows in _rows(column, count):
                    file.write(rows.view(-1).view(torch.uint8).numpy().data)
        torch.save(about, folder / "about.pt")
    except OSError as error:
        raise StorageError(f"{folder} must be writable", got=error.strerror) from error
    except Exception as error:
        raise DataError(
            "the transforms of the data must be picklable, to run in another process",
            got=f"{type(error).__name__}: {error}",
            next_step="define them at the top of a module",
        ) from error
    return count


def load_packed(folder: Path) -> PackedDataset:
    """What ``save_packed`` wrote, kept in memory or in a file as it was.

    The folder must be trusted: transforms are pickled.

    Raises:
        StorageError: a file is missing or too short.
    """
    try:
        about = torch.load(folder / "about.pt", weights_only=False)
        count = about["num_samples"]
        columns = []
        for number, (shape, dtype, in_file) in enumerate(about["columns"]):
            column = make_column(count, shape, dtype, in_file=in_file, folder=None)
            row_bytes = column.storage_bytes // count
            with (folder / f"{number}.rows").open("rb") as file:
                for start in range(0, count, _ROWS_AT_A_TIME):
                    wanted = min(_ROWS_AT_A_TIME, count - start)
                    data = bytearray(file.read(wanted * row_bytes))
                    rows = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
                    column.append(rows.view(wanted, *shape))
            columns.append(column)
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"the copy of the data in {folder} must be whole", got=error) from error
    return PackedDataset(
        *columns,
        num_samples=count,
        num_classes=about["num_classes"],
        value_scale=about["value_scale"],
        labels=about["labels"],
        table=about["table"],
        structure=about["structure"],
        description=about["description"],
        transforms=about["transforms"],
        seed=about["seed"],
    )


def _rows(column: Column, count: int) -> Any:
    for start in range(0, count, _ROWS_AT_A_TIME):
        indices = torch.arange(start, min(count, start + _ROWS_AT_A_TIME))
        out = torch.empty((len(indices), *column.row_shape), dtype=column.dtype)
        column.gather(indices, out)
        yield out
