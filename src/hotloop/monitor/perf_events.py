"""Hardware counters of this process through ``perf_event_open``, where the processor has them.

Virtual machines often have none; then ``HardwareCounters.open`` gives the reason instead. Source:
``perf_event_open(2)`` and ``include/uapi/linux/perf_event.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Mapping

_HARDWARE, _SOFTWARE, _CACHE = 0, 1, 3
_READ, _ACCESS, _MISS = 0, 0, 1
_L1D, _LL = 0, 2


def _cache(which: int, result: int) -> tuple[int, int]:
    return _CACHE, which | (_READ << 8) | (result << 16)


# Name: type and number of the event.
HARDWARE_EVENTS: dict[str, tuple[int, int]] = {
    "cycles": (_HARDWARE, 0),
    "instructions": (_HARDWARE, 1),
    "cache_references": (_HARDWARE, 2),
    "cache_misses": (_HARDWARE, 3),
    "l1_references": _cache(_L1D, _ACCESS),
    "l1_misses": _cache(_L1D, _MISS),
    "ll_references": _cache(_LL, _ACCESS),
    "ll_misses": _cache(_LL, _MISS),
}
# The kernel's own counters go through the same calls; for tests where there is no hardware.
SOFTWARE_EVENTS: dict[str, tuple[int, int]] = {"page_faults": (_SOFTWARE, 2)}

_SYSCALLS = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "ppc64le": 319, "s390x": 331}
_ATTRIBUTE_BYTES = 112  # PERF_ATTR_SIZE_VER5; the kernel takes what it knows of it
_TOTAL_TIMES = 1 | 2  # PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING
_INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 1, 1 << 5, 1 << 6
_CLOSE_ON_EXEC = 8


class HardwareCounters:
    """Open counters, one a thread and event; new threads inherit them.

    Args:
        files: descriptors by event.
    """

    def __init__(self, files: Mapping[str, list[int]]) -> None:
        self._files = dict(files)

    @classmethod
    def open(
        cls, events: Mapping[str, tuple[int, int]] = HARDWARE_EVENTS
    ) -> tuple[HardwareCounters | None, str | None]:
        """Counters over all threads of this process; ``None`` and the reason where there are none.

        An event that this processor does not have is left out.
        """
        number = _SYSCALLS.get(platform.machine())
        if number is None or platform.system() != "Linux":
            return None, f"no perf_event_open on {platform.system()} {platform.machine()}"
        try:
            threads = [int(name) for name in os.listdir("/proc/self/task")]
        except OSError:
            threads = [0]
        files: dict[str, list[int]] = {}
        reason = None
        for name, event in events.items():
            opened = []
            for thread in threads:
                file = _open(number, event, thread)
                if file >= 0:
                    opened.append(file)
                elif file != -errno.ESRCH:  # A thread that just ended is no reason.
                    reason = _reason(-file)
            if opened:
                files[name] = opened
        return (cls(files), None) if files else (None, reason or "no thread could be counted")

    def read(self) -> dict[str, int]:
        """Counts since the start, scaled up where events had to take turns."""
        totals = {}
        for name, files in self._files.items():
            total = 0
            for file in files:
                try:
                    value, enabled, running = struct.unpack("QQQ", os.read(file, 24))
                except (OSError, struct.error):
                    continue
                total += value if running in (0, enabled) else int(value * enabled / running)
            totals[name] = total
        return totals

    def close(self) -> None:
        """Stop counting. Twice is allowed."""
        for files in self._files.values():
            for file in files:
                os.close(file)
        self._files = {}


def _open(number: int, event: tuple[int, int], thread: int) -> int:
    """A descriptor, or the error number, negative."""
    flags = _INHERIT | _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR
    if event[0] == _SOFTWARE:
        flags = _INHERIT  # Faults are taken in the kernel.
    attribute = struct.pack(
        "IIQQQQQ", event[0], _ATTRIBUTE_BYTES, event[1], 0, 0, _TOTAL_TIMES, flags
    )
    buffer = ctypes.create_string_buffer(attribute, _ATTRIBUTE_BYTES)
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    system_call.restype = ctypes.c_long
    any_cpu, no_group = ctypes.c_int(-1), ctypes.c_int(-1)
    file: int = system_call(
        ctypes.c_long(number), buffer, ctypes.c_int(thread), any_cpu, no_group,
        ctypes.c_ulong(_CLOSE_ON_EXEC),
    )  # fmt: skip
    return file if file >= 0 else -ctypes.get_errno()


def _reason(error: int) -> str:
    if error in (errno.EACCES, errno.EPERM):
        return "the kernel does not allow it (kernel.perf_event_paranoid, or a seccomp filter)"
    if error in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
        return "this processor, or the virtual machine, has no hardware counters"
    return f"perf_event_open failed: {os.strerror(error)}"
