"""Samples of a map-style dataset, read and collated as a ``DataLoader`` would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from ..errors import DataError, HotloopError
from .batch import alike
from .random_state import RandomState, random_state_kept

# Samples read twice to see whether they stay the same.
_PROBES = 6


class SampleReader:
    """Reads batches of a dataset that has ``__len__`` and ``__getitem__``.

    Args:
        dataset: may have ``__getitems__`` too, which gives several samples at once.
        collate: makes a batch of a list of samples; default that of ``DataLoader``.

    Raises:
        DataError: not map-style, or empty.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any] | None = None) -> None:
        self.dataset = dataset
        self.name = type(dataset).__qualname__
        self.collate = collate or default_collate
        if not is_map_style(dataset):
            raise DataError(
                "a Dataset must be map-style, with __len__ and __getitem__",
                got=self.name,
                next_step="collect the samples into arrays and pass (X, Y)",
            )
        try:
            self.num_samples = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise DataError(
                "a Dataset must know its length", got=f"{self.name}: {error}"
            ) from error
        if self.num_samples < 1:
            raise DataError("the data must have at least 1 sample", got=f"an empty {self.name}")
        self.description = f"{self.num_samples:,} samples of {self.name}"

    def read(self, indices: Sequence[Any]) -> Any:
        """A batch of these samples.

        Raises:
            DataError: a sample cannot be read, or they do not make a batch.
        """
        samples = self._samples(indices)
        try:
            return self.collate(samples)
        except HotloopError:
            raise
        except Exception as error:
            raise DataError(
                f"samples of {self.name} must make a batch",
                got=f"{type(error).__name__}: {_first_line(error)}",
                next_step="pass a DataLoader with a collate_fn that makes one",
            ) from error

    def looks_random(self) -> bool:
        """Whether samples differ when they are read again, or draw random numbers."""
        last = self.num_samples - 1
        places = sorted({last * k // (_PROBES - 1) for k in range(_PROBES)})
        with random_state_kept():
            for place in places:
                before = RandomState.now()
                if not alike(self.read([place]), self.read([place])) or not before.unchanged():
                    return True
        return False

    def _samples(self, indices: Sequence[Any]) -> Any:
        getter = getattr(self.dataset, "__getitems__", None)
        if getter:
            try:
                return getter(indices)
            except HotloopError:
                raise
            except Exception as error:
                raise self._unreadable(f"{self.name}.__getitems__", error) from error
        return [self._sample(index) for index in indices]

    def _sample(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except HotloopError:
            raise
        except Exception as error:
            # Anything: the code is the user's.
            raise self._unreadable(f"{self.name}[{index}]", error) from error

    def _unreadable(self, where: str, error: Exception) -> DataError:
        return DataError(
            f"{where} must be readable", got=f"{type(error).__name__}: {_first_line(error)}"
        )


def is_map_style(data: Any) -> bool:
    """Whether samples can be asked for by number."""
    if isinstance(data, torch.utils.data.IterableDataset):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
