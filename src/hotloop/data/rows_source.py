"""Sources of rows: what ``pack_rows`` packs as it is, each tensor of a sample in its own type."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from ..errors import DataError
from ..memory.tree import Structure, flatten
from .batch import Batch, ToBatch, alike, batch_of
from .rows import look_up
from .samples import SampleReader
from .source import CHUNK_BYTES, MAX_CHUNK_ROWS

_CHECKED = 8


class NotPackable(DataError):
    """The samples cannot be packed; they can be read batch by batch."""


@dataclass(frozen=True)
class RowSpec:
    """One tensor of a sample.

    Attributes:
        shape: without the batch dimension. dtype: as stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


class RowSource(Protocol):
    """What ``pack_rows`` reads.

    Attributes:
        num_samples: in all. description: for reports.
        structure: of a batch ``(x, y)`` or ``(x,)``. specs: of its tensors, in order.
        table: float32 ``[channels, 256]``: what the bytes of the first tensor stand for.
    """

    num_samples: int
    description: str
    structure: Structure
    specs: tuple[RowSpec, ...]
    table: torch.Tensor | None

    def chunks(self) -> Iterator[list[torch.Tensor]]:
        """The tensors of so many samples as fit ``CHUNK_BYTES``, in order.

        Raises:
            NotPackable: a sample is not like the first. DataError: one cannot be read.
        """


