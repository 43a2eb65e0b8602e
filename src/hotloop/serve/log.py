"""Lines of JSON on stderr, written by a thread: a reader that stops must not stop serving."""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import Any, TextIO

import orjson

_MAX_WAITING = 10_000


class Log:
    """A log. Lines beyond what the reader takes are dropped and counted.

    Args:
        to: where lines go; ``None``: stderr.
    """

    def __init__(self, to: TextIO | None = None) -> None:
        self._to = to or sys.stderr
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.dropped = 0
        self._thread = threading.Thread(target=self._write, name="hotloop-log", daemon=True)
        self._thread.start()

    def info(self, event: str, **fields: Any) -> None:
        """Something happened."""
        self._put("info", event, fields)

    def warn(self, event: str, **fields: Any) -> None:
        """Something is not as it should be."""
        self._put("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something failed."""
        self._put("error", event, fields)

    def close(self) -> None:
        """Write what waits."""
        self._lines.put(None)
        self._thread.join(2.0)

    def _put(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if self._lines.qsize() >= _MAX_WAITING:
            self.dropped += 1
            return
        self._lines.put({"time": round(time.time(), 3), "level": level, "event": event, **fields})

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._to.write(orjson.dumps(line, default=str).decode() + "\n")
                if self._lines.empty():
                    self._to.flush()
            except (OSError, ValueError):
                self.dropped += 1
