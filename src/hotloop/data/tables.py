"""Tables, streamed: Parquet, Arrow and Feather, CSV (needs pyarrow, the extra ``parquet``).

One column is the target; all others, in the order of the file, are the features, but for those
that pandas wrote for a frame's index. A single column of lists of length k gives samples of shape
``[k]``; otherwise the columns are laid side by side in one vector, lists taking as many places as
they are long. The element type is the narrowest NumPy type that holds all feature columns. Columns
in the form of a dictionary are read as the values they stand for, decimals as float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, MissingExtraError
from ..sealed import Sealed
from .source import Array, ArraySpec, Chunk, chunk_rows
from .table_files import TABLE_SUFFIXES, index_columns, kind_of, open_table, require_file

__all__ = ["TABLE_SUFFIXES", "TableSource"]

LABEL_COLUMNS = ("label", "target", "y")


class TableSource:
    """A table with a label column.

    Args:
        path: the file.
        label_column: the target; default is the first of ``label``, ``target``, ``y`` present.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: no such file, damaged, no label column, or columns that hold no numbers.
    """

    def __init__(self, path: Path | Sealed, *, label_column: str | None = None) -> None:
        self._kind = kind_of(path)
        try:
            import pyarrow as pa
        except ImportError:
            raise MissingExtraError(f"reading {self._kind}", "pyarrow", "parquet") from None
        self._pa, self._path = pa, path
        require_file(path)
        try:
            self._file = open_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a sound {self._kind} file", got=error) from error
        schema = self._file.schema
        self.num_samples: int = self._file.num_rows
        if self.num_samples < 1:
            raise DataError("the data must have at least 1 sample", got=f"an empty {path}")
        self._label = _label_column(schema.names, label_column, path)
        no_features = {self._label, *index_columns(schema)}
        self._features = [name for name in schema.names if name not in no_features]
        if not self._features:
            raise DataError(
                f"{path} must have feature columns beside the label column {self._label!r}"
            )
        specs = self._column_specs(schema)
        self._specs: dict[str, ArraySpec] = {k: v for k, v in specs.items() if v is not None}
        features = [self._specs[name] for name in self._features]
        dtype = np.result_type(*(spec.dtype for spec in features))
        length = sum(spec.shape[0] if spec.shape else 1 for spec in features)
        self.x = ArraySpec((length,), dtype)
        self.y = self._specs[self._label]
        self.description = f"{self.num_samples:,} samples of {path}"

    def chunks(self) -> Iterator[Chunk]:
        """Rows of the table; see ``SampleSource``."""
        rows = chunk_rows(self.x, self.y)
        columns = [self._label, *self._features]
        start = 0
        try:
            for batch in self._file.batches(columns, rows):
                x = np.empty((batch.num_rows, *self.x.shape), self.x.dtype)
                at = 0
                for name in self._features:
                    part = self._values(self._plain(batch.column(name)), name, start)
                    width = part.shape[1] if part.ndim == 2 else 1
                    x[:, at : at + width] = part.reshape(batch.num_rows, width)
                    at += width
                yield x, self._values(self._plain(batch.column(self._label)), self._label, start)
                start += batch.num_rows
        except (self._pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path} is damaged", got=error) from error

    def _column_specs(self, schema: Any) -> dict[str, ArraySpec | None]:
        columns = [self._label, *self._features]
        specs = {name: self._column_spec(schema.field(name)) for name in columns}
        if any(spec is None for spec in specs.values()):
            # Lists of variable length do not say how long they are: the first row does.
            try:
                batches = self._file.batches(columns, 1)
                first = next(batch for batch in batches if batch.num_rows)
            except (self._pa.ArrowException, OSError) as error:
                raise DataError(f"{self._path} is damaged", got=error) from error
            for name, spec in specs.items():
                if spec is None:
                    specs[name] = self._first_row_spec(first.column(name), name)
        return specs

    def _plain(self, column: Any) -> Any:
        """A column of plain numbers, whatever form it is stored in."""
        types = self._pa.types
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if types.is_decimal(column.type):
            column = column.cast(self._pa.float64())
        return column

    def _column_spec(self, field: Any) -> ArraySpec | None:
        """Shape and type of one value of a column; ``None``: a list whose length is not stated."""
        types = self._pa.types
        kind = field.type
        if types.is_list(kind) or types.is_large_list(kind):
            self._number_dtype(kind.value_type, field.name)
            return None
        if types.is_fixed_size_list(kind):
            dtype = self._number_dtype(kind.value_type, field.name)
            return ArraySpec((kind.list_size,), dtype)
        return ArraySpec((), self._number_dtype(kind, field.name))

    def _number_dtype(self, kind: Any, name: str) -> np.dtype[Any]:
        types = self._pa.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_decimal(kind):
            kind = self._pa.float64()
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise DataError(
                f"column {name!r} of {self._path} must hold numbers or lists of numbers",
                got=kind,
                next_step="drop the column or encode it as numbers",
            )
        return _numpy_dtype(kind)

    def _first_row_spec(self, column: Any, name: str) -> ArraySpec:
        if column.null_count:
            raise self._null_error(column, name, 0)
        return ArraySpec((len(column[0]),), _numpy_dtype(column.type.value_type))

    def _values(self, column: Any, name: str, start: int) -> Array:
        """NumPy values ``[k]`` or ``[k, length]`` of a column that must have no nulls."""
        if column.null_count:
            raise self._null_error(column, name, start)
        spec = self._specs[name]
        if not spec.shape:
            return _flat(column)
        length = spec.shape[0]
        flat = column.flatten()
        if flat.null_count:
            row = start + int(np.flatnonzero(_flat(flat.is_null()))[0]) // max(1, length)
            raise DataError(f"column {name!r} of {self._path} must have no nulls", got=f"row {row}")
        if not self._pa.types.is_fixed_size_list(column.type):
            lengths = _flat(column.value_lengths())
            wrong = np.flatnonzero(lengths != length)
            if wrong.size:
                raise DataError(
                    f"lists in column {name!r} of {self._path} must all have length {length} as "
                    "the first has",
                    got=f"{lengths[wrong[0]]} in row {start + int(wrong[0])}",
                )
        return _flat(flat).reshape(len(column), length)

    def _null_error(self, column: Any, name: str, start: int) -> DataError:
        row = start + int(np.flatnonzero(_flat(column.is_null()))[0])
        return DataError(
            f"column {name!r} of {self._path} must have no nulls",
            got=f"{column.null_count} nulls, the first in row {row}",
            next_step="fill or drop them",
        )


def _numpy_dtype(kind: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
    return dtype


def _flat(column: Any) -> Array:
    values: Array = column.to_numpy(zero_copy_only=False)
    return values


def _label_column(names: list[str], wanted: str | None, path: Path | Sealed) -> str:
    found = [name for name in ((wanted,) if wanted else LABEL_COLUMNS) if name in names]
    if not found:
        rule = f"named {wanted!r}" if wanted else "named label, target or y"
        raise DataError(
            f"{path} must have a label column {rule}",
            got="columns " + ", ".join(names),
            next_step="pass label_column with the name of one of them",
        )
    if names.count(found[0]) > 1 or len(set(names)) < len(names):
        raise DataError(f"column names of {path} must differ", got=", ".join(names))
    return found[0]
