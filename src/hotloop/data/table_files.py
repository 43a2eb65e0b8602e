"""Files that hold a table, opened with pyarrow and read in batches of rows: Parquet, Arrow, CSV."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError
from ..files import unicode_name

_PARQUET = (".parquet", ".pq")
_ARROW = (".arrow", ".feather", ".ipc")
_TEXT = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*_PARQUET, *_ARROW, *_TEXT)


class TableFile(Protocol):
    """A table in a file.

    Attributes:
        schema: of pyarrow. num_rows: in all.
    """

    schema: Any
    num_rows: int

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[Any]:
        """Record batches of at most ``rows`` rows with these columns."""


def open_table(path: Path) -> TableFile:
    """The table by the file's name.

    Raises:
        pyarrow.ArrowException, OSError: it is damaged or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix in _PARQUET:
        return _Parquet(path)
    if suffix in _ARROW:
        return _Arrow(path)
    return _Text(path, _TEXT[suffix])


def kind_of(path: Path) -> str:
    """What such a file is called."""
    suffix = path.suffix.lower()
    return "Parquet" if suffix in _PARQUET else "Arrow" if suffix in _ARROW else "CSV"


def index_columns(schema: Any) -> set[str]:
    """Columns that pandas wrote for the index of a frame; they are no features."""
    try:
        about = json.loads((schema.metadata or {})[b"pandas"])
        return {name for name in about["index_columns"] if isinstance(name, str)}
    except (KeyError, TypeError, ValueError):
        return set()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            self.schema = file.schema_arrow
            self.num_rows: int = file.metadata.num_rows

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[Any]:
        with self._open() as file:
            yield from file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False)

    def _open(self) -> Any:
        import pyarrow.parquet

        # Without pre_buffer only the pages of the current batch are held.
        return pyarrow.parquet.ParquetFile(unicode_name(self._path), pre_buffer=False)


class _Arrow:
    """Both forms of Arrow's own format: with an index at the end of the file, or a stream."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_rows = 0
        with contextlib.closing(self._read()) as batches:
            self.schema = next(batches)
            self.num_rows = sum(batch.num_rows for batch in batches)

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[Any]:
        with contextlib.closing(self._read()) as batches:
            next(batches)
            for batch in batches:
                chosen = batch.select(list(columns))
                for start in range(0, batch.num_rows, rows):
                    yield chosen.slice(start, rows)

    def _read(self) -> Generator[Any, None, None]:
        """The schema, then the batches."""
        import pyarrow as pa

        with pa.OSFile(unicode_name(self._path)) as file:
            has_index = file.read(6) == b"ARROW1"
        with pa.OSFile(unicode_name(self._path)) as file:
            if has_index:
                with pa.ipc.open_file(file) as reader:
                    yield reader.schema
                    yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                with pa.ipc.open_stream(file) as stream:
                    yield stream.schema
                    yield from stream


class _Text:
    """Comma or tab separated values with the names of the columns in the first line."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self._path, self._delimiter = path, delimiter
        self._types: dict[str, Any] = {}
        while True:
            try:
                self.schema, self.num_rows = self._count()
                return
            except ValueError as error:  # ArrowInvalid is one.
                if not self._widen(error):
                    raise

    def _widen(self, error: ValueError) -> bool:
        """Whether the column that failed can be read as another type.

        Types are those of the first lines: whole numbers may be followed by others.
        """
        import pyarrow as pa

        found = re.match(r"In CSV column #(\d+)", str(error))
        if found is None:
            return False
        field = self._open().schema.field(int(found[1]))
        if field.name in self._types or not pa.types.is_integer(field.type):
            return False
        self._types[field.name] = pa.float64()
        return True

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[Any]:
        with self._open() as reader:
            for batch in reader:
                chosen = batch.select(list(columns))
                for start in range(0, batch.num_rows, rows):
                    yield chosen.slice(start, rows)

    def _count(self) -> tuple[Any, int]:
        with self._open() as reader:
            return reader.schema, sum(batch.num_rows for batch in reader)

    def _open(self) -> Any:
        import pyarrow.csv as csv

        return csv.open_csv(
            unicode_name(self._path),
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(delimiter=self._delimiter),
            convert_options=csv.ConvertOptions(column_types=self._types),
        )


def require_file(path: Path) -> None:
    """Raises DataError where there is no such file."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
