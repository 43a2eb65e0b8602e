"""What the kernel says of this process: resident memory, its peak, page faults, CPU time."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_bytes(key: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def resident_bytes() -> int | None:
    """Resident memory now, anonymous and file pages; ``None`` where the kernel does not tell."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int | None:
    """Highest resident memory since the start or the last ``reset_peak_resident``."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    return usage * (1 if os.uname().sysname == "Darwin" else 1024) or None


def reset_peak_resident() -> bool:
    """Start the peak anew from what is resident now; ``False`` where the kernel refuses."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class ProcessUsage:
    """Counters of this process since its start; subtract two to get what lay between.

    Attributes:
        user_s, system_s: CPU seconds of all threads.
        minor_faults: page faults served without reading a file.
        major_faults: page faults that waited for storage.
        voluntary_switches, involuntary_switches: context switches.
    """

    user_s: float
    system_s: float
    minor_faults: int
    major_faults: int
    voluntary_switches: int
    involuntary_switches: int

    @classmethod
    def now(cls) -> ProcessUsage:
        """The counters at this moment."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(
            user_s=usage.ru_utime,
            system_s=usage.ru_stime,
            minor_faults=usage.ru_minflt,
            major_faults=usage.ru_majflt,
            voluntary_switches=usage.ru_nvcsw,
            involuntary_switches=usage.ru_nivcsw,
        )

    def __sub__(self, earlier: ProcessUsage) -> ProcessUsage:
        return ProcessUsage(
            user_s=self.user_s - earlier.user_s,
            system_s=self.system_s - earlier.system_s,
            minor_faults=self.minor_faults - earlier.minor_faults,
            major_faults=self.major_faults - earlier.major_faults,
            voluntary_switches=self.voluntary_switches - earlier.voluntary_switches,
            involuntary_switches=self.involuntary_switches - earlier.involuntary_switches,
        )
