"""Who else works on this machine: what a measurement must know, or wait for.

Nobody can send the neighbours away. What can be done: see that they were there (``waited_s``,
``busy_elsewhere_s``), and begin a turn only when this process itself is at rest (``until_idle``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from .clock import now

# How long threads of the turn before are waited for, how often one looks (longer than a tick of
# the scheduler's clock), and the share of a CPU that is rest.
_LONGEST_S = 0.25
_LOOK_S = 0.012
_AT_REST = 0.1


def waited_s() -> float:
    """Seconds that this process's threads were ready to run and had no processor; 0: not told.

    Source: the second field of ``schedstat``, nanoseconds (Linux,
    Documentation/scheduler/sched-stats).
    """
    waited_ns = 0
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError, ValueError, IndexError):  # The thread has ended.
                waited_ns += int(_content(f"/proc/self/task/{thread}/schedstat").split()[1])
    return waited_ns * 1e-9


def _content(path: str) -> bytes:
    """Of a small file; a turn has two of these readings for each thread."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 256)
    finally:
        os.close(file)


def busy_elsewhere_s() -> float | None:
    """CPU seconds of all other processes since the start; ``None`` where /proc does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]
        mine = os.times()
        return busy / os.sysconf("SC_CLK_TCK") - mine.user - mine.system
    except (OSError, ValueError, IndexError):
        return None


def until_idle(
    *,
    clock: Callable[[], float] = now,
    cpu_s: Callable[[], float] = time.process_time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait, a quarter of a second at most, until the other threads of this process sleep.

    Those of ONNX Runtime spin for tens of milliseconds after a call, each on a CPU that the next
    candidate needs: after a session of two threads, two instances took 47 us a call instead of 35
    (small, batch 32, two CPUs), and lost to it.
    """
    ends_s = clock() + _LONGEST_S
    while (looked_s := clock()) < ends_s:
        used_s = cpu_s()
        sleep(_LOOK_S)
        if cpu_s() - used_s < _AT_REST * (clock() - looked_s):
            return
