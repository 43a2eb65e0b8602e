"""A dataset packed once, gathered in batches straight into the buffers of a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import DataError
from ..memory.layout import BatchLayout
from ..memory.tree import Structure, flatten
from .hashing import mix
from .rows import byte_table, look_up
from .storage import Column
from .transforms import Normalize, Transform

# Factor and offset, or a divisor; ``None``: bytes are the values.
Scaling = tuple[torch.Tensor, torch.Tensor] | float | None

# A batch (x, y) of two tensors.
PAIR = flatten((torch.empty(0), torch.empty(0)))[1]


class PackedDataset:
    """Samples in packed storage, one column for each tensor, and the transforms applied on reading.

    With a ``value_scale`` samples that are bytes (``uint8``) become float32 when gathered, divided
    as ``torchvision.transforms.ToTensor`` does; a ``Normalize`` that comes first is folded into
    that, one multiplication and one addition.

    Args:
        columns: packed rows, in the order of the tensors of ``structure``.
        structure: of a batch ``(x, y)`` or ``(x,)``; default two tensors.
        num_samples: how many of the rows to use, from the first.
        labels: each whole number that a target is, and the first sample that has it; ``None``:
            targets are no whole numbers, or too many different ones.
        num_classes: classes when the targets are class labels, else ``None``.
        value_scale: what one step of a sample of stored bytes is worth: 1/255, or 1 for booleans;
            ``None``: samples are what they are stored as.
        table: float32 ``[channels, 256]``: what the bytes of the first column stand for, instead
            of ``value_scale``.
        description: which data this is.
        transforms: applied in order to every batch; those for training only when training.
        seed: of the random transforms.

    Raises:
        DataError: a transform does not fit the samples.
    """

    def __init__(
        self,
        *columns: Column,
        structure: Structure = PAIR,
        num_samples: int,
        num_classes: int | None,
        value_scale: float | None,
        description: str,
        labels: Mapping[int, int] | None = None,
        table: torch.Tensor | None = None,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
    ) -> None:
        self.structure = structure
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.labels = labels
        self.description = description
        self.transforms = tuple(transforms)
        self.seed = seed
        self.value_scale = value_scale
        self.table = table
        self._columns: tuple[Column, ...] | None = columns
        self.row_shapes = tuple(column.row_shape for column in columns)
        becomes_float = columns[0].dtype == torch.uint8 and (value_scale or table is not None)
        first = torch.float32 if becomes_float else columns[0].dtype
        self.row_dtypes = (first, *(column.dtype for column in columns[1:]))
        # Places of the first tensor of x and of y among the columns.
        self._targets = len(flatten(self.batch(self.example_tensors())[0])[0])
        self._check_transforms()
        self._pipelines = {training: self._pipeline(training) for training in (False, True)}

    def __len__(self) -> int:
        return self.num_samples

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample, of its first tensor where it has several."""
        return self.row_shapes[0]

    @property
    def sample_dtype(self) -> torch.dtype:
        """Type of a sample, of its first tensor where it has several."""
        return self.row_dtypes[0]

    @property
    def has_targets(self) -> bool:
        """Whether a batch is ``(x, y)``."""
        return len(self.structure.parts) == 2

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of a target, of its first tensor where it has several.

        Raises:
            DataError: there are no targets.
        """
        return self.row_shapes[self._target_place]

    @property
    def target_dtype(self) -> torch.dtype:
        """Type of a target; see ``target_shape``."""
        return self.row_dtypes[self._target_place]

    @property
    def is_pair(self) -> bool:
        """Whether a batch is two tensors."""
        return self.structure == PAIR

    @property
    def _target_place(self) -> int:
        if self._targets >= len(self.row_shapes):
            raise DataError("the data must have targets", got=self.description)
        return self._targets

    @property
    def columns(self) -> tuple[Column, ...]:
        """Rows as stored, those past ``num_samples`` included.

        Raises:
            DataError: closed.
        """
        return self._open_columns()

    @property
    def storage_bytes(self) -> int:
        """Bytes of all packed samples and targets."""
        return sum(column.storage_bytes for column in self._open_columns())

    @property
    def resident_bytes(self) -> int:
        """Bytes of ``storage_bytes`` that stay in this process's memory."""
        return sum(column.resident_bytes for column in self._open_columns())

    @property
    def is_mapped(self) -> bool:
        """Whether samples lie in a file, of which nothing stays in this process's memory."""
        return self.resident_bytes < self.storage_bytes

    def layouts(self, batch_size: int, *, line_bytes: int = 64) -> tuple[BatchLayout, ...]:
        """Layouts of the tensors of a batch, for a ``MemoryPool``: contiguous, as a loader's."""
        return tuple(
            BatchLayout(batch_size, shape, dtype, line_bytes, padded=False)
            for shape, dtype in zip(self.row_shapes, self.row_dtypes, strict=True)
        )

    def example_tensors(self, count: int = 1) -> list[torch.Tensor]:
        """The tensors of a batch as meta tensors ``[count, ...]``: shape and dtype, no memory."""
        return [
            torch.empty((count, *shape), dtype=dtype, device="meta")
            for shape, dtype in zip(self.row_shapes, self.row_dtypes, strict=True)
        ]

    def example(self) -> tuple[Any, ...]:
        """One sample and its target as meta tensors ``[1, ...]``: ``(x, y)`` or ``(x,)``."""
        return self.batch(self.example_tensors())

    def batch(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """``(x, y)`` or ``(x,)`` of gathered tensors."""
        if self.structure is PAIR:
            return tuple(tensors)
        made: tuple[Any, ...] = self.structure.unflatten(tensors)
        return made

    def gather(
        self,
        indices: torch.Tensor,
        *outs: torch.Tensor,
        epoch: int = 0,
        training: bool = False,
    ) -> None:
        """Write a batch. May be called from several threads at once.

        Args:
            indices: int64 ``[n]``, sample positions.
            outs: one for each column: ``[n, *row_shape]`` of ``row_dtypes``; rows may be apart.
            epoch: enters the draws of random transforms.
            training: whether transforms for training apply.

        Raises:
            DataError: closed, or an output of another shape or type, or not on the CPU.
            IndexError: an index is outside the storage.
            StorageError: the disk failed.
        """
        columns = self._open_columns()
        count = len(indices)
        for out, shape, dtype in zip(outs, self.row_shapes, self.row_dtypes, strict=True):
            if out.shape != (count, *shape) or out.dtype != dtype or not out.is_cpu:
                raise _wrong_out(outs, out, (count, *shape), dtype)
        x_out = outs[0]
        scaling, table, transforms = self._pipelines[training]
        applied = columns[0].gather(indices, x_out, table)
        for place in range(1, len(outs)):
            columns[place].gather(indices, outs[place])
        if applied:
            pass
        elif self.table is not None:
            x_out.copy_(look_up(x_out, self.table))
        elif isinstance(scaling, tuple):
            # Two passes, each correctly rounded: a fused one may round differently in the tail
            # of a batch, and a sample must not depend on its place in the batch.
            x_out.mul_(scaling[0]).add_(scaling[1])
        elif scaling is not None:
            x_out.div_(scaling)
        for number, transform in transforms:
            transform.apply(x_out, positions=indices, epoch=epoch, seed=mix(self.seed, number))

    def with_transforms(
        self,
        transforms: Sequence[Transform],
        *,
        seed: int | None = None,
        num_samples: int | None = None,
    ) -> PackedDataset:
        """The same storage read in another way; each of the two is closed by itself.

        Raises:
            DataError: a transform does not fit, or more samples than there are.
        """
        if num_samples is not None and not 1 <= num_samples <= self.num_samples:
            raise DataError(
                f"num_samples must be between 1 and {self.num_samples}", got=num_samples
            )
        fewer = num_samples is not None and num_samples < self.num_samples
        description = f"first {num_samples:,} of {self.description}" if fewer else self.description
        return PackedDataset(
            *self._open_columns(),
            structure=self.structure,
            num_samples=num_samples or self.num_samples,
            num_classes=self.num_classes,
            labels=self.labels,
            value_scale=self.value_scale,
            table=self.table,
            description=description,
            transforms=transforms,
            seed=self.seed if seed is None else seed,
        )

    def close(self) -> None:
        """Let go of the storage, which is freed when no other dataset uses it. Twice is allowed."""
        self._columns = None

    def _open_columns(self) -> tuple[Column, ...]:
        if self._columns is None:
            raise DataError("a closed dataset holds no samples", next_step="open it again")
        return self._columns

    def _check_transforms(self) -> None:
        if not self.transforms:
            return
        if self._targets != 1 or self.sample_dtype != torch.float32:
            several = f"{self._targets} tensors a sample"
            found = str(self.sample_dtype) + " samples" if self._targets == 1 else several
            raise DataError(
                "transforms apply to images and other real-valued samples",
                got=f"{found} and {self.transforms[0].name}",
            )
        for transform in self.transforms:
            transform.check(self.sample_shape)

    def _pipeline(
        self, training: bool
    ) -> tuple[Scaling, torch.Tensor | None, list[tuple[int, Transform]]]:
        """How stored bytes become values, the same as a table, and the transforms after it."""
        transforms = [
            (number, transform)
            for number, transform in enumerate(self.transforms)
            if training or not transform.training_only
        ]
        assert self._columns is not None
        if self.table is not None:
            return None, self.table, transforms
        if self._columns[0].dtype != torch.uint8 or self.value_scale is None:
            return None, None, transforms
        scaling: Scaling
        if transforms and isinstance(transforms[0][1], Normalize):
            scaling, transforms = (
                transforms[0][1].factor_and_offset(self.value_scale),
                transforms[1:],
            )
        else:
            # Division, not a multiplication by the inverse: the same bits as ToTensor.
            divisor = round(1 / self.value_scale)
            scaling = None if divisor == 1 else float(divisor)
        return scaling, byte_table(scaling, self.sample_shape), transforms


def _wrong_out(
    outs: Sequence[torch.Tensor], out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> DataError:
    number = next(place for place, each in enumerate(outs) if each is out)
    name = {0: "x_out", 1: "y_out"}.get(number, f"output {number}")
    return DataError(
        f"{name} must be {dtype} of shape {list(shape)} on the CPU",
        got=f"{out.dtype} of shape {list(out.shape)} on {out.device}",
    )
