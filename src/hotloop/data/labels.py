"""Which whole numbers the targets of a data set are: a loss may have no score for some of them."""

from __future__ import annotations

import numpy as np
import torch

from .source import Array

# Labels further apart, or more of them, are no classes.
_SPAN = 2**20
_MOST = 2**17


class LabelCounter:
    """Looks at labels as they pass.

    Attributes:
        first: each label and the first sample that has it; ``None``: too many.
    """

    def __init__(self) -> None:
        self.first: dict[int, int] | None = {}
        self._largest = -1

    def look(self, labels: Array, start: int) -> None:
        """Take note of labels ``[k, ...]`` of samples ``start`` to ``start + k``."""
        if not labels.size:
            return
        low, high = int(labels.min()), int(labels.max())
        self._largest = max(self._largest, high)
        if self.first is None:
            return
        if high - low > _SPAN:
            self.first = None
            return
        present = np.flatnonzero(np.bincount(labels.ravel().astype(np.int64) - low)) + low
        if all(int(value) in self.first for value in present):
            return
        values, places = np.unique(labels, return_index=True)
        row_size = labels[0].size
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            self.first.setdefault(value, start + place // row_size)
        if len(self.first) > _MOST:
            self.first = None

    @property
    def num_classes(self) -> int:
        """The largest label and 1."""
        return self._largest + 1


def counts_labels(dtype: torch.dtype) -> bool:
    """Whether targets of a type may be class labels."""
    return not (dtype.is_floating_point or dtype.is_complex)