class TensorRows:
    """Tensors whose first dimension counts the samples; see ``RowSource``.

    Args:
        tensors: ``[N, ...]`` each. structure: of a batch of them.
        indices: int64 ``[n]``: which rows; ``None``: all.
        table: see ``RowSource``.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        structure: Structure,
        description: str,
        *,
        indices: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> None:
        self.tensors, self.structure, self.table = tensors, structure, table
        self.indices = indices
        self.num_samples = len(tensors[0]) if indices is None else len(indices)
        self.description = description
        self.specs = specs_of(tensors, len(tensors[0]))

    def rows(self, positions: torch.Tensor | slice) -> list[torch.Tensor]:
        """As stored."""
        if self.indices is not None:
            positions = self.indices[positions]
        return [tensor[positions] for tensor in self.tensors]

    def batch(self, positions: torch.Tensor) -> Batch:
        """As a loader gives it."""
        rows = self.rows(positions)
        if self.table is not None:
            rows[0] = look_up(rows[0], self.table)
        made: Batch = self.structure.unflatten(rows)
        return made

    def chunks(self) -> Iterator[list[torch.Tensor]]:
        """Slices; see ``RowSource``."""
        step = _chunk_rows(self.specs)
        for start in range(0, self.num_samples, step):
            yield self.rows(slice(start, min(self.num_samples, start + step)))


class SampleRows:
    """Samples of a dataset, read in turn and collated; see ``RowSource``.

    Attributes:
        read_s: seconds that reading one sample takes, about.

    Raises:
        NotPackable: the samples are not tensors and numbers of one shape each.
    """

    table: torch.Tensor | None = None

    def __init__(self, reader: SampleReader, to_batch: ToBatch | None = None) -> None:
        self._reader, self._to_batch = reader, to_batch
        self.num_samples, self.description = reader.num_samples, reader.description
        began_s = time.perf_counter()
        first = reader.read([0])
        self.read_s = time.perf_counter() - began_s
        batch = batch_of(first, to_batch)
        tensors, self.structure = flatten(batch)
        given = {id(t) for t in flatten(first)[0]}
        if any(id(t) not in given for t in tensors):
            raise NotPackable("to_batch computes, so it is called for each batch")
        self.specs = specs_of(tensors, 1)

    def chunks(self) -> Iterator[list[torch.Tensor]]:
        """Collated samples; see ``RowSource``."""
        step = _chunk_rows(self.specs)
        for start in range(0, self.num_samples, step):
            count = min(step, self.num_samples - start)
            try:
                value = self._reader.read(list(range(start, start + count)))
            except DataError as error:
                if "must make a batch" in error.rule:
                    raise NotPackable(
                        f"samples of {self._reader.name} must have one shape and type",
                        got=error.got,
                    ) from error
                raise
            tensors, structure = flatten(batch_of(value, self._to_batch))
            if structure != self.structure or self.specs != specs_of(tensors, count):
                raise NotPackable(
                    f"samples of {self._reader.name} must have one shape and type",
                    got=f"others in samples {start} to {start + count - 1}",
                )
            yield tensors


def specs_of(tensors: Sequence[torch.Tensor], count: int) -> tuple[RowSpec, ...]:
    """What rows of a batch of ``count`` samples are.

    Raises:
        NotPackable: a tensor is not dense, not on the CPU, or has another number of rows.
    """
    if not tensors:
        raise NotPackable("samples must hold tensors, arrays or numbers")
    for tensor in tensors:
        kind = None
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            kind = f"a {tensor.layout} tensor on {tensor.device}"
        elif tensor.dim() == 0 or len(tensor) != count:
            kind = f"a tensor {list(tensor.shape)} in a batch of {count}"
        elif math.prod(tensor.shape[1:]) < 1:
            kind = f"a tensor {list(tensor.shape)} without elements"
        if kind is not None:
            raise NotPackable(
                "samples must be dense tensors on the CPU with a row for each", got=kind
            )
    return tuple(RowSpec(tuple(t.shape[1:]), t.dtype) for t in tensors)


def _chunk_rows(specs: Sequence[RowSpec]) -> int:
    row_bytes = max(1, sum(spec.row_bytes for spec in specs))
    return max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // row_bytes))


def vectorized(reader: SampleReader) -> TensorRows | None:
    """The rows of a dataset whose samples are rows of tensors, checked against the dataset.

    ``TensorDataset``, image sets of torchvision under ``ToTensor`` and ``Normalize``, and a
    ``Subset`` of either. ``None``: not one of these, or some sample read the slow way differs.
    """
    if reader.collate is not default_collate:
        return None
    try:
        rows = _tensor_rows(reader.dataset, reader.description)
    except Exception:  # It only looked like one: the slow way is always right.
        return None
    if rows is None or rows.num_samples != reader.num_samples:
        return None
    last = rows.num_samples - 1
    places = sorted({last * k // (_CHECKED - 1) for k in range(_CHECKED)})
    for place in places:
        slow = batch_of(reader.read([place]), None)
        if not alike(rows.batch(torch.tensor([place])), slow):
            return None
    return rows


def _tensor_rows(dataset: Any, description: str) -> TensorRows | None:
    if type(dataset) is Subset:
        below = _tensor_rows(dataset.dataset, description)
        if below is None:
            return None
        indices = torch.as_tensor(dataset.indices, dtype=torch.int64)
        inner = indices if below.indices is None else below.indices[indices]
        return TensorRows(
            below.tensors, below.structure, description, indices=inner, table=below.table
        )
    if isinstance(dataset, TensorDataset):
        structure = flatten(batch_of(list(dataset.tensors), None))[1]
        return TensorRows(list(dataset.tensors), structure, description)
    return _image_rows(dataset, description)


def _image_rows(dataset: Any, description: str) -> TensorRows | None:
    """Images of bytes and class numbers under ``ToTensor`` and ``Normalize``, as torchvision's."""
    images, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    transform = getattr(dataset, "transform", None)
    if images is None or targets is None or transform is None or not _is_per_value(transform):
        return None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.dim() not in (3, 4):
        return None
    # [N, H, W] or [N, H, W, C], as the files have them, become [N, C, H, W].
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    channels = images.shape[1]
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, channels)
    # By the user's own transform: the same operations, so the same bits.
    table = transform(ramp.contiguous().numpy())
    if table.shape != (channels, 16, 16) or table.dtype != torch.float32:
        return None
    labels = torch.as_tensor(targets, dtype=torch.int64)
    structure = flatten((images, labels))[1]
    return TensorRows(
        [images, labels], structure, description, table=table.reshape(channels, 256).contiguous()
    )


def _is_per_value(transform: Any) -> bool:
    """Whether a transform begins with ``ToTensor`` and goes on with ``Normalize`` at most."""
    steps = getattr(transform, "transforms", [transform])
    names = [type(step).__name__ for step in steps]
    return names[:1] == ["ToTensor"] and all(name == "Normalize" for name in names[1:])
