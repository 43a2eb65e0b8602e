"""Tables of what the kernels compare in one call: words and blocks of memory."""

from __future__ import annotations

import ctypes
import functools
from bisect import bisect_right
from collections.abc import Callable

from .. import kernels
from ..kernels.binding import GuardBlock, GuardWord
from .guards_memory import Block, Word
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
        self._ends: list[int] = []
        rows: list[Word] = []
        for _, words in found:
            if words:
                self._starts.append(len(rows))
                rows += words
                self._ends.append(len(rows))
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

    def watch_at(self, index: int) -> tuple[Watch, int, int]:
        """Whose word this is, and where its words begin and end."""
        number = bisect_right(self._starts, index) - 1
        return self._watches[number], self._starts[number], self._ends[number]

    def refresh(self, start: int, words: list[Word]) -> None:
        """Expect these words, as many as the watch had whose words begin there."""
        for index, (address, expected) in enumerate(words, start):
            row = self._rows[index]
            row.address, row.expected = address, expected


class BlockTable:
    """The memory in which torch describes tensors: storage, sizes, strides, type."""

    def __init__(self, found: list[tuple[Watch, Block]]) -> None:
        self._watches = [watch for watch, _ in found]
        # All in one piece: the processor sees what comes next.
        texts = [ctypes.string_at(block.content, 8 * block.words) for _, block in found]
        self._expected = ctypes.create_string_buffer(b"".join(texts))
        at = ctypes.addressof(self._expected)
        rows = []
        for (_, block), text in zip(found, texts, strict=True):
            rows.append((block.slot, block.owner, block.content, at, block.words))
            at += len(text)
        self._rows = (GuardBlock * len(rows))(*rows)
        self._at, self._count = ctypes.addressof(self._rows), len(rows)
        self._find = _entry("hotloop_first_changed_block") if rows else None

    def first_changed(self) -> Watch | None:
        """The first tensor that is not as it was; ``None``: all are."""
        if self._find is None:
            return None
        index = self._find(self._at, self._count)
        return None if index < 0 else self._watches[index]
