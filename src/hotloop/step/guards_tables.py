"""Tables of what the kernels compare in one call: words of memory, and where tensors lie."""

from __future__ import annotations

import ctypes
import functools
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch

from .. import kernels
from ..kernels.binding import GuardTensor, GuardWord
from .guards_memory import Word
from .guards_watch import Watch


@functools.cache
def _entry(name: str) -> Callable[[int, int], int]:
    """A function of the kernels, called without letting other threads of Python run meanwhile:
    they could free what it looks at."""
    address = ctypes.cast(getattr(kernels.library(), name), ctypes.c_void_p).value
    made = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)(address or 0)
    made.restype = ctypes.c_int64
    return made


class WordTable:
    """Words of many watches, one watch after the other."""

    def __init__(self, found: list[tuple[Watch, list[Word]]]) -> None:
        self._watches = [watch for watch, words in found if words]
        self._starts: list[int] = []
        self._ends: dict[Watch, int] = {}
        rows: list[Word] = []
        for watch, words in found:
            if words:
                self._starts.append(len(rows))
                rows += words
                self._ends[watch] = len(rows)
        self._count = len(rows)
        self._rows = (GuardWord * self._count)(*rows)
        self._at = ctypes.addressof(self._rows)
        self._find = _entry("hotloop_first_changed_word") if rows else None

    def first_changed(self) -> int:
        """Index of the first word that is not as it was; -1: all are."""
        return -1 if self._find is None else self._find(self._at, self._count)

    def first_changed_from(self, start: int) -> int:
        """The same of the words from an index on."""
        assert self._find is not None, "a word has changed"
        found = self._find(self._at + start * ctypes.sizeof(GuardWord), self._count - start)
        return found if found < 0 else start + found

    def watch_at(self, index: int) -> tuple[Watch, int]:
        """Whose word this is, and the index after its last one."""
        watch = self._watches[bisect_right(self._starts, index) - 1]
        return watch, self._ends[watch]

    def refresh(self, end: int, words: list[Word]) -> None:
        """Expect these words of the watch whose words end there, as many as before."""
        for index, (address, expected) in enumerate(words, end - len(words)):
            row = self._rows[index]
            row.address, row.expected = address, expected

    def length(self, watch: Watch) -> int:
        """How many words a watch has."""
        return (
            self._ends[watch] - self._starts[bisect_right(self._starts, self._ends[watch] - 1) - 1]
        )


class TensorTable:
    """Where tensors lie in memory, and their sizes and strides."""

    def __init__(self, found: list[tuple[Watch, torch.Tensor, int]]) -> None:
        self._watches = [watch for watch, *_ in found]
        self._kept: list[Any] = []
        self._rows = (GuardTensor * len(found))()
        for row, (_, tensor, slot) in zip(self._rows, found, strict=True):
            numbers = (ctypes.c_int64 * (2 * tensor.dim()))(*tensor.shape, *tensor.stride())
            self._kept.append(numbers)
            row.slot, row.data, row.dims = slot, tensor.data_ptr(), tensor.dim()
            row.sizes_and_strides = ctypes.addressof(numbers)
        self._at, self._count = ctypes.addressof(self._rows), len(found)
        self._find = _entry("hotloop_first_changed_tensor") if found else None

    def first_changed(self) -> Watch | None:
        """The first tensor that is not as it was; ``None``: all are."""
        if self._find is None:
            return None
        index = self._find(self._at, self._count)
        return None if index < 0 else self._watches[index]

    def is_right(self) -> bool:
        """Whether torch tells the kernels what it tells Python."""
        return self.first_changed() is None
