"""The one clock: it never goes back, and is fine enough for a kernel of a microsecond."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds since some moment; only differences mean something.
now = time.perf_counter


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """``(seconds, answer)`` of one call: for a report. To choose between calls, use ``Turns``."""
    started_s = now()
    answer = call()
    return now() - started_s, answer
