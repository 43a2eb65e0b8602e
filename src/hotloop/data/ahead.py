"""Values read ahead of their use by a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .prefetch import use_one_torch_thread

_DEPTH = 2


def read_ahead(read: Callable[[Any], Any], keys: Iterable[Any]) -> Iterator[Any]:
    """``read(key)`` of each key, in order; a thread reads ``_DEPTH`` of them ahead.

    What fails in the thread is read again by the caller, and so is all that follows: some things
    (a connection to a database) work in the thread alone that made them.
    """
    left = iter(keys)
    with _Reader(read, left) as reader:
        while (found := reader.next()) is not None:
            key, value, failed = found
            if failed:
                yield read(key)
                break
            yield value
        else:
            return
    for key in left:
        yield read(key)


class _Reader:
    """The thread of ``read_ahead``; gives ``(key, value, failed)``."""

    def __init__(self, read: Callable[[Any], Any], keys: Iterator[Any]) -> None:
        self._read, self._keys = read, keys
        self._changed = threading.Condition()
        self._ready: deque[tuple[Any, Any, bool]] = deque()
        self._done = self._stopping = False
        self._thread = threading.Thread(target=self._work, name="hotloop-read", daemon=True)

    def __enter__(self) -> _Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def next(self) -> tuple[Any, Any, bool] | None:
        """The next one; ``None``: there is none."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ready) or self._done)
            if not self._ready:
                return None
            found = self._ready.popleft()
            self._changed.notify_all()
            return found

    def _work(self) -> None:
        use_one_torch_thread()
        try:
            for key in self._keys:
                try:
                    found = key, self._read(key), False
                except Exception:
                    found = key, None, True
                if not self._put(found) or found[2]:
                    return
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, found: tuple[Any, Any, bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < _DEPTH or self._stopping)
            self._ready.append(found)
            self._changed.notify_all()
            return not self._stopping
