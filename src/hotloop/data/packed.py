"""Samples packed once, gathered in batches straight into the buffers of a pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import DataError
from ..memory.layout import BatchLayout
from .hashing import mix
from .rows import byte_table
from .storage import Column
from .transforms import Normalize, Transform

# Factor and offset, or a divisor; ``None``: bytes are the values.
Scaling = tuple[torch.Tensor, torch.Tensor] | float | None


class PackedDataset:
    """Samples and targets in packed storage, with the transforms that apply when they are read.

    Bytes (``uint8``) are divided by 255 when gathered, as ``torchvision.transforms.ToTensor`` does;
    a ``Normalize`` that comes first is folded into that, one multiplication and one addition.

    Args:
        x: packed samples.
        y: packed targets.
        num_samples: how many of the rows to use, from the first.
        num_classes: classes when the targets are class labels, else ``None``.
        value_scale: what one step of a stored ``uint8`` is worth: 1/255 for bytes, 1 for booleans.
        description: which data this is.
        transforms: applied in order to every batch; those for training only when training.
        seed: of the random transforms.

    Raises:
        DataError: a transform does not fit the samples.
    """

    def __init__(
        self,
        x: Column,
        y: Column,
        *,
        num_samples: int,
        num_classes: int | None,
        value_scale: float,
        description: str,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
    ) -> None:
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.description = description
        self.transforms = tuple(transforms)
        self.seed = seed
        self.sample_shape = x.row_shape
        self.target_shape = y.row_shape
        self.sample_dtype = torch.int64 if x.dtype == torch.int64 else torch.float32
        self.target_dtype = y.dtype
        self.value_scale = value_scale
        self._columns: tuple[Column, Column] | None = (x, y)
        if self.transforms and self.sample_dtype != torch.float32:
            raise DataError(
                "transforms apply to images and other real-valued samples",
                got=f"{self.sample_dtype} samples and {self.transforms[0].name}",
            )
        for transform in self.transforms:
            transform.check(self.sample_shape)
        self._pipelines = {training: self._pipeline(training) for training in (False, True)}

    def __len__(self) -> int:
        return self.num_samples

    @property
    def columns(self) -> tuple[Column, Column]:
        """Samples and targets as stored, rows past ``num_samples`` included.

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

    def layouts(self, batch_size: int, *, line_bytes: int = 64) -> tuple[BatchLayout, BatchLayout]:
        """Layouts of a batch of samples and of targets, for a ``MemoryPool``."""
        return (
            BatchLayout(batch_size, self.sample_shape, self.sample_dtype, line_bytes),
            BatchLayout(batch_size, self.target_shape, self.target_dtype, line_bytes),
        )

    def example(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample and its target as meta tensors ``[1, ...]``: shape and dtype, no memory."""
        return (
            torch.empty((1, *self.sample_shape), dtype=self.sample_dtype, device="meta"),
            torch.empty((1, *self.target_shape), dtype=self.target_dtype, device="meta"),
        )

    def gather(
        self,
        indices: torch.Tensor,
        x_out: torch.Tensor,
        y_out: torch.Tensor,
        *,
        epoch: int = 0,
        training: bool = False,
    ) -> None:
        """Write a batch. May be called from several threads at once.

        Args:
            indices: int64 ``[n]``, sample positions.
            x_out: ``[n, *sample_shape]`` of ``sample_dtype``; rows may be apart (padded).
            y_out: ``[n, *target_shape]`` of ``target_dtype``.
            epoch: enters the draws of random transforms.
            training: whether transforms for training apply.

        Raises:
            DataError: closed, or an output of another shape or type, or not on the CPU.
            IndexError: an index is outside the storage.
            StorageError: the disk failed.
        """
        x, y = self._open_columns()
        count = len(indices)
        _check_out(x_out, (count, *self.sample_shape), self.sample_dtype, "x_out")
        _check_out(y_out, (count, *self.target_shape), self.target_dtype, "y_out")
        scaling, table, transforms = self._pipelines[training]
        applied = x.gather(indices, x_out, table)
        y.gather(indices, y_out)
        if applied:
            pass
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
        x, y = self._open_columns()
        return PackedDataset(
            x,
            y,
            num_samples=num_samples or self.num_samples,
            num_classes=self.num_classes,
            value_scale=self.value_scale,
            description=description,
            transforms=transforms,
            seed=self.seed if seed is None else seed,
        )

    def close(self) -> None:
        """Let go of the storage, which is freed when no other dataset uses it. Twice is allowed."""
        self._columns = None

    def _open_columns(self) -> tuple[Column, Column]:
        if self._columns is None:
            raise DataError("a closed dataset holds no samples", next_step="open it again")
        return self._columns

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
        if self._columns[0].dtype != torch.uint8:
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


def _check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    if out.shape != shape or out.dtype != dtype or out.device.type != "cpu":
        raise DataError(
            f"{name} must be {dtype} of shape {list(shape)} on the CPU",
            got=f"{out.dtype} of shape {list(out.shape)} on {out.device}",
        )
