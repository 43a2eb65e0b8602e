"""Any torch map-style Dataset of ``(x, y)`` pairs as a source of samples."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .arrays import to_numpy
from .source import Array, ArraySpec, Chunk, chunk_rows


class TorchDatasetSource:
    """Reads each sample once, in order, into chunks; nothing else is kept.

    What a Dataset does at random when read (torchvision's random transforms) is therefore frozen at
    its first draw: random augmentation belongs in the transforms of ``open_dataset``.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; each sample is a pair of tensors, arrays or
            numbers, all samples of one shape and type.

    Raises:
        DataError: not map-style, empty, or its first sample is not such a pair.
    """

    def __init__(self, dataset: Any) -> None:
        name = type(dataset).__qualname__
        if isinstance(dataset, torch.utils.data.IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise DataError(
                "a Dataset must be map-style, with __len__ and __getitem__",
                got=name,
                next_step="collect the samples into arrays and pass (X, Y)",
            )
        self._dataset = dataset
        self._name = name
        try:
            self.num_samples = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise DataError("a Dataset must know its length", got=f"{name}: {error}") from error
        if self.num_samples < 1:
            raise DataError("the data must have at least 1 sample", got=f"an empty {name}")
        self._first = self._read(0)
        self.x, self.y = (ArraySpec(part.shape, part.dtype) for part in self._first)
        self.description = f"{self.num_samples:,} samples of {name}"

    def chunks(self) -> Iterator[Chunk]:
        """Stacked samples; see ``SampleSource``."""
        rows = chunk_rows(self.x, self.y)
        for start in range(0, self.num_samples, rows):
            count = min(rows, self.num_samples - start)
            x = np.empty((count, *self.x.shape), self.x.dtype)
            y = np.empty((count, *self.y.shape), self.y.dtype)
            for row in range(count):
                index = start + row
                # A Dataset may draw at random: sample 0 is the one whose shape was announced.
                pair = self._read(index) if index else self._first
                for part, spec, out, what in zip(
                    pair, (self.x, self.y), (x, y), ("sample", "target"), strict=True
                ):
                    if part.shape != spec.shape or part.dtype != spec.dtype:
                        raise DataError(
                            f"every {what} must be {spec.dtype} {list(spec.shape)} as the first is",
                            got=f"{part.dtype} {list(part.shape)} at index {index}",
                        )
                    out[row] = part
            yield x, y

    def _read(self, index: int) -> tuple[Array, Array]:
        where = f"{self._name}[{index}]"
        try:
            pair = self._dataset[index]
        except Exception as error:
            # Anything: the code is the user's.
            raise DataError(
                f"{where} must be readable", got=f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DataError(f"{where} must be a pair (x, y)", got=_describe(pair))
        x, y = (_number_array(part, where) for part in pair)
        return x, y


def _number_array(value: Any, where: str) -> Array:
    if not isinstance(value, torch.Tensor | np.ndarray | np.generic | numbers.Number):
        raise DataError(
            f"the parts of {where} must be tensors, arrays or numbers",
            got=_describe(value),
            next_step="give the Dataset a transform that makes tensors",
        )
    return to_numpy(value)


def _describe(value: Any) -> str:
    kind = type(value).__qualname__
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list | dict) else kind
